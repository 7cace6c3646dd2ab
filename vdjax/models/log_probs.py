"""Log-probs of scored tokens: the one place where the vocabulary head meets hidden states."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def predecessors(sequence_ids: Int[Array, "rows length"]) -> Int[Array, "rows length"]:
    """Index in the row of the token whose hidden state predicts each token.

    That is the token before it, but for a response's first token the last token of the shared prompt.
    """
    index = jnp.arange(sequence_ids.shape[1])
    last_shared = jax.lax.cummax(jnp.where(sequence_ids == 0, index, -1), axis=1)
    before = jnp.pad(sequence_ids, ((0, 0), (1, 0)))[:, :-1]
    starts = (sequence_ids != before) & (sequence_ids > 0) & (last_shared >= 0)
    return jnp.maximum(jnp.where(starts, last_shared, index - 1), 0)


def hidden_states(model: Any, batch: Mapping[str, Array]) -> Float[Array, "rows length width"]:
    return model(batch["tokens"], batch["positions"], batch["segment_ids"], batch["sequence_ids"])


def token_log_probs(
    model: Any,
    batch: Mapping[str, Array],
    *,
    chunk: int,
    groups: int = 1,
    hidden: Float[Array, "rows length width"] | None = None,
    temperature: float = 1.0,
) -> Float[Array, "rows length"]:
    """log pi(token | what it sees) in nats at the tokens of `loss_mask`, 0 elsewhere.

    The scored tokens are gathered to the front and the head is applied to `chunk` of them at a time, in float32, so
    that no [tokens, vocab] array exists and chunks without a scored token cost nothing.

    Args:
      model: gives hidden states when called and float32 logits from `project`.
      batch: a packed batch (`vdjax.data.packing`).
      chunk: tokens per application of the head and group.
      groups: parts of the rows that are gathered apart; the number of shards of the batch, so that nothing moves
        between devices.
      hidden: the model's `hidden_states` on the batch, where they are known already.
      temperature: of the softmax, for responses that were sampled with it.
    """
    hidden = hidden_states(model, batch) if hidden is None else hidden
    rows, length, width = hidden.shape
    size = rows // groups * length
    row_start = (jnp.arange(rows) % (rows // groups) * length)[:, None]

    def flat(x: Array) -> Array:
        return x.reshape(groups, size, *x.shape[2:])

    scored = flat(batch["loss_mask"])
    order = jnp.argsort(~scored, axis=1, stable=True)
    chunk = min(chunk, size)
    padding = -size % chunk

    def chunks(x: Array) -> Array:
        x = jnp.pad(jnp.take_along_axis(x, order, axis=1), ((0, 0), (0, padding)))
        return x.reshape(groups, -1, chunk).swapaxes(0, 1)

    sources = chunks(flat(predecessors(batch["sequence_ids"]) + row_start))
    targets, wanted = chunks(flat(batch["tokens"])), chunks(scored)
    states = flat(hidden)

    def score(source: Int[Array, "g c"], target: Int[Array, "g c"]) -> Float[Array, "g c"]:
        logits = model.project(jnp.take_along_axis(states, source[..., None], axis=1)) / temperature
        at_target = jnp.arange(logits.shape[-1]) == target[..., None]
        return jnp.sum(jnp.where(at_target, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    def body(_: None, xs: tuple[Int[Array, "g c"], Int[Array, "g c"], Bool[Array, "g c"]]) -> tuple[None, Array]:
        source, target, want = xs
        out = jax.lax.cond(want.any(), score, lambda *_: jnp.zeros(source.shape, jnp.float32), source, target)
        return None, jnp.where(want, out, 0)

    # The whole body is recomputed: inside the branch alone, each chunk would keep a copy of the table and the states.
    _, out = jax.lax.scan(jax.checkpoint(body), None, (sources, targets, wanted))
    out = out.swapaxes(0, 1).reshape(groups, -1)[:, :size]
    return jnp.take_along_axis(out, jnp.argsort(order, axis=1), axis=1).reshape(rows, length)


def token_scores(model: Any, batch: Mapping[str, Array]) -> Float[Array, "rows length"]:
    """Scores of a model with a score head: of each token, read where the token has been seen."""
    return model.scores(hidden_states(model, batch))


def token_values(scores: Float[Array, "rows length"], sequence_ids: Int[Array, "rows length"]) -> Array:
    """Values of the states that tokens are chosen in: the scores where each token's predecessor has been seen."""
    return jnp.take_along_axis(scores, predecessors(sequence_ids), axis=1)


def sequence_ends(
    values: Float[Array, "rows length"],
    loss_mask: Bool[Array, "rows length"],
    sequence_ids: Int[Array, "rows length"],
    sequences: int,
) -> Float[Array, "rows sequences"]:
    """The value at each sequence's last scored token; 0 for a sequence that is not there."""
    index = jnp.arange(values.shape[1])

    def one_row(row: Array, mask: Array, ids: Array) -> Array:
        last = jax.ops.segment_max(jnp.where(mask, index, -1), ids, num_segments=sequences + 1)[1:]
        return jnp.where(last >= 0, row[jnp.maximum(last, 0)], 0)

    return jax.vmap(one_row)(values, loss_mask, sequence_ids)


def sequence_sums(
    values: Float[Array, "rows length"], sequence_ids: Int[Array, "rows length"], sequences: int
) -> Float[Array, "rows sequences"]:
    """Sums of token values over each sequence of a row; column s is sequence id s + 1, shared tokens are left out."""

    def one_row(row: Array, ids: Array) -> Array:
        return jax.ops.segment_sum(row, ids, num_segments=sequences + 1)[1:]

    return jax.vmap(one_row)(values, sequence_ids)
