"""Plans: what programs are counted to do against closed forms and programs of known sizes."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vdjax import chips, plan, sharding
from vdjax.config import experiment, stage
from vdjax.errors import UserError
from vdjax.models.config import from_hf, num_params, published
from vdjax.planning import hlo, operations, programs
from vdjax.planning.programs import PROGRAMS, Plan, Work


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return tiny.on_eight_devices(Path(__file__).parent / "eight_devices_plan.py")


def test_weights_spread_over_eight_devices_are_gathered_layer_by_layer(results: dict[str, Any]) -> None:
    (gather,) = results["gathered"]["collectives"]
    assert (gather["kind"], gather["over"]) == ("all-gather", ["fsdp"])
    # Each device sends its eighth of every layer's 64 x 64 float32 weights to seven others.
    assert gather["sent"] == 3 * 64 * 64 * 4 * 7 / 8


def test_parameters_and_moments_are_an_eighth_a_device(results: dict[str, Any]) -> None:
    step = results["fsdp"]["train_step"]
    cfg = from_hf(tiny.SHAPES["llama"], where="tiny")
    norms = (2 * cfg.num_layers + 1) * cfg.hidden_size  # whole on each device
    held = 4 * (norms + (num_params(cfg) - norms) / 8)
    assert step["parts"]["parameters"] * 2**30 == pytest.approx(held)
    assert step["parts"]["optimizer"] * 2**30 == pytest.approx(2 * held, rel=1e-3)
    assert step["fits"]


def test_the_reference_needs_a_third_of_a_steps_products(results: dict[str, Any]) -> None:
    found = results["tensor"]
    assert found["reference"]["needed_tflops"] * 3 == pytest.approx(found["train_step"]["needed_tflops"])
    for one in (found[name] for name in PROGRAMS):
        assert one["tflops"] >= one["needed_tflops"] > 0
        assert one["hbm_bytes"] > 0 and one["hbm_gib"] > sum(one["parts"].values()) * 0.99


def test_no_collective_joins_snapshots(results: dict[str, Any]) -> None:
    found = results["tensor"]["evaluator"]
    assert "parameters of 8 snapshots" in found["parts"] and found["mesh"]["snapshot"] == 4
    assert all("snapshot" not in each["over"] for each in found["collectives"])
    assert any("tensor" in each["over"] for each in found["collectives"])


def test_a_plan_says_what_it_found(results: dict[str, Any]) -> None:
    found = results["tensor"]
    assert found["topology"] == "v5e:2x4" and found["chips"] == 8
    assert found["mesh"]["fsdp"] == 4 and found["mesh"]["tensor"] == 2
    for name in PROGRAMS:
        assert found[name]["fits"] and found[name]["compile_s"] > 0 and found[name]["roofline_s"]["matmuls"] > 0
        assert f"{name}: {found[name]['hbm_gib']:.2f} of 15.75 GiB a chip, fits" in found["text"]
    assert "16 rows of 128 tokens a step, 8 at a time" in found["text"]
    assert found["too_large"].count("DOES NOT FIT") == 4
    for advice in ("dpo.microbatch_rows=4 (now 8)", "model.remat=dots (now none)", "model.compute_dtype=bfloat16"):
        assert f"try --config.{advice}" in found["too_large"]


# Counting


def test_products_are_counted_through_loops_branches_and_gradients() -> None:
    def loop(x: jax.Array, w: jax.Array) -> jax.Array:
        x = jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, None, length=5)[0]
        return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x).sum()

    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    one = 2 * 4 * 8 * 8
    assert operations.matmul_flops(jax.make_jaxpr(loop)(x, w).jaxpr) == 6 * one
    assert operations.matmul_flops(jax.make_jaxpr(jax.grad(loop, argnums=(0, 1)))(x, w).jaxpr) == 3 * 6 * one
    again = jax.grad(lambda x, w: jax.checkpoint(loop)(x, w), argnums=(0, 1))
    assert operations.matmul_flops(jax.make_jaxpr(again)(x, w).jaxpr) > 3 * 6 * one

    def until(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ w, x)

    def one_of_two_sizes(x: jax.Array) -> jax.Array:
        large = jax.lax.fori_loop(0, jnp.int32(x.sum() > 0), lambda _, x: x @ w, x)
        return jax.lax.fori_loop(0, jnp.int32(x.sum() <= 0), lambda _, x: x.at[:2].set(x[:2] @ w), large) @ w

    assert operations.matmul_flops(jax.make_jaxpr(until)(x).jaxpr, trips=7) == 7 * one
    assert operations.matmul_flops(jax.make_jaxpr(one_of_two_sizes)(x).jaxpr) == 2 * one


def test_what_the_forward_pass_keeps_is_named() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    w, x = jnp.ones((6, 8, 8)), jnp.ones((32, 8))
    kept = operations.kept(jax.make_jaxpr(jax.grad(loss))(w, x).jaxpr)
    assert {size for size, _ in kept} == {6 * 32 * 8 * 4}  # the inputs, tanh, and 1 - tanh
    first, *others = [name for _, name in kept]
    assert first == "f32[6,32,8] that each turn of the loop begins with"
    assert others and all(name.startswith("f32[6,32,8] of") and "test_planning.py" in name for name in others)


MESH = {"snapshot": 2, "data": 1, "fsdp": 4, "tensor": 1}
PROGRAM = """HloModule jit_run, is_scheduled=true

