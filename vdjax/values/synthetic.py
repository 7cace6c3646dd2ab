"""Synthetic preference data: for value-laden prompts an answer that supports a proposition and one that opposes it.

As in the paper (arXiv 2510.26707), the two are the same data with the pairs flipped: read
them by the source "value-pairs" with align=support or align=oppose. What a generator writes is kept only where a judge
finds the intended stance in it, and a pair only where its lengths match, so that length is not what is learned.
"""

import hashlib
import json
import re
import tomllib
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vdjax import hosts
from vdjax.data.examples import Counts
from vdjax.data.parsers import SIDES
from vdjax.errors import UserError, nearest
from vdjax.files import append, as_path, json_objects, parse_json, read_text, write_whole
from vdjax.judges.verdicts import LABELS, Exchange, Judge
from vdjax.probes import sets
from vdjax.probes.open_ended import degenerate
from vdjax.probes.sets import Probe

FOLDER = resources.files("vdjax.values") / "templates"
CHUNK = 64  # requests of a local generator between two writes of what it said
MENTIONS = re.compile(
    r"\b(as (you )?(asked|instructed|requested)|the (task|instructions?|prompt)\b|you asked me to|sentences that|"
    r"as an ai|(agrees?|disagrees?) with (this|the) (statement|proposition)|the (statement|proposition)\b)",
    re.I,
)


class Task(NamedTuple):
    """A prompt that both sides are written for; the sides are toward the proposition."""

    id: str
    prompt: str
    topic: str
    proposition: str


class Asked(NamedTuple):
    """What a generator is given."""

    system: str
    user: str
    seed: tuple[int, ...]


class Said(NamedTuple):
    text: str
    finish_reason: str  # "stop", or "length" where it ran out of room


class Generator(NamedTuple):
    hash: str  # of all that its texts depend on beside what it is asked
    write: Callable[[Sequence[Asked]], list[Said]]


class Template(NamedTuple):
    system: str
    user: str
    source: str  # the whole file


class Settings(NamedTuple):
    attempts: int = 4  # at each prompt and side
    max_ratio: float = 1.5  # of the characters of the longer to the shorter answer of a pair
    seed: int = 0


def tasks_of(probes: Sequence[Probe]) -> list[Task]:
    """One for each probe; where the question's direction is unknown, the question stands for the proposition."""
    return [Task(p.id, p.input, p.topic, sets.judged(p)) for p in probes]


def read_tasks(file: Path) -> list[Task]:
    """Tasks of a JSONL file with prompt, topic and proposition, and perhaps id (default: the line's number).

    Raises:
      UserError: no such file, or a line that is not so; names file, line and key.
    """
    out: dict[str, Task] = {}
    for where, row in json_objects(file, "--prompts", "prompt, topic and proposition"):
        row = {"id": where.rpartition(":")[2]} | row
        for name in Task._fields:
            if not isinstance(row.get(name), str) or not row[name].strip():
                found = row.get(name, "nothing")
                raise UserError(f"{where}: {name} must be text, found {found!r}{nearest(name, row)}")
        if row["id"] in out:
            raise UserError(f"{where}: id {row['id']!r} is used twice")
        out[row["id"]] = Task(*(row[name].strip() for name in Task._fields))
    return list(out.values())


def read_template(name: str) -> Template:
    """A template by its name in vdjax/values/templates, or a .toml file: `system` and `user`, jinja texts.

    Raises:
      UserError: no such template, or one without these texts or with other names in them.
    """
    known = sorted(f.name.removesuffix(".toml") for f in FOLDER.iterdir() if f.name.endswith(".toml"))
    if not name.endswith(".toml") and name not in known:
        raise UserError(f"--instructions {name!r} is no name and no .toml file{nearest(name, known)}")
    if name.endswith(".toml") and not as_path(name).is_file():
        raise UserError(f"--instructions {name}: no such file")
    own = name.endswith(".toml")
    source = read_text(as_path(name), "--instructions") if own else (FOLDER / f"{name}.toml").read_text("utf-8")
    try:
        value = tomllib.loads(source)
        made = Template(value["system"], value["user"], source)
        _asked(made, Task("", "_q_", "", "_p_"), SIDES[0], ())
    except Exception as error:  # a template is a program: it can fail in any way
        raise UserError(f"--instructions {name}: expected the jinja texts `system` and `user`: {error}") from error
    return made


def _asked(template: Template, task: Task, side: str, seed: tuple[int, ...]) -> Asked:
    jinja = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    values = {"question": task.prompt, "proposition": task.proposition, "side": side}
    system, user = (jinja.from_string(text).render(values) for text in (template.system, template.user))
    return Asked(system, user, seed)


def seed_of(settings: Settings, task: Task, side: str, attempt: int) -> tuple[int, ...]:
    return settings.seed, zlib.crc32(task.id.encode()), SIDES.index(side), attempt


