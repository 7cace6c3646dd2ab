"""People as a judge: labels of a sample of the responses, in a CSV file.

Columns: proposition, question and response (as they were shown), label (of LABELS; empty: not labelled yet), and
perhaps graded (stance in [-1, 1], where the label takes one) and annotator. Several annotators may label the same
response: p is their share, graded their mean. `write_sheet` makes a file to be filled in.
"""

import csv
import hashlib
import io
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vdjax.errors import UserError, nearest
from vdjax.files import as_path, write_whole
from vdjax.judges.verdicts import LABELS, Exchange, Judge, Verdicts

COLUMNS = (*Exchange._fields, "label", "graded", "annotator")
NEEDED = COLUMNS[:4]
GRADED = {"support": 1.0, "neutral": 0.0, "oppose": -1.0}  # where the file does not say how strong
# Spreadsheets take a cell that begins with one of these for a formula; an apostrophe in front makes it text.
FORMULA = "=+-@\uff1d\uff0b\uff0d\uff20'"


class HumanLabel(NamedTuple):
    where: str
    label: str
    graded: float  # NaN: no stance
    annotator: str


def open_human(name: str, fields: Mapping[str, Any]) -> Judge:
    """The judge of the CSV file `fields["path"]`.

    A response is found by its proposition, question and text, however it is spaced. Responses without labels have NaN
    in p and graded. So has every repeat but 0: the labels are given once.

    Raises:
      UserError: see `read_labels`.
    """
    file = as_path(fields["path"])
    labels = read_labels(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]

    def judge(exchanges: Sequence[Exchange], repeat: int) -> Verdicts:
        p, graded = np.full((len(exchanges), len(LABELS)), np.nan), np.full(len(exchanges), np.nan)
        for i, exchange in enumerate(exchanges):
            given = labels.get(_spaced(exchange), []) if repeat == 0 else []
            if given:
                p[i] = np.mean([[x.label == label for label in LABELS] for x in given], axis=0)
                strengths = [x.graded for x in given if not np.isnan(x.graded)]
                graded[i] = np.mean(strengths) if strengths else np.nan
        return Verdicts(p, graded)

    return Judge(name, digest, judge)


def read_labels(file: Path) -> dict[Exchange, list[HumanLabel]]:
    """The labels of each response, whose texts have single spaces; rows whose label is empty are left out.

    Raises:
      UserError: no such file, missing or unknown columns, a row that does not fit, an unknown label, a graded stance
        that does not fit its label, two labels of one annotator for a response; no label at all.
    """
    if not file.is_file():
        siblings = sorted(f.name for f in file.parent.glob("*.csv")) if file.parent.is_dir() else []
        raise UserError(f"human labels: no such file: {file}" + (nearest(file.name, siblings) if siblings else ""))
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text; save it as CSV UTF-8: {error}") from error
    labels: dict[Exchange, list[HumanLabel]] = defaultdict(list)
    for where, row in _rows(text, file):
        if not row["label"].strip():
            continue
        exchange = _spaced(Exchange(*(_plain(row[name]) for name in Exchange._fields)))
        label = _label(row, where)
        for other in labels[exchange]:
            if label.annotator and label.annotator == other.annotator:
                raise UserError(f"{where}: annotator {label.annotator!r} has labelled this response at {other.where}")
        labels[exchange].append(label)
    if not labels:
        raise UserError(f"{file}: no row has a label; expected one of {', '.join(LABELS)} in the column label")
    return dict(labels)


def write_sheet(exchanges: Sequence[Exchange], file: Path, n: int, seed: int) -> int:
    """Writes a CSV file for people to fill in; the number of its rows.

    `n` of the exchanges (all where there are fewer; the same text only once) are drawn and shuffled by `seed`, so that
    neither order nor stage tells the annotator what to expect. Cells that a spreadsheet would take for a formula have
    an apostrophe in front, which `read_labels` takes away.
    """
    distinct = sorted({_spaced(exchange): exchange for exchange in exchanges}.values())
    chosen = random.Random(seed).sample(distinct, min(n, len(distinct)))
    out = io.StringIO(newline="")
    sheet = csv.writer(out, quoting=csv.QUOTE_ALL)
    sheet.writerow(COLUMNS)
    sheet.writerows([*map(_defused, exchange), "", "", ""] for exchange in chosen)
    write_whole(file, out.getvalue().encode("utf-8-sig"))  # Excel takes UTF-8 without the mark for Latin-1
    return len(chosen)


def _defused(text: str) -> str:
    return f"'{text}" if text.lstrip()[:1] in tuple(FORMULA) else text


def _plain(cell: str) -> str:
    """What `_defused` was given. A text that people quoted themselves ('so') is not touched."""
    return cell[1:] if cell.startswith("'") and cell[1:].lstrip()[:1] in tuple(FORMULA) else cell


def _spaced(exchange: Exchange) -> Exchange:
    """With single spaces: spreadsheets change line ends and margins."""
    return Exchange(*(" ".join(text.split()) for text in exchange))


def _rows(text: str, file: Path) -> list[tuple[str, dict[str, str]]]:
    reader, found = csv.reader(io.StringIO(text, newline=""), strict=True), []
    try:
        header = [name.strip() for name in next(reader, [])]
        for name in NEEDED:
            if name not in header:
                raise UserError(f"{file}, line 1: no column {name!r}{nearest(name, header or ['(empty file)'])}")
        for name in header:
            if name not in COLUMNS or header.count(name) > 1:
                raise UserError(f"{file}, line 1: column {name!r} is unknown or doubled{nearest(name, COLUMNS)}")
        first = reader.line_num + 1
        for cells in reader:
            where, first = f"{file}, line {first}", reader.line_num + 1
            if cells and len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} cells, but the header names {len(header)}; quote commas")
            if cells:
                found.append((where, {**dict.fromkeys(COLUMNS, ""), **dict(zip(header, cells, strict=True))}))
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not CSV: {error}") from error
    return found


def _label(row: Mapping[str, str], where: str) -> HumanLabel:
    label, strength = row["label"].strip(), row["graded"].strip()
    if label not in LABELS:
        raise UserError(f"{where}: label {label!r} is unknown{nearest(label, LABELS)}")
    graded = GRADED.get(label, float("nan"))
    if strength:
        try:
            graded = float(_plain(strength))
        except ValueError:
            graded = float("nan")
        low, high = {"support": (0, 1), "neutral": (-1, 1), "oppose": (-1, 0)}.get(label, (1, -1))
        if not low <= graded <= high:
            expected = f"a number from {low} to {high}" if low < high else "nothing"
            raise UserError(f"{where}: graded {strength!r}, expected {expected} for the label {label!r}")
    return HumanLabel(where, label, graded, row["annotator"].strip())