%fused (a: f32[5,64,8], i: s32[]) -> f32[1,64,8] {
  %a = f32[5,64,8]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  ROOT %part = f32[1,64,8]{2,1,0:T(8,128)} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={1,64,8}
}

%all-reduce-scatter.1 (g: f32[64,8]) -> f32[16,8] {
  %g = f32[64,8]{1,0} parameter(0)
  %sum = f32[64,8]{1,0} all-reduce(%g), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %own = f32[16,8]{1,0} dynamic-slice(%sum, %g, %g), dynamic_slice_sizes={16,8}
}

%body (t: (s32[], f32[5,64,8])) -> (s32[], f32[5,64,8]) {
  %t = (s32[]{:T(128)}, f32[5,64,8]{2,1,0}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%t), index=0
  %all = f32[5,64,8]{2,1,0} get-tuple-element(%t), index=1
  %slice = f32[1,64,8]{2,1,0:T(8,128)} fusion(%all, %n), kind=kLoop, calls=%fused
  %wide = f32[4,64,8]{2,1,0} all-gather(%slice), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %again = f32[4,64,8]{2,1,0} all-gather(%slice), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %fast = f32[64,8]{1,0:T(8,128)S(1)} copy(%slice)
  %back = f32[16,8]{1,0} fusion(%fast), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, f32[5,64,8]{2,1,0}) tuple(%n, %all)
}

