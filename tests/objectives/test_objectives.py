"""Preference objectives against TRL and the papers' formulas, at the extremes, with padding, and their mistakes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from vdjax.errors import UserError
from vdjax.objectives import OBJECTIVES, Pairs, Unpaired, check_hyper, dpo, sft, simpo

COMPARED = [name for name, o in OBJECTIVES.items() if o.kind in ("preference", "unpaired")]
PAIRED = [name for name in COMPARED if OBJECTIVES[name].kind == "preference"]
BATCH_LEVEL = [name for name in COMPARED if OBJECTIVES[name].batch_level]
DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.8},
]


def test_every_objective_is_compared_with_a_formula() -> None:
    assert set(references.FORMULAS) == set(COMPARED)
    assert {name for name, *_ in references.CASES} == set(COMPARED)
    only_a_formula = set(COMPARED) - {case["objective"] for case in references.GOLDEN["cases"]}
    assert only_a_formula == {"dpop", "r_dpo", "beta_dpo", "bco"}, "what TRL has is compared with TRL"


@pytest.mark.parametrize("name", COMPARED)
def test_loss_and_gradient_of_trl_and_of_the_formula(name: str) -> None:
    for case in references.CASES:
        if case[0] == name:
            assert {k: v for k, v in references.errors(case).items() if max(v) > 1e-9} == {}, case[1]
            if case[3] is not None:
                assert np.nanmax(np.abs(np.array(case[3]["first"], float))) > 1e-4, "the case compares nothing"


@pytest.mark.parametrize("name", COMPARED)
def test_defaults_run_compiled_and_in_float32(name: str) -> None:
    """Compiled float32 losses are the float64 ones to float32's precision, and stay float32."""
    examples = references.inputs(OBJECTIVES[name].kind)
    compiled = jax.jit(lambda *x: references.run(name, {}, {}, type(examples)(*x), dtype=jnp.float32))
    losses, extra, carry, gradients = compiled(*examples)
    with jax.enable_x64(True):
        exact = references.run(name, {}, {}, examples)
    for ours, wide in zip(jax.tree.leaves((losses, extra, carry, gradients)), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == jnp.float32 and ours.shape == wide.shape
        if name != "beta_dpo":  # which draws other pairs from other bits
            np.testing.assert_allclose(ours, wide, rtol=1e-4, atol=1e-4)
    rewards = {"reward_chosen", "reward_rejected"} if OBJECTIVES[name].kind == "preference" else {"reward"}
    assert rewards <= set(extra) and set(carry) == set(OBJECTIVES[name].carry)


def extremes(name: str) -> Any:
    """Far-apart, equal and certain responses, and absent ones."""
    values = np.array([-1e4, -1e-8, 0.0, -50.0])
    a, b = (x.ravel() for x in np.meshgrid(values, values))
    c, d = np.roll(a, 5), np.roll(b, 3)
    lengths = np.where(a == 0, 0.0, 7.0), np.where(b == 0, 0.0, 300.0)
    if OBJECTIVES[name].kind == "unpaired":
        good = np.arange(32) < 16
        return Unpaired(np.tile(a, 2), np.tile(lengths[0], 2), np.tile(b, 2), good, np.tile(c, 2), np.tile(d, 2))
    return Pairs(a, b, *lengths, c, d, a / 2, b, c / 2, d)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", COMPARED)
def test_losses_and_gradients_stay_finite(name: str, x64: bool) -> None:
    divergences = DIVERGENCES if "f_divergence_type" in OBJECTIVES[name].hyper else []
    for hyper in ({},) if x64 else ({}, {"beta": 10.0}, *divergences):
        with jax.enable_x64(x64):
            out = references.run(name, hyper, {}, extremes(name))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(out)), hyper


@pytest.mark.parametrize("name", BATCH_LEVEL)
def test_padding_changes_nothing(name: str) -> None:
    """Whatever stands in invalid places, wherever they are, the valid ones' losses, gradients and the carry stay."""
    examples = references.inputs(OBJECTIVES[name].kind)
    n = len(examples[0])
    rng = np.random.default_rng(0)
    valid = np.zeros(2 * n, bool)
    valid[np.sort(rng.choice(2 * n, n, replace=False))] = True

    def padded(x: np.ndarray) -> np.ndarray:
        junk = rng.choice([np.nan, 1e4, -1e4, 0.0], 2 * n) if x.dtype != bool else rng.random(2 * n) < 0.5
        junk[valid] = x
        return junk

    carry = {k: 2.0 for k in OBJECTIVES[name].carry}
    plain = references.run(name, {}, carry, examples)
    inside = references.run(name, {}, carry, type(examples)(*map(padded, examples)), valid)
    for part, (ours, without) in enumerate(zip(inside, plain, strict=True)):
        ours = jax.tree.map(lambda x, part=part: x if part == 2 else x[valid], ours)  # the carry has no pairs
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, without)
    assert np.isfinite(inside[0]).all(), "losses of padding may be anything finite"
    assert all((np.asarray(g)[~valid] == 0).all() for g in inside[3].values())
    nothing = references.run(name, {}, carry, examples, np.zeros(n, bool))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(nothing))


