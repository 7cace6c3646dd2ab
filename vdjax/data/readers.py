"""Rows of local files and of hub datasets, one plain dict at a time."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

from vdjax.errors import UserError, nearest
from vdjax.files import absolute, as_path, local_copy, parse_json, under

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Row(NamedTuple):
    """`id` is "<file or dataset>:<row>"; rows count from 0 (for JSONL: the line number minus one)."""

    id: str
    data: dict[str, Any]


def read_rows(
    path: str | Sequence[str],
    *,
    revision: str | None = None,
    split: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
) -> Iterator[Row]:
    """Rows of a local file, a directory, several files (a list, or joined by commas) or a hub dataset, lazily in order.

    Local: .jsonl, .json (an array of objects, or one object a line), .parquet, .txt (documents separated by blank
    lines, as {"text": ...}), the text formats also as .gz. `split` picks the files "<split>.*" and "<split>-*" of a
    directory. Hub: `revision` is required, `split` is "train" unless given, `name` is the dataset's config; no code
    of the dataset is ever run.

    Raises UserError for missing files, unknown suffixes, links out of a directory, lines that are no JSON object (with
    file and line number), damaged files, and hub datasets that cannot be loaded.
    """
    files = local_files(path, split)
    if not files:
        return _hub_rows(str(path), revision, split or "train", name, data_dir)
    for key, value in {"revision": revision, "name": name, "data_dir": data_dir}.items():
        if value:
            raise UserError(f"data: {key}={value!r} is for hub datasets, but {path} is a local path")
    return chain.from_iterable(_file_rows(file, label) for file, label in files)


def local_files(path: str | Sequence[str], split: str | None = None) -> list[tuple[Path, str]]:
    """The files that `read_rows` would read, with their labels in ids; none for a hub id.

    Raises:
      UserError: what cannot be a hub id either.
    """
    paths = [p.strip() for p in path.split(",")] if isinstance(path, str) else [str(p) for p in path]
    if len(paths) != 1:
        if not paths:
            raise UserError("data: path is an empty list, expected at least one file")
        files = [_existing(as_path(p)) for p in paths]
        if twice := [str(f) for i, f in enumerate(files) if f in files[:i]]:
            raise UserError(f"data: {twice[0]} is named twice, so that its rows would have the same ids")
        labels = [f.name for f in files] if len({f.name for f in files}) == len(files) else paths
        return list(zip(files, labels, strict=True))
    local = as_path(paths[0])
    if local.is_dir():
        return _directory_files(local, split)
    if not local.exists() and HUB_ID.fullmatch(paths[0]) and not paths[0].endswith(SUFFIXES):
        return []
    file = _existing(local)
    if split:
        raise UserError(f"data: split={split!r} is for hub datasets and directories, but {path} is a file")
    return [(file, file.name)]


def _existing(file: Path) -> Path:
    if not file.is_file():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        hint = nearest(file.name, sorted(siblings)) if siblings else f"; no directory {file.parent}"
        raise UserError(f"data: no such file: {file}{hint}")
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"data: {file} has an unknown suffix; expected one of {', '.join(SUFFIXES)}")
    return file


def _directory_files(directory: Path, split: str | None) -> list[tuple[Path, str]]:
    files = sorted(f for f in under(directory) if f.name.endswith(SUFFIXES))
    real = absolute(directory)
    # In a cache of the hub the files of a snapshot are links to blobs beside all snapshots.
    caches = (p.parent for p in (real, *real.parents) if p.name == "snapshots" and (p.parent / "blobs").is_dir())
    root = next(caches, real)
    for file in files:
        if not absolute(file).is_relative_to(root):
            raise UserError(f"data: {file} is a link out of {directory}; to read it, name the file itself")
    splits = {f: re.split(r"[-.]", f.name)[0] for f in files}
    if split:
        files = [f for f in files if splits[f] == split]
    elif any(s.startswith("train") for s in splits.values()) and len(set(splits.values())) > 1:
        names = ", ".join(sorted(set(splits.values())))
        raise UserError(f"data: {directory} holds several splits ({names}): give `split`")
    if not files:
        wanted = f"files of split {split!r}{nearest(split, sorted(set(splits.values())))}" if split else "data files"
        raise UserError(f"data: {directory} holds no {wanted}; suffixes read: {', '.join(SUFFIXES)}")
    return [(f, str(f.relative_to(directory))) for f in files]


def _hub_rows(path: str, revision: str | None, split: str, name: str | None, data_dir: str | None) -> Iterator[Row]:
    if not revision:
        raise UserError(
            f"data: {path!r} is no local file, so it is read as a hub dataset, and those need `revision` (a commit "
            f"hash from https://huggingface.co/datasets/{path}/commits/main), so that the run can be repeated"
        )
    import datasets

    try:
        loaded = datasets.load_dataset(path, name, data_dir=data_dir, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        what = f"{path} (config {name}, split {split}, revision {revision})"
        raise UserError(f"data: cannot load {what}: {error}") from error
    return (Row(f"{path}:{i}", dict(cast(dict[str, Any], row))) for i, row in enumerate(loaded))


def _file_rows(file: Path, label: str) -> Iterator[Row]:
    kind = file.name.removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        if kind == "parquet":
            yield from _parquet_rows(file, label)
            return
        opener = gzip.open if file.name.endswith(".gz") else open
        with cast(TextIO, opener(local_copy(file), "rt", encoding="utf-8-sig")) as stream:
            if kind == "txt":
                yield from _text_rows(stream, label)
            elif kind == "json":
                yield from _json_rows(stream, file, label)
            else:
                yield from _jsonl_rows(stream, file, label)
    except UnicodeDecodeError as error:
        raise UserError(f"data: {file} is not UTF-8 text: {error}") from error
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"data: cannot read {file}: {error}") from error


def _parquet_rows(file: Path, label: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(local_copy(file)).iter_batches(batch_size=512)
        index = 0
        for batch in batches:
            for data in batch.to_pylist():
                yield Row(f"{label}:{index}", data)
                index += 1
    except UnicodeDecodeError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter: dates beyond Python's
        raise UserError(f"data: cannot read {file} as Parquet: {error}") from error


def _text_rows(stream: TextIO, label: str) -> Iterator[Row]:
    for index, text in enumerate(re.split(r"\n(?:[ \t]*\n)+", stream.read().strip())):
        if text:
            yield Row(f"{label}:{index}", {"text": text})


def _jsonl_rows(stream: TextIO, file: Path, label: str) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield Row(f"{label}:{number - 1}", _object(line, f"{file}, line {number}"))


def _json_rows(stream: TextIO, file: Path, label: str) -> Iterator[Row]:
    start = stream.read(64).lstrip()[:1]
    stream.seek(0)
    if start != "[":
        yield from _jsonl_rows(stream, file, label)
        return
    try:
        rows = parse_json(stream.read())
    except json.JSONDecodeError as error:
        raise UserError(f"data: {file}, line {error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise UserError(f"data: {file}: not JSON: {error}") from error
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"data: {file}, row {index}: expected an object, found {type(row).__name__}")
        yield Row(f"{label}:{index}", row)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} (column {error.colno}); expected one object a line"
        raise UserError(f"data: {where}: {problem}") from error
    except ValueError as error:
        raise UserError(f"data: {where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"data: {where}: expected an object with named fields, found {type(value).__name__}")
    return value
