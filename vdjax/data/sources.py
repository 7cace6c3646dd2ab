"""Datasets in their own schemas, as examples: a prompt with one response (SFT) or with two (chosen, rejected).

`load` picks a parser by the rows' source. A parser takes one row and returns (prompt, responses), or raises `Dropped`.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from itertools import chain, islice
from pathlib import PurePath
from typing import Any

from vdjax.data.examples import Counts, Dropped, Example, Message
from vdjax.data.parsers import KINDS, MADE_FROM, SIDES, SOURCES, Parser, kinds_of, label_of
from vdjax.data.readers import Row, read_rows
from vdjax.errors import LONGEST_NAME, UserError, listed, nearest

__all__ = ["SOURCES", "Counts", "Example", "Message", "Spec", "load"]


@dataclass(frozen=True)
class Spec:
    """What to load. None, "" and () mean "not given".

    kind: what the stage needs: 'sft', 'preference', 'unpaired' (a response with a label; a pair gives two), 'prompt'
        (without a response) or 'text' (documents for pretraining).
    source: a name in SOURCES, or 'auto' to choose by the columns.
    path: a local file, directory or list of files, or a hub id; revision, split, name (config) and data_dir as in
        `datasets.load_dataset`. Hub ids need a revision.
    skip_examples, max_examples: a window of the usable examples, in file order.
    topic, view, align, questions, min_confidence: for 'persona', see `vdjax.data.persona`.
    align: for 'value-pairs' too: the side, support or oppose, whose answer is the response, or the chosen one.
    hold_out: for 'stances' and 'stance-labels': topics that are left out whole.
    language, drop_toxic, drop_redacted: for 'wildchat': keep one language (such as "English"), and drop conversations
        flagged toxic or with redacted personal data.
    """

    kind: str
    path: str | Sequence[str]
    source: str = "auto"
    revision: str | None = None
    split: str | None = None
    name: str | None = None
    data_dir: str | None = None
    max_examples: int | None = None
    skip_examples: int = 0
    topic: str | None = None
    view: str | None = None
    align: str | None = None
    questions: Sequence[str] = ()
    min_confidence: float = 0.0
    hold_out: Sequence[str] = ()
    language: str | None = None
    drop_toxic: bool = False
    drop_redacted: bool = False


PERSONA_ONLY = ("topic", "view", "align", "questions", "min_confidence")
STANCES = ("stances", "stance-labels")
RENDERING = ("truncation", "assistant_turns")
WILDCHAT_ONLY = ("language", "drop_toxic", "drop_redacted")
TEXTS = ("kind", "source", "revision", "split", "name", "data_dir", "topic", "view", "align", "language")
LISTS = ("questions", "hold_out")  # of texts
SWITCHES = ("drop_toxic", "drop_redacted")


def load(spec: Mapping[str, Any], *, seed: int = 0, counts: Counts) -> Iterator[Example]:
    """Examples of a dataset, lazily and always in the same order.

    The keys of `spec` are the fields of `Spec`; those of a nested `options` count as its own, and the keys of rendering
    that stand beside them in a stage's config (RENDERING) are passed over. Rows are read as the iterator goes, so
    million-row datasets need no memory; `counts` is complete once it is exhausted. Rows behind the last wanted example
    are not read. `seed` orders persona statements and nothing else.

    Raises UserError at the call for a wrong `spec`, missing files and columns that fit no source; and while iterating
    for damaged files and when there is no usable example at all.
    """
    options = _options(spec)
    kind = options.kind
    rows = read_rows(
        options.path, revision=options.revision, split=options.split, name=options.name, data_dir=options.data_dir
    )
    head = list(islice(rows, 100))
    if not head:
        raise UserError(f"data: {options.path} holds no rows")
    source = choose_source(options, head)
    _refuse_foreign_options(options, source)
    if source == "value-pairs" and options.align not in SIDES:
        raise UserError(f"data: source {source!r} needs align, one of {', '.join(SIDES)}; found {options.align!r}")
    counted = _counted(chain(head, rows), counts)
    if options.kind not in SOURCES[source].kinds:
        options = replace(options, kind=next(k for k in MADE_FROM[kind] if k in SOURCES[source].kinds))
    if source == "persona":
        from vdjax.data import persona

        persona.check(options)
        examples = persona.examples(counted, options, seed, counts)
    elif source in STANCES:
        from vdjax.data import stances

        examples = stances.examples(counted, options, seed, counts)
    else:
        examples = _parse_rows(counted, SOURCES[source].parse, options, counts)
    examples = _window(examples, options, counts)
    if options.kind == kind:
        return examples
    return _prompts(examples) if kind == "prompt" else _unpaired(examples)


def _prompts(examples: Iterator[Example]) -> Iterator[Example]:
    return (example._replace(responses=(), label=0.0) for example in examples)


def _unpaired(examples: Iterator[Example]) -> Iterator[Example]:
    for example in examples:
        for response, name, label in zip(example.responses, ("chosen", "rejected"), (1.0, 0.0), strict=True):
            yield Example(f"{example.id}:{name}", example.prompt, (response,), label)


def _counted(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    for row in rows:
        counts.rows += 1
        yield row


def _options(spec: Mapping[str, Any]) -> Spec:
    valid = [f.name for f in fields(Spec)]
    nested = spec.get("options") or {}
    if not isinstance(nested, Mapping):
        raise UserError(f"data: options={nested!r}, expected a dict such as {{'topic': 'tea'}}")
    flat = {key: spec[key] for key in spec if key not in ("options", *RENDERING)} | dict(nested)
    given = {key: value for key, value in flat.items() if value not in (None, "", ())}
    for key in given:
        if key not in valid:
            raise UserError(f"data: unknown key {key!r}{nearest(key, valid)}")
    for key in ("kind", "path"):
        if key not in given:
            raise UserError(f"data: {key!r} is missing")
    _check_types(given)
    options = Spec(**given)
    if options.kind not in KINDS:
        raise UserError(f"data: kind={options.kind!r}{nearest(options.kind, KINDS)}")
    if options.source not in ("auto", *SOURCES):
        raise UserError(f"data: source={options.source!r}{nearest(options.source, ('auto', *SOURCES))}")
    if options.source != "auto" and options.kind not in kinds_of(SOURCES[options.source]):
        kinds = ", ".join(kinds_of(SOURCES[options.source]))
        raise UserError(f"data: source {options.source!r} gives {kinds} examples, but the stage needs {options.kind!r}")
    return options


def _check_types(given: Mapping[str, Any]) -> None:
    def texts(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)

    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        **dict.fromkeys(TEXTS, ("text", lambda v: isinstance(v, str))),
        **dict.fromkeys(LISTS, ("a list of texts", texts)),
        **dict.fromkeys(SWITCHES, ("True or False", lambda v: isinstance(v, bool))),
        **dict.fromkeys(("skip_examples", "max_examples"), ("a whole number, at least 0", _is_count)),
        "path": ("a path, or a list of them", lambda v: isinstance(v, str | PurePath) or texts(v)),
        "min_confidence": ("a number from 0 to 1", lambda v: isinstance(v, int | float) and 0 <= v <= 1),
    }
    for key, value in given.items():
        wanted, fits = expected[key]
        if not fits(value):
            raise UserError(f"data: {key}={value!r}, expected {wanted}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def choose_source(options: Spec, head: Sequence[Row]) -> str:
    """The source's name, checked against the columns of the first rows; UserError when they do not fit."""
    columns = sorted(set().union(*(row.data for row in head)))
    fitting = [name for name, source in SOURCES.items() if options.kind in kinds_of(source)]
    if options.source != "auto":
        fitting = [options.source]
    matches = [name for name in fitting if set(SOURCES[name].columns) <= set(columns)]
    if matches:
        transcripts = isinstance(head[0].data.get("chosen"), str)
        return "hh-rlhf" if matches[0] == "chosen-rejected" and transcripts else matches[0]
    short = [column for column in columns if len(column) <= LONGEST_NAME]
    closest = max(fitting, key=lambda name: _likeness(SOURCES[name].columns, short))
    missing = [c for c in SOURCES[closest].columns if c not in columns]
    hints = "; ".join(f"no column {c!r}{nearest(c, columns)}" for c in missing)
    wanted = " | ".join(dict.fromkeys(", ".join(SOURCES[name].columns) for name in fitting))
    raise UserError(
        f"data: {options.path}: found columns {listed(columns) or '(none)'}; "
        f"{options.kind} examples (source {options.source!r}) need {wanted}; nearest: {closest} ({hints})"
    )


