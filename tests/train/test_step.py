"""The train step against gradients that are put together from unpacked log-probs and closed-form derivatives."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from ml_collections import ConfigDict
from scipy.special import expit, log_expit

from vdjax import config as configs
from vdjax import sharding
from vdjax.data import pipeline
from vdjax.data.packing import Shape
from vdjax.data.pipeline import Dataset
from vdjax.models.config import from_hf
from vdjax.models.functional import Model, init_adapters, make_model, shardings, trained_part
from vdjax.models.lora import Lora, join, merge
from vdjax.objectives import OBJECTIVES, Pairs, Unpaired
from vdjax.train import supervised
from vdjax.train.losses import LossSpec
from vdjax.train.plan import StagePlan
from vdjax.train.stage import BESIDE, Update
from vdjax.train.step import TrainState, adds_in_place, for_each_microbatch, make_train_step

PAIRS = tiny.dataset(tiny.preference_examples(3, 7))
DOCUMENTS = tiny.dataset(tiny.sft_examples(4, 14))
HYPER: dict[str, dict[str, float]] = {"sft": {}, "dpo": {"beta": 0.3}, "simpo": {"beta": 2.0, "gamma": 0.7}}

# Three ways to lay out the same examples: (row length, rows, rows a microbatch).
LAYOUTS = [(64, 7, 1), (128, 8, 2), (40, 14, 14)]


class Case(NamedTuple):
    """What one objective should give on its data: loss, metrics and the gradient of the parameters."""

    data: Dataset
    reference: np.ndarray
    metrics: dict[str, float]
    gradient: Any


Pull = Callable[[tiny.Alone, np.ndarray], tuple[jax.Array, Any]]


@pytest.fixture(scope="module")
def pull(qwen: tuple[Model, Any]) -> Pull:
    """Log-probs [sequences, 63] from plain logits, and the gradient of their sum with the given weights."""
    made, params = qwen

    @jax.jit
    def of(params: Any, rows: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
        out, vjp = jax.vjp(lambda p: tiny.naive_log_probs(made, p, rows), params)
        return out, vjp(weights)[0]

    return lambda parts, weights: of(params, parts.rows, (weights * parts.scored).astype(np.float32))


@pytest.fixture(scope="module")
def cases(pull: Pull) -> dict[str, Case]:
    """Losses and their derivatives by log-prob in float64; the model's own derivative from plain logits."""

    def log_probs(parts: tiny.Alone) -> np.ndarray:
        return np.asarray(pull(parts, np.zeros(parts.scored.shape))[0], np.float64)

    def gradient(parts: tiny.Alone, weights: np.ndarray) -> Any:
        return pull(parts, weights)[1]

    documents = tiny.each_alone([pipeline.example(DOCUMENTS, i) for i in range(14)])
    pairs = tiny.each_alone([pipeline.example(PAIRS, i) for i in range(7)])
    rng = np.random.default_rng(0)
    reference = np.where(PAIRS.loss_mask, -5 + rng.normal(size=len(PAIRS.tokens)), 0).astype(np.float32)

    tokens = documents.scored.sum()
    out = {"sft": Case(DOCUMENTS, reference, {}, gradient(documents, np.full(documents.scored.shape, -1 / tokens)))}
    out["sft"].metrics["loss"] = -log_probs(documents)[documents.scored].sum() / tokens

    token_log_probs = log_probs(pairs)
    starts = PAIRS.offsets[pairs.source[..., 0]] + pairs.source[..., 1]
    token_reference = np.where(pairs.scored, reference[np.where(pairs.scored, starts, 0)], 0).astype(np.float64)
    sums, lengths = (token_log_probs * pairs.scored).sum(1), pairs.scored.sum(1)
    ref_sums = token_reference.sum(1)
    sign = np.tile([1, -1], 7)
    for name in ("dpo", "simpo"):
        beta = HYPER[name]["beta"]
        slope = np.full(14, beta) if name == "dpo" else beta / lengths
        rewards = slope * (sums - ref_sums if name == "dpo" else sums)
        margins = rewards[::2] - rewards[1::2]
        shifted = margins - HYPER[name].get("gamma", 0)
        weights = -expit(-np.repeat(shifted, 2)) * sign * slope / 7
        metrics = {
            "loss": -log_expit(shifted).mean(),
            "reward_chosen": rewards[::2].mean(),
            "reward_rejected": rewards[1::2].mean(),
            "reward_margin": margins.mean(),
            "reward_accuracy": (margins > 0).mean(),
            "log_prob_chosen": sums[::2].mean(),
            "log_prob_rejected": sums[1::2].mean(),
        }
        if name == "dpo":
            ratio = (token_reference - token_log_probs)[pairs.scored]
            metrics["kl_to_reference"] = (np.exp(ratio) - 1 - ratio).mean()
        out[name] = Case(PAIRS, reference, metrics, gradient(pairs, np.broadcast_to(weights[:, None], (14, 63))))
    return out


