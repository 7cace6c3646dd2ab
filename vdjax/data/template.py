"""The chat template: which one, and what follows from it and the tokenizer (stop ids, BOS, forbidden text)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from vdjax.data.examples import Dropped, Message
from vdjax.data.tokenizer import byte_characters
from vdjax.errors import UserError, nearest
from vdjax.files import as_path, parse_json, read_text

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase
    Encoder = tokenizers.Tokenizer

DATE = "26 Jul 2024"  # Llama-3.1 templates print a date; theirs when none is given
TEMPLATES = ("plain", "chatml", "llama3")
NO_THOUGHTS = MappingProxyType({"enable_thinking": False})  # known to the templates of Qwen-3 and others


@dataclass(frozen=True)
class Template:
    """A chat template with what follows from it and the tokenizer.

    stop_ids: every id that ends an answer: the tokenizer's eos, those of generation_config.json, the template's end of
        turn. end_id: the one put behind an answer for which the template has none (raw text, documents): the eos.
    bos_ids: what the tokenizer by itself puts before raw text: () or one id.
    forbidden: matches the text of special and stop tokens, which no message may contain.
    options: what the template is told where a response is to be sampled, and only there: what is trained on and scored
        is written without. Variables that the template has not are left out.
    encoder: the tokenizer's own rules, without a post-processor that trims offsets (SmolLM2's leaves spaces out).
    lost_bytes: bytes that a byte-level vocabulary has no token for, so that their characters vanish (SmolLM2's lacks
        those of some control characters).
    """

    name: str
    text: str
    stop_ids: tuple[int, ...]
    end_id: int
    bos_ids: tuple[int, ...]
    forbidden: re.Pattern[str]
    encoder: Encoder
    lost_bytes: bytes
    options: Mapping[str, Any] = field(default_factory=dict)


def template_hash(template: Template) -> str:
    """Twelve hex digits that change with the template's text or with the date it is given."""
    return hashlib.sha256(f"{DATE}\0{template.text}".encode()).hexdigest()[:12]


def read_template(name: str) -> str:
    return resources.files("vdjax.data").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")


