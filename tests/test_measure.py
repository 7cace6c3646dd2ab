"""From snapshots to scores: what is asked and judged again and what is not, judges that leave responses out."""

import json
import shutil
from pathlib import Path
from typing import Any

import experiments
import jax
import numpy as np
import pandas as pd
import pytest
import tiny

from vdjax import config as configs
from vdjax import findings, judge, measure, snapshots
from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange, Judge, Verdicts, prompts
from vdjax.judges import local as local_judge
from vdjax.probes import evaluator, score_table, sets
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
    experiments.run(config, workdir)
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
    experiments.run(config, workdir)
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
        experiments.run(changed, workdir)


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
    kept = {"config": json.loads(configs.to_json(longer))}
    (tmp_path / "run" / "config.json").write_text(json.dumps(kept))
    asked: list[tuple[str, list[int]]] = []
    with pytest.MonkeyPatch.context() as patch:
        real = measure.responses
        patch.setattr(measure, "responses", lambda c, m, q, s: (asked.append((s.stage, s.steps)), real(c, m, q, s))[1])
        experiments.run(longer, tmp_path / "run")
    assert asked == [("dpo", [1]), ("dpo", [2])]  # a CPU takes one at a time
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
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()


NO_LETTERS = (Path(prompts.__file__).parent / "templates" / "trained-v1.toml").read_text()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("key", "config.judges.lost.key_env: the environment variable VDJAX_NO_SUCH_KEY is not set"),
        ("template", "' no' begins ' no idea', token by token"),
        ("quality template", "' no' begins ' no idea', token by token"),
        ("quality data", "no such file"),
    ],
)
def test_what_would_fail_after_training_is_said_before(
    finished: tuple[Path, list[str]], tiny_data: Path, tmp_path: Path, case: str, says: str
) -> None:
    config = configs.load(tiny.config_spec(tiny_data))
    config.probes.readouts, config.probes.judges = ("open_ended",), ("lost",)
    unfit = tmp_path / "unfit.toml"
    unfit.write_text(NO_LETTERS.replace('" support"', '" no"').replace('" neutral"', '" no idea"'))
    local = {"path": str(finished[0] / "sft" / "snapshots" / "6"), "template": "trained-v1"}
    config.judges.lost = configs.judge("local", **local)
    if case == "key":
        config.judges.lost = configs.judge(
            "api", base_url="http://127.0.0.1:1/v1", model="m", key_env="VDJAX_NO_SUCH_KEY",
            usd_per_million_input=0.0, usd_per_million_output=0.0,
        )  # fmt: skip
    elif case == "template":
        config.judges.lost.template = str(unfit)
    else:
        labelled = tmp_path / "labelled.jsonl"
        if case == "quality template":
            labelled.write_text('{"proposition": "p", "response": "r", "label": "neutral"}\n')
            config.judge_quality.template = str(unfit)
        config.judge_quality.update({"stage": "sft", "path": str(labelled)})
    with pytest.raises(UserError, match=says):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()


def test_no_key_is_needed_where_all_is_judged(tmp_path: Path) -> None:
    config = configs.experiment()
    config.judges.far = configs.judge(
        "api", base_url="http://127.0.0.1:1/v1", model="m", key_env="VDJAX_NO_SUCH_KEY",
        usd_per_million_input=0.0, usd_per_million_output=0.0,
    )  # fmt: skip
    config.probes.judges = ("far",)
    measure.store(table(), tmp_path / "judgements" / "far" / "sft.parquet")
    measure.check_keys(config, ["sft"], tmp_path)
    with pytest.raises(UserError, match="VDJAX_NO_SUCH_KEY is not set"):
        measure.check_keys(config, ["sft", "dpo"], tmp_path)


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
    remembering = measure.remembering(Judge("name", "hash", verdicts), {})
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


