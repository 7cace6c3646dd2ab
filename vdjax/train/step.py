"""THE train step, for every objective, and the two passes that share its code: held-out evaluation and scoring."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from vdjax.models.log_probs import sequence_sums, token_log_probs
from vdjax.objectives import OBJECTIVES, Pairs

Batch = Mapping[str, Array]  # arrays [microbatches, rows, length]
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    step: Int[Array, ""]
    params: Any
    opt_state: Any


class LossSpec(NamedTuple):
    """What a stage's loss depends on besides parameters and batch."""

    graphdef: Any
    objective: str
    hyper: Mapping[str, float]
    sequences: int  # most sequences in a row
    head_chunk: int
    groups: int  # shards of the batch


def counts_of(spec: LossSpec, batch: Batch) -> dict[str, Float[Array, ""]]:
    """Global counts that losses are divided by: scored tokens, and for preferences pairs."""
    counts = {"tokens": jnp.sum(batch["loss_mask"], dtype=jnp.float32)}
    if OBJECTIVES[spec.objective].kind == "preference":
        scored = batch["loss_mask"].astype(jnp.float32)
        scored = jax.vmap(lambda x, ids: sequence_sums(x, ids, spec.sequences))(scored, batch["sequence_ids"])
        counts["pairs"] = jnp.sum(scored[..., 1::2] > 0, dtype=jnp.float32)
    return counts


def loss_and_metrics(
    spec: LossSpec, params: Any, batch: Batch, counts: Mapping[str, Float[Array, ""]]
) -> tuple[Float[Array, ""], Metrics]:
    """One microbatch's share of the batch's mean loss and metrics: sums divided by the whole batch's counts."""
    objective = OBJECTIVES[spec.objective]
    model = nnx.merge(spec.graphdef, params)
    mask = batch["loss_mask"]
    log_probs = token_log_probs(model, batch, chunk=spec.head_chunk, groups=spec.groups)

    def per_token(x: Array) -> Array:
        return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(counts["tokens"], 1)

    if objective.kind != "preference":
        loss = per_token(objective.fn(log_probs, **spec.hyper))
        return loss, {"loss": loss}

    reference = batch["reference_log_probs"] if objective.needs_reference else jnp.zeros_like(log_probs)
    policy, ref, length = (
        sequence_sums(x, batch["sequence_ids"], spec.sequences)
        for x in (log_probs, reference, mask.astype(jnp.float32))
    )
    pairs = Pairs(policy[:, ::2], policy[:, 1::2], length[:, ::2], length[:, 1::2], ref[:, ::2], ref[:, 1::2])

    def per_pair(x: Array) -> Array:
        return jnp.sum(jnp.where(pairs.rejected_length > 0, x, 0)) / jnp.maximum(counts["pairs"], 1)

    losses, extra = objective.fn(pairs, **spec.hyper)
    margin = extra["reward_chosen"] - extra["reward_rejected"]
    metrics = {
        "loss": losses,
        **extra,
        "reward_margin": margin,
        "reward_accuracy": (jnp.sign(margin) + 1) / 2,  # a tie, as before the first step, counts one half
        "log_prob_chosen": pairs.chosen,
        "log_prob_rejected": pairs.rejected,
    }
    metrics = {name: per_pair(value) for name, value in metrics.items()}
    if objective.needs_reference:
        # Schulman's k3 estimate, which is never negative; the tokens are the data set's, not samples of the policy.
        log_ratio = reference - log_probs
        metrics["kl_to_reference"] = per_token(jnp.expm1(log_ratio) - log_ratio)
    return metrics["loss"], metrics


def make_train_step(
    spec: LossSpec, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`train_step(state, batch) -> (state, metrics)`.

    The batch is [microbatches, rows, length]; gradients are summed over microbatches, each already divided by the
    whole batch's counts, so they do not depend on how the batch is cut. Microbatches without a token are skipped. A
    step whose loss or gradient is not finite leaves parameters and optimizer as they were and says so in `finite`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        counts = counts_of(spec, batch)
        loss_grad = jax.grad(lambda params, part: loss_and_metrics(spec, params, part, counts), has_aux=True)

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            def run(total: Any) -> Any:
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, loss_grad(state.params, part))

            return jax.lax.cond(part["loss_mask"].any(), run, lambda total: total, total), None

        one = jax.tree.map(lambda x: x[0], dict(batch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(loss_grad, state.params, one))
        (grads, metrics), _ = jax.lax.scan(add, zeros, dict(batch))

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

        def update(state: TrainState) -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

        state = jax.lax.cond(finite, update, lambda state: state, state)
        return state, metrics | counts | {"grad_norm": grad_norm, "finite": finite}

    return train_step


def make_eval_step(spec: LossSpec) -> Callable[[Any, Batch], Metrics]:
    """`eval_step(params, batch)`: the same loss and metrics as sums over the batch, with the counts to divide by."""

    def eval_step(params: Any, batch: Batch) -> Metrics:
        one = {"tokens": jnp.float32(1), "pairs": jnp.float32(1)}
        sums = jax.lax.map(lambda part: loss_and_metrics(spec, params, part, one)[1], dict(batch))
        return jax.tree.map(jnp.sum, sums) | counts_of(spec, batch)

    return eval_step


def make_score_step(spec: LossSpec) -> Callable[[Any, Batch], Float[Array, "microbatches rows length"]]:
    """`score_step(params, batch)`: log-probs of the scored tokens, for the reference pass."""

    def score_step(params: Any, batch: Batch) -> Float[Array, "microbatches rows length"]:
        model = nnx.merge(spec.graphdef, params)
        return jax.lax.map(
            lambda part: token_log_probs(model, part, chunk=spec.head_chunk, groups=spec.groups), dict(batch)
        )

    return score_step