def batch_of(data: Dataset, layout: tuple[int, int, int], reference: np.ndarray | None) -> dict[str, np.ndarray]:
    length, rows, microbatch_rows = layout
    steps = pipeline.in_order(len(data), len(data))
    beside = {} if reference is None else {"reference_log_probs": reference}
    batch = pipeline.batches(data, steps, Shape(rows, length, 14), microbatch_rows, beside)[0]
    return {k: v for k, v in batch.items() if k not in BESIDE}


def spec_of(made: Model, objective: str) -> LossSpec:
    return LossSpec(made.graphdef, objective, HYPER[objective], 14, 16)


def plain_step(made: Model, objective: str) -> Any:
    """Descent with rate 1, so that the parameters move by the gradient."""
    step = make_train_step(spec_of(made, objective), optax.sgd(1.0))
    return jax.jit(lambda state, batch: step(state, {}, batch))


def start(params: Any) -> TrainState:
    return TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params), {})


def check(state: TrainState, metrics: dict[str, Any], params: Any, case: Case) -> None:
    assert bool(metrics["finite"]) and int(state.step) == 1
    assert set(case.metrics) == set(metrics) - {"finite", "grad_norm", "tokens", "pairs"}
    for name, value in case.metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert float(metrics["tokens"]) == case.data.loss_mask.sum()
    assert float(metrics.get("pairs", 7)) == 7
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(case.gradient))
    assert largest > 0.01
    moved = jax.tree.map(lambda a, b: a - b, params, state.params)
    for got, want in zip(jax.tree.leaves(moved), jax.tree.leaves(case.gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(largest, 1))
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(case.gradient), rtol=1e-5)


@pytest.mark.parametrize(
    ("objective", "layout"),
    [("dpo", layout) for layout in LAYOUTS] + [("sft", LAYOUTS[1]), ("simpo", LAYOUTS[2])],
)
def test_gradient_and_metrics_for_any_layout(
    qwen: tuple[Model, Any],
    cases: dict[str, Case],
    objective: str,
    layout: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DPO with several sizes of microbatches."""
    if objective == "dpo":
        monkeypatch.setattr("vdjax.train.step.LITTLE_WORK", 0)
    made, params = qwen
    case = cases[objective]
    batch = batch_of(case.data, layout, case.reference if objective == "dpo" else None)
    state, metrics = plain_step(made, objective)(start(params), batch)
    check(state, metrics, params, case)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"remat": "full"}, 1e-5),
        ({"compute_dtype": "bfloat16", "remat": "full"}, 0.04),
        ({"compute_dtype": "bfloat16", "param_dtype": "bfloat16"}, 0.04),
    ],
)
def test_gradients_add_up_over_microbatches_in_every_dtype(
    qwen: tuple[Model, Any], cases: dict[str, Case], options: dict[str, str], tolerance: float
) -> None:
    """Every parameter's gradient is within a share of its own norm."""
    made = make_model(qwen[0].cfg, ConfigDict(tiny.MODEL.to_dict() | options))
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), qwen[1], made.params)
    spec = spec_of(made, "dpo")
    assert adds_in_place(spec, params, params) == ("compute_dtype" not in options)
    optimizer = optax.GradientTransformation(lambda params: {}, lambda grads, _, __: (zeros(params), grads))
    state = TrainState(jnp.int32(0), params, zeros(jax.tree.map(lambda x: x.astype(jnp.float32), params)), {})
    batch = batch_of(PAIRS, LAYOUTS[0], cases["dpo"].reference)
    state, _ = jax.jit(make_train_step(spec, optimizer))(state, {}, batch)
    for got, want in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(cases["dpo"].gradient), strict=True):
        assert got.dtype == jnp.float32
        assert float(jnp.linalg.norm(got - want)) < tolerance * float(jnp.linalg.norm(want))


def zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def test_empty_microbatches_are_skipped(qwen: tuple[Model, Any], cases: dict[str, Case]) -> None:
    """Tokens beyond the vocabulary embed as NaN, and would spoil the gradient if they were looked at."""
    made, params = qwen
    batch = batch_of(PAIRS, LAYOUTS[0], cases["dpo"].reference)
    empty = ~batch["loss_mask"].any(axis=(1, 2))
    assert empty.any()
    batch["tokens"][empty] = 10 * tiny.VOCAB
    state, metrics = plain_step(made, "dpo")(start(params), batch)
    check(state, metrics, params, cases["dpo"])


def test_padding_at_the_end_of_a_single_row_is_not_looked_at(
    qwen: tuple[Model, Any], cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdjax.train.step.LITTLE_WORK", 0)
    made, params = qwen
    batch = batch_of(PAIRS, (128, 4, 1), cases["dpo"].reference)
    sizes = np.array([64, 128])
    computed = sizes[np.searchsorted(sizes, (batch["segment_ids"] > 0).sum(axis=(1, 2)))]
    assert len(set(computed[batch["loss_mask"].any(axis=(1, 2))])) > 1
    batch["tokens"][np.arange(128) >= computed[:, None, None]] = 10 * tiny.VOCAB
    state, metrics = plain_step(made, "dpo")(start(params), batch)
    check(state, metrics, params, cases["dpo"])


def test_a_batch_of_one_microbatch_and_one_size_is_not_looped_over(
    qwen: tuple[Model, Any], cases: dict[str, Case]
) -> None:
    made, params = qwen
    state, metrics = plain_step(made, "dpo")(start(params), batch_of(PAIRS, (448, 1, 1), cases["dpo"].reference))
    check(state, metrics, params, cases["dpo"])


def test_a_step_that_is_not_finite_changes_nothing(qwen: tuple[Model, Any], cases: dict[str, Case]) -> None:
    made, params = qwen
    batch = batch_of(PAIRS, LAYOUTS[0], cases["dpo"].reference)
    batch["reference_log_probs"][0, 0, batch["loss_mask"][0, 0].argmax()] = np.nan
    state, metrics = plain_step(made, "dpo")(start(params), batch)
    assert not bool(metrics["finite"]) and int(state.step) == 0
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(before, after)


def test_held_out_evaluation_is_the_same_mean(
    qwen: tuple[Model, Any], cases: dict[str, Case], tmp_path: Path
) -> None:
    """Over two batches, the second one smaller."""
    made, params = qwen
    case, mesh = cases["dpo"], sharding.make_mesh(devices=jax.devices()[:1])
    plan = StagePlan(PAIRS, PAIRS, None, 1, 1, Shape(1, 1, 1), 2, [])
    stage = tiny.stage(made, params, configs.stage("dpo", hyper=HYPER["dpo"], batch_size=4), mesh, tmp_path, plan)
    beside = {PAIRS.key: {"reference_log_probs": case.reference}}
    evaluate = supervised.held_out_evaluation(stage, Update({}, optax.sgd(1.0), None), beside)
    assert evaluate is not None
    found = evaluate(start(params))
    assert set(found) == {f"eval_{name}" for name in case.metrics}
    for name, value in case.metrics.items():
        np.testing.assert_allclose(found[f"eval_{name}"], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_dpo_begins_at_ln_2_and_keeps_its_reference(
    qwen: tuple[Model, Any], tmp_path: Path, compiles: Any
) -> None:
    """The reference pass packs the data in its own way."""
    made, params = qwen
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    plan = StagePlan(PAIRS, None, None, 1, 1, Shape(1, 1, 1), 1, [])
    stage = tiny.stage(made, params, configs.stage("dpo", hyper=HYPER["dpo"], batch_size=3), mesh, tmp_path, plan)
    reference = supervised.reference(stage, PAIRS)
    want = np.concatenate(tiny.brute_force(made, params, [pipeline.example(PAIRS, i) for i in range(7)]))
    np.testing.assert_allclose(reference, want, atol=1e-5)
    _, metrics = plain_step(made, "dpo")(start(params), batch_of(PAIRS, LAYOUTS[0], reference))
    assert abs(float(metrics["loss"]) - np.log(2)) < 1e-5
    assert abs(float(metrics["reward_margin"])) < 1e-5 and float(metrics["kl_to_reference"]) < 1e-5
    with compiles() as names:
        np.testing.assert_array_equal(supervised.reference(stage, PAIRS), reference)
        assert "jit(score_step)" not in names
        other = jax.tree.map(lambda x: x, params) | {"final_norm": params["final_norm"].at[0].add(1e-3)}
        changed = supervised.reference(stage._replace(start=lambda: other), PAIRS)
        assert "jit(score_step)" in names
    assert np.abs(changed - reference).max() > 1e-6


# Every other objective, against the gradient of its loss on plain log-probs of responses scored one by one

LABELS = np.array([1, 0, 0, 1, 1, 0, 1], np.float32)
KEPT = {"bco_pair": {"mean": 0.4, "count": 6.0}, "bco": {"mean": 0.4, "count": 6.0}}


def direct_loss(
    log_probs: jax.Array, parts: tiny.Alone, name: str, hyper: dict[str, Any], reference: np.ndarray
) -> jax.Array:
    """The mean loss over the seven pairs of PAIRS (or, unpaired, over their first responses)."""
    token_log_probs = jnp.where(parts.scored, log_probs, 0)
    at = np.where(parts.scored, PAIRS.offsets[parts.source[..., 0]] + parts.source[..., 1], 0)
    token_reference = np.where(parts.scored, reference[at], 0)
    length = parts.scored.sum(1)
    shorter = np.minimum(length[::2], length[1::2]).repeat(2)
    first = parts.scored & (np.cumsum(parts.scored, axis=1) <= shorter[:, None])

    def both(x: Any) -> tuple[Any, Any]:
        return x[::2], x[1::2]

    policy, ref = both(token_log_probs.sum(1)), both(token_reference.sum(1))
    common = both(jnp.where(first, token_log_probs, 0).sum(1))
    reference_common = both(np.where(first, token_reference, 0).sum(1))
    objective, everything = OBJECTIVES[name], np.ones(7, bool)
    carry = {key: jnp.float32(value) for key, value in (KEPT.get(name) or objective.carry).items()}
    if objective.kind == "unpaired":
        mismatched = jax.lax.stop_gradient(policy[1])
        examples = Unpaired(policy[0], length[::2], ref[0], LABELS > 0.5, mismatched, ref[1])
        return objective.fn(examples, everything, carry, **hyper)[0].mean()
    pairs = Pairs(*policy, *both(length.astype(np.float32)), *ref, *common, *reference_common)
    out = objective.fn(pairs, everything, carry, **hyper) if objective.batch_level else objective.fn(pairs, **hyper)
    return out[0].mean()


OTHERS = [n for n, o in OBJECTIVES.items() if o.kind == "unpaired" or (o.kind == "preference" and o.batch_level)]


@pytest.mark.parametrize("name", [*OTHERS, "ld_dpo", "orpo", "simpo"])
def test_any_objective_has_the_gradient_of_its_loss_over_the_whole_batch(
    qwen: tuple[Model, Any], cases: dict[str, Case], pull: Pull, name: str
) -> None:
    """Over seven microbatches of one row, some of them empty; a step's loss may look at all pairs at once."""
    made, params = qwen
    objective = OBJECTIVES[name]
    hyper = dict(objective.hyper) | ({"rpo_alpha": 0.5} if name == "aot" else {})
    carry = {key: jnp.float32(value) for key, value in (KEPT.get(name) or objective.carry).items()}
    # Near the policy's own log-probs, so that no loss is flat there.
    own = np.concatenate(tiny.brute_force(made, params, [pipeline.example(PAIRS, i) for i in range(7)]))
    reference = np.where(PAIRS.loss_mask, own + 0.3 * cases["dpo"].reference / 5, 0).astype(np.float32)
    beside = {"reference_log_probs": reference, "labels": np.repeat(LABELS, pipeline.lengths(PAIRS))}
    batches = pipeline.batches(PAIRS, pipeline.in_order(7, 7), Shape(9, 64, 14), 1, beside)
    batch = {k: v for k, v in batches[0].items() if k not in BESIDE}
    parts = tiny.each_alone([pipeline.example(PAIRS, i) for i in range(7)])
    log_probs, _ = pull(parts, np.zeros(parts.scored.shape))
    loss, slopes = jax.value_and_grad(direct_loss)(log_probs, parts, name, hyper, reference)
    _, gradient = pull(parts, np.asarray(slopes))

    spec = LossSpec(made.graphdef, name, hyper, 14, 16)
    step = jax.jit(make_train_step(spec, optax.sgd(1.0)))
    state, metrics = step(TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params), carry), {}, batch)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    assert largest > 1e-4
    moved = jax.tree.map(lambda a, b: a - b, params, state.params)
    for got, want in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(largest, 1))
    if "count" in carry:
        assert float(state.carry["count"]) > float(carry["count"])


