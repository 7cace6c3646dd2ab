"""Log-probs and scores of the tokens of packed rows, and their sums over sequences."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vdjax.models.head import Head, scored_log_probs


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
    ids = (batch["segment_ids"], batch["sequence_ids"], batch.get("prefix"))
    return model(batch["tokens"], batch["positions"], *ids)


def token_log_probs(
    model: Any,
    batch: Mapping[str, Array],
    *,
    chunk: int,
    hidden: Float[Array, "rows computed width"] | None = None,
    temperature: float = 1.0,
) -> Float[Array, "rows length"]:
    """log pi(token | what it sees) in nats at the tokens of `loss_mask`, 0 elsewhere.

    Args:
      model: gives hidden states when called, and the `table` of its vocabulary head.
      batch: a packed batch (`vdjax.data.packing`); with `sources` [rows, length], the place whose hidden state predicts
        each token, its tokens may stand in another order, and `hidden` may be shorter than the rows.
      chunk: scored tokens per application of the head (`vdjax.models.head`).
      hidden: the model's `hidden_states` on the batch, where they are known already.
      temperature: of the softmax, for responses that were sampled with it.
    """
    hidden = hidden_states(model, batch) if hidden is None else hidden
    sources = batch["sources"] if "sources" in batch else predecessors(batch["sequence_ids"])
    head = Head(chunk, temperature)
    return scored_log_probs(head, hidden, model.table, sources, batch["tokens"], batch["loss_mask"])


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