@pytest.mark.parametrize("name", [name for name in PAIRED if name not in BATCH_LEVEL])
def test_pairs_do_not_depend_on_each_other(name: str) -> None:
    examples = references.inputs("preference")
    others = Pairs(*(np.where(np.arange(len(x)) == 7, x, x[::-1] * 2) for x in examples))
    first, second = (references.run(name, {}, {}, x)[0] for x in (examples, others))
    assert first[7] == second[7] and (np.asarray(first) != np.asarray(second)).sum() > 10


@pytest.mark.parametrize("name", PAIRED)
def test_sft_term(name: str) -> None:
    examples = references.inputs("preference")
    plain, _, _, slopes = references.run(name, {}, {}, examples)
    more, _, _, steeper = references.run(name, {"rpo_alpha": 2.0}, {}, examples)
    np.testing.assert_allclose(more - plain, -2 * examples.chosen / examples.chosen_length, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(
        steeper["chosen"] - slopes["chosen"], -2 / examples.chosen_length, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(steeper["rejected"], slopes["rejected"])


def test_limits_are_dpo() -> None:
    examples = references.inputs("preference")
    plain = references.run("dpo", {"beta": 0.2}, {}, examples)[0]
    for name, hyper in (
        ("robust", {"label_smoothing": 0.0}), ("dpop", {"penalty": 0.0}), ("r_dpo", {"alpha": 0.0}),
        ("ld_dpo", {"ld_alpha": 1.0}), ("beta_dpo", {"alpha": 0.0, "filter_ratio": 0.0}),
    ):  # fmt: skip
        losses = references.run(name, {"beta": 0.2, **hyper}, {}, examples)[0]
        np.testing.assert_allclose(losses, plain, rtol=1e-6, err_msg=name)


def test_exported_functions_take_their_hyper_parameters_by_name() -> None:
    pairs = Pairs(*map(jnp.asarray, references.inputs("preference")))
    ours = dpo(pairs, beta=0.1, label_smoothing=0.0)[0], OBJECTIVES["dpo"].fn(pairs)[0]
    np.testing.assert_array_equal(*ours)
    by_name = simpo(pairs, beta=2.0, gamma=1.0, gamma_beta_ratio=None, label_smoothing=0.0)[0]
    np.testing.assert_array_equal(by_name, OBJECTIVES["simpo"].fn(pairs, gamma=1.0)[0])
    with pytest.raises(TypeError, match="beta"):
        dpo(pairs)


def test_gamma_of_simpo() -> None:
    """1 at beta 2 by default: a ratio of 0.5."""
    pairs = references.inputs("preference")
    for name in ("simpo", "alphapo"):
        losses = [
            references.run(name, hyper, {}, pairs)[0]
            for hyper in ({}, {"gamma": 1.0}, {"gamma_beta_ratio": 0.5}, {"gamma": 0.5})
        ]
        np.testing.assert_array_equal(losses[0], losses[1])
        np.testing.assert_array_equal(losses[0], losses[2])
        assert (np.abs(losses[0] - losses[3]) > 1e-4).any()


def test_running_means_of_bco() -> None:
    """After steps of unequal size the carry is the mean of all rewards so far."""
    for name in ("bco_pair", "bco"):
        examples = references.inputs(OBJECTIVES[name].kind)
        n, carry, rewards = len(examples[0]), {}, []
        for step, size in enumerate((3, n, 1)):
            valid = np.arange(n) < size
            examples = type(examples)(*(x if x.dtype == bool else x - step for x in examples))
            _, extra, carry, _ = references.run(name, {"beta": 0.3}, carry, examples, valid)
            rewards += [np.asarray(x)[valid] for x in extra.values()]
            every = np.concatenate(rewards)
            np.testing.assert_allclose(carry["mean"], every.mean(), rtol=1e-4)
            assert carry["count"] == len(every)


def test_kl_estimate_of_kto() -> None:
    examples = references.inputs("unpaired")
    ratio = examples.mismatched - examples.reference_mismatched
    estimate = references.run("kto", {}, {}, examples)[1]["kl_estimate"]
    np.testing.assert_allclose(estimate, ratio.mean(), rtol=1e-4)
    assert ratio.mean() > 0.01
    lower = examples._replace(mismatched=examples.reference_mismatched - 1)
    losses, extra, *_ = references.run("kto", {}, {}, lower)
    assert (extra["kl_estimate"] == 0).all()
    np.testing.assert_array_equal(losses, references.run("apo_zero_unpaired", {}, {}, lower)[0])


def test_moving_values_of_beta_dpo() -> None:
    examples = references.inputs("preference")
    carry = {"gap_mean": 1.0, "gap_std": 3.0, "step": 5.0}
    _, extra, new, _ = references.run("beta_dpo", {"momentum": 0.7}, carry, examples)
    gap = (examples.chosen - examples.reference_chosen) - (examples.rejected - examples.reference_rejected)
    mean, std = 0.7 * 1 + 0.3 * gap.mean(), 0.7 * 3 + 0.3 * gap.std(ddof=1)
    np.testing.assert_allclose([new["gap_mean"], new["gap_std"], new["step"]], [mean, std, 6], rtol=1e-5)
    kept = np.asarray(extra["kept"]) == 1
    np.testing.assert_allclose(extra["beta"], max(0.1 * (1 + 0.6 * (gap[kept].mean() - mean)), 1e-3), rtol=1e-4)


def test_draw_of_beta_dpo() -> None:
    """Deterministic by seed and step, and as often as drawing without replacement by the weights keeps each pair."""
    gap = np.array([0.0, 0.5, 1.0, -2.0, 2.5, 6.0])
    zeros = np.zeros(6)
    pairs = Pairs(*(jnp.asarray(x, jnp.float32) for x in (gap, zeros, zeros + 5, zeros + 5, zeros, zeros)))
    valid = jnp.ones(6, bool)

    def kept(step: jax.Array, seed: int) -> jax.Array:
        carry = {"gap_mean": jnp.float32(0), "gap_std": jnp.float32(0), "step": step}
        return OBJECTIVES["beta_dpo"].fn(pairs, valid, carry, momentum=0.0, filter_ratio=0.5, seed=seed)[1]["kept"]

    many = jax.jit(jax.vmap(kept, in_axes=(0, None)))
    draws = np.asarray(many(jnp.arange(1000.0), 0))
    assert (draws.sum(1) == 3).all()
    np.testing.assert_array_equal(draws, many(jnp.arange(1000.0), 0))
    assert (draws != np.asarray(many(jnp.arange(1000.0), 1))).any(), "the seed changes nothing"

    weights = np.exp(-((gap - gap.mean()) ** 2) / (2 * gap.var(ddof=1)))
    rng = np.random.default_rng(0)
    brute = [rng.choice(6, 3, replace=False, p=weights / weights.sum()) for _ in range(4000)]
    expected = np.bincount(np.concatenate(brute), minlength=6) / 4000
    np.testing.assert_allclose(draws.mean(0), expected, atol=5 * np.sqrt(0.25 / 1000))
    assert expected[5] < 0.3 < expected[1], "the outlier is left out more often"


def test_sft() -> None:
    log_probs = jnp.asarray([-0.5, -3.0, 0.0, -80.0])
    np.testing.assert_array_equal(sft(log_probs), -log_probs)
    np.testing.assert_array_equal(jax.grad(lambda x: sft(x).sum())(log_probs), -np.ones(4))


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("simpo", {"gamma": 1.0, "gamma_beta_ratio": 0.5}, r"both gamma \(1.0\) and gamma_beta_ratio \(0.5\)"),
        ("dpo", {"betta": 0.1}, "no hyper-parameter 'betta'; did you mean 'beta'"),
        ("dpo", {"beta": 0.0}, r"dpo: beta is 0.0; it must be in \(0.0, inf\)"),
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing is 0.5; it must be in \[0.0, 0.5\)"),
        ("exo_pair", {"label_smoothing": 0.0}, "the loss is infinite"),
        ("ld_dpo", {"ld_alpha": 1.1}, r"it must be in \[0.0, 1.0\]"),
        ("hinge", {"f_divergence_type": "reverse_kll"}, "did you mean 'reverse_kl'"),
        ("apo_zero", {"f_divergence_type": "forward_kl"}, "no hyper-parameter 'f_divergence_type'"),
        ("bco_pair", {"reward_shift": "runing"}, "did you mean 'running'"),
        ("beta_dpo", {"filter_ratio": 1.0}, "filter_ratio is 1.0"),
        ("kto", {"rpo_alpha": 1.0}, "no hyper-parameter 'rpo_alpha'"),
    ],
)
def test_bad_hyper_parameters_are_found_before_anything_runs(name: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_hyper(name, hyper)
    check_hyper(name, OBJECTIVES[name].hyper)


def test_objectives_name_their_data() -> None:
    assert OBJECTIVES["pretrain"].kind == "text" and OBJECTIVES["sft"].kind == "sft"
    free = {"simpo", "alphapo", "cpo", "orpo"}
    assert {name for name in COMPARED if not OBJECTIVES[name].needs_reference} == free
    batch = {"aot", "aot_unpaired", "bco_pair", "beta_dpo", "kto", "apo_zero_unpaired", "bco"}
    assert set(BATCH_LEVEL) == batch
    assert all("beta" in OBJECTIVES[name].hyper for name in COMPARED)
