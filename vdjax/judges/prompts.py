"""How a local judge is asked: templates, which are TOML files in vdjax/judges/templates or of the user's own.

A template has `prompt` (jinja text with `proposition`, `question`, `response` and `options`), `labels`, and two
switches: `chat` and `letters`. Its name carries its version, and its text is part of a judge's hash.
"""

import functools
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vdjax.errors import UserError, nearest
from vdjax.files import as_path, read_text
from vdjax.judges.verdicts import LABELS, Exchange

FOLDER = resources.files("vdjax.judges") / "templates"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
KEYS = ("chat", "letters", "prompt", "labels")
BRACKETS = str.maketrans("<>", "‹›")


class Label(NamedTuple):
    """An answer that the judge may give."""

    text: str  # what it answers, or the option whose letter it answers
    label: str  # of LABELS
    graded: float | None  # stance in [-1, 1]; None where no stance is taken


class JudgeTemplate(NamedTuple):
    name: str
    chat: bool  # the prompt is a user's message; else plain text that the answer follows at once
    letters: bool  # answers are letters of options, shown in every rotation of an order; else the labels' texts
    prompt: str
    labels: tuple[Label, ...]
    source: str  # the whole file


def names() -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in FOLDER.iterdir() if file.name.endswith(".toml"))


def read_template(name: str) -> JudgeTemplate:
    """A template of vdjax by its name, or a file that ends with .toml.

    Raises:
      UserError: no such template, or one that is not as the module says; names file and key.
    """
    if name.endswith(".toml"):
        if not as_path(name).is_file():
            raise UserError(f"judge template: no such file: {name}")
        source = read_text(as_path(name), "judge template")
    elif name in names():
        source = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise UserError(f"judge template {name!r} is no name and no .toml file{nearest(name, names())}")
    try:
        value = tomllib.loads(source)
    except (ValueError, RecursionError) as error:
        raise UserError(f"judge template {name}: is no TOML: {error}") from error
    for key in [*KEYS, *value]:
        if key not in value:
            raise UserError(f"judge template {name}: {key!r} is missing")
        if key not in KEYS:
            raise UserError(f"judge template {name}: unknown key {key!r}{nearest(key, KEYS)}")
    for key, kind in zip(KEYS, (bool, bool, str, list), strict=True):
        if not isinstance(value[key], kind):
            raise UserError(f"judge template {name}: {key} must be {kind.__name__}, found {value[key]!r}")
    labels = tuple(_label(item, f"judge template {name}: labels[{i}]") for i, item in enumerate(value["labels"]))
    if not 2 <= len(labels) <= len(LETTERS) or len({x.text for x in labels}) < len(labels):
        raise UserError(f"judge template {name}: expected 2 to {len(LETTERS)} labels with different texts")
    if not any(x.graded is not None for x in labels):
        raise UserError(f"judge template {name}: no label has `graded`, so that there would be no stance")
    template = JudgeTemplate(name, value["chat"], value["letters"], value["prompt"], labels, source)
    try:
        probe = prompt_text(template, Exchange("_p_", "_q_", "_r_"), range(len(labels)))
    except Exception as error:  # a template is a program: it can fail in any way
        raise UserError(f"judge template {name}: prompt: {type(error).__name__}: {error}") from error
    for part in ("_p_", "_r_"):
        if part not in probe:
            raise UserError(f"judge template {name}: prompt must show {{{{ proposition }}}} and {{{{ response }}}}")
        if probe.endswith(part):
            raise UserError(f"judge template {name}: prompt must end with words of its own, which the answer follows")
    return template


def _label(item: Any, where: str) -> Label:
    if not isinstance(item, dict) or not set(item) <= set(Label._fields):
        raise UserError(f"{where}: expected text, label and perhaps graded, found {item!r}")
    if not isinstance(item.get("text"), str) or not item["text"].strip():
        raise UserError(f"{where}: text must be text, found {item.get('text')!r}")
    if item.get("label") not in LABELS:
        raise UserError(f"{where}: label={item.get('label')!r}{nearest(item.get('label'), LABELS)}")
    graded = item.get("graded")
    if graded is not None and (isinstance(graded, bool) or not isinstance(graded, int | float) or not abs(graded) <= 1):
        raise UserError(f"{where}: graded={graded!r}, expected a number in [-1, 1]")
    return Label(item["text"], item["label"], None if graded is None else float(graded))


def prompt_text(template: JudgeTemplate, exchange: Exchange, order: Sequence[int]) -> str:
    """The prompt about an exchange, options in the order of these indices into the labels.

    The exchange's texts are quoted: they hold no angle bracket, and so cannot close the tag that they stand in.
    """
    options = [{"letter": letter, "text": template.labels[i].text} for letter, i in zip(LETTERS, order, strict=False)]
    quoted = {key: quote(value) for key, value in exchange._asdict().items()}
    return _compiled(template.prompt).render(options=options, **quoted)


@functools.cache
def _compiled(prompt: str) -> Template:
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True).from_string(prompt)


def quote(text: str) -> str:
    """The text with ‹ and › for angle brackets, and without characters that are no Unicode text."""
    return text.translate(BRACKETS).encode("utf-8", "replace").decode("utf-8")


def answers(template: JudgeTemplate) -> tuple[str, ...]:
    """What the judge may answer, in the order of the options."""
    return tuple(LETTERS[: len(template.labels)]) if template.letters else tuple(x.text for x in template.labels)
