"""Studies: the grid laid out as experiments, and run, listed, sharded, stopped and gone on with."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import html5lib
import numpy as np
import pandas as pd
import pytest
import tiny
import tiny_study
from fake_chat_server import completion, serve
from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax import experiment, measure, runs, study
from vdjax.data import pipeline
from vdjax.errors import UserError
from vdjax.probes import score_table, sets
from vdjax.setup import setup
from vdjax.studies import grid
from vdjax.train import loop

TRUNKS = ["tiny-things-seed-0", "tiny-things-seed-1"]
CELLS = ["sft", "dpo_all", "ipo_all", "dpo_few", "ipo_few"]


def load(folder: Path, *overrides: str) -> ConfigDict:
    return configs.load(f"{tiny.HERE / 'tiny_study.py'}:{folder}", overrides)


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, workdir: Path, *flags: str) -> int:
    spec = f"{tiny.HERE / 'tiny_study.py'}:{folder}"
    monkeypatch.setattr(sys, "argv", ["study", "--config", spec, "--workdir", str(workdir), *flags])
    return study.main()


def test_cells_of_one_trunk_are_stages_of_one_experiment(tiny_data: Path) -> None:
    config = tiny_study.get_config(str(tiny_data), ("dpo", "simpo"))
    for flag in ("pairs=OTHER", "dpo.hyper.beta=0.3", "dpo.data.skip_examples=1"):
        configs.override(config, f"--config.{flag}")
    stages = ["sft", "dpo_all", "simpo_all", "dpo_few", "simpo_few"]
    todo = grid.experiments(config)
    assert list(todo) == TRUNKS
    for seed, c in enumerate(todo.values()):
        assert (c.seed, c.seeds, list(c.stages)) == (seed, (), stages)
        assert c.sft.data.path == f"{tiny_data}/sft.jsonl"
        assert {c[name].init_from for name in stages[1:]} == {"sft"}
        assert {c[name].data.path for name in stages[1:]} == {"OTHER"}
        assert [c[name].data.max_examples for name in stages[1:]] == [0, 0, 8, 8]
        assert [c[name].data.skip_examples for name in stages[1:]] == [1, 0, 1, 0]
        assert (c.dpo_few.hyper.beta, c.model.query_chunk) == (0.3, 0)
        assert not {"grid", "dpo", "simpo"} & set(c)
        assert json.loads(configs.to_json(c))
        configs.check(c, "trunk")
    cells = grid.cells(config)
    assert [(cell.trunk, cell.stage) for cell in cells] == [(t, s) for t in TRUNKS for s in stages]
    assert cells[2] == grid.Cell("tiny", "things", "simpo", "all", 0, TRUNKS[0], "simpo_all")


def test_every_dataset_has_its_own_reward_model(tiny_data: Path) -> None:
    config = tiny_study.get_config(str(tiny_data), ("reward", "ppo"))
    c = grid.experiments(config)[TRUNKS[0]]
    assert list(c.stages) == ["sft", "reward_all", "ppo_all", "reward_few", "ppo_few"]
    assert [c[name].reward.model for name in ("ppo_all", "ppo_few")] == ["reward_all", "reward_few"]
    assert {c[name].init_from for name in c.stages[1:]} == {"sft"}
    assert [cell.objective for cell in grid.cells(config)][:3] == ["sft", "ppo", "ppo"]
    configs.check(c, "trunk")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.grid.models.update({"a/b": {}}), "'a/b' is no name"),
        (lambda c: c.grid.sft.update({"b": {}}), "config.grid.sft.b.path is empty"),
        (lambda c: c.grid.preferences.few.update({"max_example": 3}), "did you mean 'max_examples'"),
        (lambda c: c.grid.models.tiny.update({"modle": {"path": "x"}}), "did you mean 'model'"),
        (lambda c: c.update({"seeds": (1, 1)}), "different whole numbers"),
        (lambda c: c.update({"seeds": ("1",)}), "different whole numbers"),
        (lambda c: c.update({"stages": ("sft",)}), "needs a stage after 'sft'"),
        (lambda c: c.update({"stages": ("dpo",)}), "needs a stage with the objective sft"),
        (lambda c: c.grid.models.__delattr__("tiny"), "config.grid.models is empty"),
        (lambda c: c.grid.preferences.update({"a_few": c.grid.preferences.few}) or rename(c, "dpo_a"), "are called"),
        (lambda c: c.__delattr__("grid"), "is no study"),
    ],
)
def test_what_is_no_study_is_refused(tiny_data: Path, change: Callable, message: str) -> None:
    config = tiny_study.get_config(str(tiny_data), ("dpo", "simpo"))
    with config.unlocked():
        change(config)
    with pytest.raises(UserError, match=message):
        grid.experiments(config)


def rename(config: ConfigDict, name: str) -> None:
    """simpo becomes `name`."""
    config[name] = config.simpo
    config.stages = ("sft", "dpo", name)


def test_shards_share_out_all_experiments(capsys: pytest.CaptureFixture) -> None:
    todo: dict[str, Any] = dict.fromkeys("abcde")
    assert study.shard("0/1", todo) == list("abcde")
    assert [study.shard(f"{i}/2", todo) for i in (0, 1)] == [list("ace"), list("bd")]
    assert study.shard("6/9", todo) == []
    assert "only 5 experiments, and none is left" in capsys.readouterr().err
    for wrong in ("2/2", "1", "-1/2", "0/0", "a/b"):
        with pytest.raises(UserError, match="expected i/n"):
            study.shard(wrong, todo)


def test_only_one_process_is_at_an_experiment(tmp_path: Path) -> None:
    with runs.held(tmp_path / "a") as first, runs.held(tmp_path / "a") as second, runs.held(tmp_path / "b") as other:
        assert (first, second, other) == (True, False, True)
    with runs.held(tmp_path / "a") as again:
        assert again


def test_a_run_that_is_stopped_says_how_to_go_on(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(config: ConfigDict, workdir: Path, command: str) -> None:
        raise loop.Interrupted("stopped")

    monkeypatch.setattr(experiment, "run", stop)
    assert command(monkeypatch, tiny_data, tmp_path) == 75
    assert "to go on: python -m vdjax.study" in capsys.readouterr().err

    def fail(config: ConfigDict, workdir: Path, command: str) -> None:
        raise UserError("no such file")

    monkeypatch.setattr(experiment, "run", fail)
    with pytest.raises(UserError, match="tiny-things-seed-1: no such file\nthen go on with"):
        command(monkeypatch, tiny_data, tmp_path, "--shard", "1/2")


@pytest.fixture(scope="module")
def ran(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A study of two experiments as two shards: the first is run, of the second only its tables are made up.

    And what was done for it: the stages that were trained, and "reference" for each dataset that was scored.
    """
    workdir = tmp_path_factory.mktemp("study")
    todo = grid.experiments(load(tiny_data))

    def states() -> list[str]:
        return [study.state(config, workdir / name) for name, config in todo.items()]

    def made_up(config: ConfigDict, folder: Path, command: str) -> None:
        for table in (workdir / TRUNKS[0] / "drift").glob("*.csv"):
            frame = pd.read_csv(table, keep_default_na=False, na_values=[""])
            frame[[c for c in ("magnitude", "value") if c in frame]] *= 1.5
            (folder / "drift").mkdir(exist_ok=True)
            frame.to_csv(folder / "drift" / table.name, index=False)

    work: list[str] = []

    def noted(what: Callable, name: Callable[..., str]) -> Callable:
        return lambda *args: work.append(name(*args)) or what(*args)

    assert states() == ["todo", "todo"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_stage", noted(loop.train_stage, lambda stage, *_: stage.name))
        patch.setattr(pipeline, "score", noted(pipeline.score, lambda *_: "reference"))
        patch.setattr(loop, "peak_flops", lambda: 1e9)
        assert command(patch, tiny_data, workdir, "--shard", "0/2") == 0
        assert states() == ["done", "todo"]
        patch.setattr(experiment, "run", made_up)
        assert command(patch, tiny_data, workdir, "--shard", "1/2") == 0
    assert states() == ["done", "done"]
    return workdir, work


def test_a_study_shares_its_trunk_and_reports_on_every_cell(ran: tuple[Path, list[str]]) -> None:
    workdir, trunks = ran[0], TRUNKS
    assert {p.parent.name for p in (workdir / trunks[0]).glob("*/done.json")} == set(CELLS)
    drift = pd.read_csv(workdir / "tables" / "drift.csv", keep_default_na=False, na_values=[""])
    one = drift[(drift["objective"] == "dpo") & (drift["preference"] == "few") & (drift["topic"] == "tea")]
    assert set(one["stance"]) >= {"support", "neutral", "oppose"}
    own = [pd.read_csv(workdir / trunk / "drift" / "drift.csv") for trunk in trunks]
    for row in one.to_dict("records"):
        keys = {"stage": "dpo_few", "topic": "tea", "stance": row["stance"]}
        values = [t[(t[list(keys)] == list(keys.values())).all(axis=1)]["magnitude"].item() for t in own]
        assert row["seeds"] == 2
        np.testing.assert_allclose([row["magnitude"], row["low"], row["high"]],
                                   [np.mean(values), min(values), max(values)], atol=2e-6)  # fmt: skip
    page = (workdir / "report.html").read_text()
    html5lib.HTMLParser(strict=True).parse(page)
    assert all(f"{trunk}/report.html" in page for trunk in trunks)
    assert list((workdir / "figures").glob("trajectories-*.png"))


def test_sft_runs_once_and_reference_log_probs_are_computed_once(ran: tuple[Path, list[str]]) -> None:
    """DPO and IPO of a dataset start from the same SFT snapshot: one file of its training and its held-out examples."""
    workdir, work = ran
    assert [name for name in work if name != "reference"] == CELLS
    names = [file.stem.split("-") for file in (workdir / TRUNKS[0] / "data" / "reference").iterdir()]
    assert work.count("reference") == len(names) == 4  # two datasets, each in two parts
    assert len({data for data, *_ in names}) == 2
    assert len({tuple(rest) for _, _, _, *rest in names}) == 1  # what they start from
    later = work[work.index("ipo_few") :]
    assert "reference" not in later and "reference" not in work[work.index("ipo_all") : work.index("dpo_few")]


def test_what_is_finished_is_not_run_again(
    ran: tuple[Path, list[str]], tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    workdir, _ = ran
    calls: list[Path] = []
    monkeypatch.setattr(experiment, "run", lambda config, folder, command: calls.append(folder))
    monkeypatch.setattr(study, "write_reports", lambda *args, **how: None)
    assert command(monkeypatch, tiny_data, workdir) == 0
    assert not calls
    assert command(monkeypatch, tiny_data, workdir, "--list") == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    for i, line in enumerate(lines):
        name, state, cells, how = line.split("\t")
        assert (name, state, cells) == (TRUNKS[i], "done", ",".join(CELLS[1:]))
        assert how.endswith(f"--shard {i}/2") and "--list" not in how
    # Other probes are asked anew; a third seed is one more experiment.
    monkeypatch.setattr(study.merge, "write", lambda *args: None)
    assert command(monkeypatch, tiny_data, workdir, "--config.probes.max_per_topic=2", "--config.seeds=(1, 2)") == 0
    assert calls == [workdir / name for name in ("tiny-things-seed-1", "tiny-things-seed-2")]


def test_an_experiment_with_several_seeds(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = configs.load(tiny.config_spec(tiny_data), ["--config.seeds=(3, 5)"])
    todo, cells = grid.of_seeds(config)
    assert [(name, c.seed, c.seeds) for name, c in todo.items()] == [("seed-3", 3, ()), ("seed-5", 5, ())]
    assert [(cell.trunk, cell.stage) for cell in cells] == [(f"seed-{n}", s) for n in (3, 5) for s in ("sft", "dpo")]
    calls: list[tuple[Path, str]] = []
    monkeypatch.setattr(experiment, "run", lambda config, folder, command: calls.append((folder, command)))
    monkeypatch.setattr(study.merge, "write", lambda *args: print("merged", args[0]))
    monkeypatch.setattr(study, "write_reports", lambda *args, **how: None)
    study.run_seeds(config, tmp_path, "COMMAND")
    assert calls == [(tmp_path / "seed-3", "COMMAND"), (tmp_path / "seed-5", "COMMAND")]
    assert f"merged {tmp_path}" in capsys.readouterr().out


def test_reports_know_the_drift_of_the_other_seeds(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo, _ = grid.of_seeds(configs.load(tiny.config_spec(tiny_data), ["--config.seeds=(3, 5, 7)"]))
    for name, config in list(todo.items())[:2]:  # the third is not finished
        (tmp_path / name / "drift").mkdir(parents=True)
        (tmp_path / name / "finished.json").write_text(json.dumps({"config_hash": study.config_hash(config)}))
        row = {"readout": "r", "stage": "sft", "topic": "all", "stance": "support", "magnitude": config.seed / 10}
        pd.DataFrame([row | {"ci_low": 0.0}]).to_csv(tmp_path / name / "drift" / "drift.csv")
    calls: list[Path] = []
    monkeypatch.setattr(experiment, "run", lambda config, folder, command: calls.append(folder))
    both = [tmp_path / "seed-3", tmp_path / "seed-5"]
    study.write_reports(todo, tmp_path, dict.fromkeys(todo, ""), always=False)
    assert calls == both
    other = pd.read_csv(tmp_path / "seed-3" / "drift" / "reseeded.csv")
    assert other.to_dict("records") == [
        {"seed": 5, "readout": "r", "stage": "sft", "topic": "all", "stance": "support", "magnitude": 0.5}
    ]
    study.write_reports(todo, tmp_path, dict.fromkeys(todo, ""), always=False)
    assert calls == both
    study.write_reports(todo, tmp_path, dict.fromkeys(todo, ""), always=True)
    assert calls == both * 2


def test_experiments_share_what_an_api_answered_and_its_budget(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trunks with the same responses pay once; other responses have what is left of the one budget."""
    config = load(tiny_data)
    config.judges.remote = configs.judge(
        "api", model="m", max_calls=1 + 7, usd_per_million_input=0.0, usd_per_million_output=0.0
    )
    config.probes.readouts, config.probes.judges = ("open_ended",), ("remote",)
    asked = measure.Questions(sets.load(config.probes.path), [], [], [])
    texts = dict.fromkeys(TRUNKS, "yes")

    def run(config: ConfigDict, workdir: Path, command: str) -> None:
        row = dict(zip(score_table.RESPONSE, ("sft", 0, asked.probes[0].id, 0, 0, 0), strict=True))
        said = pd.DataFrame([row | {"question": "Q?", "degenerate": "", "response": texts[workdir.name]}])
        measure.store(said, workdir / "responses" / "sft.parquet")
        measure.judge(config, setup(config), asked, ["sft"], workdir)

    monkeypatch.setattr(experiment, "run", run)
    with serve(lambda body, n: completion("A", {"A": -0.1})) as server:
        config.judges.remote.base_url = server.url
        todo = grid.experiments(config)
        study.run_all(todo, tmp_path, dict.fromkeys(todo, ""))
        assert len(server.seen) == 8
        assert [file.name for file in tmp_path.rglob("*.sqlite")] == ["replies.sqlite"]
        (tmp_path / TRUNKS[1] / "finished.json").unlink()
        texts[TRUNKS[1]] = "no"
        with pytest.raises(UserError, match="the budget of 8 calls and 1 dollars is spent"):
            study.run_all(todo, tmp_path, dict.fromkeys(todo, ""))
        assert len(server.seen) == 8
    assert runs.calls(tmp_path / TRUNKS[0]) == tmp_path / "judgements" / "calls"
    assert runs.calls(tmp_path) == tmp_path / "judgements" / "calls"
