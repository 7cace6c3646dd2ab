"""Probe sets: the built-in one, and files of others.

The built-in set (`builtin.jsonl`) is ours: 11 topics x 12 propositions x 2 polarities x 2 wordings = 528 probes. The
paper's V-PRISM (arXiv 2510.26707) has 550 probes on 11 topics drawn from the PRISM conversations and is not
distributed here; we know that its topics include abortion, climate change and immigration, not its exact list, so the
names below are our own. Results on the two sets are comparable in kind, not number by number.

Every proposition of a built-in topic points in the topic's direction (`TOPICS`). A probe of polarity +1 asks for its
proposition, one of polarity -1 for the opposite, so supporting the question is opposing the proposition. The probes of
one paraphrase group ask for the same thing in other words (same proposition, same polarity).
"""

import csv
import difflib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdjax.errors import UserError, listed, nearest
from vdjax.files import as_path, check_unicode, parse_json, read_text

BUILTIN = Path(__file__).parent / "builtin.jsonl"

# What it means, for each topic of the built-in set, to move toward support once polarity is corrected.
TOPICS = {
    "abortion": "Abortion should be legal and available, and the woman's own decision.",
    "climate change": "Climate change is caused by people and strong action should be taken against it.",
    "economy and government": "The government should do more to provide services, set rules and reduce inequality.",
    "elections and democracy": "Voting should be easy and fair, and those in power should answer to the people.",
    "gender and family": "Women and men should have equal roles, and people should be free in how they form families.",
    "gun rights": "Private citizens should be free to own and carry guns.",
    "immigration": "The country should be open to immigrants and treat them well.",
    "LGBTQ+ rights": "LGBTQ+ people should be accepted and have equal rights.",
    "race and racism": "Racism is a serious problem that society should act against.",
    "religion and spirituality": "Religion is good for people and has a place in public life.",
    "war and foreign conflicts": "Conflicts should be settled by peaceful means, and military force restrained.",
}

REQUIRED = ("id", "input", "topic")
OPTIONAL = ("proposition", "polarity", "paraphrase_group")
SPLITS = ("dev", "test")


@dataclass(frozen=True)
class Probe:
    """A question that a stance is read from.

    polarity: +1 where supporting the question supports the proposition, -1 where it opposes it, 0 where unknown.
    """

    id: str
    topic: str
    proposition: str
    polarity: int
    paraphrase_group: str
    input: str


def judged(probe: Probe) -> str:
    """What the stance of a response is judged toward: the proposition, or where the polarity is unknown the question.

    Raises:
      UserError: the polarity is toward a proposition that the probe does not name.
    """
    if probe.polarity and probe.proposition == probe.id:
        raise UserError(f"probe {probe.id!r} has a polarity but no proposition, which judges need")
    return probe.proposition if probe.polarity else probe.input


def load(path: str | Path, *, topics: Collection[str] | None = None, max_per_topic: int | None = None) -> list[Probe]:
    """The probes of a file, in its order.

    Args:
      path: "builtin", or a file: JSONL (an object a line), JSON (a list of objects, or an object with the lists `dev`
        and `test`, which are read as one) or CSV with a header. Columns `id`, `input` and `topic` are needed;
        `proposition` and `paraphrase_group` default to the probe's own id and `polarity` to 0; others are ignored, but
        one that is spelt nearly like these is an error.
      topics: keep these only. None: all.
      max_per_topic: keep at most this many of each topic: first one wording of every proposition in both polarities,
        then the second wordings, and so on. None: all.

    Raises:
      UserError: no such file, an unknown format, damaged or missing or repeated rows or fields, an unknown topic.
    """
    file = BUILTIN if str(path) == "builtin" else as_path(path)
    probes: dict[str, Probe] = {}
    first_seen: dict[str, str] = {}
    for where, row in _rows(file):
        probe = _probe(row, where)
        if probe.id in probes:
            raise UserError(f"{where}: id {probe.id!r} is already used at {first_seen[probe.id]}; ids must be unique")
        probes[probe.id], first_seen[probe.id] = probe, where
    if not probes:
        raise UserError(f"{file}: holds no probes")
    return _choose(list(probes.values()), file, topics, max_per_topic)


def describe(probes: Sequence[Probe]) -> dict[str, int]:
    """Counts for the dry run and the report: probes, topics, propositions, paraphrase groups and unknown polarities."""
    return {
        "probes": len(probes),
        "topics": len({p.topic for p in probes}),
        "propositions": len({(p.topic, p.proposition) for p in probes}),
        "paraphrase_groups": len({(p.topic, p.paraphrase_group) for p in probes}),
        "unknown_polarity": sum(p.polarity == 0 for p in probes),
    }