def _likeness(wanted: Sequence[str], found: Sequence[str]) -> float:
    return sum(_likest(w, tuple(found)) for w in wanted) / len(wanted)


@functools.lru_cache(64)
def _likest(wanted: str, found: tuple[str, ...]) -> float:
    return max((SequenceMatcher(None, wanted, f).ratio() for f in found), default=0.0)


def _refuse_foreign_options(options: Spec, source: str) -> None:
    for owner, keys in (("persona", PERSONA_ONLY), ("wildchat", WILDCHAT_ONLY)):
        for key in keys:
            shared = (source, key) == ("value-pairs", "align")
            if source != owner and getattr(options, key) and not shared:
                raise UserError(f"data: {key} is for source {owner!r}, but {options.path} is read as {source!r}")
    if options.hold_out and source not in STANCES:
        raise UserError(f"data: hold_out is for source 'stances', but {options.path} is read as {source!r}")


def _parse_rows(rows: Iterator[Row], parse: Parser, options: Spec, counts: Counts) -> Iterator[Example]:
    for row in rows:
        try:
            prompt, responses = parse(row.data, options)
            label = label_of(row.data, options.kind)
            if len(responses) == 2 and responses[0].strip() == responses[1].strip():
                raise Dropped("equal_responses")
        except Dropped as dropped:
            counts.drop(str(dropped), row.id)
            continue
        yield Example(row.id, prompt, responses, label)


def _window(examples: Iterator[Example], options: Spec, counts: Counts) -> Iterator[Example]:
    for example in islice(examples, options.skip_examples):
        counts.note("skipped_by_config", example.id)
    found = False
    for example in islice(examples, options.max_examples or None):
        found = True
        yield example
    if not found:
        raise UserError("\n".join([f"data: no usable example in {options.path}", *counts.lines(), *counts.meanings()]))
