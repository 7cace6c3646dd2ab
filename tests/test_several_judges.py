"""An experiment under several judges: models, people and an API that fails on the way."""

import csv
import json
import zlib
from pathlib import Path
from typing import Any

import experiments
import numpy as np
import pandas as pd
import pytest
import tiny
from fake_chat_server import Answer, completion, serve
from ml_collections import ConfigDict

from vdjax import chat_api, judge
from vdjax import config as configs
from vdjax.errors import UserError
from vdjax.judges import LABELS
from vdjax.probes import score_table

KEY = "sk-very-secret-0123456789"


@pytest.fixture(scope="module")
def run(finished: tuple[Path, list[str]], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SFT of two steps whose responses two models have judged: the same one before and after its training."""
    config = configs.load(tiny.config_spec(tiny_data), ["--config.stages=('sft',)", "--config.sft.max_steps=2"])
    for name, step in (("before", 0), ("after", 6)):
        path = str(finished[0] / "sft" / "snapshots" / str(step))
        config.judges[name] = configs.judge("local", path=path, template="trained-v1")
    config.probes.update({"readouts": ("open_ended",), "judges": ("before", "after"), "samples": 2})
    config.probes.max_new_tokens = 24
    workdir = tmp_path_factory.mktemp("judged") / "run"
    experiments.run(config, workdir)
    return config, workdir


def with_judge(run: Any, name: str, fields: ConfigDict) -> tuple[ConfigDict, Path]:
    config = run[0].copy_and_resolve_references()
    config.judges[name] = fields
    config.probes.judges = (*config.probes.judges, name)
    return config, run[1]


def likeliest(workdir: Path, name: str) -> pd.Series:
    """The label of each response, by a judge's first verdict."""
    table = pd.read_parquet(workdir / "judgements" / name / "sft.parquet").set_index(score_table.RESPONSE)
    return table[list(LABELS)].idxmax(axis=1)


def test_two_models_and_people_from_the_sheet_to_the_report(run: Any, tmp_path: Path) -> None:
    sheet, filled = tmp_path / "sheet.csv", tmp_path / "labels.csv"
    judge.write_run_sheet(run[1], sheet, 0, seed=1)
    with open(sheet, encoding="utf-8-sig", newline="") as blank, open(filled, "w", encoding="utf-8", newline="") as out:
        rows = list(csv.DictReader(blank))
        for row in rows:
            row["label"] = LABELS[zlib.crc32(row["response"].encode()) % 3]
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    config, workdir = with_judge(run, "people", configs.judge("human", path=str(filled)))
    experiments.run(config, workdir)

    said = pd.read_parquet(workdir / "responses" / "sft.parquet")
    labels = {name: likeliest(workdir, name) for name in config.probes.judges}
    assert len(labels["people"]) == (said["degenerate"] == "").sum() > 8 and labels["people"].nunique() > 1
    found = pd.read_csv(workdir / "drift" / "agreement.csv").set_index(["judge_a", "judge_b", "measure"])["value"]
    pairs = [("after", "before"), ("after", "people"), ("before", "people")]
    for a, b in pairs:
        assert found[a, b, "percent"] == pytest.approx((labels[a] == labels[b]).mean())
        assert (a, b, "cohen_kappa") in found.index
    assert found["all", "all", "percent"] == pytest.approx(np.mean([found[a, b, "percent"] for a, b in pairs]))
    drift = pd.read_csv(workdir / "drift" / "drift.csv")
    assert set(drift["readout"]) == {"open_ended:before", "open_ended:after", "open_ended:people"}
    page = (workdir / "report.html").read_text()
    for text in ("they agree on", "Labels of after (rows) and people (columns)", "open_ended:people"):
        assert text in page
    assert "The own noise of before, after is 0 by construction" in page


def test_an_api_judge_that_is_cut_off_goes_on_and_pays_nothing_twice(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VDJAX_TEST_KEY", KEY)
    monkeypatch.setattr(chat_api, "BACKOFF_S", 0.01)
    served: list[str] = []
    broken = True

    def answer(body: dict[str, Any], n: int) -> Answer:
        if broken and len(served) >= 4:
            return Answer({"error": {"message": f"out of order, {KEY}"}}, 503)
        served.append(json.dumps(body, sort_keys=True))
        return completion("A", usage=(100, 1))

    with serve(answer) as server:
        asked: dict[str, Any] = {"base_url": server.url, "model": "m", "key_env": "VDJAX_TEST_KEY", "votes": 1}
        asked |= {"max_retries": 0, "concurrency": 1, "usd_per_million_input": 1.0, "usd_per_million_output": 1.0}
        remote = configs.judge("api", **asked)
        config, workdir = with_judge(run, "remote", remote)
        with pytest.raises(UserError, match="out of order, .key.. .* requests are left; the same command goes on"):
            experiments.run(config, workdir)
        assert len(served) == 4 and not (workdir / "judgements" / "remote" / "sft.parquet").exists()
        broken = False
        experiments.run(config, workdir)
        sound = pd.read_parquet(workdir / "responses" / "sft.parquet").query("degenerate == ''")
        distinct = sound.drop_duplicates(["probe_id", "question", "response"])
        assert len(served) == len(set(served)) == len(distinct) > 8
        experiments.run(config, workdir)
        assert len(server.seen) - len(served) <= 2  # those that failed
        spent = chat_api.spent(chat_api.Endpoint(server.url, "m", "", 1, 0, 0, 1.0, 1, 1.0, 1.0, 1.0),
                               workdir / "judgements" / "calls" / "replies.sqlite")  # fmt: skip
    failed = spent.usd - len(served) * 101e-6
    assert 0 < failed < 2 * 10_000e-6  # a call that may have been billed keeps its bound
    assert len(likeliest(workdir, "remote")) == len(sound)
    assert "open_ended:remote" in set(pd.read_csv(workdir / "drift" / "drift.csv")["readout"])
    assert not any(KEY.encode() in f.read_bytes() for f in workdir.rglob("*") if f.is_file())
