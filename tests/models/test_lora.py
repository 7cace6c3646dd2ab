"""Adapters: against merged kernels, finite differences and the base alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from ml_collections import ConfigDict

from vdjax import sharding
from vdjax.errors import UserError
from vdjax.models import lora
from vdjax.models.functional import Model, init_adapters, make_model, shardings
from vdjax.models.log_probs import token_log_probs

BATCH = tiny.pack(tiny.preference_examples(3, 6), 64)
ALL = lora.Lora(3, 6.0, lora.KERNELS)


def adapted(made: Model, adapters: lora.Lora = ALL, **options: Any) -> Model:
    return make_model(made.cfg, ConfigDict(tiny.MODEL.to_dict() | options), lora=adapters)


def random_adapters(model: Model, seed: int, scale: float = 0.1) -> Any:
    rng = np.random.default_rng(seed)
    shapes = lora.adapters_of(model.params)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=scale), jnp.float32), shapes)


def hidden(model: Model, params: Any) -> jax.Array:
    ids = [BATCH[k] for k in ("tokens", "positions", "segment_ids", "sequence_ids")]
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p: nnx.merge(model.graphdef, p)(*ids))(params)


def rms(x: jax.Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.mark.parametrize("targets", [lora.KERNELS, ("q_proj",), ("down_proj", "v_proj")])
def test_adapters_compute_what_merged_kernels_compute(qwen: tuple[Model, Any], targets: tuple[str, ...]) -> None:
    made, base = qwen
    model = adapted(made, lora.Lora(3, 6.0, targets))
    params = lora.join(base, random_adapters(model, 0))
    merged = lora.merge(params, model.lora)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    changed = {name for name in base["layers"] if not np.array_equal(merged["layers"][name], base["layers"][name])}
    assert changed == set(targets)
    beside, within = hidden(model, params), hidden(made, merged)
    assert rms(beside - within) < 1e-6 * rms(within)  # the largest error would be mostly luck of rounding
    assert rms(within - hidden(made, base)) > 0.01
    a, b = (np.asarray(params["layers"][targets[0] + side], np.float64) for side in lora.SIDES)
    want = np.asarray(base["layers"][targets[0]], np.float64) + 6 / 3 * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(merged["layers"][targets[0]], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_new_adapters_change_no_bit(llama: tuple[Model, Any], compute: str) -> None:
    """Nor does the dtype of the base become theirs."""
    made, base = llama
    model = adapted(made, compute_dtype=compute, param_dtype=compute)
    base = jax.tree.map(lambda x: x.astype(compute), base)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    layout = lora.adapters_of(shardings(model, mesh))
    new = init_adapters(model, seed=4, shardings=layout)
    plain = make_model(made.cfg, ConfigDict(tiny.MODEL.to_dict() | {"compute_dtype": compute}))
    want, got = hidden(plain, base), hidden(model, lora.join(base, new))
    assert got.dtype == want.dtype == compute
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))

    assert jax.tree.structure(new) == jax.tree.structure(lora.adapters_of(model.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    firsts = []
    for name in lora.KERNELS:
        a, b = (np.asarray(new["layers"][name + side]) for side in lora.SIDES)
        bound = base["layers"][name].shape[1] ** -0.5
        assert not b.any() and 0.9 * bound < np.abs(a).max() <= bound and abs(a.mean()) < 0.25 * bound
        assert not np.array_equal(a[0], a[1])
        firsts.append(a.flat[0] / bound)
    assert len(set(firsts)) == len(firsts)
    again, other = (init_adapters(model, seed=seed, shardings=layout) for seed in (4, 5))
    jax.tree.map(np.testing.assert_array_equal, new, again)
    assert not np.array_equal(new["layers"]["q_proj_lora_a"], other["layers"]["q_proj_lora_a"])


def test_bfloat16_computes_with_float32_adapters(qwen: tuple[Model, Any]) -> None:
    made, base = qwen
    half = adapted(made, compute_dtype="bfloat16")
    params = lora.join(base, random_adapters(half, 0))
    got, want, plain = hidden(half, params), hidden(adapted(made), params), hidden(made, base)
    assert got.dtype == jnp.bfloat16
    assert rms(got.astype(jnp.float32) - want) < 0.1 * rms(plain - want)


def test_a_reward_model_trains_its_head_beside_its_adapters(qwen: tuple[Model, Any]) -> None:
    made, base = qwen
    model = make_model(made.cfg, tiny.MODEL, lora=ALL, head="score")
    layout = lora.adapters_of(shardings(model, sharding.make_mesh(devices=jax.devices()[:1])))
    new = init_adapters(model, seed=4, shardings=layout)
    assert new.keys() == {"layers", "score"} and not np.asarray(new["score"]).any()
    assert lora.without_adapters(model.params).keys() == {"embed", "layers", "final_norm"}
    whole = lora.join(base, new)
    assert jax.tree.structure(whole) == jax.tree.structure(model.params)
    assert lora.merge(whole, ALL).keys() == whole.keys()


def test_only_adapters_are_made(qwen: tuple[Model, Any]) -> None:
    """XLA makes no array of the base's size on the way."""
    big = make_model(
        jax.tree.map(lambda x: x, qwen[0].cfg.__class__(**{**vars(qwen[0].cfg), "vocab_size": 100_000})),
        tiny.MODEL,
        lora=ALL,
    )
    seen = []
    real = jax.jit

    def watched(function: Any, **options: Any) -> Any:
        made = real(function, **options)
        seen.append(made.lower().compile().memory_analysis())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", watched)
        layout = lora.adapters_of(shardings(big, sharding.make_mesh(devices=jax.devices()[:1])))
        init_adapters(big, seed=0, shardings=layout)
    assert seen[-1].output_size_in_bytes < 1e5 and seen[-1].temp_size_in_bytes < 1e6


