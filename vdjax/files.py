"""Files that others wrote or that a workdir keeps: JSON, tables and text in, whole files out."""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vdjax.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


def local_path(name: str | Path) -> Path:
    """The path with ~ and ~USER replaced; that of an unknown user stays as it is.

    Raises:
      UserError: what no path can be, such as a name that is too long.
    """
    path = Path(name)
    with contextlib.suppress(RuntimeError):
        path = path.expanduser()
    try:
        path.exists()
    except OSError as error:
        raise UserError(f"{name}: cannot be a path: {error.strerror}") from error
    return path


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, whose every refusal is a ValueError: too deep a nesting too, and numbers of too many digits."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_unicode(value: Any, where: str) -> None:
    """UserError where a text in parsed JSON is none: half of a surrogate pair, as \\ud83d alone gives."""
    if isinstance(value, str) and value.isascii():
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds a character that is no Unicode text: {error.reason}") from None


def read_text(file: Path, what: str) -> str:
    """A text file in UTF-8, with or without the mark that says so.

    Raises:
      UserError: a file that cannot be read; `what` is in front of its name.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: {file} is not UTF-8 text: {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {file} cannot be read: {error}") from error


def read_object(file: Path, problem: str = "cannot be read as JSON") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: a file that is missing or damaged (`problem` says so), or that holds something else.
    """
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {problem}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object, found {type(value).__name__}")
    return value


def read_kept(file: Path, *keys: str) -> dict[str, Any]:
    """The JSON object in a file that vdjax wrote.

    Raises:
      UserError: a file that is missing, damaged or without one of `keys`.
    """
    value = read_object(file, "cannot be read back")
    for key in keys:
        if key not in value:
            raise UserError(f"{file}: cannot be read back: {key!r} is missing; found {', '.join(value) or 'nothing'}")
    return value


def kept_lines(file: Path, *keys: str) -> list[dict[str, Any]]:
    """The objects in a JSONL file that vdjax adds to; without what comes after the last whole line.

    Raises:
      UserError: a file that is missing, or a line that is damaged or without one of `keys`.
    """
    rows: list[dict[str, Any]] = []
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read back: {error}") from error
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: cannot be read back: {error}") from error
        if not isinstance(row, dict) or not row.keys() >= set(keys):
            expected = f"an object with {', '.join(keys)}" if keys else "an object"
            raise UserError(f"{file}:{number}: cannot be read back: expected {expected}, found {row!r}")
        rows.append(row)
    return rows


def read_array(file: Path, again: str, mode: Literal["r"] | None = "r") -> "np.ndarray":
    """The array in an .npy file that vdjax wrote, mapped into memory unless `mode` is None.

    Raises:
      UserError: a file that is missing or damaged, or holds Python objects; `again` says how it comes to be again.
    """
    import numpy as np

    try:
        return np.load(file, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # of a damaged header NumPy raises whatever Python's tokenizer does
        raise UserError(f"{file}: cannot be read back: {error}; {again}") from error


def read_table(file: Path) -> "pd.DataFrame":
    """A .parquet or .csv file that vdjax wrote.

    Raises:
      UserError: a file that is missing or damaged.
    """
    import pandas as pd
    import pyarrow

    read: Callable[[Path], pd.DataFrame] = pd.read_parquet if file.suffix == ".parquet" else pd.read_csv
    try:
        return read(file)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        again = "remove it, and the command that wrote it writes it again"
        raise UserError(f"{file}: cannot be read back: {error}; {again}") from error


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file next to its place, under a name of this process's own, and moves it there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, file)


def json_objects(
    file: Path, flag: str, wanted: str, added: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, object) of each line of a JSONL file that is not blank.

    Args:
      flag: that named the file.
      wanted: what an object should hold, in words.
      added: fields that the command adds to its rows, and so may not be there.

    Raises:
      UserError: a file that cannot be read or holds no row, or a line that is no object or has a field of `added`.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file}: cannot be read: {error}") from error
    if not text.strip():
        raise UserError(f"{flag} {file}: holds no rows")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with {wanted}, found {type(row).__name__}")
        if taken := [name for name in added if name in row]:
            raise UserError(f"{where}: already has the field {taken[0]!r}, which would be overwritten")
        check_unicode(row, where)
        yield where, row
