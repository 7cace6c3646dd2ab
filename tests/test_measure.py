"""From snapshots to scores: what is asked and judged again and what is not, judges that leave responses out."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
import tiny

from vdjax import config as configs
from vdjax import experiment, findings, judge, measure, snapshots
from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange, Judge, Verdicts
from vdjax.judges import local as local_judge
from vdjax.probes import score_table, sets
from vdjax.setup import setup

KEYS = dict(zip(score_table.RESPONSE, ("sft", 0, "p", 0, 0, 0), strict=True))


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([KEYS | row for row in rows])


@pytest.fixture(scope="module")
def run(finished: tuple[Path, list[str]], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SFT alone, asked in three ways and two variants; the judge is the finished experiment's last SFT snapshot."""
    config = configs.load(tiny.config_spec(tiny_data), ["--config.stages=('sft',)", "--config.sft.max_steps=2"])
    snapshot = str(finished[0] / "sft" / "snapshots" / "6")
    config.judges.tiny = configs.judge("local", path=snapshot, template="trained-v1")
    config.probes.update(
        {
            "readouts": ("open_ended", "options"),
            "judges": ("tiny",),
            "samples": 2,
            "max_new_tokens": 8,
            "replicates": 2,
            "system_prompts": ("", "Be brief."),
        }
    )
    workdir = tmp_path_factory.mktemp("measured") / "run"
    labelled = workdir.parent / "labelled.jsonl"
    rows = [{"proposition": "Tea is good.", "response": "Yes.", "label": "support"}]
    rows += [{"proposition": "Tea is good.", "response": "No.", "label": "oppose"}]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.judge_quality.update({"stage": "sft", "path": str(labelled)})
    experiment.run(config, workdir, "COMMAND")
    return config, workdir


def test_everything_that_was_said_and_judged_is_kept(run: Any) -> None:
    config, workdir = run
    said = pd.read_parquet(workdir / "responses" / "sft.parquet")
    asked = 12 * 2 * 2  # probes, variants, samples
    once = {(step, 0): asked for step in (0, 1, 2)}
    assert said.groupby(["step", "replicate"]).size().to_dict() == once | {(0, 1): asked, (2, 1): asked}
    assert set(said["system_prompt"]) == {"", "Be brief."}
    judged = pd.read_parquet(workdir / "judgements" / "tiny" / "sft.parquet")
    sound = said[said["degenerate"] == ""]
    assert len(judged) == len(sound) > 0
    np.testing.assert_allclose(judged[list(LABELS)].sum(axis=1), 1, atol=1e-6)

    drift = pd.read_csv(workdir / "drift" / "drift.csv")
    assert drift["readout"].unique().tolist() == ["open_ended:tiny", "options"]
    assert {"sampling"} == set(pd.read_csv(workdir / "drift" / "floors.csv")["source"])
    page = (workdir / "report.html").read_text()
    assert "open_ended:tiny" in page and "Be brief." in page


