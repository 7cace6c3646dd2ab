import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdjax import config as configs
from vdjax.train import optimizer as optimizers
from vdjax.train.optimizer import Mastered, decay_mask, make_optimizer, schedule


def settings(**fields: float | str | bool) -> configs.ConfigDict:
    return configs.stage("sft", optimizer=fields).optimizer


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup", "final"), [(100, 0.1, 0.1), (20, 0.0, 0.0), (7, 0.5, 0.3), (1, 0.1, 0.0)])
def test_schedule(kind: str, total: int, warmup: float, final: float) -> None:
    rate = schedule(settings(learning_rate=2e-3, schedule=kind, warmup=warmup, final=final), total)
    rising = round(warmup * total)
    for step in range(total + 1):
        if step < rising:  # the first step already moves
            want = (step + 1) / rising
        else:
            part = (step - rising) / (total - rising)
            decayed = {"cosine": (1 + math.cos(math.pi * part)) / 2, "linear": 1 - part, "constant": 1.0}[kind]
            want = decayed if kind == "constant" else final + (1 - final) * decayed
        assert float(rate(step)) == pytest.approx(2e-3 * want, rel=1e-5, abs=1e-9), step
    assert float(rate(0)) > 0
    if kind != "constant":
        assert float(rate(total)) == pytest.approx(2e-3 * final, abs=1e-9)


PARAMS: dict[str, Any] = {
    "embed": jnp.full((3, 2), 2.0),
    "final_norm": jnp.full(2, 2.0),
    "layers": {
        "q_proj": jnp.full((2, 2, 2), 2.0),
        "attention_norm": jnp.full((2, 2), 2.0),
        "q_norm": jnp.full((2, 2), 2.0),
    },
}


def test_decay_spares_norms() -> None:
    assert decay_mask(PARAMS) == {
        "embed": True,
        "final_norm": False,
        "layers": {"q_proj": True, "attention_norm": False, "q_norm": False},
    }
    optimizer = make_optimizer(settings(learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup=0.0), 10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["embed"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates["layers"]["q_proj"], -0.1, rtol=1e-6)
    for norm in (updates["final_norm"], updates["layers"]["attention_norm"], updates["layers"]["q_norm"]):
        np.testing.assert_array_equal(norm, 0)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 100.0])
def test_adamw_with_clipping_by_hand(clip_norm: float) -> None:
    """Two steps of Adam in float64 (Kingma and Ba, algorithm 1) on gradients of global norm 5 and 13."""
    fields = {"learning_rate": 0.01, "warmup": 0.0, "clip_norm": clip_norm, "b1": 0.8, "b2": 0.9, "eps": 0.1}
    optimizer = make_optimizer(settings(schedule="constant", **fields), 10)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    state = optimizer.init(params)
    x, m, v = np.zeros(2), np.zeros(2), np.zeros(2)
    for t, gradient in enumerate(([3.0, 4.0], [-5.0, 12.0]), start=1):
        updates, state = optimizer.update({"a": jnp.array(gradient[:1]), "b": jnp.array(gradient[1:])}, state, params)
        params = optax.apply_updates(params, updates)
        g = np.array(gradient)
        if clip_norm:
            g = g * min(1, clip_norm / np.sqrt((g**2).sum()))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        x = x - 0.01 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 0.1)
        np.testing.assert_allclose([params["a"][0], params["b"][0]], x, rtol=1e-5)


SHAPES = {"embed": (160, 130), "norm": (130,), "layers": {"q_proj": (2, 130, 140), "q_norm": (2, 16)}}


def random_trees(seed: int, count: int) -> Any:
    """Trees like SHAPES on a leading axis: noise around a mean, of sizes that differ up to a hundredfold."""
    rng = np.random.default_rng(seed)

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        size = 10.0 ** rng.uniform(-2, 0, shape)
        return jnp.asarray(size * (0.5 + rng.normal(size=(count, *shape))), jnp.float32)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def after_all(optimizer: optax.GradientTransformation, params: Any, gradients: Any) -> tuple[Any, Any]:
    def step(carry: tuple[Any, Any], gradient: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p, g: jax.lax.scan(step, (p, optimizer.init(p)), g)[0])(params, gradients)


