"""From a stage's data to batches: render once, keep on disk, pack, and serve by step with Grain."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from vdjax import hosts
from vdjax.data import chat, mixture, packing, readers, sources
from vdjax.data.chat import Rendered, Template
from vdjax.data.examples import Example, normal, user_turns
from vdjax.data.sources import Counts
from vdjax.errors import UserError
from vdjax.files import content_key, making, read_array, read_kept, write_array


class Dataset(NamedTuple):
    """Rendered examples, concatenated; example i is the slice offsets[i]:offsets[i + 1]."""

    tokens: np.ndarray  # int32 [total]
    loss_mask: np.ndarray  # bool [total]
    branches: np.ndarray  # int8 [total]
    offsets: np.ndarray  # int64 [examples + 1]
    ids: Sequence[str]
    labels: np.ndarray  # float32 [examples]: `examples.Example.label`
    prompts: Sequence[Any]  # of kind "prompt": each one as the data have it, text or messages; of other kinds empty
    questions: np.ndarray  # int64 [user turns, 2]: its example, and `question_hash` of it
    counts: dict[str, Any]  # rows read, dropped and changed, by reason (`sources.Counts`)
    key: str  # hash of all that the tokens depend on

    def __len__(self) -> int:
        return len(self.offsets) - 1


NO_QUESTIONS = np.zeros((0, 2), np.int64)


def question_hash(text: str) -> int:
    """64 bits of a question's words, so that questions are found again without keeping the texts."""
    return int.from_bytes(hashlib.blake2b(normal(text).encode(), digest_size=8).digest(), "big", signed=True)


def asking(data: Dataset, questions: Iterable[str]) -> list[str]:
    """Ids of the examples in which a user asks one of these questions, word for word, in any turn."""
    wanted = np.array([question_hash(text) for text in questions], np.int64)
    found = data.questions[np.isin(data.questions[:, 1], wanted), 0]
    return [data.ids[i] for i in np.unique(found)]


def example(data: Dataset, i: int) -> Rendered:
    part = slice(data.offsets[i], data.offsets[i + 1])
    return Rendered(data.tokens[part], data.loss_mask[part], data.branches[part])


def of_rendered(rendered: Sequence[Rendered], ids: Sequence[str] = (), key: str = "") -> Dataset:
    """Examples that are not kept on disk."""
    tokens, loss_mask, branches = (np.concatenate(part) for part in zip(*rendered, strict=True))
    offsets = np.cumsum([0, *(len(r.tokens) for r in rendered)])
    labels = np.zeros(len(rendered), np.float32)
    return Dataset(tokens, loss_mask, branches, offsets, ids, labels, (), NO_QUESTIONS, {}, key)


def lengths(data: Dataset) -> np.ndarray:
    return np.diff(data.offsets)


def take(data: Dataset, start: int, stop: int) -> Dataset:
    """Examples start to stop, without copying their tokens."""
    whole = slice(data.offsets[start], data.offsets[stop])
    of = data.questions[:, 0]
    return Dataset(
        data.tokens[whole],
        data.loss_mask[whole],
        data.branches[whole],
        data.offsets[start : stop + 1] - data.offsets[start],
        data.ids[start:stop],
        data.labels[start:stop],
        data.prompts[start:stop],
        data.questions[(start <= of) & (of < stop)] - np.array([start, 0]),
        data.counts,
        f"{data.key}-{start}-{stop}",
    )