def pick_template(
    tokenizer: Tokenizer, name: str = "auto", options: Mapping[str, Any] = NO_THOUGHTS
) -> Template:
    """The template to use: 'auto' (the tokenizer's own, else plain), one of TEMPLATES, or the path of a .jinja file.

    `options` are variables of the template, for what is sampled: see `Template`.

    Raises UserError for unknown names, for an option but NO_THOUGHTS that the template has not, for a tokenizer without
    eos, for tokens that the template needs and the tokenizer lacks, and for a template under which a conversation
    cannot be split: its text up to an answer, with the generation prompt, must be how the text of the whole
    conversation begins.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: it has no eos token, and without one no answer can end")
    bos_ids = _default_bos(tokenizer)
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several by name; the others are for tools
        own = own.get("default")
    if name == "auto" and own:
        name, text = "the tokenizer's own", own
    elif name in ("auto", *TEMPLATES):
        name = "plain" if name == "auto" else name
        text = _vdjax_template(name, tokenizer, bos_ids)
    elif name.endswith(".jinja"):
        if not as_path(name).is_file():
            raise UserError(f"template: no such file: {name}")
        text = read_text(as_path(name), "template")
    else:
        raise UserError(f"template: {name!r} is no name and no .jinja file{nearest(name, ('auto', *TEMPLATES))}")
    text = _without_clock(text, name)
    known = {key: value for key, value in options.items() if re.search(rf"\b{re.escape(key)}\b", text)}
    for key in options.keys() - known.keys() - NO_THOUGHTS.keys():
        raise UserError(f"template: {name} has no variable {key!r}, which tokenizer.template_options sets")
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    encoder, lost = _encoder(tokenizer), _lost_bytes(tokenizer)
    template = Template(name, text, (), tokenizer.eos_token_id, bos_ids, _any_of(special), encoder, lost, known)
    try:
        stops = {tokenizer.eos_token_id, *_generation_stops(tokenizer), *_turn_end(tokenizer, template)}
        _check_template(tokenizer, template)
        template_text(SAMPLE[:1], tokenizer, template, generation_prompt=True, options=known)
    except Dropped as dropped:
        raise UserError(f"template: {name} fails on an ordinary conversation: {dropped.__cause__}") from dropped
    forbidden = _any_of(special | {str(tokenizer.convert_ids_to_tokens(i)) for i in stops})
    return replace(template, stop_ids=tuple(sorted(stops)), forbidden=forbidden)


def _encoder(tokenizer: Tokenizer) -> Encoder:
    from tokenizers import Tokenizer as Backend

    backend = tokenizer.backend_tokenizer
    post = backend.post_processor
    trims = post is not None and re.search(rb'"trim_offsets":\s*true', post.__getstate__())
    if not trims and backend.truncation is None and backend.padding is None:
        return backend
    parts = json.loads(backend.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
    return Backend.from_str(json.dumps(parts))


def _lost_bytes(tokenizer: Tokenizer) -> bytes:
    before = tokenizer.backend_tokenizer.pre_tokenizer
    if before is None or b"ByteLevel" not in before.__getstate__():
        return b""
    vocabulary = tokenizer.get_vocab()
    return bytes(byte for byte, char in enumerate(byte_characters()) if char not in vocabulary)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda t: (-len(t), t)))))


def _without_clock(text: str, name: str) -> str:
    """The template with DATE in place of its calls of the clock: tokens must not depend on the day of the run."""
    date = datetime.strptime(DATE, "%d %b %Y")
    text = re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: repr(date.strftime(call[2])), text)
    if re.search(r"strftime_now\s*\(", text):
        raise UserError(f"template: {name} asks for the time in a way that cannot be replaced by a fixed date")
    return text


def _default_bos(tokenizer: Tokenizer) -> tuple[int, ...]:
    ids = tokenizer("a")["input_ids"]
    return (ids[0],) if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else ()


def _vdjax_template(name: str, tokenizer: Tokenizer, bos_ids: tuple[int, ...]) -> str:
    text = read_template(name)
    if not bos_ids:  # several tokenizers name a BOS that their models have never seen at the start of a text
        text = text.replace("{{- bos_token -}}\n", "")
    vocabulary = tokenizer.get_added_vocab()
    for token in sorted(set(re.findall(r"<\|\w+\|>", text))):
        if token not in vocabulary:
            raise UserError(f"template: {name!r} needs the token {token}, which the tokenizer has not; use 'plain'")
    return text


def _generation_stops(tokenizer: Tokenizer) -> list[int]:
    file = Path(tokenizer.name_or_path) / "generation_config.json"
    if not file.is_file():
        return []
    try:
        value = parse_json(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"tokenizer: {file} is no JSON object: {error}") from error
    stops = [] if value is None else value if isinstance(value, list) else [value]
    for stop in stops:
        is_id = type(stop) is int and 0 <= stop < 2**31  # beyond a machine word the tokenizer overflows
        if not is_id or tokenizer.convert_ids_to_tokens(stop) is None:
            raise UserError(f"tokenizer: {file}: eos_token_id {stop!r:.60} is the id of no token of the tokenizer")
    return stops


SAMPLE: tuple[Message, ...] = (
    {"role": "user", "content": "Hello there."},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Very well."},
)


def _turn_end(tokenizer: Tokenizer, template: Template) -> list[int]:
    """The first added token behind the last answer, if there is one; in some tokenizers it is not marked special."""
    after = template_text(SAMPLE[:2], tokenizer, template).rpartition(SAMPLE[1]["content"])[2]
    added = tokenizer.get_added_vocab()
    found = _any_of(added).search(after)
    return [added[found.group()]] if found and added else []


def _check_template(tokenizer: Tokenizer, template: Template) -> None:
    whole = template_text(SAMPLE, tokenizer, template)
    for turn in (1, 3):
        begun = template_text(SAMPLE[:turn], tokenizer, template, generation_prompt=True)
        if not whole.startswith(begun):
            raise UserError(
                f"template: {template.name}: the text of the first {turn} message(s) with the generation prompt,\n"
                f"{begun!r},\nis not how the whole conversation begins:\n{whole!r}\nso the answer cannot be found in it"
            )
        if SAMPLE[turn]["content"] not in whole[len(begun) :]:
            raise UserError(f"template: {template.name} leaves out the answer {SAMPLE[turn]['content']!r}: {whole!r}")
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise UserError(f"template: {template.name} begins with two BOS tokens: {whole!r}")


def template_text(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: Template,
    generation_prompt: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Messages as the template writes them; Dropped 'template_refuses' when it raises an error about their content."""
    try:
        return str(
            tokenizer.apply_chat_template(
                cast(list[dict[str, str]], list(messages)),
                chat_template=template.text,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                date_string=DATE,
                **options,
            )
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise Dropped("template_refuses") from error  # such as a system message where it knows none