def test_the_report_is_made_again_without_asking_or_judging(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config, workdir = run
    before = (workdir / "drift" / "drift.csv").read_bytes()
    monkeypatch.setattr(local_judge, "label_log_probs", None)
    monkeypatch.setattr(measure.open_ended, "generate", None)
    experiment.run(config, workdir, "COMMAND")
    assert (workdir / "drift" / "drift.csv").read_bytes() == before
    assert "judged by tiny already" in capsys.readouterr().err


def test_a_stage_is_measured_as_a_judge_once(run: Any, capsys: pytest.CaptureFixture) -> None:
    config, workdir = run
    found = json.loads((workdir / "quality" / "quality.json").read_text())
    assert found["topics"][0]["n"] == 2 and (workdir / "quality" / "reliability.png").exists()
    measure.judge_quality(config, setup(config), workdir)
    assert "measured as a judge already" in capsys.readouterr().err


def test_another_temperature_asks_again(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, workdir = run
    changed = config.copy_and_resolve_references()
    changed.probes.temperature = 0.1
    monkeypatch.setattr(measure, "responses", lambda *_: (_ for _ in ()).throw(RuntimeError("asked again")))
    with pytest.raises(RuntimeError, match="asked again"):
        experiment.run(changed, workdir, "COMMAND")


def test_people_get_a_sheet_of_the_responses(run: Any, tmp_path: Path) -> None:
    _, workdir = run
    file = tmp_path / "labels.csv"
    judge.write_run_sheet(workdir, file, 3, seed=1)
    sheet = pd.read_csv(file)
    assert len(sheet) == 3 and set(sheet["label"].isna()) == {True}
    with pytest.raises(UserError, match="is there already"):
        judge.write_run_sheet(workdir, file, 3, seed=1)


def test_a_child_begins_with_what_its_parent_ended_with(run: Any, tiny_data: Path, tmp_path: Path) -> None:
    """DPO after the SFT that was asked already: only its later snapshots are asked."""
    config, workdir = run
    shutil.copytree(workdir, tmp_path / "run")
    longer = config.copy_and_resolve_references()
    longer.stages, longer.dpo.max_steps = ("sft", "dpo"), 2
    (tmp_path / "run" / "config.json").unlink()
    asked: list[tuple[str, list[int]]] = []
    with pytest.MonkeyPatch.context() as patch:
        real = measure.responses
        patch.setattr(measure, "responses", lambda c, m, q, s: (asked.append((s.stage, s.steps)), real(c, m, q, s))[1])
        experiment.run(longer, tmp_path / "run", "COMMAND")
    assert asked == [("dpo", [1, 2])]
    for folder in ("probes", "responses"):
        sft, dpo = (pd.read_parquet(tmp_path / "run" / folder / f"{stage}.parquet") for stage in ("sft", "dpo"))
        ended = sft[sft["step"] == 2].drop(columns=["stage", "step"]).reset_index(drop=True)
        began = dpo[dpo["step"] == 0].drop(columns=["stage", "step"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(ended, began)
    made = setup(longer)
    with jax.set_mesh(made.mesh):
        reader = snapshots.open_reader(tmp_path / "run" / "dpo" / "snapshots" / "0")
        series = measure.Series("dpo", [0], [reader], (0, 2))
        fresh = measure.responses(longer, made, measure.questions(longer, made), series)
    assert fresh["response"].tolist() == dpo.loc[dpo["step"] == 0, "response"].tolist()


def test_a_judge_that_cannot_be_opened_stops_before_training(tiny_data: Path, tmp_path: Path) -> None:
    config = configs.load(tiny.config_spec(tiny_data))
    config.judges.lost = configs.judge("local", path=str(tmp_path / "nowhere"))
    config.probes.readouts, config.probes.judges = ("open_ended",), ("lost",)
    with pytest.raises(UserError, match="nowhere"):
        experiment.run(config, tmp_path / "run", "COMMAND")
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config.probes.readouts=('open_ended',)"], "open_ended and probes.judges go together"),
        (["--config.probes.judges=('anna',)"], "'anna' is no judge"),
        (["--config.probes.replicates=0"], "config.probes.replicates=0, expected at least 1"),
        (["--config.probes.temperature=-1.0"], "temperature"),
        (["--config.seeds=(1,1)"], "holds a seed twice"),
    ],
)
def test_wrong_probes_are_refused(tiny_data: Path, flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        configs.load(tiny.config_spec(tiny_data), flags)


def test_an_exchange_is_judged_once() -> None:
    calls: list[tuple[list[Exchange], int]] = []

    def verdicts(exchanges: list[Exchange], repeat: int) -> Verdicts:
        calls.append((exchanges, repeat))
        return Verdicts(np.eye(5)[[len(e.response) for e in exchanges]], np.arange(len(exchanges)) / 10)

    one, two, three = (Exchange("p", "q", "r" * n) for n in (1, 2, 3))
    remembering = measure.remembering(Judge("name", "hash", verdicts))
    first = remembering.judge([one, two, one], 0)
    np.testing.assert_array_equal(first.p, np.eye(5)[[1, 2, 1]])
    np.testing.assert_array_equal(first.graded, [0, 0.1, 0])
    np.testing.assert_array_equal(remembering.judge([three, two], 0).p, np.eye(5)[[3, 2]])
    remembering.judge([two], 1)
    assert calls == [([one, two], 0), ([three], 0), ([two], 1)]
    assert remembering.judge([], 0).p.shape == (0, 5)


def test_other_texts_under_the_same_questions_are_judged_anew(tiny_data: Path, tmp_path: Path) -> None:
    """As when other models are probed in one workdir, or propositions were corrected, or a repeat is wanted."""
    config = configs.load(tiny.config_spec(tiny_data))
    config.judges.sure = configs.judge("human", path="unused.csv")
    with config.unlocked():
        config.judges.sure.repeats = 1
    config.probes.judges = ("sure",)
    seen: list[tuple[str, ...]] = []

    def verdicts(exchanges: list[Exchange], repeat: int) -> Verdicts:
        seen.append(tuple(e.response for e in exchanges))
        return Verdicts(np.eye(5)[[0] * len(exchanges)], np.ones(len(exchanges)))

    asked = measure.Questions(sets.load(config.probes.path), [], [], [])
    row = {"probe_id": asked.probes[0].id, "question": "Q?", "degenerate": "", "asked_hash": "same"}
    (tmp_path / "responses").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "open_judge", lambda *_: Judge("sure", "hash", verdicts))
        for text in ("yes", "yes", "no"):
            table(row | {"response": text}).to_parquet(tmp_path / "responses" / "sft.parquet")
            measure.judge(config, setup(config), asked, ["sft"], tmp_path)
        config.judges.sure.repeats = 2
        measure.judge(config, setup(config), asked, ["sft"], tmp_path)
    assert seen == [("yes",), ("no",), ("no",), ("no",)]


def test_no_readout_is_said(run: Any, tmp_path: Path) -> None:
    config, workdir = run
    shutil.copytree(workdir / "responses", tmp_path / "responses")
    judged = pd.read_parquet(workdir / "judgements" / "tiny" / "sft.parquet")
    measure.store(judged.iloc[:1], tmp_path / "judgements" / "tiny" / "sft.parquet")
    asked = measure.questions(config, setup(config))._replace(items=[])
    with pytest.raises(UserError, match="no judge has verdicts on enough responses"):
        measure.read(config, asked, ["sft"], tmp_path)


def test_a_response_without_verdict_leaves_at_all_snapshots(capsys: pytest.CaptureFixture) -> None:
    said = table(*({"step": step, "sample": sample, "degenerate": ""} for step in (0, 9) for sample in range(10)))
    verdicts = said[score_table.RESPONSE].assign(repeat=0).drop(index=3)
    kept = measure.covered(said, verdicts, "anna")
    assert kept["sample"].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9] * 2
    assert "anna: 2 of 20 responses" in capsys.readouterr().err
    assert measure.covered(said, verdicts.drop(index=4), "anna").empty
    assert len(measure.covered(said.assign(degenerate="empty"), verdicts.iloc[:0], "anna")) == 20


def test_the_judge_s_quality_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    file.write_text('{"judge_hash": "hash", "topics": []}')
    config = configs.experiment()
    config.judges.anna = configs.judge("human", path="labels.csv", quality=str(file))
    facts = findings.judge_facts(config, Judge("anna", "hash", lambda e, r: Verdicts(np.zeros((0, 5)), np.zeros(0))))
    other = Judge("anna", "another", lambda e, r: Verdicts(np.zeros((0, 5)), np.zeros(0)))
    assert findings.judge_facts(config, other)["quality"] is None
    assert facts == {
        "name": "anna",
        "hash": "hash",
        "kind": "human",
        "path": "labels.csv",
        "quality": {"judge_hash": "hash", "topics": []},
    }


@pytest.mark.parametrize(("template", "noiseless"), [("trained-v1", True), ("stance-v1", False)])
def test_a_judge_that_shows_no_options_has_no_noise_of_its_own(template: str, noiseless: bool) -> None:
    config = configs.experiment()
    config.judges.anna = configs.judge("local", path="DIR", template=template)
    facts = findings.judge_facts(config, Judge("anna", "hash", lambda e, r: Verdicts(np.zeros((0, 5)), np.zeros(0))))
    assert facts.get("noiseless", False) == noiseless
