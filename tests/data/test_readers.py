import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdjax.data.readers import local_files, read_rows
from vdjax.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROWS = [{"a": 1, "b": ["x", "y"]}, {"a": 2, "b": ["é"]}, {"a": 3, "b": []}]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "r.jsonl").write_text("\ufeff" + lines(ROWS), encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "by_line.json").write_text(lines(ROWS))
    with gzip.open(tmp_path / "r.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(lines(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    for name in ("r.jsonl", "r.json", "by_line.json", "r.jsonl.gz", "r.parquet"):
        rows = list(read_rows(str(tmp_path / name)))
        assert [row.data for row in rows] == ROWS, name
        assert [row.id for row in rows] == [f"{name}:{i}" for i in range(3)]


def test_row_numbers_are_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row.id for row in read_rows(str(tmp_path / "r.jsonl"))] == ["r.jsonl:0", "r.jsonl:2"]


def test_text_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n\none\nstill one\n \n\ntwo\n\n\n")
    assert [row.data["text"] for row in read_rows(str(tmp_path / "t.txt"))] == ["one\nstill one", "two"]


def test_several_files_and_directories(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines([{"n": name}]))
    (tmp_path / "README.md").write_text("no data")
    assert [row.id for row in read_rows(str(tmp_path))] == ["a.jsonl:0", "b.jsonl:0", "sub/a.jsonl:0"]
    two = [str(tmp_path / "b.jsonl"), str(tmp_path / "sub/a.jsonl")]
    for path in (two, ",".join(two), ", ".join(two)):
        assert [row.id for row in read_rows(path)] == ["b.jsonl:0", "a.jsonl:0"]
    same = [str(tmp_path / "a.jsonl"), str(tmp_path / "sub/a.jsonl")]
    assert [row.id for row in read_rows(same)] == [f"{name}:0" for name in same]
    assert [file for file, _ in local_files(two)] == [Path(p) for p in two]
    assert local_files("someone/dataset") == []


def test_a_directory_with_splits_needs_one_named(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl", "train_prefs-0.jsonl"):
        (tmp_path / name).write_text(lines([{"n": name}]))
    with pytest.raises(UserError, match=r"several splits \(test, train, train_prefs\)"):
        read_rows(str(tmp_path))
    assert [row.data["n"] for row in read_rows(str(tmp_path), split="train")] == [
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
    ]
    with pytest.raises(UserError, match="did you mean 'train_prefs'"):
        read_rows(str(tmp_path), split="train_pref")


def test_a_directory_does_not_lead_out_of_itself(tmp_path: Path) -> None:
    for folder in ("data/sub", "cache/snapshots/abc", "cache/blobs"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("outside.jsonl", "data/sub/a.jsonl", "cache/blobs/0123"):
        (tmp_path / file).write_text(lines(ROWS))
    (tmp_path / "data" / "inside.jsonl").symlink_to("sub/a.jsonl")
    (tmp_path / "cache" / "snapshots" / "abc" / "b.jsonl").symlink_to("../../blobs/0123")
    assert len(local_files(str(tmp_path / "data"))) == 2
    assert len(list(read_rows(str(tmp_path / "cache" / "snapshots" / "abc")))) == len(ROWS)
    (tmp_path / "data" / "train.jsonl").symlink_to("../outside.jsonl")
    with pytest.raises(UserError, match=r"data/train.jsonl is a link out of .*data; to read it, name the file"):
        read_rows(str(tmp_path / "data"))
    assert len(list(read_rows(str(tmp_path / "data" / "train.jsonl")))) == len(ROWS)  # the user's own choice


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": \n', r"rows\.jsonl, line 2: not JSON"),
        ('{"a": 1}\n[1, 2]\n', r"rows\.jsonl, line 2: expected an object with named fields, found list"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / "rows.jsonl")))


def test_damaged_files_are_user_errors(tmp_path: Path) -> None:
    whole = gzip.compress(lines(ROWS * 1000).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "latin.jsonl").write_bytes('{"a": "é"}\n'.encode("latin-1"))
    (tmp_path / "no.parquet").write_bytes(b"PAR2")
    (tmp_path / "array.json").write_text('[{"a": 1},\n {"a"]')
    (tmp_path / "numbers.json").write_text("[1, 2]")
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=file.name):
            list(read_rows(str(file)))


def test_missing_files_and_useless_options(tmp_path: Path) -> None:
    (tmp_path / "harmless.jsonl").write_text(lines(ROWS))
    (tmp_path / "rows.csv").write_text("a,b")
    for path, message in [
        (str(tmp_path / "harmles.jsonl"), "did you mean 'harmless.jsonl'"),
        (str(tmp_path / "nowhere" / "x.jsonl"), "no directory"),
        ("nothing.jsonl", "no such file"),
        ("./some/where", "no such file"),
        (str(tmp_path / "rows.csv"), "unknown suffix"),
        ([], "empty list"),
    ]:
        with pytest.raises(UserError, match=message):
            read_rows(path)
    with pytest.raises(UserError, match="split='train'"):
        read_rows(str(tmp_path / "harmless.jsonl"), split="train")
    with pytest.raises(UserError, match="revision='abc' is for hub datasets"):
        read_rows(str(tmp_path / "harmless.jsonl"), revision="abc")


def test_hub_datasets_are_pinned_and_never_run_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(path: str, name: str | None, **kwargs: Any) -> Any:
        asked.update(kwargs, path=path, name=name)
        if kwargs["split"] == "tset":
            raise ValueError("Unknown split \"tset\". Should be one of ['train', 'test'].")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="need `revision`"):
        read_rows("someone/dataset")
    rows = list(read_rows("someone/dataset", revision="abc", data_dir="part"))
    assert [row.data for row in rows] == ROWS
    assert rows[2].id == "someone/dataset:2"
    assert asked == {"path": "someone/dataset", "name": None, "revision": "abc", "split": "train", "data_dir": "part"}
    with pytest.raises(UserError, match="tset.*Should be one of"):
        read_rows("someone/dataset", revision="abc", split="tset")


@given(st.lists(st.dictionaries(st.text(max_size=6), VALUES, max_size=3), max_size=5))
@settings(max_examples=25, deadline=None)
def test_any_rows_come_back_from_every_text_format(tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.jsonl").write_text(lines(rows))
    (folder / "raw.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    (folder / "a.json").write_text(json.dumps(rows))
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(lines(rows))
    for file in sorted(folder.iterdir()):
        found = list(read_rows(str(file)))
        assert [row.data for row in found] == rows, file.name
        assert [row.id for row in found] == [f"{file.name}:{i}" for i in range(len(rows))]


@given(st.binary(max_size=80) | st.text(alphabet='{}[]",:\\ud83ae1\n ', max_size=40).map(str.encode))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_rows_or_a_user_error(tmp_path_factory: Any, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.parquet"):
        (folder / name).write_bytes(content)
        try:
            found = list(read_rows(str(folder / name)))
        except UserError as error:
            assert name in str(error)
        else:
            assert all(isinstance(row.data, dict) for row in found)
