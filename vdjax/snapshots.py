"""Orbax: when snapshots are taken, snapshots, resume points, and slices of a snapshot read through tensorstore.

Either is saved with a checksum of every array, which is compared when the whole array is back on the devices: what is
on a disk or in a bucket may have changed.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from vdjax import hosts, sharding
from vdjax.errors import UserError
from vdjax.files import AGAIN, absolute, in_bucket, read_kept, url
from vdjax.models import hf
from vdjax.progress import say

COMMITTED = "commit_success.txt"  # Orbax's mark of a whole snapshot
ABOUT = "_CHECKPOINT_METADATA"  # Orbax's file for what is saved beside arrays
CHUNK_BYTES = 32 * 2**20  # of a chunk before it is compressed, at most


@dataclass(frozen=True)
class Reader:
    """Reads any slice of any parameter of a snapshot."""

    snapshot: Path
    checksums: Mapping[str, int]  # of whole parameters, as they were saved; empty where none were
    read: Callable[[tuple[str, ...], tuple[slice, ...]], np.ndarray]

    def __call__(self, path: tuple[str, ...], index: tuple[slice, ...]) -> np.ndarray:
        return self.read(path, index)


def schedule(total_steps: int, *, log_spaced: int, every: int) -> list[int]:
    """Steps at which snapshots are taken: the first, the last, `log_spaced` between them, and multiples of `every`."""
    steps = {0, total_steps}
    if log_spaced:
        ratio = math.log(total_steps) / (log_spaced + 1)
        steps |= {round(math.exp(ratio * i)) for i in range(1, log_spaced + 1)}
    if every:
        steps |= set(range(every, total_steps, every))
    return sorted(s for s in steps if s <= total_steps)


def kept(folder: Path) -> list[int]:
    """Steps of the snapshots in `folder` that are whole.

    Orbax renames a snapshot into place when it is; in a bucket, where that cannot be done, it leaves a mark in it.
    """
    found = [p for p in folder.glob("*") if p.name.isdigit()] if folder.is_dir() else []
    return sorted(int(p.name) for p in found if not in_bucket(p) or (p / COMMITTED).exists())


def apart(name: str) -> ocp.options.MultiprocessingOptions:
    """So that processes which save snapshots and resume points at once do not meet at each other's barriers."""
    return ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)


def saver() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=apart("snapshots"))


def save(checkpointer: ocp.AsyncCheckpointer, folder: Path, step: int, params: Any) -> None:
    """Starts to write a snapshot; one that is there is left alone, since the same step gives the same values."""
    if not hosts.by_first("a look for a snapshot", lambda: step in kept(folder)):
        about = {"checksums": checksums(params)}
        # Over what an interruption left of it in a bucket.
        where, args = absolute(folder) / str(step), ocp.args.StandardSave(params, jax.tree.map(in_chunks, params))
        checkpointer.save(where, args=args, force=True, custom_metadata=about)


def in_chunks(parameter: jax.Array) -> ocp.SaveArgs:
    """Each layer of a stacked kernel in chunks of its own: who reads a slice unpacks the chunks it lies in whole."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if parameter.ndim == 3 else ())


def open_reader(snapshot: Path) -> Reader:
    """A function that reads any slice of any parameter of a snapshot, and nothing else.

    Raises:
      UserError: not a snapshot, or a damaged one.
    """
    if not (snapshot / (COMMITTED if in_bucket(snapshot) else "_METADATA")).exists():
        siblings = kept(snapshot.parent)
        raise UserError(f"{snapshot} is no snapshot" + (f"; steps there: {siblings}" if siblings else ""))
    about = read_kept(snapshot / ABOUT).get("custom_metadata") or {}
    saved = about.get("checksums", {}) if isinstance(about, dict) else None
    if not isinstance(saved, dict):
        raise UserError(f"{snapshot / ABOUT}: cannot be read back: no checksums by parameter; {AGAIN}")
    stores: dict[tuple[str, ...], Any] = {}

    def read(path: tuple[str, ...], index: tuple[slice, ...]) -> np.ndarray:
        try:
            if path not in stores:
                kvstore = {"driver": "ocdbt", "base": url(snapshot), "path": ".".join(path) + "/"}
                stores[path] = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
            return stores[path][index].read().result()
        except ValueError as error:
            name = ".".join(path)
            why = str(error).partition(" [tensorstore_spec")[0]
            raise UserError(f"{snapshot}: parameter {name} cannot be read: {why}. {how_to_mend(snapshot)}") from None

    return Reader(snapshot, saved, read)


def place(reader: Reader, abstract_params: Any, shardings: Any) -> Any:
    """`hf.place` of a snapshot.

    Raises:
      UserError: a parameter is not what was saved.
    """
    params = hf.place(reader, abstract_params, shardings)
    _compare(reader, checksums(params))
    return params


def check_stacked(readers: Sequence[Any], params: Any, axes: Any) -> None:
    """UserError where a parameter is not what was saved; what another function than `open_reader` read is not checked.

    Args:
      params: of all snapshots, with a snapshot axis where `axes` says.
    """
    if not any(isinstance(reader, Reader) and reader.checksums for reader in readers):
        return
    sums = _stacked_sums(jax.tree.leaves(params), tuple(jax.tree.leaves(axes)))
    found = {name: sharding.fetch(values) for name, values in _named(params, sums).items()}
    for i, reader in enumerate(readers):
        if isinstance(reader, Reader):
            _compare(reader, {name: int(values[i]) for name, values in found.items()})


def _compare(reader: Reader, found: Mapping[str, int]) -> None:
    for name in _changed(reader.checksums, found):
        raise UserError(
            f"{reader.snapshot}: {name} is not what was saved: files in there are damaged. "
            f"{how_to_mend(reader.snapshot)}"
        )


def how_to_mend(snapshot: Path) -> str:
    stage = snapshot.parents[1]
    return f"Put back a copy of it, or remove {stage}: the run's command trains that stage again, to the same values"


def _changed(saved: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Names of arrays whose checksum is another; what was read as another dtype has another name."""
    return [name for name, value in found.items() if saved.get(name, value) != value]


