"""Files that others wrote or that a workdir keeps, on a disk or in a bucket: JSON, tables and text in, whole files out.

Paths on a disk are pathlib's. Those in a bucket, gs://BUCKET/..., are etils', which have the same methods. What the two
cannot do alike is done here and nowhere else: an object in a bucket appears whole or not at all, but it cannot be added
to, mapped into memory or locked, and a folder is only a part of names, which cannot be renamed.
"""

import errno
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import fsspec
from etils import epath

from vdjax.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
AGAIN = "put back a copy of it"  # what is to be done about a file that nothing writes again
DIGEST = 32  # bytes of a SHA-256
UPLOAD_S = 60.0  # between two uploads of a file that grows

# Several hosts write into a bucket, so what one of them has listed once may not be so any more.
for _protocol in ("gs", "gcs"):
    fsspec.config.conf.setdefault(_protocol, {})["use_listings_cache"] = False


def as_path(name: str | os.PathLike[str]) -> Path:
    """The path that a flag or config names: of a disk, or gs://BUCKET/... in Google Cloud Storage.

    On a disk ~ and ~USER are replaced; that of an unknown user stays as it is.

    Raises:
      UserError: what no path can be, such as a name that is too long; another kind of URL, or a bucket without the
        package that reads buckets.
    """
    text = os.fspath(name)
    scheme, is_url, _ = text.partition("://")
    if is_url:
        if scheme != "gs":
            raise UserError(f"{text}: expected a path, or gs://BUCKET/... for a bucket")
        if not importlib.util.find_spec("gcsfs"):
            raise UserError(f"{text}: buckets need a package: pip install 'vdjax[tpu]', or gcsfs alone")
        return cast(Path, epath.Path(text))
    path = Path(text)
    with suppress(RuntimeError):
        path = path.expanduser()
    try:
        path.exists()
    except OSError as error:
        raise UserError(f"{text}: cannot be a path: {error.strerror}") from error
    return path


def in_bucket(path: Path) -> bool:
    return str(path).startswith("gs://")


def absolute(path: Path) -> Path:
    return path if in_bucket(path) else path.resolve()


def url(folder: Path) -> str:
    """What tensorstore takes for a folder."""
    return f"{folder}/" if in_bucket(folder) else f"file://{folder.resolve()}/"


def is_folder(path: Path) -> bool:
    """Whether files can be written there; in a bucket a folder need not be made."""
    return in_bucket(path) or path.is_dir()


def check_no_model(folder: Path) -> None:
    """UserError where a directory already holds a model."""
    if any(folder.glob("*.safetensors*")):
        raise UserError(f"{folder}: already holds safetensors files; give an empty directory")


def content_key(file: Path) -> str:
    """What changes with a file's content: its SHA-256, which copies on several hosts share; in a bucket its generation.

    Raises:
      UserError: it cannot be read.
    """
    try:
        if in_bucket(file):
            return str(fsspec.url_to_fs(str(file))[0].info(str(file))["generation"])
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


def under(folder: Path) -> Iterator[Path]:
    """All files of a folder and of the folders in it."""
    if not in_bucket(folder):
        yield from (path for path in folder.rglob("*") if path.is_file())
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from under(path)
        else:
            yield path


# Writing


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file next to its place, under a name of this process's own, and moves it there."""
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(file):
        file.write_bytes(data)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_bytes(data)
    os.replace(part, file)


def write_array(file: Path, values: "np.ndarray") -> None:
    """Writes an .npy file whole, `with_digest`."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, values)
    write_whole(file, with_digest(content.getvalue()))


def with_digest(content: bytes) -> bytes:
    """The content with its SHA-256 behind it, where NumPy does not look."""
    return content + hashlib.sha256(content).digest()


def append(file: Path, text: str) -> None:
    """Adds to a file; one in a bucket is written anew."""
    if in_bucket(file):
        file.write_bytes((file.read_bytes() if file.exists() else b"") + text.encode())
        return
    with file.open("a", encoding="utf-8") as out:
        out.write(text)


class Growing:
    """A binary file that begins with `start`, grows, and is read by others meanwhile.

    On a disk `start` replaces what was there in one move. In a bucket all is written anew UPLOAD_S seconds after the
    last time, at `sync` and at `close`.
    """

    def __init__(self, file: Path, start: bytes = b"") -> None:
        self.file, self.uploads = file, in_bucket(file)
        if self.uploads:
            self.out: Any = io.BytesIO()
            self.out.write(start)
        else:
            write_whole(file, start)
            self.out = file.open("ab")
        self.next_upload = time.monotonic() + UPLOAD_S

    def write(self, data: bytes) -> None:
        self.out.write(data)

    def flush(self) -> None:
        self.out.flush()
        if self.uploads and time.monotonic() > self.next_upload:
            self.sync()

    def sync(self) -> None:
        """Nothing that was written is lost from here on, whatever becomes of this process, or of a bucket's machine."""
        self.out.flush()
        if self.uploads:
            self.file.write_bytes(self.out.getvalue())
            self.next_upload = time.monotonic() + UPLOAD_S

    def close(self) -> None:
        self.sync()
        self.out.close()