def test_a_reward_model_scores_the_last_token_and_learns_from_margins(tmp_path: Path) -> None:
    made = make_model(from_hf(tiny.SHAPES["qwen"], where="qwen"), tiny.MODEL, head="score")
    params = tiny.model("qwen")[1] | {"score": jnp.linspace(-1, 1, 32)}
    margins = np.linspace(0, 2, 7).astype(np.float32)
    hyper = {"margin_scale": 0.5, "center_rewards_coefficient": 0.1}
    parts = tiny.each_alone([pipeline.example(PAIRS, i) for i in range(7)])
    last = parts.scored.shape[1] - parts.scored[:, ::-1].argmax(1)

    def direct(params: Any) -> jax.Array:
        rows = parts.rows
        positions, segments = np.broadcast_to(np.arange(64), rows.shape), np.ones_like(rows)
        model = nnx.merge(made.graphdef, params)
        scores = model.scores(model(rows, positions, segments))[np.arange(14), last]
        chosen, rejected = scores[::2], scores[1::2]
        losses = -jax.nn.log_sigmoid(chosen - rejected - 0.5 * margins) + 0.1 * (chosen + rejected) ** 2
        return losses.mean()

    loss, gradient = jax.value_and_grad(direct)(params)
    batches = pipeline.batches(
        PAIRS, pipeline.in_order(7, 7), Shape(8, 64, 14), 2, {"labels": np.repeat(margins, pipeline.lengths(PAIRS))}
    )
    batch = {k: v for k, v in batches[0].items() if k not in BESIDE}
    step = jax.jit(make_train_step(LossSpec(made.graphdef, "reward_model", hyper, 14, 16), optax.sgd(1.0)))
    state, metrics = step(start(params), {}, batch)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    moved = jax.tree.map(lambda a, b: a - b, params, state.params)
    for got, want in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_adapters_alone_are_trained(qwen: tuple[Model, Any], cases: dict[str, Case]) -> None:
    """Their gradient is that of the merged model by the chain rule; nothing else has any."""
    _, base = qwen
    lora = Lora(3, 6.0, ("q_proj", "down_proj"))
    made = make_model(from_hf(tiny.SHAPES["qwen"], where="qwen"), tiny.MODEL, lora=lora)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    adapters = init_adapters(made, seed=3, shardings=trained_part(made, shardings(made, mesh)))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    batch = batch_of(PAIRS, LAYOUTS[0], cases["dpo"].reference)
    step = jax.jit(make_train_step(spec_of(made, "dpo"), optax.sgd(1.0)))
    state, metrics = step(start(adapters), base, batch)
    assert jax.tree.structure(state.params) == jax.tree.structure(adapters)

    plain = tiny.model_without_params("qwen")
    merged = merge(join(base, adapters), lora)
    at_merged, same = plain_step(plain, "dpo")(start(merged), batch)
    assert float(metrics["loss"]) == pytest.approx(float(same["loss"]), rel=1e-5)
    kernels = jax.tree.map(lambda a, b: a - b, merged, at_merged.params)["layers"]
    for name in lora.targets:
        a, b = (adapters["layers"][f"{name}_lora_{side}"] for side in "ab")
        want = {"a": 2 * kernels[name] @ b.swapaxes(1, 2), "b": 2 * a.swapaxes(1, 2) @ kernels[name]}
        for side in "ab":
            moved = adapters["layers"][f"{name}_lora_{side}"] - state.params["layers"][f"{name}_lora_{side}"]
            np.testing.assert_allclose(moved, want[side], rtol=0, atol=1e-5 * float(jnp.abs(want[side]).max() + 1))