%condition (c: (s32[], f32[5,64,8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[5,64,8]{2,1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(5)
  %at = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %bound), direction=LT
}

ENTRY %main (w: f32[5,64,8]) -> f32[] {
  %w = f32[5,64,8]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[]{:T(128)}, f32[5,64,8]{2,1,0}) tuple(%zero, %w)
  %run = (s32[]{:T(128)}, f32[5,64,8]{2,1,0}) while(%start), condition=%condition, body=%body
  %scalar = f32[]{:T(128)} constant(1)
  ROOT %total = f32[]{:T(128)} all-reduce(%scalar), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
}
"""


def test_a_compiled_program_is_read_with_its_loops_multiplied_out() -> None:
    found = hlo.read(PROGRAM, MESH)
    part = 64 * 8 * 4
    by_kind = {each.kind: each for each in found.collectives}
    # Written twice with one channel, run five times; a device sends its part to three others.
    assert by_kind["all-gather"] == hlo.Collective("all-gather", ("fsdp",), 5, 5 * 3 * part)
    assert by_kind["reduce-scatter"] == hlo.Collective("reduce-scatter", ("fsdp",), 5, 5 * part * 3 / 4)
    assert by_kind["all-reduce"] == hlo.Collective("all-reduce", ("snapshot",), 1, 4)
    # The slice is read (with its 4-byte place) and written, then read by two gathers and a copy, whose results are 4, 4
    # and 0 (fast memory) parts; the reduction writes a quarter of one. The last all-reduce reads and writes a number.
    assert found.hbm_bytes == 5 * (2 * part + 4 + 2 * 5 * part + part + part / 4) + 8


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("to_apply=%add", [[0, 1, 2, 3]]),
    ],
)
def test_groups_of_collectives(text: str, groups: list[list[int]]) -> None:
    np.testing.assert_array_equal(hlo._groups(text, 4), groups)


# What is asked for


@pytest.mark.parametrize(
    ("name", "topology"),
    [("v5e:8x8", "v5e:8x8"), ("v5e-64", "v5e:8x8"), ("v5p-128", "v5p:4x4x4"), ("v6e-256", "v6e:16x16")],
)
def test_names_of_slices(name: str, topology: str) -> None:
    assert chips.parse(name) == topology


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:8x8", "did you mean 'v5"),
        ("v5e-100", "no such slice"),
        ("v5e:8x8x8", "expected a shape such as 4x4"),
        ("v5p:8xx8", "expected a shape such as 2x4x4"),
    ],
)
def test_unknown_slices_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chips.parse(name)


def test_published_models_are_known_by_their_hub_ids() -> None:
    for hub_id, layers in {
        "meta-llama/Llama-3.1-8B": 32,
        "meta-llama/Llama-3.2-3B-Instruct": 28,
        "meta-llama/Meta-Llama-3.1-70B-Instruct": 80,
        "Qwen/Qwen3-8B-Base": 36,
        "Qwen/Qwen3-4B": 36,
    }.items():
        found = published(hub_id)
        assert found and found.num_layers == layers
    assert published("Qwen/Qwen2-7B") is None and published("someone/llama") is None


def test_a_mesh_is_read_from_a_flag() -> None:
    default = experiment().mesh
    assert plan.mesh_of("", default) == {"data": 1, "fsdp": -1, "context": 1, "tensor": 1}
    assert plan.mesh_of("fsdp=-1,tensor=4", default) == {"fsdp": -1, "tensor": 4}
    for text, message in {"fsd=4": "did you mean 'fsdp'", "fsdp=four": "expected AXIS=N"}.items():
        with pytest.raises(UserError, match=message):
            plan.mesh_of(text, default)


def test_a_search_ranks_what_fits_by_its_roofline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    c = experiment()
    c.dpo = stage("dpo", batch_size=8, max_length=96)
    mesh: Any = SimpleNamespace(shape={"data": 1, "fsdp": 3}, devices=np.empty(0, object))
    work = Work(c, "dpo", from_hf(tiny.SHAPES["llama"], where="tiny"), mesh, chips.CHIPS["v5e"], 96, 64, 8)
    known = Plan(True, 1.0, {}, {}, [], [], 1.0, 1.0, 1e12, 8, 1.0, "")
    plans = [known, known._replace(fits=False, message="out of memory"), known._replace(hbm_bytes=1e13)]
    tried = [({"data": 1}, "dots", 8), ({"data": 1}, "none", 8), ({"data": 1}, "full", 8)]
    searched: list[Any] = []
    monkeypatch.setattr(plan, "candidates", lambda work, wanted: searched.extend(wanted) or tried)
    monkeypatch.setattr(programs, "train_step", lambda work: None)
    monkeypatch.setattr(programs, "compiled", lambda lowered, chip: plans.pop())
    monkeypatch.setattr(sharding, "make_mesh", lambda **how: mesh)
    assert plan.search(work, argparse.Namespace(json=False, mesh="fsdp=3")) == 0
    assert searched == [{"data": 1, "fsdp": 3}]  # the mesh that was asked for, and no other
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "remat full" in first and "remat dots" in second


def test_memory_of_the_chip_itself_that_runs_out_says_nothing_of_hbm() -> None:
    """The message is that of Qwen3-4B DPO on v6e-64 (docs/plans.json)."""
    vmem = "E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem while allocating on stack"
    hbm = "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (38.65G)"
    work: Any = SimpleNamespace(chip=chips.CHIPS["v6e"])
    plan_of_it = Plan(False, 1.2, {}, {}, [], [], 1.0, 1.0, 0.0, 8, 1.0, vmem)
    first, *_, last = plan.of_program("train_step", plan_of_it, work)
    assert "NOT COMPILED" in first and "try LIBTPU_INIT_ARGS with the flags of tpu/xla_flags.txt" in last
    assert programs.verdict(True, "") == "fits"
    assert programs.verdict(False, vmem) == "not compiled"
    assert programs.verdict(False, hbm) == programs.verdict(False, "") == "does not fit"


def test_a_search_tries_layouts_that_share_the_rows_out() -> None:
    c = experiment()
    c.dpo = stage("dpo", batch_size=64, max_length=96)
    devices = [SimpleNamespace(platform="tpu", slice_index=i // 8) for i in range(16)]
    mesh: Any = SimpleNamespace(size=16, shape={"data": 1, "fsdp": 16}, devices=np.array(devices[:1] * 16))
    work = Work(c, "dpo", from_hf(tiny.SHAPES["llama"], where="tiny"), mesh, chips.CHIPS["v5e"], 96, 64, 8)
    tried = list(plan.candidates(work, plan.meshes(work)))
    assert len(tried) == len({str(each) for each in tried}) > 20
    for sizes, remat, rows in tried:
        assert np.prod(list(sizes.values())) == 16 and 2 % sizes["tensor"] == 0  # two key/value heads
        assert remat in ("none", "dots", "full") and rows % (sizes["data"] * sizes["fsdp"]) == 0
    assert {sizes["context"] for sizes, *_ in tried} == {1}  # there are rows for all chips
    c.dpo.batch_size = 4
    few = list(plan.candidates(work, plan.meshes(work)))
    assert {sizes["context"] for sizes, *_ in few} == {1, 2, 4, 8}
    c.dpo.batch_size = 24  # rows that share out over no 16 shards: the last ones stay empty
    assert {rows for sizes, _, rows in plan.candidates(work, [{"data": 1, "fsdp": 16}])} == {32, 16}
    c.dpo.batch_size = 64
    # Of each layout the largest microbatch comes first: where it fits, no smaller one is tried.
    firsts = {(str(sizes), remat): rows for sizes, remat, rows in reversed(tried)}
    assert set(firsts.values()) == {64}
    pinned = {"data": 2, "fsdp": 4, "context": 2, "tensor": 1}
    assert {str(sizes) for sizes, *_ in plan.candidates(work, [pinned])} == {str(pinned)}
    mesh.devices = np.array(devices)
    assert {sizes["data"] for sizes in plan.meshes(work)} == {2, 4, 8}  # two slices: each holds all of a data shard