def test_gradients_against_finite_differences(llama: tuple[Model, Any]) -> None:
    made, base = llama
    model = adapted(made, lora.Lora(2, 4.0, ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")))
    params = random_adapters(model, 1)

    @jax.jit
    def loss(adapters: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return token_log_probs(nnx.merge(model.graphdef, lora.join(base, adapters)), BATCH, chunk=16).sum()

    gradient = jax.grad(loss)(params)
    rng = np.random.default_rng(5)
    for name in params["layers"]:
        direction = rng.normal(size=params["layers"][name].shape)
        direction /= np.linalg.norm(direction)

        def along(size: float, name: str = name, direction: np.ndarray = direction) -> float:
            moved = params["layers"][name] + jnp.asarray(size * direction, jnp.float32)
            return float(loss({"layers": params["layers"] | {name: moved}}))

        # Fourth-order differences: the loss is float32, so the step must be large.
        h = 0.02
        numeric = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        exact = float((gradient["layers"][name] * direction).sum())
        assert abs(numeric - exact) < 2e-3 * max(1, float(jnp.linalg.norm(gradient["layers"][name]))), name
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_rows_and_snapshots_are_vmapped(qwen: tuple[Model, Any]) -> None:
    model = adapted(qwen[0])
    several = [random_adapters(model, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)

    def score(adapters: Any) -> jax.Array:
        return token_log_probs(nnx.merge(model.graphdef, lora.join(qwen[1], adapters)), BATCH, chunk=16)

    together = jax.jit(jax.vmap(score))(stacked)
    for one, own in zip(together, several, strict=True):
        np.testing.assert_allclose(one, jax.jit(score)(own), rtol=0, atol=1e-4)
    merged = lora.merge(lora.join(qwen[1], several[0]), ALL)
    examples = tiny.preference_examples(3, 6)
    alone = tiny.brute_force(qwen[0], merged, examples)
    found = together[0].sum()
    np.testing.assert_allclose(found, sum(values.sum() for values in alone), rtol=1e-5)


def test_targets_are_checked() -> None:
    def read(**changes: Any) -> lora.Lora | None:
        fields = {"rank": 4, "alpha": 8.0, "targets": ("q_proj",)}
        return lora.from_config(ConfigDict(fields | changes), "config.s.lora")

    assert read(rank=0) is None
    assert read(targets=("up_proj", "q_proj")) == lora.Lora(4, 8.0, ("q_proj", "up_proj"))
    with pytest.raises(UserError, match=r"config.s.lora.targets: 'q_prj'.*did you mean 'q_proj'"):
        read(targets=("q_prj",))
    with pytest.raises(UserError, match="targets is empty"):
        read(targets=())