def computed_of(segments: np.ndarray, work: float = 1e12) -> tuple[int, int]:
    """The shape that `for_each_microbatch` takes of a microbatch and of its rows' own arrays; (-1, -1): nothing.

    With parameters of so many FLOPs a microbatch.
    """
    batch = {"tokens": segments, "segment_ids": segments, "loss_mask": segments > 0}
    empty_first = jax.tree.map(lambda x: np.stack([np.zeros_like(x), x]), (batch, np.zeros((len(segments), 2))))
    first, second = computed(round(work / 2 / segments.size), *empty_first).tolist()
    assert first == [-1, -1]
    return tuple(second)


@functools.partial(jax.jit, static_argnums=0)
def computed(weights: int, batch: Any, of_rows: Any) -> jax.Array:
    """The shapes that `for_each_microbatch` takes of two microbatches."""
    ref = jax.new_ref(jnp.full((2, 2), -1))

    def run(number: Any, part: Any, of_rows: Any) -> None:
        assert len(of_rows) == len(part["tokens"])
        ref[number] = jnp.array(part["tokens"].shape)

    for_each_microbatch(run, jax.ShapeDtypeStruct((weights,), jnp.float32), batch, of_rows)
    return jax.freeze(ref)


@pytest.mark.parametrize("rows", [2, 3, 4, 7])
def test_no_more_rows_are_computed_than_the_next_size_that_holds_those_in_use(rows: int) -> None:
    sizes = {-(-rows // 2), -(-3 * rows // 4), rows}
    for used in range(rows + 1):
        segments = (np.arange(rows) < used)[:, None] * np.ones((1, 3), np.int32)
        assert computed_of(segments) == ((min(s for s in sizes if s >= used), 3) if used else (-1, -1))


@pytest.mark.parametrize(("length", "sizes"), [(30, {30}), (100, {64, 100}), (320, {192, 256, 320})])
def test_a_single_row_is_computed_up_to_the_next_size_that_holds_its_tokens(length: int, sizes: set[int]) -> None:
    for used in range(0, length + 1, 5):
        segments = (np.arange(length) < used)[None].astype(np.int32)
        assert computed_of(segments) == ((1, min(s for s in sizes if s >= used)) if used else (-1, -1))


@pytest.mark.parametrize(("whole", "part"), [((1, 320), (1, 192)), ((4, 3), (2, 3))])
def test_a_microbatch_of_little_work_is_computed_whole(whole: tuple[int, int], part: tuple[int, int]) -> None:
    segments = np.zeros(whole, np.int32)
    segments[0, 0] = 1
    assert computed_of(segments, 0.9e10) == whole
    assert computed_of(segments, 1.1e10) == part