def test_moments_in_bfloat16_take_nearly_the_steps_of_float32_ones() -> None:
    fields = {"learning_rate": 1e-3, "warmup": 0.0, "schedule": "constant"}
    params, gradients = jax.tree.map(lambda x: x[0], random_trees(0, 1)), random_trees(1, 20)
    want, _ = after_all(make_optimizer(settings(**fields), 20), params, gradients)
    got, state = after_all(make_optimizer(settings(**fields, moment_dtype="bfloat16"), 20), params, gradients)
    adam = state[1][0]
    assert {x.dtype for x in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype(jnp.bfloat16)}
    for before, one, other in zip(*map(jax.tree.leaves, (params, want, got)), strict=True):
        moved = np.abs(one - before).mean()
        assert 1e-4 < moved < 20e-3 and 0 < np.abs(one - other).mean() < 0.01 * moved


def test_second_moments_in_bfloat16_do_not_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step changes them by 1/1000, and bfloat16 tells apart what differs by 1/256."""
    fields = {"learning_rate": 1e-3, "clip_norm": 0.0}
    sizes = jnp.concatenate([jnp.full((3000, 64), 1.0), jnp.full((1500, 64), 0.1)])
    gradients = {"kernel": sizes * jax.random.normal(jax.random.key(0), sizes.shape)}
    params = {"kernel": jnp.zeros(64)}

    def second_moments(**more: str) -> np.ndarray:
        made = make_optimizer(settings(**fields, **more), 4500)
        return np.asarray(after_all(made, params, gradients)[1][1][0].nu["kernel"], np.float32)

    want = second_moments()
    off = second_moments(moment_dtype="bfloat16") / want - 1
    assert np.abs(off).max() < 0.1 and np.abs(off.mean()) < 0.03
    monkeypatch.setattr(optimizers, "rounded_in_turn", lambda x, step: x.astype(jnp.bfloat16))
    assert np.abs(second_moments(moment_dtype="bfloat16") / want - 1).min() > 0.3


def test_adafactor_is_that_of_optax() -> None:
    fields = {"learning_rate": 1e-2, "warmup": 0.25, "clip_norm": 0.0}
    params, gradients = jax.tree.map(lambda x: x[0], random_trees(2, 1)), random_trees(3, 20)
    made = make_optimizer(settings(name="adafactor", **fields), 20)
    got, state = after_all(made, params, gradients)
    want, _ = after_all(
        optax.adafactor(schedule(settings(**fields), 20), multiply_by_parameter_scale=False), params, gradients
    )
    for before, one, other in zip(*map(jax.tree.leaves, (params, want, got)), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-7)
        assert np.abs(one - before).mean() > 1e-3
    kept = state[1][0][0]
    assert kept.v_row["layers"]["q_proj"].shape == (2, 130) and kept.v_col["layers"]["q_proj"].shape == (2, 140)
    assert sum(x.size for x in jax.tree.leaves(state)) < 0.03 * sum(x.size for x in jax.tree.leaves(params))


def test_adafactor_has_the_weight_decay_of_adamw() -> None:
    fields = {"learning_rate": 0.1, "weight_decay": 0.5, "schedule": "constant", "warmup": 0.0}
    optimizer = make_optimizer(settings(name="adafactor", **fields), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["embed"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["final_norm"], 0)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_bfloat16_parameters_follow_their_float32_copy(name: str) -> None:
    """Steps of 1e-5 on parameters of 0.02, of which each alone is rounded away."""
    fields = {"name": name, "learning_rate": 1e-5, "schedule": "constant", "warmup": 0.0}
    gradients = random_trees(5, 100)
    params = jax.tree.map(lambda x: jnp.full(x.shape[1:], 0.02, jnp.bfloat16), gradients)
    want, _ = after_all(make_optimizer(settings(**fields), 100), optimizers.to_float32(params), gradients)
    got, state = after_all(make_optimizer(settings(**fields), 100), params, gradients)
    assert isinstance(state, Mastered)
    for one, master, low in zip(*map(jax.tree.leaves, (want, state.master, got)), strict=True):
        np.testing.assert_allclose(master, one, rtol=1e-6)
        np.testing.assert_array_equal(low, master.astype(jnp.bfloat16))
    still, state = after_all(make_optimizer(settings(**fields, master=False), 100), params, gradients)
    assert not isinstance(state, Mastered)
    for before, one, other in zip(*map(jax.tree.leaves, (params, got, still)), strict=True):
        assert (one != before).mean() > 0.5 and (other == before).mean() > 0.9


def test_optimizers_of_float32_parameters_keep_no_copy() -> None:
    assert not isinstance(make_optimizer(settings(), 10).init(PARAMS), Mastered)