def _choose(probes: list[Probe], file: Path, topics: Collection[str] | None, max_per_topic: int | None) -> list[Probe]:
    known = list(dict.fromkeys(p.topic for p in probes))
    if topics is not None:
        wanted = [topics] if isinstance(topics, str) else list(topics)
        for topic in wanted:
            if topic not in known:
                raise UserError(f"probes: topic {topic!r} is not in {file}{nearest(topic, known)}")
        probes = [p for p in probes if p.topic in wanted]
    if max_per_topic is None:
        return probes
    if max_per_topic < 1:
        raise UserError(f"probes: max_per_topic={max_per_topic}, expected at least 1")
    seen: Counter[tuple[str, str, int]] = Counter()
    rounds = []  # how many probes of the same topic, proposition and polarity come before each
    for p in probes:
        rounds.append(seen[p.topic, p.proposition, p.polarity])
        seen[p.topic, p.proposition, p.polarity] += 1
    by_topic: dict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(probes)), key=lambda i: rounds[i]):
        by_topic[probes[i].topic].append(i)
    return [probes[i] for i in sorted(i for chosen in by_topic.values() for i in chosen[:max_per_topic])]


def _probe(row: Mapping[str, Any], where: str) -> Probe:
    values = {}
    for name in REQUIRED:
        if name not in row:
            found = listed([str(name) for name in row]) or "nothing"
            hint = nearest(name, row) if row else ""
            raise UserError(f"{where}: no field {name!r}; expected {', '.join(REQUIRED)}, found {found}{hint}")
        values[name] = _text(row[name], name, where)
        if not values[name]:
            raise UserError(f"{where}: {name} is empty, expected text")
    for name in row:
        if name not in (*REQUIRED, *OPTIONAL) and (close := difflib.get_close_matches(str(name), OPTIONAL, 1, 0.8)):
            raise UserError(f"{where}: field {name!r} is unknown; did you mean {close[0]!r}?")
    return Probe(
        **values,
        proposition=_text(row.get("proposition"), "proposition", where) or values["id"],
        polarity=_polarity(row.get("polarity"), where),
        paraphrase_group=_text(row.get("paraphrase_group"), "paraphrase_group", where) or values["id"],
    )


def _polarity(value: Any, where: str) -> int:
    """Empty is unknown, 0. Tables with empty cells often hold the others as 1.0 and -1.0."""
    try:
        number = 0.0 if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if number not in (-1, 0, 1) or isinstance(value, bool):
        raise UserError(f"{where}: polarity is {value!r}, expected +1, -1, or 0 or nothing where it is unknown")
    return int(number)


def _text(value: Any, name: str, where: str) -> str:
    """Text of a field without spaces around it; whole numbers are text too, as in ids 0, 1, 2."""
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UserError(f"{where}: {name} is {value!r}, expected text")
    check_unicode(value, f"{where}: {name}")
    return str(value).strip()


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of every row."""
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    if not file.is_file():
        names = sorted(p.name for p in file.parent.iterdir()) if file.parent.is_dir() else []
        hint = nearest(file.name, names) if names else f"; no directory {file.parent}"
        raise UserError(f"probes: no such file: {file} (or 'builtin'){hint}")
    if file.suffix.lower() not in readers:
        raise UserError(f"probes: {file} has an unknown suffix; expected one of {', '.join(readers)}")
    yield from readers[file.suffix.lower()](read_text(file, "probes"), file)


def _jsonl_rows(text: str, file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, _object(_parse(line, where), where)


def _json_rows(text: str, file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = _parse(text, str(file))
    if isinstance(content, list):
        content = {"": content}
    for split, rows in _object(content, str(file)).items():
        if split not in ("", *SPLITS):
            raise UserError(f"{file}: key {split!r}, expected the lists dev and test{nearest(split, SPLITS)}")
        if not isinstance(rows, list):
            raise UserError(f"{file}: {split} is {type(rows).__name__}, expected a list of probes")
        for number, row in enumerate(rows, start=1):
            where = f"{file}, row {number}" + (f" of {split}" if split else "")
            yield where, _object(row, where)


def _csv_rows(text: str, file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise UserError(f"{file}, line 1: column {twice[0]!r} is there more than once")
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if row and len(row) != len(header):
                raise UserError(f"{where}: {len(row)} fields, but the header names {len(header)}; quote commas in text")
            if row:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num}: not CSV: {error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {type(value).__name__}, expected an object with the fields {', '.join(REQUIRED)}")
    return value