def build(stage: ConfigDict, kind: str, tokenizer: Any, template: Template, cache: Path, *, seed: int) -> Dataset:
    """Renders a stage's data, or reads what an earlier run rendered from the same things.

    Args:
      kind: "text", "sft", "preference", "unpaired" or "prompt".
      cache: folder that keeps rendered data sets by key.

    Raises:
      UserError: as `sources.load` and `chat.render`, or when no example is left.
    """
    parts = {
        "format": 5,
        # Without the parts of data that have none: a tuple, or in a config that was written and read again a list.
        "data": {k: v for k, v in stage.data.to_dict().items() if k != "order" and v not in ((), [])},
        "files": [
            (label, content_key(file))
            for source in specs(stage, kind)
            for file, label in readers.local_files(source["path"], source.get("split"))
        ],
        "kind": kind,
        "max_length": longest(stage, kind),
        "seed": seed,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": (chat.template_hash(template), template.stop_ids, template.end_id, template.bos_ids),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:16]
    folder, name = cache / key, ", ".join(str(spec["path"]) for spec in specs(stage, kind))

    def render() -> None:
        if not (folder / "meta.json").exists():
            _write(_render_all(stage, kind, tokenizer, template, seed), key, folder)

    hosts.agree(f"what the data of {name} depend on", parts)
    hosts.by_first(f"the data of {name} to be rendered", render)
    render()  # where the cache is no folder that all processes share, each has one
    return _read(folder)


def longest(stage: ConfigDict, kind: str) -> int:
    """Most tokens of an example: a prompt leaves room for the response that will be sampled."""
    return stage.max_length - (stage.rollout.max_new_tokens if kind == "prompt" else 0)


def specs(stage: ConfigDict, kind: str) -> list[dict[str, Any]]:
    """A stage's data sets as `sources.load` takes them, one for each part of a mixture.

    Several files, joined by commas in the config, become a list.
    """
    whole = {name: value for name, value in stage.data.to_dict().items() if name not in ("parts", "order")}
    parts = [
        {name: value for name, value in part.items() if name not in mixture.SHARE_FIELDS}
        for part in stage.data.get("parts") or ()
    ]
    out = []
    for spec in parts or [whole]:
        paths = [path.strip() for path in spec["path"].split(",")]
        out.append(spec | {"kind": kind, "path": paths[0] if len(paths) == 1 else paths})
    return out


class Content(NamedTuple):
    """What is kept of a rendered data set."""

    rendered: list[Rendered]
    examples: list[Example]
    questions: list[list[int]]  # `question_hash` of what is asked in each
    counts: dict[str, Any]


def _render_all(stage: ConfigDict, kind: str, tokenizer: Any, template: Template, seed: int) -> Content:
    shares = stage.data.get("parts") or ()
    wanted = mixture.shares(shares, stage.data.max_examples) if shares else [None]
    counts = [Counts() for _ in wanted]
    loaded = [sources.load(spec, seed=seed, counts=c) for spec, c in zip(specs(stage, kind), counts, strict=True)]
    if kind == "unpaired":
        loaded = _split(with_mismatched, loaded)
    kept = []
    for part, (examples, c, number) in enumerate(zip(loaded, counts, wanted, strict=True)):
        found = list(itertools.islice(_rendered(examples, stage, kind, tokenizer, template, c), number))
        if number is not None and len(found) < number:
            found_in = f"{len(found)} usable ones in {shares[part]['path']}"
            found_in = "\n".join([found_in, *c.lines(), *c.meanings()])
            raise UserError(f"data.parts[{part}]: {number} examples wanted, {found_in}")
        kept.append(found)
    if not any(kept):
        where = ", ".join(str(spec["path"]) for spec in specs(stage, kind))
        merged = _merged(counts, kept)
        lines = [f"data: {where}: no example could be rendered", *merged.lines(), *merged.meanings()]
        raise UserError("\n".join(lines))
    if not shares:
        rendered, items, asked = zip(*kept[0], strict=True)
        return Content(list(rendered), list(items), list(asked), counts[0].as_dict())
    mixed = [(part, *kept[part][j]) for part, j in mixture.spread([len(found) for found in kept])]
    items = [item._replace(id=mixture.label(part, item.id)) for part, _, item, _ in mixed]
    rendered, questions = [rendered for _, rendered, *_ in mixed], [asked for *_, asked in mixed]
    return Content(rendered, items, questions, _merged(counts, kept).as_dict())


def _rendered(
    examples: Iterable[Example], stage: ConfigDict, kind: str, tokenizer: Any, template: Template, counts: Counts
) -> Iterator[tuple[Rendered, Example, list[int]]]:
    """Each example as tokens; without its texts, but for prompts that are sampled from; and what it asks."""
    for item in examples:
        out = chat.render(
            item,
            kind,
            tokenizer,
            template,
            max_length=longest(stage, kind),
            truncation=stage.data.truncation,
            assistant_turns=stage.data.assistant_turns,
            counts=counts,
        )
        if out is not None:
            asked = [] if kind == "text" else [question_hash(turn) for turn in user_turns(item.prompt)]
            yield out, item._replace(responses=(), prompt=item.prompt if kind == "prompt" else ""), asked


def _split(change: Callable[[list[Example]], list[Example]], parts: Sequence[Iterable[Example]]) -> list[Any]:
    """Parts changed as one list of examples."""
    lists = [list(part) for part in parts]
    changed = iter(change([example for part in lists for example in part]))
    return [list(itertools.islice(changed, len(part))) for part in lists]


def _merged(counts: Sequence[Counts], kept: Sequence[Sequence[tuple[Rendered, Example, list[int]]]]) -> Counts:
    """The counts of all parts together, and how many examples came from each."""
    out = Counts(rows=sum(c.rows for c in counts))
    for part, c in enumerate(counts):
        out.dropped.update(c.dropped)
        out.noted.update(c.noted)
        out.first = {reason: mixture.label(part, id) for reason, id in c.first.items()} | out.first
    for part, found in enumerate(kept):
        if found:
            out.noted[f"from_part_{part}"] = len(found)
            out.first[f"from_part_{part}"] = mixture.label(part, found[0][1].id)
    return out


def with_mismatched(examples: list[Example]) -> list[Example]:
    """Each example with a second response, that of another prompt (for KTO's estimate of the KL).

    It is that of the next example with another prompt and the same label, if there is one, so that desirable and
    undesirable responses count in the estimate as they do in the data.

    Raises:
      UserError: all prompts are the same.
    """
    if all(example.prompt == examples[0].prompt for example in examples):
        raise UserError("data: unpaired examples need at least two prompts, but all have the same")

    def other(at: int) -> str:
        after = itertools.chain(range(at + 1, len(examples)), range(at))
        elsewhere = (i for i in after if examples[i].prompt != examples[at].prompt)
        first = next(elsewhere)
        same = (i for i in (first, *elsewhere) if examples[i].label == examples[at].label)
        return examples[next(same, first)].responses[0]

    return [e._replace(responses=(e.responses[0], other(at))) for at, e in enumerate(examples)]


def _write(content: Content, key: str, folder: Path) -> None:
    """Writes a folder that is always whole where it has a meta.json."""
    rendered, examples, questions, counts = content
    with making(folder, "meta.json") as part:
        write_array(part / "tokens.npy", np.concatenate([r.tokens for r in rendered], dtype=np.int32))
        write_array(part / "loss_mask.npy", np.concatenate([r.loss_mask for r in rendered], dtype=bool))
        write_array(part / "branches.npy", np.concatenate([r.branches for r in rendered], dtype=np.int8))
        write_array(part / "offsets.npy", np.cumsum([0] + [len(r.tokens) for r in rendered]).astype(np.int64))
        write_array(part / "labels.npy", np.array([e.label for e in examples], np.float32))
        flat = [(i, question) for i, asked in enumerate(questions) for question in asked]
        write_array(part / "questions.npy", np.array(flat, np.int64).reshape(-1, 2))
        prompts = [e.prompt for e in examples] if any(e.prompt for e in examples) else []
        meta = {"key": key, "ids": [e.id for e in examples], "prompts": prompts, "counts": counts}
        (part / "meta.json").write_text(json.dumps(meta))


def _read(folder: Path) -> Dataset:
    """What `_write` wrote; UserError where it is damaged."""
    meta = read_kept(folder / "meta.json", "ids", "prompts", "counts", "key")

    def array(name: str, mode: Literal["r"] | None = "r") -> np.ndarray:
        return read_array(folder / f"{name}.npy", f"remove {folder}, and the data are rendered again", mode)

    tokens, mask, branches, offsets, labels = map(array, ("tokens", "loss_mask", "branches", "offsets", "labels"))
    known = meta["ids"], labels, meta["prompts"], array("questions", None), meta["counts"], meta["key"]
    return Dataset(tokens, mask, branches, offsets, *known)


def order(
    n: int, batch_size: int, epochs: int, seed: int, parts: Int[np.ndarray, " n"] | None = None
) -> grain.MapDataset:
    """Example indices of each step: every epoch in an order of its own; the last batch may be smaller.

    Args:
      parts: of a curriculum, the part that each example is of: each epoch goes through them by number, and each time
        through the examples of a part in another order.
    """
    if parts is None:
        epoch = grain.MapDataset.range(n).seed(seed).shuffle()
    else:
        groups = [np.flatnonzero(parts == part) for part in np.unique(parts)]
        epoch = grain.MapDataset.concatenate([grain.MapDataset.source(g).seed(seed).shuffle() for g in groups])
    return epoch.repeat(epochs).batch(batch_size, drop_remainder=False)


def in_order(n: int, batch_size: int) -> grain.MapDataset:
    """Example indices of each batch, in the data's own order."""
    return grain.MapDataset.range(n).batch(batch_size, drop_remainder=False)


def plan(data: Dataset, steps: grain.MapDataset, *, row_length: int, row_multiple: int) -> packing.Shape:
    """The static shape that every batch of `steps` fits.

    Args:
      row_length: tokens of a row, or 0 for the length that leaves the least padding (looked for on 200 batches).
      row_multiple: the number of rows is rounded up to a multiple of this.

    Raises:
      UserError: an example is longer than the row.
    """
    sizes = lengths(data)
    longest = int(sizes.max())
    if row_length and longest > row_length:
        culprit = data.ids[int(sizes.argmax())]
        raise UserError(
            f"row_length={row_length}, but example {culprit} has {longest} tokens; raise row_length to that"
        )

    def packed(step: int, length: int) -> list[list[int]]:
        return packing.best_fit([int(sizes[i]) for i in steps[step]], length)

    if not row_length:
        some = range(0, len(steps), -(-len(steps) // 200))

        def cost(length: int) -> float:
            rows = sum(-(-len(packed(s, length)) // row_multiple) * row_multiple for s in some)
            return rows * packing.row_cost(length)

        row_length = min(packing.row_lengths(longest), key=cost)
    branches = np.maximum.reduceat(data.branches, data.offsets[:-1])
    rows = sequences = 0
    for step in range(len(steps)):
        indices = steps[step]
        layout = packing.best_fit([int(sizes[i]) for i in indices], row_length)
        rows = max(rows, len(layout))
        sequences = max(sequences, *(int(branches[indices[row]].sum()) for row in layout))
    return packing.Shape(-(-rows // row_multiple) * row_multiple, row_length, sequences)


def batches(
    data: Dataset,
    steps: grain.MapDataset,
    shape: packing.Shape,
    microbatch_rows: int,
    per_token: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> grain.MapDataset:
    """Batches of arrays [microbatches, rows, length], with `source` and the examples' `indices` beside them.

    Args:
      per_token: further arrays of the batch by name: float32 [total], aligned with `data.tokens`.
    """

    def make(indices: np.ndarray) -> dict[str, np.ndarray]:
        chosen = [example(data, i) for i in indices]
        batch = packing.pack(chosen, packing.best_fit([len(e.tokens) for e in chosen], shape.length), shape)
        for name, array in per_token.items():
            values = [array[data.offsets[i] : data.offsets[i + 1]] for i in indices]
            batch[name] = packing.place(values, batch["source"])
        cut = {k: v.reshape(-1, microbatch_rows, *v.shape[1:]) for k, v in batch.items()}
        return cut | {"indices": np.asarray(indices)}

    return steps.map(make)


def iterate(steps: grain.MapDataset) -> grain.DatasetIterator:
    """An iterator that makes batches ahead of time and whose position can be kept (`get_state`, `set_state`)."""
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def score(
    data: Dataset,
    batches: grain.MapDataset | Sequence[dict[str, np.ndarray]],
    run: Callable[[dict[str, np.ndarray]], np.ndarray],
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> np.ndarray:
    """A value of every token: float32 [total], aligned with `data.tokens`.

    Args:
      batches: that together hold every example once.
      run: from a batch to its values [microbatches, rows, length].
    """
    out = np.zeros(len(data.tokens), np.float32)
    for batch in progress(iterate(batches), len(batches)):
        grid, source = run(batch), batch["source"]
        used = source[..., 0] >= 0
        example, token = source[used].T
        out[data.offsets[batch["indices"][example]] + token] = grid[used]
    return out
