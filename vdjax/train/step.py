"""THE train step, for every objective, and the passes that share its code: held-out evaluation and scoring."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from vdjax.data.packing import LENGTH_MULTIPLE
from vdjax.models import log_probs as lp
from vdjax.models.lora import join
from vdjax.objectives import OBJECTIVES
from vdjax.sharding import parts_of
from vdjax.train.losses import (
    Batch,
    Counts,
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

SHORT_ROW = 256  # tokens up to which a single row is computed whole: each size is a program to compile


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
    Microbatches without a token are skipped, and padding at the end of others where that is possible (`on_used_part`).
    A step whose loss or gradient is not finite leaves parameters and optimizer as they were and says so in `finite`.
    """

    def loss(params: Any, part: Batch, slopes: Any, counts: Counts) -> tuple[Array, Metrics]:
        if slopes is None:
            return loss_and_metrics(spec, params, part, counts)
        values = sequence_values(spec, params, part)
        return jnp.sum(jnp.stack([jnp.sum(slopes[name] * values[name]) for name in values])), {}

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        counts, slopes, measured, carry = counts_of(spec, batch), None, {}, state.carry
        if OBJECTIVES[spec.objective].batch_level:
            slopes, sums, carry = batch_loss(spec, join(frozen, state.params), batch, carry)
            slopes = jax.tree.map(lambda x: x / jnp.maximum(counts[count_of(spec, "loss")], 1), slopes)
            measured = shares(spec, sums, counts)

        def loss_grad(part: Batch, slopes: Any) -> tuple[Any, Metrics]:
            return jax.grad(lambda params: loss(join(frozen, params), part, slopes, counts), has_aux=True)(state.params)

        def add(total: Any, parts: tuple[Batch, Any]) -> tuple[Any, None]:
            def run(parts: tuple[Batch, Any]) -> Any:
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, loss_grad(*parts))

            return on_used_part(run, parts, total), None

        parts = (dict(batch), slopes)
        first = jax.tree.map(lambda x: x[0], parts)
        if len(batch["tokens"]) == 1:  # nothing to add up: no second copy of the gradients
            found = on_used_part(lambda parts: loss_grad(*parts), first)
            grads, metrics = jax.tree.map(lambda x: x.astype(jnp.float32), found)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(loss_grad, *first))
            (grads, metrics), _ = jax.lax.scan(add, zeros, parts)
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


def on_used_part(run: Callable[[Any], Any], parts: tuple[Batch, Any], nothing: Any = None) -> Any:
    """`run` on a microbatch without the padding at its end: that of a single row, or else the empty rows.

    A few sizes are compiled for; one alone where rows or their places are spread over devices.

    Args:
      parts: the batch, arrays [rows, length] or [rows, 1], and arrays of its rows.
      nothing: given for a microbatch without a token; None runs it all the same.
    """
    batch, of_rows = parts
    rows, length = batch["tokens"].shape
    axis, whole, multiple = (0, rows, 1) if rows > 1 else (1, length, LENGTH_MULTIPLE)
    spread = parts_of("batch", rows) * parts_of("length", length) > 1
    sizes = {whole}
    if not spread and (rows > 1 or length > SHORT_ROW):
        sizes |= {-(-whole * quarters // 4 // multiple) * multiple for quarters in (2, 3)}
    taken = (batch["segment_ids"] > 0).any(axis=1 - axis)
    used = jnp.max(jnp.where(taken, jnp.arange(1, whole + 1), 0))
    size_number = jnp.searchsorted(jnp.array(sorted(sizes)), used)

    def of_first(size: int) -> Callable[[], Any]:
        if rows > 1:
            return lambda: run(jax.tree.map(lambda x: x[:size], parts))
        return lambda: run(({name: x[:, :size] for name, x in batch.items()}, of_rows))

    branches = [*map(of_first, sorted(sizes))]
    if nothing is None:
        return jax.lax.switch(size_number, branches)
    return jax.lax.switch(jnp.where(batch["loss_mask"].any(), 1 + size_number, 0), [lambda: nothing, *branches])


def make_eval_step(spec: LossSpec) -> Callable[[Any, dict[str, Array], Batch], Metrics]:
    """`eval_step(params, carry, batch)`: the same loss and metrics as sums over the batch, with the counts."""

    def eval_step(params: Any, carry: dict[str, Array], batch: Batch) -> Metrics:
        counts = counts_of(spec, batch)
        if kind_of(spec) not in ("text", "sft"):
            return batch_loss(spec, params, batch, carry)[1] | counts
        ones = jax.tree.map(jnp.ones_like, counts)

        def run(part: Batch) -> Metrics:
            return on_used_part(lambda parts: loss_and_metrics(spec, params, parts[0], ones)[1], (part, None))

        sums = jax.lax.map(run, dict(batch))
        return jax.tree.map(jnp.sum, sums) | counts

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
        def run(part: Batch) -> Array:
            nothing = jnp.zeros(part["tokens"].shape, jnp.float32)

            def of_used(parts: tuple[Batch, Any]) -> Array:
                return jax.lax.dynamic_update_slice(nothing, score(params, parts[0]), (0, 0))

            return on_used_part(of_used, (part, None), nothing)

        return jax.lax.map(run, dict(batch))

    return score_step