@pytest.fixture(scope="module")
def parted(run: Any, finished: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run's questions to the four snapshots of the finished experiment's SFT, held two at a time; a judge with
    options in all orders, twice."""
    config = run[0].copy_and_resolve_references()
    snapshot = str(finished[0] / "sft" / "snapshots" / "6")
    template = tmp_path_factory.mktemp("templates") / "short.toml"
    template.write_text(OPTIONS)
    config.judges.tiny = configs.judge("local", path=snapshot, template=str(template), repeats=2)
    # Of parameters: two snapshots, or one that is sampled from, which takes a second copy.
    config.probes.system_prompts, config.probes.memory_gb = ("",), 2.5 * PARAMS_BYTES / 1e9
    made = setup(config)
    readers = [snapshots.open_reader(Path(snapshot).parent / str(step)) for step in (0, 2, 4, 6)]
    return config, made, measure.questions(config, made), measure.Series("sft", [0, 2, 4, 6], readers, (0, 6))


OPTIONS = """
chat = true
letters = true
prompt = '''{{ response }} / {{ proposition }}
{% for option in options %}{{ option.letter }} {{ option.text }}
{% endfor %}'''
labels = [
  { text = "pro", label = "support", graded = 1.0 },
  { text = "con", label = "oppose", graded = -1.0 },
  { text = "none", label = "refusal" },
]
"""
PARAMS_BYTES = evaluator.size_in_bytes(tiny.model_without_params("qwen").params)


class Stopped(Exception):
    pass


def ask_and_judge(parted: Any, workdir: Path, most: float = np.inf) -> list[str]:
    """What is stored: tables and parts; stopped when it would store more than `most`."""
    config, made, asked, series = parted
    real, stored = measure.store, []

    def store(table: pd.DataFrame, file: Path) -> None:
        if len(stored) >= most:
            raise Stopped(stored)
        stored.append(str(file.relative_to(workdir)))
        real(table, file)

    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(made.mesh):
        patch.setattr(measure, "store", store)
        measure.ask(config, made, asked, series, workdir)
        measure.judge(config, made, asked, ["sft"], workdir)
    return stored


def test_asking_and_judging_go_on_from_their_parts_to_the_same_bits(parted: Any, tmp_path: Path) -> None:
    whole = ask_and_judge(parted, tmp_path / "whole")
    assert whole == [
        *("probes/parts/sft/0-2.parquet", "probes/parts/sft/4-6.parquet", "probes/sft.parquet"),
        *("responses/parts/sft/0-0.parquet", "responses/parts/sft/2-2.parquet", "responses/parts/sft/4-4.parquet"),
        *("responses/parts/sft/6-6.parquet", "responses/sft.parquet"),
        *(f"judgements/tiny/parts/sft/{step}.parquet" for step in (0, 2, 4, 6)),
        "judgements/tiny/sft.parquet",
    ]
    again: list[str] = []
    while len(again) < len(whole):
        try:
            again += ask_and_judge(parted, tmp_path / "stopped", most=3)
        except Stopped as stop:
            again += stop.args[0]
    assert again == whole  # nothing twice
    for file in ("probes/sft.parquet", "responses/sft.parquet", "judgements/tiny/sft.parquet"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    left = {file.name for file in (tmp_path / "stopped").rglob("*.parquet")}
    assert left == {"sft.parquet"} and not (tmp_path / "stopped" / "responses" / "parts" / "sft").exists()
    judged = pd.read_parquet(tmp_path / "whole" / "judgements" / "tiny" / "sft.parquet")
    assert judged.groupby("repeat")["step"].unique().map(list).to_dict() == {0: [0, 2, 4, 6], 1: [0, 6]}


def test_parts_of_other_questions_are_not_taken(parted: Any, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        ask_and_judge(parted, tmp_path, most=5)  # two parts of responses among them
    config, made, asked, series = parted
    other = config.copy_and_resolve_references()
    other.probes.temperature = 0.1
    stored = ask_and_judge((other, made, measure.questions(other, made), series), tmp_path)
    assert [file for file in stored if file.startswith("responses")] == [
        *(f"responses/parts/sft/{step}-{step}.parquet" for step in (0, 2, 4, 6)),
        "responses/sft.parquet",
    ]
