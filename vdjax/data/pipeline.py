"""From a stage's data to batches: render once, keep on disk, pack, and serve by step with Grain."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from vdjax.data import chat, packing, readers, sources
from vdjax.data.chat import Rendered, Template
from vdjax.data.sources import Counts
from vdjax.errors import UserError


class Dataset(NamedTuple):
    """Rendered examples, concatenated; example i is the slice offsets[i]:offsets[i + 1]."""

    tokens: np.ndarray  # int32 [total]
    loss_mask: np.ndarray  # bool [total]
    branches: np.ndarray  # int8 [total]
    offsets: np.ndarray  # int64 [examples + 1]
    ids: Sequence[str]
    counts: dict[str, Any]  # rows read, dropped and changed, by reason (`sources.Counts`)
    key: str  # hash of all that the tokens depend on

    def __len__(self) -> int:
        return len(self.offsets) - 1


def example(data: Dataset, i: int) -> Rendered:
    part = slice(data.offsets[i], data.offsets[i + 1])
    return Rendered(data.tokens[part], data.loss_mask[part], data.branches[part])


def lengths(data: Dataset) -> np.ndarray:
    return np.diff(data.offsets)


def take(data: Dataset, start: int, stop: int) -> Dataset:
    """Examples start to stop, without copying."""
    whole = slice(data.offsets[start], data.offsets[stop])
    return Dataset(
        data.tokens[whole],
        data.loss_mask[whole],
        data.branches[whole],
        data.offsets[start : stop + 1] - data.offsets[start],
        data.ids[start:stop],
        data.counts,
        f"{data.key}-{start}-{stop}",
    )


def build(stage: ConfigDict, kind: str, tokenizer: Any, template: Template, cache: Path, *, seed: int) -> Dataset:
    """Renders a stage's data, or reads what an earlier run rendered from the same things.

    Args:
      kind: "text", "sft" or "preference".
      cache: folder that keeps rendered data sets by key.

    Raises:
      UserError: as `sources.load` and `chat.render`, or when no example is left.
    """
    source = _spec(stage, kind)
    parts = {
        "format": 2,
        "data": stage.data.to_dict(),
        "files": [
            (str(p), p.stat().st_size, p.stat().st_mtime_ns)
            for p in readers.local_files(source["path"], source["split"])
        ],
        "kind": kind,
        "max_length": stage.max_length,
        "seed": seed,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": (chat.template_hash(template), template.stop_ids, template.end_id, template.bos_ids),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:16]
    folder = cache / key
    if not folder.exists():
        _write(_render_all(stage, kind, tokenizer, template, seed), key, folder)
    return _read(folder)


def _spec(stage: ConfigDict, kind: str) -> dict[str, Any]:
    """A stage's data as `sources.load` takes it: several files, joined by commas in the config, become a list."""
    spec = stage.data.to_dict()
    paths = [part.strip() for part in spec["path"].split(",")]
    return spec | {"kind": kind, "path": paths[0] if len(paths) == 1 else paths}


def _render_all(
    stage: ConfigDict, kind: str, tokenizer: Any, template: Template, seed: int
) -> tuple[list[Rendered], list[str], dict[str, Any]]:
    counts = Counts()
    rendered, ids = [], []
    for item in sources.load(_spec(stage, kind), seed=seed, counts=counts):
        out = chat.render(
            item,
            kind,
            tokenizer,
            template,
            max_length=stage.max_length,
            truncation=stage.data.truncation,
            assistant_turns=stage.data.assistant_turns,
            counts=counts,
        )
        if out is not None:
            rendered.append(out)
            ids.append(item.id)
    if not rendered:
        raise UserError("\n".join([f"data: {stage.data.path}: no example could be rendered", *counts.lines()]))
    return rendered, ids, counts.as_dict()


def _write(content: tuple[list[Rendered], list[str], dict[str, Any]], key: str, folder: Path) -> None:
    """Fills a folder of its own and moves it into place, so that a folder under that name is always whole."""
    rendered, ids, counts = content
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{key}-"))
    np.save(part / "tokens.npy", np.concatenate([r.tokens for r in rendered], dtype=np.int32))
    np.save(part / "loss_mask.npy", np.concatenate([r.loss_mask for r in rendered], dtype=bool))
    np.save(part / "branches.npy", np.concatenate([r.branches for r in rendered], dtype=np.int8))
    np.save(part / "offsets.npy", np.cumsum([0] + [len(r.tokens) for r in rendered]).astype(np.int64))
    (part / "meta.json").write_text(json.dumps({"key": key, "ids": ids, "counts": counts}))
    try:
        part.rename(folder)
    except OSError:  # another process was first, with the same content
        shutil.rmtree(part)


def _read(folder: Path) -> Dataset:
    meta = json.loads((folder / "meta.json").read_text())

    def array(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    tokens, mask, branches, offsets = map(array, ("tokens", "loss_mask", "branches", "offsets"))
    return Dataset(tokens, mask, branches, offsets, meta["ids"], meta["counts"], meta["key"])


def order(n: int, batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """Example indices of each step: every epoch in an order of its own; the last batch may be smaller."""
    return grain.MapDataset.range(n).seed(seed).shuffle().repeat(epochs).batch(batch_size, drop_remainder=False)


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
    reference: np.ndarray | None = None,
) -> grain.MapDataset:
    """Batches of arrays [microbatches, rows, length], with `source` and the examples' `indices` beside them.

    Args:
      reference: float32 [total], reference log-probs aligned with `data.tokens`; becomes `reference_log_probs`.
    """

    def make(indices: np.ndarray) -> dict[str, np.ndarray]:
        chosen = [example(data, i) for i in indices]
        batch = packing.pack(chosen, packing.best_fit([len(e.tokens) for e in chosen], shape.length), shape)
        if reference is not None:
            values = [reference[data.offsets[i] : data.offsets[i + 1]] for i in indices]
            batch["reference_log_probs"] = packing.place(values, batch["source"])
        cut = {k: v.reshape(-1, microbatch_rows, *v.shape[1:]) for k, v in batch.items()}
        return cut | {"indices": np.asarray(indices)}

    return steps.map(make)


def iterate(steps: grain.MapDataset) -> grain.DatasetIterator:
    """An iterator that makes batches ahead of time and whose position can be kept (`get_state`, `set_state`)."""
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def reference_log_probs(
    data: Dataset,
    batch_size: int,
    row_multiple: int,
    score: Callable[[packing.Shape], Callable[[dict[str, np.ndarray]], np.ndarray]],
    progress: Callable[[Iterable, int], Iterable],
) -> np.ndarray:
    """Scores every example once: float32 [total], aligned with `data.tokens`, 0 where nothing is scored.

    Args:
      score: makes, for a shape, the function from a batch to its token log-probs [microbatches, rows, length].
    """
    steps = in_order(len(data), batch_size)
    shape = plan(data, steps, row_length=0, row_multiple=row_multiple)
    run = score(shape)
    out = np.zeros(len(data.tokens), np.float32)
    for batch in progress(iterate(batches(data, steps, shape, row_multiple)), len(steps)):
        grid = run({k: v for k, v in batch.items() if k not in ("source", "indices")})
        source = batch["source"].reshape(-1, shape.length, 2)
        ends = [int(data.offsets[i + 1] - data.offsets[i]) for i in batch["indices"]]
        for i, values in zip(
            batch["indices"], packing.collect(grid.reshape(source.shape[:2]), source, ends), strict=True
        ):
            out[data.offsets[i] : data.offsets[i + 1]] = values
    return out