@contextmanager
def filling(folder: Path, last: str) -> Iterator[Path]:
    """A folder on a disk to write files in; those of a bucket are uploaded in the end, `last` after the others.

    Args:
      last: the file that says that the others are there.
    """
    if not in_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="vdjax-") as scratch:
        yield Path(scratch)
        written = sorted(under(Path(scratch)), key=lambda file: file.name == last)
        for file in written:
            _transfer(file, folder / str(file.relative_to(scratch)))


@contextmanager
def making(folder: Path, last: str) -> Iterator[Path]:
    """Like `filling`, of a folder that appears as a whole; on a disk under its name only when it is."""
    if in_bucket(folder):
        with filling(folder, last) as scratch:
            yield scratch
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield part
        part.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def edited(file: Path) -> Iterator[Path]:
    """The file where it can be changed in place; what was changed is in the bucket only afterwards."""
    if not in_bucket(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="vdjax-") as scratch:
        copy = Path(scratch) / file.name
        if file.exists():
            _transfer(file, copy)
        before = copy.read_bytes() if copy.exists() else b""
        try:
            yield copy
        finally:
            if copy.exists() and copy.read_bytes() != before:
                _transfer(copy, file)


def remove_tree(folder: Path) -> None:
    if in_bucket(folder):
        cast(Any, folder).rmtree()
    else:
        shutil.rmtree(folder)


def disk_problem(error: Exception) -> str:
    """What is wrong with the disk that an error comes from, and what to do; empty where it comes from elsewhere."""
    said = re.search(r"os_error_code='(\d+)'", str(error))  # all that tensorstore tells
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    if number not in DISK_ERRORS:
        return ""
    named = re.search(r'local file "([^"]+)"', str(error))
    where = named[1] if named else getattr(error, "filename", None) or "a file"
    if number in (errno.EACCES, errno.EPERM):
        return f"{where}: {os.strerror(number)}; expected files that whoever runs this may read and write"
    return (
        f"{where}: cannot be written: {os.strerror(number)}. What was saved before is whole: make room or mend the disk"
        ", and the same command goes on from there"
    )


# Reading


def local_copy(path: Path) -> Path:
    """A file or folder as it is on a disk: itself, or what was fetched of it, which is kept for the next time."""
    if not in_bucket(path):
        return path
    found = sorted(under(path)) if path.is_dir() else [path]
    about = str(path), [(str(file), content_key(file)) for file in found]
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vdjax" / key / path.name
    if not kept.exists():
        with making(kept.parent, "") as part:
            for file in found:
                copy = part / path.name / str(file.relative_to(path)) if path != file else part / path.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                _transfer(file, copy)
                os.utime(copy, (cast(Any, file.stat()).mtime,) * 2)
    return kept


def _transfer(source: Path, target: Path) -> None:
    with source.open("rb") as content, target.open("wb") as out:
        shutil.copyfileobj(content, out, 16 * 2**20)


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


def _text(file: Path) -> str:
    """In UTF-8, with or without the mark that says so, which etils would keep."""
    return io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="utf-8-sig").read()


def read_text(file: Path, what: str) -> str:
    """A text file in UTF-8, with or without the mark that says so.

    Raises:
      UserError: a file that cannot be read; `what` is in front of its name.
    """
    try:
        return _text(file)
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
    try:
        value = read_object(file, "cannot be read back")
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from error
    for key in keys:
        if key not in value:
            listed = ", ".join(value) or "nothing"
            raise UserError(f"{file}: cannot be read back: {key!r} is missing; found {listed}; {AGAIN}")
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
        raise UserError(f"{file}: cannot be read back: {error}; {AGAIN}") from error
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: cannot be read back: {error}; {AGAIN}") from error
        if not isinstance(row, dict) or not row.keys() >= set(keys):
            expected = f"an object with {', '.join(keys)}" if keys else "an object"
            raise UserError(f"{file}:{number}: cannot be read back: expected {expected}, found {row!r}; {AGAIN}")
        rows.append(row)
    return rows


def read_array(file: Path, again: str, mode: Literal["r"] | None = "r") -> "np.ndarray":
    """The array that `write_array` wrote, mapped into memory unless `mode` is None.

    Raises:
      UserError: a file that is missing or damaged, or holds Python objects; `again` says how it comes to be again.
    """
    import numpy as np

    try:
        copy = local_copy(file)
        content = np.memmap(copy, np.uint8, "r").data
        if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
            raise ValueError("it is not what was written")
        return np.load(copy, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # of a forged header NumPy raises whatever Python's tokenizer does
        raise UserError(f"{file}: cannot be read back: {error}; {again}") from error


def read_table(file: Path) -> "pd.DataFrame":
    """A .parquet or .csv file that vdjax wrote.

    Raises:
      UserError: a file that is missing or damaged.
    """
    import pandas as pd
    import pyarrow

    read: Callable[[IO[bytes]], pd.DataFrame] = pd.read_parquet if file.suffix == ".parquet" else pd.read_csv
    try:
        with file.open("rb") as content:
            return read(content)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        again = "remove it, and the command that wrote it writes it again"
        raise UserError(f"{file}: cannot be read back: {error}; {again}") from error


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
        text = _text(file)
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
