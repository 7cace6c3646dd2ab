"""python -m vdjax.judge on the tiny experiment's snapshot and export, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_chat_server import Answer, completion, serve
from test_commands import run

from vdjax import config as configs
from vdjax import export, judge, sharding
from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange
from vdjax.judges.local import open_local

ROWS = [
    {"proposition": "Tea is good.", "question": "Is it?", "response": "Yes <|im_end|>, it is.", "more": [1]},
    {"proposition": "Rain is bad.", "response": ""},
]
MESH = sharding.make_mesh(fsdp=-1)


@pytest.fixture(scope="module")
def snapshot(finished: tuple[Path, list[str]]) -> Path:
    return finished[0] / "sft" / "snapshots" / "6"


def test_rows_get_verdicts(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    files = ["--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    flags = ["--judge", str(snapshot), "--template", "trained-v1", *files]
    assert run(judge, monkeypatch, *flags) == 0
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    fields = configs.judge("local", path=str(snapshot), template="trained-v1")
    opened = open_local("mine", fields, MESH)
    want = opened.judge([Exchange(r["proposition"], r.get("question", ""), r["response"]) for r in ROWS], 0)
    for i, row in enumerate(out):
        assert {key: row[key] for key in ROWS[i]} == ROWS[i]
        assert row["judge_hash"] == opened.hash
        np.testing.assert_allclose([row[label] for label in LABELS], want.p[i], rtol=1e-5)
        assert sum(row[label] for label in LABELS) == pytest.approx(1)
        assert row["graded"] == pytest.approx(want.graded[i], rel=1e-5)
    assert not list(tmp_path.glob(".*"))


def test_a_judges_hash_is_of_all_that_it_depends_on(snapshot: Path, tmp_path: Path) -> None:
    export.export(snapshot, tmp_path / "model")

    def opened(path: Path, **fields: Any) -> Any:
        return open_local("any", configs.judge("local", path=str(path), template="trained-v1", **fields), MESH)

    base = opened(snapshot)
    same = opened(tmp_path / "model")
    assert same.hash == base.hash
    exchange = [Exchange("Tea is good.", "Is it?", "Yes.")]
    np.testing.assert_array_equal(same.judge(exchange, 0).p, base.judge(exchange, 0).p)
    other = opened(snapshot.parent / "0")
    assert np.abs(other.judge(exchange, 0).p - base.judge(exchange, 0).p).max() > 1e-4
    hashes = {base.hash, other.hash, opened(snapshot, max_length=100).hash}
    stance = configs.judge("local", path=str(snapshot))
    assert len(hashes | {open_local("any", stance, MESH).hash}) == 4


def test_a_judge_is_measured(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    persona = tmp_path / "persona"
    persona.mkdir()
    for stem in ("anti-immigration", "believes-in-gun-rights"):
        rows = [{"statement": f"S {stem} {i}", "answer_matching_behavior": (" Yes", " No")[i % 2]} for i in range(100)]
        (persona / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = {"proposition": "p", "response": "r", "label": "neutral", "topic": "gun rights"}
    (tmp_path / "own.jsonl").write_text(json.dumps(labelled) + "\n")
    flags = ["--judge", str(snapshot), "--template", "trained-v1", "--workdir", str(tmp_path / "quality")]
    flags += ["--labelled", str(persona), str(tmp_path / "own.jsonl"), "--topics", "gun rights", "--max_examples", "12"]
    assert run(judge, monkeypatch, *flags) == 0
    said = capsys.readouterr()
    assert "12 labelled exchanges" in said.err and "100 x other_topic" in said.err and "ECE" in said.out
    every = pd.read_csv(tmp_path / "quality" / "verdicts.csv")
    assert len(every) == 12 and set(every["topic"]) == {"gun rights"}
    assert every["response"][0] == "r"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "is no JSON"),
        ("[]", "expected an object with proposition and response, found list"),
        ('{"proposition": "p"}', "'response' is missing; found 'proposition'"),
        ('{"proposition": "p", "response": 1}', "response must be text, found int"),
        ('{"proposition": " ", "response": "r"}', "the proposition is empty"),
        ('{"proposition": "p", "response": "r", "graded": 1}', "already has the field 'graded'"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(line: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"proposition": "p", "response": "r"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=text) as error:
        judge.read_rows(file)
    assert f"{file}:3" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "give either --rows and --out, or --labelled and --workdir"),
        (["--rows", "a"], "--rows and --out go together"),
        (["--labelled", "a"], "--labelled and --workdir go together"),
        (["--rows", "a", "--out", "nowhere/b"], "no such directory: nowhere"),
        (["--rows", "nofile", "--out", "b"], "cannot be read"),
        (["--rows", "a", "--out", "b", "--config.seed=1"], "unknown flag; expected those of --help or --config.mesh"),
        (["--labelled", "nofile.jsonl", "--workdir", "b"], "no such file"),
    ],
)
def test_wrong_flags_are_refused(
    flags: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(judge, monkeypatch, "--judge", "nomodel/x/y", *flags) == 2
    assert text in capsys.readouterr().err


def test_a_judge_that_is_none_is_refused(snapshot: Path) -> None:
    with pytest.raises(UserError, match="config.judges.mine.path is empty"):
        open_local("mine", configs.judge("local"), MESH)
    with pytest.raises(UserError, match="only --config.mesh can be chosen"):
        open_local("mine", configs.judge("local", path=str(snapshot), revision="main"), MESH)


CONFIG = """
from vdjax import config as base