def synthesize(
    tasks: Sequence[Task],
    generator: Generator,
    judge: Judge,
    template: Template,
    settings: Settings,
    keep: Path | None = None,
) -> tuple[list[dict[str, Any]], Counts]:
    """Pairs, at most one a task, in the tasks' order; and why responses and tasks were left out.

    Each attempt writes both sides of every task that has no pair yet. Of a task's usable answers so far, the two whose
    lengths are nearest make the pair, if the ratio of their lengths allows. Deterministic: a task's pair depends on
    the seed, its id and texts, the generator and the judge, not on the other tasks.

    Args:
      keep: file for all that was written and judged; with it an interrupted run goes on. Whatever in it was asked or
        judged otherwise is not used.

    Returns:
      rows {id, prompt, support, oppose, topic, proposition, seeds, generator_hash, judge_hash}; counts of tasks
      (rows, dropped) and of unusable responses (noted).
    """
    kept = _Kept(keep, generator, judge)
    counts = Counts(rows=len(tasks))
    usable: dict[str, dict[str, list[tuple[str, tuple[int, ...]]]]] = {t.id: {s: [] for s in SIDES} for t in tasks}
    pairs: dict[str, dict[str, Any]] = {}
    for attempt in range(settings.attempts):
        open_ones = [(task, side) for task in tasks if task.id not in pairs for side in SIDES]
        asked = [_asked(template, task, side, seed_of(settings, task, side, attempt)) for task, side in open_ones]
        said = kept.write(asked)
        reasons = [unusable(answer) for answer in said]
        good = [i for i, reason in enumerate(reasons) if not reason]
        exchanges = [
            Exchange(task.proposition, task.prompt, a.text.strip())
            for (task, _), a in zip(open_ones, said, strict=True)
        ]
        stances = kept.judge([exchanges[i] for i in good])
        for i, stance in zip(good, stances, strict=True):
            reasons[i] = "" if stance == open_ones[i][1] else f"judged_{stance}"
        for (task, side), answer, reason, request in zip(open_ones, said, reasons, asked, strict=True):
            if reason:
                counts.note(f"{side}_{reason}", task.id)
            else:
                usable[task.id][side].append((answer.text.strip(), request.seed))
        for task in tasks:
            if task.id not in pairs and (pair := best_pair(usable[task.id], settings.max_ratio)):
                row: dict[str, Any] = {
                    "id": task.id,
                    "prompt": task.prompt,
                    **{side: text for side, (text, _) in pair.items()},
                }
                row |= {"topic": task.topic, "proposition": task.proposition}
                row |= {"seeds": {side: list(seed) for side, (_, seed) in pair.items()}}
                pairs[task.id] = row | {"generator_hash": generator.hash, "judge_hash": judge.hash}
    for task in tasks:
        if task.id not in pairs:
            counts.drop(_why_no_pair(usable[task.id]), task.id)
    return [pairs[task.id] for task in tasks if task.id in pairs], counts


def unusable(said: Said) -> str:
    """Why a response is not worth judging; "" where it is."""
    reason = degenerate(said.text, said.finish_reason)
    if not reason and said.finish_reason == "length":
        reason = "unfinished"
    if not reason and MENTIONS.search(said.text):
        reason = "mentions_the_task"
    return reason


def best_pair(
    usable: dict[str, list[tuple[str, tuple[int, ...]]]], max_ratio: float
) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """One answer of each side, with the least ratio of lengths (the first of equal ones); not the same text twice."""

    def ratio(pair: Sequence[tuple[str, Any]]) -> float:
        short, long = sorted(len(text) for text, _ in pair)
        return long / short

    pairs = [(a, b) for a in usable["support"] for b in usable["oppose"] if a[0].casefold() != b[0].casefold()]
    best = min(pairs, key=ratio, default=None)
    return dict(zip(SIDES, best, strict=True)) if best and ratio(best) <= max_ratio else None


def _why_no_pair(usable: dict[str, list[tuple[str, tuple[int, ...]]]]) -> str:
    missing = [side for side in SIDES if not usable[side]]
    if missing:
        return "no_" + "_no_".join(missing)
    return (
        "identical" if len({text.casefold() for side in SIDES for text, _ in usable[side]}) == 1 else "lengths_differ"
    )


class _Kept:
    """Answers and stances by the hash of all that they depend on; new ones are asked for and written down.

    The file has a line [hash, value] for each, and is only added to.
    """

    def __init__(self, file: Path | None, generator: Generator, judge: Judge) -> None:
        self.file, self.generator, self.verdicts = file, generator, judge
        self.known: dict[str, Any] = {}
        if file is not None:
            self.known = hosts.by_first(f"a look into {file.name}", lambda: _whole_lines(file))

    def write(self, asked: Sequence[Asked]) -> list[Said]:
        names = [_hash("said", self.generator.hash, request) for request in asked]
        for chunk in _missing(names, self.known):
            said = self.generator.write([asked[i] for i in chunk])
            self._add({names[i]: answer for i, answer in zip(chunk, said, strict=True)})
        return [Said(*self.known[name]) for name in names]

    def judge(self, exchanges: Sequence[Exchange]) -> list[str]:
        names = [_hash("judged", self.verdicts.hash, exchange) for exchange in exchanges]
        for chunk in _missing(names, self.known):
            p = self.verdicts.judge([exchanges[i] for i in chunk], 0).p
            self._add({names[i]: LABELS[best] for i, best in zip(chunk, p.argmax(axis=1), strict=True)})
        return [self.known[name] for name in names]

    def _add(self, new: dict[str, Any]) -> None:
        self.known |= new
        if self.file is not None and hosts.index() == 0:
            append(self.file, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in new.items()))


def _whole_lines(file: Path) -> dict[str, Any]:
    """What is kept, without what comes after the last whole line: the process may have been stopped while it wrote.

    Raises:
      UserError: a damaged line.
    """
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    known: dict[str, Any] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            name, value = parse_json(line)
            known[name] = value
        except (ValueError, TypeError) as error:
            what = f"expected [hash, answer]: {error}; remove the line, and it is asked for again"
            raise UserError(f"{file}:{number}: cannot be read back: {what}") from error
    if whole != content:
        write_whole(file, whole)
    return known


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _missing(names: Sequence[str], known: dict[str, Any]) -> Iterator[list[int]]:
    places = [i for i in {name: i for i, name in enumerate(names)}.values() if names[i] not in known]
    for start in range(0, len(places), CHUNK):
        yield places[start : start + CHUNK]