def resume_manager(folder: Path) -> ocp.CheckpointManager:
    """Rolling resume points; the last two are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, multiprocessing_options=apart("resume"))
    return ocp.CheckpointManager(absolute(folder), options=options)


def save_resume(manager: ocp.CheckpointManager, step: int, state: Any, position: dict) -> None:
    kept_with = position | {"checksums": checksums(state)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(kept_with))
    manager.save(step, args=items)


def restore_resume(manager: ocp.CheckpointManager, abstract_state: Any) -> tuple[Any, dict] | None:
    """The newest resume point that is whole, laid out as the shardings of `abstract_state` say; None if there is none.

    Raises:
      UserError: there are resume points, and all of them are damaged.
    """
    steps = hosts.by_first("a look for resume points", lambda: sorted(manager.all_steps(), reverse=True))
    damaged: dict[int, str] = {}
    for step in steps:
        state, position, problem = _restore(manager, step, abstract_state)
        problem = next(filter(None, hosts.gather(f"resume point {step} to be read", problem)), "")
        if problem:
            damaged[step] = problem
            continue
        for other, why in damaged.items():
            say(f"{manager.directory / str(other)}: damaged ({why}); going on from step {step} instead")
            manager.delete(other)
        return state, position
    if damaged:
        listed = "\n".join(f"  {manager.directory / str(step)}: {why}" for step, why in damaged.items())
        raise UserError(
            f"{manager.directory}: no resume point is whole. Put back a copy, or remove {manager.directory.parent} to "
            f"begin the stage anew\n{listed}"
        )
    return None


def _restore(manager: ocp.CheckpointManager, step: int, abstract_state: Any) -> tuple[Any, dict, str]:
    """State and position of a resume point, and what is wrong with them."""
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore())
    try:
        out = manager.restore(step, args=items)
    except Exception as error:  # Orbax and tensorstore raise whatever the damage leads to
        return None, {}, str(error).partition("\n")[0][:200] or type(error).__name__
    position = dict(out["position"])
    changed = _changed(position.pop("checksums", {}), checksums(out["state"]))
    return out["state"], position, f"{changed[0]} is not what was saved" if changed else ""


def checksums(params: Any) -> dict[str, int]:
    """Of every array a hash of its bits that is the same on any number of devices; names say its dtype too."""
    return {name: int(value) for name, value in _named(params, jax.device_get(_sums(params))).items()}


def fingerprint(params: Any) -> str:
    """A hash of all parameter bits that is the same on any number of devices."""
    sums = jax.tree_util.tree_leaves_with_path(_sums(params))
    text = ",".join(f"{jax.tree_util.keystr(path)}={int(value)}" for path, value in sums)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _named(params: Any, values: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [f"{jax.tree_util.keystr(path, simple=True, separator='.')} ({leaf.dtype})" for path, leaf in leaves]
    return dict(zip(names, jax.tree.leaves(values), strict=True))


def _sum(x: jax.Array) -> jax.Array:
    """uint32; every bit of every element changes it, and where the element stands."""
    bits = jax.lax.bitcast_convert_type(x, {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).astype(np.uint32)
    place = sum(
        jax.lax.broadcasted_iota(np.uint32, bits.shape, axis) * np.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
        for axis in range(bits.ndim)
    )
    return ((bits ^ (bits >> 15)) * (2 * place + 1) * np.uint32(2654435761)).sum(dtype=np.uint32)


@jax.jit
def _sums(params: Any) -> Any:
    return jax.tree.map(_sum, params)


@functools.partial(jax.jit, static_argnums=1)
def _stacked_sums(leaves: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    return [jax.vmap(_sum, in_axes=axis)(leaf) for leaf, axis in zip(leaves, axes, strict=True)]
