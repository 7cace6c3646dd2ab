import itertools
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from vdjax import snapshots
from vdjax.errors import UserError
from vdjax.models import hf


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 700))
def test_schedule(total: int, log_spaced: int, every: int) -> None:
    steps = snapshots.schedule(total, log_spaced=log_spaced, every=every)
    assert steps[0] == 0 and steps[-1] == total and steps == sorted(set(steps))
    between = set(steps) - {0, total}
    multiples = set(range(every, total, every)) if every else set()
    assert multiples <= between | {total} and len(between - multiples) <= log_spaced
    if not every:  # dense early: no gap is much shorter than the one before it
        gaps = np.diff(steps[1:])
        assert all(later >= earlier - 1 for earlier, later in zip(gaps[:-1], gaps[1:], strict=True))


def test_schedule_by_hand() -> None:
    assert snapshots.schedule(1000, log_spaced=2, every=400) == [0, 10, 100, 400, 800, 1000]
    assert snapshots.schedule(1, log_spaced=6, every=0) == [0, 1]
    assert snapshots.schedule(30, log_spaced=0, every=10) == [0, 10, 20, 30]


def params(seed: int, size: int = 64) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "embed": jax.random.normal(keys[0], (size, 8)),
        "layers": {"q_proj": jax.random.normal(keys[1], (3, 8, size)), "norm": jnp.ones((3, 8))},
        "head": jax.random.normal(keys[2], (8, size)).astype(jnp.bfloat16),
    }


def test_a_reader_reads_any_slice(tmp_path: Path) -> None:
    tree, saver = params(0), snapshots.saver()
    snapshots.save(saver, tmp_path / "snapshots", 12, tree)
    saver.wait_until_finished()
    assert snapshots.kept(tmp_path / "snapshots") == [12]
    read = snapshots.open_reader(tmp_path / "snapshots" / "12")
    kernel, head = np.asarray(tree["layers"]["q_proj"]), np.asarray(tree["head"])
    for index in np.s_[0:3, 0:8, 0:64], np.s_[1:2, 3:7, 10:11], np.s_[2:3, 0:8, 60:64]:
        np.testing.assert_array_equal(read(("layers", "q_proj"), index), kernel[index])
    part = read(("head",), np.s_[2:5, 1:9])
    assert part.dtype == jnp.bfloat16
    np.testing.assert_array_equal(part.view(np.uint16), head[2:5, 1:9].view(np.uint16))
    with pytest.raises(UserError, match="parameter layers.k_proj cannot be read"):
        read(("layers", "k_proj"), (slice(0, 1),))


