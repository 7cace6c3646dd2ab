import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdjax import config as configs
from vdjax.train.optimizer import decay_mask, make_optimizer, schedule


def settings(**fields: float | str) -> configs.ConfigDict:
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
