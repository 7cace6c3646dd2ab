"""Orbax: when snapshots are taken, snapshots, resume points, and slices of a snapshot read through tensorstore."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from vdjax import hosts
from vdjax.errors import UserError
from vdjax.files import absolute, in_bucket, url

COMMITTED = "commit_success.txt"  # Orbax's mark of a whole snapshot

Reader = Callable[[tuple[str, ...], tuple[slice, ...]], np.ndarray]


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
        # Over what an interruption left of it in a bucket.
        checkpointer.save(absolute(folder) / str(step), args=ocp.args.StandardSave(params), force=True)


def open_reader(snapshot: Path) -> Reader:
    """A function that reads any slice of any parameter of a snapshot, and nothing else.

    Raises:
      UserError: not a snapshot.
    """
    if not (snapshot / (COMMITTED if in_bucket(snapshot) else "_METADATA")).exists():
        siblings = kept(snapshot.parent)
        raise UserError(f"{snapshot} is no snapshot" + (f"; steps there: {siblings}" if siblings else ""))
    stores: dict[tuple[str, ...], Any] = {}

    def read(path: tuple[str, ...], index: tuple[slice, ...]) -> np.ndarray:
        if path not in stores:
            kvstore = {"driver": "ocdbt", "base": url(snapshot), "path": ".".join(path) + "/"}
            try:
                stores[path] = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
            except ValueError as error:
                raise UserError(f"{snapshot}: parameter {'.'.join(path)} cannot be read: {error}") from None
        return stores[path][index].read().result()

    return read


def resume_manager(folder: Path) -> ocp.CheckpointManager:
    """Rolling resume points; the last two are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, multiprocessing_options=apart("resume"))
    return ocp.CheckpointManager(absolute(folder), options=options)


def save_resume(manager: ocp.CheckpointManager, step: int, state: Any, position: dict) -> None:
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
    manager.save(step, args=items)


def restore_resume(manager: ocp.CheckpointManager, abstract_state: Any) -> tuple[Any, dict] | None:
    """The newest resume point, laid out as the shardings of `abstract_state` say; None if there is none."""
    newest = hosts.by_first("a look for resume points", manager.latest_step)
    if newest is None:
        return None
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore())
    out = manager.restore(newest, args=items)
    return out["state"], out["position"]


def fingerprint(params: Any) -> str:
    """A hash of all parameter bits that is the same on any number of devices."""

    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).astype(np.uint32)
        place = sum(
            jax.lax.broadcasted_iota(np.uint32, bits.shape, axis) * np.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
            for axis in range(bits.ndim)
        )
        return ((bits ^ (bits >> 15)) * (2 * place + 1) * np.uint32(2654435761)).sum(dtype=np.uint32)

    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(one, tree))(params))
    text = ",".join(f"{jax.tree_util.keystr(k)}={int(v)}" for k, v in jax.tree_util.tree_leaves_with_path(sums))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
