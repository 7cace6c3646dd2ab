"""The value-probe evaluator: every probe under every snapshot, in one program vmapped over snapshots."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from vdjax import hosts, sharding, snapshots
from vdjax.data import packing
from vdjax.errors import UserError
from vdjax.models import hf, lora
from vdjax.models.functional import Model, trained_part
from vdjax.models.log_probs import hidden_states, predecessors, sequence_sums, token_log_probs
from vdjax.models.products import jit
from vdjax.probes.readouts import Item

MOST_ADAPTERS = 16  # snapshots held at once over one base: their activations, not their adapters, fill the memory


class Layout(NamedTuple):
    """Items packed into batches of one shape."""

    batches: list[dict[str, np.ndarray]]  # of what `with_ends_behind` gives
    places: np.ndarray  # int64 [items, 3]: batch, row and first sequence of each item
    shape: packing.Shape  # of what is computed


def layout(items: Sequence[Item], rows: int, shards: int = 1) -> Layout:
    """Packs all items, best fit first, into batches of at most `rows` rows, a multiple of `shards`.

    What the items of a row begin with alike, such as a chat template's beginning, stands in it once, and the last token
    of each answer behind what is computed. Rows are of items of any variant or of one, whose system prompt is then
    shared too, whichever takes less time.
    """
    rendered = [item.rendered for item in items]
    answers = [int(r.branches.max()) for r in rendered]
    sizes = np.array([len(r.tokens) for r in rendered]) - answers
    variants = np.array([item.variant for item in items])
    groupings = [[np.arange(len(items))]]
    if len(set(variants)) > 1:
        groupings.append([np.flatnonzero(variants == v) for v in np.unique(variants)])
    shortest = packing.row_lengths(int(sizes.max()))[0]
    plans = []
    for groups in groupings:
        shared = [packing.shared_start([rendered[i] for i in group]) for group in groups]
        for length in range(shortest, 4 * shortest + 1, packing.LENGTH_MULTIPLE):
            packed = [
                ([int(group[i]) for i in row], once)
                for group, once in zip(groups, shared, strict=True)
                for row in packing.best_fit((sizes[group] - once).tolist(), length - once)
            ]
            count = math.ceil(len(packed) / rows)  # of batches
            each = math.ceil(len(packed) / count / shards) * shards
            plans.append((count * each * packing.row_cost(length), length, each, packed))
    _, length, rows, packed = min(plans, key=lambda plan: plan[0])
    shape = packing.Shape(rows, length, max(sum(answers[i] for i in row) for row, _ in packed))
    prefixes = [once for _, once in packed]
    prefixes = prefixes if any(prefixes) else []
    ends = -(-shape.sequences // packing.LENGTH_MULTIPLE) * packing.LENGTH_MULTIPLE
    batches: list[dict[str, np.ndarray]] = []
    places = np.zeros((len(items), 3), np.int64)
    for start in range(0, len(packed), rows):
        part = [row for row, _ in packed[start : start + rows]]
        whole = shape._replace(length=length + ends)
        batch = with_ends_behind(packing.pack(rendered, part, whole, prefixes[start : start + rows]), length)
        for r, row in enumerate(part):
            firsts = np.cumsum([0] + [answers[i] for i in row])
            for i, first in zip(row, firsts, strict=False):
                places[i] = len(batches), r, first
        batches.append(batch)
    return Layout(batches, places, shape)


COMPUTED_ALONE = ("positions", "segment_ids", "prefix")  # arrays of a batch that have no ends behind them


def with_ends_behind(batch: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """A packed batch whose rows hold the last token of each response behind `length` places: nothing follows it, so
    that it is scored and not computed.

    Returns:
      `positions`, `segment_ids` and `prefix` of the first `length` places, and of all places the other arrays and
      `sources`, the place whose hidden state predicts each token.
    """
    ids = batch["sequence_ids"]
    end = (ids > 0) & (ids != np.pad(ids, ((0, 0), (0, 1)))[:, 1:])
    order = np.argsort(end, axis=1, kind="stable")
    new_places = np.argsort(order, axis=1).astype(np.int32)
    sources = np.take_along_axis(new_places, np.asarray(predecessors(jnp.asarray(ids))), axis=1)
    arrays = {name: x for name, x in batch.items() if name != "source"}
    arrays["sources"] = np.where(batch["loss_mask"], sources, 0)
    moved = {name: np.take_along_axis(x, order, axis=1) for name, x in arrays.items()}
    return {name: x[:, :length] if name in COMPUTED_ALONE else x for name, x in moved.items()}


def own_params(model: Model) -> Any:
    """What differs from snapshot to snapshot, shapes and dtypes: adapters where the model has some, else all."""
    return trained_part(model, model.params)


def groups(
    snapshots: int, model: Model, memory_bytes: float, copies: int = 1, most: int | None = None
) -> list[list[int]]:
    """Snapshot indices of each group that is held at once; all groups have one size, the last repeats its last index.

    Args:
      memory_bytes: for the parameters on all devices: those of each snapshot, and once those that adapters share. 0:
        half of what there is, and at least one snapshot, since what is free for a moment says little.
      copies: of each parameter among the devices.
      most: snapshots of a group, however many fit.

    Raises:
      UserError: not even one snapshot fits.
    """
    one = copies * size_in_bytes(own_params(model))
    shared = copies * size_in_bytes(model.params) - one
    fits = int(((memory_bytes or default_memory()) - shared) // one)
    if not memory_bytes:
        fits = max(fits, 1)
    if fits < 1:
        beside = f" beside the {shared / 1e9:.2f} GB that all share" if model.lora else ""
        raise UserError(
            f"probes.memory_gb: {memory_bytes / 1e9:.2f} GB hold no snapshot of {one / 1e9:.2f} GB{beside}; raise it, "
            "or use more devices"
        )
    if most is None:
        most = MOST_ADAPTERS if model.lora else fits
    count = -(-snapshots // min(fits, most))
    size = -(-snapshots // count)
    indices = [min(i, snapshots - 1) for i in range(count * size)]
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def most_on_cpu(model: Model, mesh: Mesh, memory_bytes: float) -> int | None:
    """Snapshots of a group where a CPU takes one a device; None: as many as the memory holds, which is so on other
    devices, with `memory_bytes` given, and with adapters."""
    if jax.default_backend() != "cpu" or memory_bytes or model.lora:
        return None
    return mesh.size // mesh.shape["tensor"]


def size_in_bytes(params: Any) -> int:
    return sum(math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves(params))


def default_memory() -> float:
    """Half of the memory of all devices together; devices that do not report theirs share the host's.

    Of several hosts the one with the least memory counts for all.
    """
    stats = [d.memory_stats() for d in jax.local_devices()]
    if all(s and "bytes_limit" in s for s in stats):
        least = min(hosts.gather("the memory of all devices", sum(s["bytes_limit"] for s in stats)))
        return 0.5 * least * hosts.count()
    # Processes may stand on one host, so that its memory is counted once.
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return 0.5 * min(hosts.gather("the memory of all hosts", free))


def evaluator_mesh(mesh: Mesh, group_size: int) -> Mesh:
    """The experiment's devices, but for the tensor axis shared out anew: as many as divide the group make the snapshot
    axis, the others share out parameters and rows. Slices lie along the snapshot axis where they can.
    """
    devices = list(mesh.devices.flat)
    slices, tensor = sharding.slice_count(devices), mesh.shape["tensor"]
    others = len(devices) // tensor
    snapshot = math.gcd(group_size, others)
    if snapshot % slices:
        snapshot = math.gcd(group_size, others // slices)
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | {"snapshot": snapshot, "fsdp": others // snapshot, "tensor": tensor}
    return sharding.as_mesh(sharding.device_grid(sizes, devices, across=("snapshot", "fsdp")))


def stacked_shardings(model: Model, mesh: Mesh) -> Any:
    """Shardings of `own_params` with a snapshot axis, which lies where `hf.snapshot_axes` says."""

    def one(leaf: Any, axes: tuple, at: int) -> NamedSharding:
        spec = list(sharding.partition_spec(axes, leaf.shape, mesh.shape))
        spec.insert(at, "snapshot" if mesh.shape["snapshot"] > 1 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    params = own_params(model)
    return jax.tree.map(one, params, trained_part(model, model.axes), hf.snapshot_axes(params))


def stacked_shapes(params: Any, count: int) -> Any:
    """Shapes of the parameters of so many snapshots, of those of one."""

    def one(leaf: Any, at: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leaf.shape[:at], count, *leaf.shape[at:]), leaf.dtype)

    return jax.tree.map(one, params, hf.snapshot_axes(params))


def load(readers: Sequence[hf.Reader], model: Model, mesh: Mesh) -> Any:
    """`own_params` of several snapshots, with a snapshot axis.

    Raises:
      UserError: what was read is not what was saved.
    """
    params = hf.stack_place(readers, own_params(model), stacked_shardings(model, mesh))
    snapshots.check_stacked(readers, params, hf.snapshot_axes(params))
    return params


def score(
    graphdef: Any, stacked: Any, base: Any, batch: dict[str, Array], *, sequences: int, chunk: int
) -> Float[Array, "snapshots rows sequences"]:
    """Log-probs of every sequence under every snapshot.

    The snapshot axis of layer-stacked parameters comes after the layer axis, where the layer loop needs it: vmapped
    from the front, the loop would first copy all parameters to bring it there. `base` has no snapshot axis.

    Args:
      batch: as `with_ends_behind` gives it.
      sequences: most sequences in a row.
      chunk: scored tokens per application of the head.
    """

    def one(params: Any, base: Any, batch: dict[str, Array]) -> Float[Array, "rows sequences"]:
        module = nnx.merge(graphdef, lora.join(base, params))
        length = batch["positions"].shape[1]
        hidden = hidden_states(module, {name: x[:, :length] for name, x in batch.items()})
        log_probs = token_log_probs(module, batch, chunk=chunk, hidden=hidden)
        return sequence_sums(log_probs, batch["sequence_ids"], sequences)

    axes = (hf.snapshot_axes(stacked), None, None)
    return jax.vmap(one, in_axes=axes, spmd_axis_name="snapshot")(stacked, base, batch)


_score = jit(score, static_argnums=0, static_argnames=("sequences", "chunk"))  # once, however many parts a series has


def evaluate(
    model: Model,
    readers: Sequence[hf.Reader],
    items: Sequence[Item],
    mesh: Mesh,
    *,
    base: Any = None,
    rows: int = 0,
    memory_bytes: float = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda batches, total: batches,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores all items under all snapshots.

    Args:
      model: one with adapters is scored over one base that all snapshots share, on `mesh` as it is; of another the
        snapshots are spread over the devices.
      readers: one a snapshot (`snapshots.open_reader`, `hf.open_reader`), of `own_params`.
      base: where the model has adapters, the other parameters, laid out on `mesh`; they are used where they are.
      rows: rows a call; 0 takes four for each batch shard.
      memory_bytes: for the parameters held at once on all devices; 0 takes half of what there is, on CPU one snapshot a
        device: the activations of several fall out of its caches, and took a fifth longer.

    Returns:
      sums: float32 [snapshots, items, answers], log-probs in nats; answers that an item lacks are 0.
      counts: int64 [items, answers], scored tokens.
    """
    copies = mesh.shape["data"] if model.lora else 1
    parts = groups(len(readers), model, memory_bytes, copies, most_on_cpu(model, mesh, memory_bytes))
    mesh = mesh if model.lora else evaluator_mesh(mesh, len(parts[0]))
    shards = sharding.batch_shards(mesh)
    plan = layout(items, -(-(rows or 4 * shards) // shards) * shards, shards)
    most = max(len(item.answers) for item in items)
    sums = np.zeros((len(readers), len(items), most), np.float32)
    batch_of, row_of, first = plan.places.T
    columns = np.minimum(first[:, None] + np.arange(most), plan.shape.sequences - 1)
    has = np.arange(most) < np.array([len(item.answers) for item in items])[:, None]
    with jax.set_mesh(mesh):
        how = {"sequences": plan.shape.sequences, "chunk": model.head_chunk}
        for part in parts:
            params = load([readers[i] for i in part], model, mesh)
            out = []
            for batch in progress(plan.batches, len(plan.batches)):
                arrays = {k: sharding.put_global(v, sharding.rows_sharding(mesh, 2)) for k, v in batch.items()}
                out.append(sharding.fetch(_score(model.graphdef, params, base or {}, arrays, **how)))
            found = np.stack(out, axis=1)[:, batch_of[:, None], row_of[:, None], columns]
            sums[part] = np.where(has, found, 0)
            del params
    counts = np.zeros((len(items), most), np.int64)
    for i, item in enumerate(items):
        scored = item.rendered.branches[item.rendered.loss_mask]
        counts[i, : len(item.answers)] = np.bincount(scored, minlength=len(item.answers) + 1)[1:]
    return sums, counts