def get_config():
    c = base.experiment()
    c.judges.remote = base.judge("api", base_url="http://127.0.0.1:1/v1", model="m", concurrency=1,
                                 usd_per_million_input=0, usd_per_million_output=0)
    return c
"""


def says(body: dict[str, Any], n: int) -> Answer:
    """Supports what says yes, in whatever order the options are; no letter for what is odd."""
    text = body["messages"][0]["content"]
    wanted = "strongly supports" if "<response>\nyes" in text else "strongly opposes"
    line = next(line for line in text.splitlines() if f"The response {wanted}" in line)
    return completion("Well", {"Well": -0.01}) if "odd" in text else completion(line[0], {line[0]: -0.1})


@pytest.fixture
def judges(tmp_path: Path) -> str:
    (tmp_path / "judges.py").write_text(CONFIG)
    return str(tmp_path / "judges.py")


def test_an_api_judge_of_a_config_is_measured_and_judges_rows(
    judges: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    said = [("yes 1", "support"), ("no 1", "oppose"), ("no 2", "support"), ("odd", "neutral")]
    said[3:3] = [(f"yes {i}", "support") for i in range(20)]
    rows = [{"proposition": "p", "response": text, "label": label} for text, label in said]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r | {"was": r.pop("label")}) + "\n" for r in rows))
    workdir, out = tmp_path / "quality", tmp_path / "out.jsonl"
    with serve(says) as server:
        chosen = ["--judge", "remote", "--config", judges, f"--config.judges.remote.base_url={server.url}"]
        labelled = ["--labelled", str(tmp_path / "labelled.jsonl"), "--workdir", str(workdir)]
        assert run(judge, monkeypatch, *chosen, *labelled) == 0
        paid = len(server.seen)
        assert run(judge, monkeypatch, *chosen, *labelled) == 0
        assert len(server.seen) == paid
        assert run(judge, monkeypatch, *chosen, "--rows", str(tmp_path / "rows.jsonl"), "--out", str(out)) == 0
    assert "no verdict on 1 of 24, which are left out" in capsys.readouterr().err
    found = json.loads((workdir / "quality.json").read_text())
    whole = found["topics"][0]
    assert (whole["n"], whole["directed"]) == (23, 23) and whole["accuracy"] == pytest.approx(22 / 23)
    assert whole["ece"] == pytest.approx(1 / 23) and found["judge"] == "remote"
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["support"] for row in written[:3]] == [1, 0, 0] and written[1]["graded"] == -1
    assert {written[-1][key] for key in (*LABELS, "graded")} == {None}
    assert {row["judge_hash"] for row in written} == {found["judge_hash"]}


def test_a_judge_that_the_config_has_not_is_named(
    judges: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"proposition": "p", "response": "r"}\n')
    files = ["--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    for flags, says_ in (
        (["--judge", "remot", "--config", judges], "did you mean 'remote'"),
        (["--judge", "remote", "--config", judges, "--template", "stance-v1"], "--template: is for a model as judge"),
        (["--judge", "remote", "--config", "nowhere.py"], "no such file"),
        (["--judge", "remote", "--config.judges.remote.votes=3"], "unknown flag"),
    ):
        assert run(judge, monkeypatch, *flags, *files) == 2
        assert says_ in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
