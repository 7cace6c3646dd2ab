"""THE train step, for every objective, and the passes that share its code: held-out evaluation and scoring."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from vdjax.data.packing import LENGTH_MULTIPLE
from vdjax.models import log_probs as lp
from vdjax.models.functional import policy_part
from vdjax.models.lora import join
from vdjax.objectives import OBJECTIVES
from vdjax.sharding import parts_of
from vdjax.train.losses import (
    Batch,
    LossSpec,
    Metrics,
    batch_loss,
    count_of,
    counts_of,
    kind_of,
    loss_and_metrics,
    sequence_values,
    shares,
)

# FLOPs of a microbatch's forward pass up to which it is computed whole: each size is a program to compile.
LITTLE_WORK = 1e10


class TrainState(NamedTuple):
    """`params` are those that are trained; `carry` holds what an objective keeps from step to step."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    carry: dict[str, Float[Array, ""]]


def make_train_step(
    spec: LossSpec, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """`train_step(state, frozen, batch) -> (state, metrics)`; `frozen` are parameters beside the trained ones.

    The batch is [microbatches, rows, length]; gradients are summed over microbatches, each already divided by the
    whole batch's counts, so they do not depend on how the batch is cut. Objectives that look at the whole batch take
    a forward pass more: from it comes the slope of the loss by each response's value, then that of the parameters.
    Microbatches without a token are skipped, and padding at the end of others where that is possible
    (`for_each_microbatch`).
    A step whose loss or gradient is not finite leaves parameters and optimizer as they were and says so in `finite`.
    """

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        counts, slopes, measured, carry = counts_of(spec, batch), None, {}, state.carry
        if OBJECTIVES[spec.objective].batch_level:
            slopes, sums, carry = batch_loss(spec, join(frozen, state.params), batch, carry)
            slopes = jax.tree.map(lambda x: x / jnp.maximum(counts[count_of(spec, "loss")], 1), slopes)
            measured = shares(spec, sums, counts)

        def loss(params: Any, part: Batch, slopes: Any) -> tuple[Array, Metrics]:
            params = join(frozen, params)
            if slopes is None:
                return loss_and_metrics(spec, params, part, counts)
            values = sequence_values(spec, params, part)
            return jnp.sum(jnp.stack([jnp.sum(slopes[name] * values[name]) for name in values])), {}

        _, metrics = jax.eval_shape(loss, state.params, *first_of((dict(batch), slopes)))
        gradient_sums, metric_sums = zero_refs(state.params), zero_refs(metrics)
        in_place = adds_in_place(spec, join(frozen, state.params), state.params)

        def add(_: Array, part: Batch, slopes: Any) -> None:
            pull: Any  # typed as a function, it has refs too
            own, pull, found = jax.vjp(lambda params: loss(params, part, slopes), state.params, has_aux=True)
            if in_place:
                pull.with_refs(gradient_sums)(jnp.ones_like(own))
            else:
                add_to(gradient_sums, *pull(jnp.ones_like(own)))
            add_to(metric_sums, found)

        for_each_microbatch(add, join(frozen, state.params), batch, slopes)
        grads, metrics = jax.tree.map(jax.freeze, (gradient_sums, metric_sums))
        metrics |= measured

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

        def update(_: Array, state: TrainState) -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return TrainState(state.step, optax.apply_updates(state.params, updates), opt_state, carry)

        # Without a token there is nothing to learn, and the moments of earlier steps must not move anything. A loop of
        # one turn or none, since XLA changes a loop's state in place, and would copy that of a conditional.
        turns = (finite & (counts["tokens"] > 0)).astype(jnp.int32)
        state = jax.lax.fori_loop(0, turns, update, state)
        state = state._replace(step=state.step + finite)
        return state, metrics | counts | {"grad_norm": grad_norm, "finite": finite}

    return train_step


def adds_in_place(spec: LossSpec, params: Any, trained: Any) -> bool:
    """Whether a backward pass may add to the gradients' sums layer by layer, without a gradient of its own in memory.

    JAX 0.10 takes one sum for another where some of the inputs that a scan is differentiated by have refs and others
    have not, as with kernels that are converted before the layer loop and norms that are not.
    """
    dtypes = {x.dtype for x in jax.tree.leaves(trained)} | {nnx.merge(spec.graphdef, policy_part(params)).compute_dtype}
    return dtypes == {np.dtype(np.float32)}


def for_each_microbatch(
    run: Callable[[Array, Batch, Any], None], params: Any, batch: Batch, of_rows: Any = None
) -> None:
    """Calls `run(number, part, its of_rows)` on each microbatch with a scored token, and on the only one of a batch for
    which one size is compiled; what it finds it writes to refs.

    A part is without the padding at its end: that of a single row, or else the empty rows. A few sizes are compiled
    for; one alone where rows or their places are spread over devices, or a microbatch is little work (`LITTLE_WORK`).

    Args:
      params: those that `run` applies, for the work of a token.
      batch: arrays [microbatches, rows, length] or [microbatches, rows, 1].
      of_rows: arrays [microbatches, rows, ...], or None.
    """
    microbatches, rows, length = batch["tokens"].shape
    axis, sizes = microbatch_sizes(params, rows, length)
    every = (dict(batch), of_rows)
    if microbatches == 1 and len(sizes) == 1:  # in a loop, sums would lie beside a gradient of its own
        run(jnp.zeros((), jnp.int32), *first_of(every))
        return

    def run_first(size: int, number: Array, part: Batch, of_rows: Any) -> None:
        if rows > 1:
            run(number, *jax.tree.map(lambda x: x[:size], (part, of_rows)))
        else:
            run(number, {name: x[:, :size] for name, x in part.items()}, of_rows)

    def one(number: Array, parts: tuple[Batch, Any]) -> tuple[Array, None]:
        part = parts[0]
        taken = (part["segment_ids"] > 0).any(axis=1 - axis)
        used = jnp.max(jnp.where(taken, jnp.arange(1, sizes[-1] + 1), 0))
        fits = jnp.searchsorted(jnp.array(sizes), used)
        for i, size in enumerate(sizes):
            # A loop of one turn or none: of what is added to, XLA would make a copy for a conditional.
            turns = ((fits == i) & part["loss_mask"].any()).astype(jnp.int32)
            jax.lax.fori_loop(0, turns, lambda _, none, size=size: run_first(size, number, *parts), None)
        return number + 1, None

    jax.lax.scan(one, jnp.zeros((), jnp.int32), every)


def microbatch_sizes(params: Any, rows: int, length: int) -> tuple[int, list[int]]:
    """The axis that microbatches are cut along, 0 for rows or 1 for places, and the sizes they are cut to."""
    axis, whole, multiple = (0, rows, 1) if rows > 1 else (1, length, LENGTH_MULTIPLE)
    work = 2 * sum(x.size for x in jax.tree.leaves(params)) * rows * length
    if parts_of("batch", rows) * parts_of("length", length) > 1 or work <= LITTLE_WORK:
        return axis, [whole]
    return axis, sorted({whole, *(min(whole, -(-whole * n // 4 // multiple) * multiple) for n in (2, 3))})


def first_of(parts: Any) -> Any:
    return jax.tree.map(lambda x: x[0], parts)


def zero_refs(tree: Any) -> Any:
    """Refs of float32 zeros in the shapes of a tree, whatever its dtypes."""
    return jax.tree.map(lambda x: jax.new_ref(jnp.zeros(x.shape, jnp.float32)), tree)


def add_to(refs: Any, tree: Any) -> None:
    for ref, x in zip(jax.tree.leaves(refs), jax.tree.leaves(tree), strict=True):
        ref[...] += x.astype(jnp.float32)


def make_eval_step(spec: LossSpec) -> Callable[[Any, dict[str, Array], Batch], Metrics]:
    """`eval_step(params, carry, batch)`: the same loss and metrics as sums over the batch, with the counts."""

    def eval_step(params: Any, carry: dict[str, Array], batch: Batch) -> Metrics:
        counts = counts_of(spec, batch)
        if kind_of(spec) not in ("text", "sft"):
            return batch_loss(spec, params, batch, carry)[1] | counts
        ones = jax.tree.map(jnp.ones_like, counts)

        def metrics(part: Batch) -> Metrics:
            return loss_and_metrics(spec, params, part, ones)[1]

        sums = zero_refs(jax.eval_shape(metrics, first_of(dict(batch))))
        for_each_microbatch(lambda _, part, __: add_to(sums, metrics(part)), params, batch)
        return jax.tree.map(jax.freeze, sums) | counts

    return eval_step


def make_score_step(
    spec: LossSpec, what: Literal["log_probs", "scores", "values"] = "log_probs"
) -> Callable[[Any, Batch], Float[Array, "microbatches rows length"]]:
    """`score_step(params, batch)`: log-probs of the scored tokens, or scores or values by a model with a score head.

    A score is read where its token has been seen, a value before that: it is of the state that the token is chosen in.
    """

    def score(params: Any, part: Batch) -> Array:
        model = nnx.merge(spec.graphdef, params)
        if what != "log_probs":
            scores = lp.token_scores(model, part)
            return scores if what == "scores" else lp.token_values(scores, part["sequence_ids"])
        return lp.token_log_probs(model, part, chunk=spec.head_chunk, temperature=spec.temperature)

    def score_step(params: Any, batch: Batch) -> Float[Array, "microbatches rows length"]:
        scores = zero_refs(batch["tokens"])

        def write(number: Array, part: Batch, _: Any) -> None:
            rows, length = part["tokens"].shape
            scores[number, :rows, :length] = score(params, part)

        for_each_microbatch(write, params, batch)
        return jax.freeze(scores)

    return score_step