def test_a_layer_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a slice lies in, whole chunks are unpacked."""
    monkeypatch.setattr(snapshots, "CHUNK_BYTES", 1024)
    saver = snapshots.saver()
    snapshots.save(saver, tmp_path, 1, params(0))
    saver.wait_until_finished()

    def chunk(name: str) -> tuple[int, ...]:
        store = {"driver": "ocdbt", "base": f"file://{tmp_path / '1'}", "path": f"{name}/"}
        return ts.open({"driver": "zarr", "kvstore": store}, open=True).result().chunk_layout.read_chunk.shape

    assert chunk("layers.q_proj")[0] == 1
    assert np.prod(chunk("layers.q_proj")) * 4 <= 1024 and np.prod(chunk("embed")) * 4 <= 1024
    assert chunk("layers.norm") == (3, 8)


def test_what_is_no_snapshot_is_refused_with_those_that_are(tmp_path: Path) -> None:
    saver = snapshots.saver()
    for step in (0, 4):
        snapshots.save(saver, tmp_path / "snapshots", step, {"x": jnp.zeros(3)})
    saver.wait_until_finished()
    with pytest.raises(UserError, match=r"5 is no snapshot; steps there: \[0, 4\]"):
        snapshots.open_reader(tmp_path / "snapshots" / "5")
    (tmp_path / "snapshots" / "7.orbax-checkpoint-tmp").mkdir()
    assert snapshots.kept(tmp_path / "snapshots") == [0, 4]


def test_training_on_does_not_reach_a_snapshot_being_written(tmp_path: Path) -> None:
    """The next steps, to which the arrays are donated, run while Orbax still writes."""

    def make() -> dict[str, jax.Array]:
        return {"w": jax.random.normal(jax.random.key(0), (512, 1024)), "b": jnp.arange(1000.0)}

    want, state, spare = jax.tree.map(np.asarray, make()), make(), make()
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * -3 + 1, tree), donate_argnums=0).lower(state).compile()
    step(spare)
    assert all(leaf.is_deleted() for leaf in spare.values())  # the step does take over the memory it is given
    saver = snapshots.saver()
    snapshots.save(saver, tmp_path, 3, state)
    for _ in range(20):
        state = step(state)
    jax.block_until_ready(state)
    saver.wait_until_finished()
    read = snapshots.open_reader(tmp_path / "3")
    for name, value in want.items():
        np.testing.assert_array_equal(read((name,), tuple(slice(0, n) for n in value.shape)), value)
    assert not np.array_equal(state["w"], want["w"])


def test_a_snapshot_that_is_there_is_left_alone(tmp_path: Path) -> None:
    saver = snapshots.saver()
    for seed in (0, 1):
        snapshots.save(saver, tmp_path, 2, params(seed))
        saver.wait_until_finished()
    read = snapshots.open_reader(tmp_path / "2")
    np.testing.assert_array_equal(read(("embed",), np.s_[0:64, 0:8]), params(0)["embed"])


def test_resume_points_roll_and_come_back(tmp_path: Path) -> None:
    tree = params(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    manager = snapshots.resume_manager(tmp_path / "resume")
    assert snapshots.restore_resume(manager, abstract) is None
    for step in (2, 4, 6):
        snapshots.save_resume(manager, step, jax.tree.map(lambda x, s=step: x + s, tree), {"next_index": step})
    manager.wait_until_finished()
    assert sorted(int(p.name) for p in (tmp_path / "resume").iterdir()) == [4, 6]
    manager.close()
    state, position = snapshots.restore_resume(snapshots.resume_manager(tmp_path / "resume"), abstract) or (None, None)
    assert position == {"next_index": 6}
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(tree), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want + 6)


def test_fingerprint_changes_with_every_bit() -> None:
    tree = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, jnp.bfloat16)}
    seen = {snapshots.fingerprint(jax.tree.map(jnp.asarray, tree))}
    places = [("a", 0), ("a", 7), ("a", 11), ("b", 4)]
    for count, (name, place) in enumerate(places):
        for bit in range(0, 32 if name == "a" else 16, 1 if count == 0 else 5):
            changed = {k: v.copy() for k, v in tree.items()}
            bits = changed[name].view(np.uint32 if name == "a" else np.uint16).reshape(-1)
            bits[place] ^= np.array(1, bits.dtype) << np.array(bit, bits.dtype)
            seen.add(snapshots.fingerprint(jax.tree.map(jnp.asarray, changed)))
    assert len(seen) == 1 + 32 + 7 + 7 + 4


def test_fingerprint_knows_places_and_names() -> None:
    a, b = jnp.arange(6.0).reshape(2, 3), jnp.arange(6.0).reshape(2, 3)[::-1]
    prints = [snapshots.fingerprint(tree) for tree in ({"x": a}, {"x": b}, {"y": a}, {"x": a.T}, {"x": -a})]
    assert len(set(prints)) == 5
    assert snapshots.fingerprint({"x": jnp.arange(6.0).reshape(2, 3)}) == prints[0]


def test_a_fingerprint_changes_with_every_element() -> None:
    params = {"a": jnp.arange(24, dtype=jnp.float32).reshape(4, 6), "b": {"c": jnp.zeros(5, jnp.bfloat16)}}
    base = snapshots.fingerprint(params)
    assert snapshots.fingerprint(jax.tree.map(jnp.copy, params)) == base
    others = {
        snapshots.fingerprint(params | {"a": params["a"].at[i, j].add(1e-6)})
        for i, j in itertools.product(range(4), range(6))
        if i + j
    }
    assert len(others | {base}) > 10
    assert snapshots.fingerprint(params | {"a": params["a"].at[0, 1].set(2.0).at[0, 2].set(1.0)}) != base
    assert snapshots.fingerprint(params | {"a": params["a"].T}) != base
    assert snapshots.fingerprint(params | {"b": {"c": params["b"]["c"].at[2].set(1e-30)}}) != base
    one = {"a": jnp.full((64, 64), 0.5)}
    assert snapshots.fingerprint(one) != snapshots.fingerprint({"a": one["a"].at[3].set(-0.5)})


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_a_damaged_snapshot_gives_an_error_that_names_it_and_never_other_values(tmp_path: Path) -> None:
    tree, saver, folder = params(0), snapshots.saver(), tmp_path / "run" / "sft" / "snapshots" / "3"
    snapshots.save(saver, folder.parent, 3, tree)
    saver.wait_until_finished()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    layout = jax.tree.map(lambda x: x.sharding, tree)
    axes = hf.snapshot_axes(shapes)

    def read() -> list[Any]:
        reader = snapshots.open_reader(folder)
        stacked = hf.stack_place([reader, reader], shapes, layout)
        snapshots.check_stacked([reader, reader], stacked, axes)
        second = jax.tree.map(lambda x, axis: x.take(1, axis=axis), stacked, axes)
        return [snapshots.place(reader, shapes, layout), second]

    def damaged() -> bool:
        """Whether there is an error; else the values are right."""
        try:
            found = read()
        except UserError as error:
            assert str(folder) in str(error)
            return True
        for each in found:
            jax.tree.map(np.testing.assert_array_equal, each, tree)
        return False

    assert not damaged()
    largest = max(files_of(folder), key=lambda file: file.stat().st_size)
    for file in files_of(folder):
        whole, seen = file.read_bytes(), []
        for at in range(7, len(whole), max(1, len(whole) // 9)):
            tiny.flip(file, at)
            seen.append(damaged())
            file.write_bytes(whole)
        file.write_bytes(whole[: len(whole) // 2])
        seen.append(damaged())
        file.unlink()
        seen.append(damaged())
        file.write_bytes(whole)
        if file == largest:  # of a compressed file a bit or two may not matter
            assert sum(seen) > len(seen) - 3
    tiny.flip(largest, 1000)
    with pytest.raises(UserError, match=r"is not what was saved: files .* or remove .*/run/sft: the run's command"):
        read()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what Orbax read beside
def test_a_damaged_resume_point_is_left_for_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tree = params(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    manager = snapshots.resume_manager(tmp_path / "resume")
    for step in (2, 4):
        snapshots.save_resume(manager, step, jax.tree.map(lambda x, s=step: x + s, tree), {"next_index": step})
    manager.close()

    def damage(step: int) -> None:
        tiny.flip(max(files_of(tmp_path / "resume" / str(step)), key=lambda file: file.stat().st_size), 1000)

    damage(4)
    manager = snapshots.resume_manager(tmp_path / "resume")
    state, position = snapshots.restore_resume(manager, abstract) or (None, None)
    assert position == {"next_index": 2}
    jax.tree.map(lambda got, want: np.testing.assert_array_equal(got, want + 2), state, tree)
    assert re.search(r"resume/4: damaged \(.* is not what was saved\); going on from step 2", capsys.readouterr().err)
    snapshots.save_resume(manager, 4, tree, {"next_index": 4})
    manager.close()
    assert (snapshots.restore_resume(snapshots.resume_manager(tmp_path / "resume"), abstract) or (0, {}))[1] == {
        "next_index": 4
    }
    for step in (2, 4):
        damage(step)
    with pytest.raises(UserError, match=r"no resume point is whole\. Put back a copy, or remove .*\n.*/4: .*\n.*/2: "):
        snapshots.restore_resume(snapshots.resume_manager(tmp_path / "resume"), abstract)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_resume_point_without_its_files_is_left_for_the_one_before(tmp_path: Path) -> None:
    tree = params(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    manager = snapshots.resume_manager(tmp_path / "whole")
    for step in (2, 4):
        snapshots.save_resume(manager, step, tree, {"next_index": step})
    manager.close()
    taken = set()
    for i, file in enumerate(files_of(tmp_path / "whole" / "4")):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        (folder / file.relative_to(tmp_path / "whole")).unlink()
        state, position = snapshots.restore_resume(snapshots.resume_manager(folder), abstract) or (None, {})
        taken.add(position["next_index"])
        jax.tree.map(np.testing.assert_array_equal, state, tree)
    assert taken == {2, 4}  # some files are not needed


def test_the_newest_resume_point_is_that_of_the_last_step_whatever_the_clock_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = params(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    manager = snapshots.resume_manager(tmp_path)
    for step, year in ((2, 2100), (4, 1980)):  # the clock was put back by more than a century in between
        seconds = (year - 1970) * 365.25 * 24 * 3600
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda seconds=seconds: seconds)
            patch.setattr(time, "time_ns", lambda seconds=seconds: int(seconds * 1e9))
            snapshots.save_resume(manager, step, tree, {"next_index": step})
            manager.wait_until_finished()
        for file in (tmp_path / str(step)).rglob("*"):
            os.utime(file, (seconds, seconds))
    manager.close()
    assert (snapshots.restore_resume(snapshots.resume_manager(tmp_path), abstract) or (0, {}))[1] == {"next_index": 4}
