"""The loss and metrics of a packed microbatch, or of a whole batch, under each kind of objective."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vdjax.models import log_probs as lp
from vdjax.models.functional import policy_part
from vdjax.models.log_probs import sequence_sums
from vdjax.objectives import OBJECTIVES, Pairs, Unpaired
from vdjax.objectives.policy_gradient import clipped_policy_loss, clipped_value_loss, kl_estimate

Batch = Mapping[str, Array]  # arrays [rows, length] of a microbatch, [microbatches, rows, length] of a batch
Counts = Mapping[str, Float[Array, ""]]
Metrics = dict[str, Array]

COUNTS = ("tokens", "pairs", "examples", "desirable", "undesirable")


class LossSpec(NamedTuple):
    """What a stage's loss depends on besides parameters and batch."""

    graphdef: Any
    objective: str
    hyper: Mapping[str, Any]
    sequences: int  # most sequences in a row
    head_chunk: int
    temperature: float = 1.0  # that responses were sampled with
    value_graphdef: Any = None  # of a value model apart from the policy; None: values come from the policy's states


def kind_of(spec: LossSpec) -> str:
    return OBJECTIVES[spec.objective].kind


def counts_of(spec: LossSpec, batch: Batch) -> dict[str, Float[Array, ""]]:
    """Global counts that sums are divided by: scored tokens, and pairs or examples."""
    counts = {"tokens": jnp.sum(batch["loss_mask"], dtype=jnp.float32)}
    if kind_of(spec) in ("preference", "unpaired", "reward"):
        facts = jax.vmap(lambda part: sequence_facts(spec, part))(batch)
        masks = item_masks(spec, facts)
        if kind_of(spec) == "unpaired":  # what stands beside a response teaches nothing
            counts["tokens"] = jnp.sum(facts["length"][..., ::2])
        counts |= {name: jnp.sum(mask, dtype=jnp.float32) for name, mask in masks.items()}
    return counts


def count_of(spec: LossSpec, metric: str) -> str:
    """The count that a metric's sum is divided by."""
    kind = kind_of(spec)
    if kind in ("text", "sft", "rollout") or metric == "kl_to_reference":
        return "tokens"
    of_some = {"reward_desirable": "desirable", "reward_undesirable": "undesirable"}
    return of_some.get(metric, "examples" if kind == "unpaired" else "pairs")


def shares(spec: LossSpec, sums: Metrics, counts: Counts) -> Metrics:
    return {name: value / jnp.maximum(counts[count_of(spec, name)], 1) for name, value in sums.items()}


def loss_and_metrics(spec: LossSpec, params: Any, batch: Batch, counts: Counts) -> tuple[Float[Array, ""], Metrics]:
    """A microbatch's share of the batch's mean loss and metrics: sums divided by the whole batch's counts.

    Not for objectives that look at the whole batch (`batch_loss`).
    """
    if kind_of(spec) in ("text", "sft"):
        losses = OBJECTIVES[spec.objective].fn(log_probs_of(spec, params, batch), **spec.hyper)
        metrics = shares(spec, {"loss": masked_sum(losses, batch["loss_mask"])}, counts)
        return metrics["loss"], metrics
    if kind_of(spec) == "rollout":
        return rollout_loss(spec, params, batch, counts)
    values = sequence_values(spec, params, batch)
    sums, _ = sequence_loss(spec, values, sequence_facts(spec, batch), {})
    metrics = shares(spec, sums, counts)
    return metrics["loss"], metrics


def masked_sum(x: Array, mask: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, x, 0))


def log_probs_of(spec: LossSpec, params: Any, batch: Batch) -> Float[Array, "rows length"]:
    model = nnx.merge(spec.graphdef, params)
    return lp.token_log_probs(model, batch, chunk=spec.head_chunk, temperature=spec.temperature)


# Objectives of whole responses: their numbers are [rows, sequences]; even columns hold what is wanted (the chosen
# response, the labelled one), odd ones what it is held against.


def sequence_values(spec: LossSpec, params: Any, batch: Batch) -> dict[str, Float[Array, "rows sequences"]]:
    """What an objective looks at that depends on the parameters.

    "value" is a response's log-prob, or its score under a reward model; "common" its log-prob up to the length of the
    shorter response; "kl" the sum of its tokens' estimates of KL(policy || reference), for the log.
    """
    ids, mask = batch["sequence_ids"], batch["loss_mask"]
    if kind_of(spec) == "reward":
        scores = lp.token_scores(nnx.merge(spec.graphdef, params), batch)
        return {"value": lp.sequence_ends(scores, mask, ids, spec.sequences)}
    log_probs = log_probs_of(spec, params, batch)
    common = jnp.where(in_common(spec, batch), log_probs, 0)
    out = {"value": sequence_sums(log_probs, ids, spec.sequences)}
    out["common"] = sequence_sums(common, ids, spec.sequences)
    if "reference_log_probs" in batch:
        # k3, which is never negative; the tokens are the data set's, not samples of the policy.
        kl = kl_estimate(jax.lax.stop_gradient(log_probs), batch["reference_log_probs"], "k3")
        out["kl"] = sequence_sums(jnp.where(mask, kl, 0), ids, spec.sequences)
    return out


def sequence_facts(spec: LossSpec, batch: Batch) -> dict[str, Float[Array, "rows sequences"]]:
    """What an objective looks at that does not: lengths in scored tokens, the reference's log-probs, labels."""
    ids, mask = batch["sequence_ids"], batch["loss_mask"].astype(jnp.float32)
    length = sequence_sums(mask, ids, spec.sequences)
    out = {"length": length}
    if "reference_log_probs" in batch:
        reference = batch["reference_log_probs"]
        out["reference"] = sequence_sums(reference, ids, spec.sequences)
        out["reference_common"] = sequence_sums(jnp.where(in_common(spec, batch), reference, 0), ids, spec.sequences)
    if "labels" in batch:
        out["label"] = sequence_sums(batch["labels"] * mask, ids, spec.sequences) / jnp.maximum(length, 1)
    return out


def in_common(spec: LossSpec, batch: Batch) -> Bool[Array, "rows length"]:
    """The first tokens of each response, as many as the shorter one of its pair has."""
    ids, mask = batch["sequence_ids"], batch["loss_mask"].astype(jnp.int32)
    length = sequence_sums(mask, ids, spec.sequences)
    shorter = jnp.minimum(length[:, ::2], length[:, 1::2]).repeat(2, axis=1)
    before = jnp.cumsum(mask, axis=1) - mask
    starts = jax.vmap(lambda x, i: jax.ops.segment_min(x, i, num_segments=spec.sequences + 1))(before, ids)
    limit = jnp.pad(shorter, ((0, 0), (1, 0)))
    at = before - jnp.take_along_axis(starts, ids, axis=1)
    return (at < jnp.take_along_axis(limit, ids, axis=1)) & (mask > 0)


def item_masks(spec: LossSpec, facts: Mapping[str, Array]) -> dict[str, Bool[Array, " items"]]:
    """The pairs or examples that are there, of those that a batch has room for."""
    if kind_of(spec) != "unpaired":
        return {"pairs": (facts["length"][..., 1::2] > 0).ravel()}
    valid, desirable = (facts["length"][..., ::2] > 0).ravel(), (facts["label"][..., ::2] > 0.5).ravel()
    return {"examples": valid, "desirable": valid & desirable, "undesirable": valid & ~desirable}


def sequence_loss(
    spec: LossSpec, values: Mapping[str, Array], facts: Mapping[str, Array], carry: Mapping[str, Array]
) -> tuple[Metrics, dict[str, Array]]:
    """Sums of losses and metrics over the pairs or examples, and the objective's running values."""
    objective = OBJECTIVES[spec.objective]
    masks = item_masks(spec, facts)
    zero = jnp.zeros_like(values["value"])

    def both(x: Array) -> tuple[Array, Array]:
        return x[..., ::2].ravel(), x[..., 1::2].ravel()

    policy, length = both(values["value"]), both(facts["length"])
    reference, label = both(facts.get("reference", zero)), both(facts.get("label", zero))
    metrics: Metrics
    if objective.kind == "unpaired":
        mismatched = jax.lax.stop_gradient(policy[1])
        examples = Unpaired(policy[0], length[0], reference[0], label[0] > 0.5, mismatched, reference[1])
        losses, extra, carry = objective.fn(examples, masks["examples"], carry, **spec.hyper)
        metrics = {"loss": losses, "reward_desirable": extra["reward"], "reward_undesirable": extra["reward"]}
        metrics |= {name: value for name, value in extra.items() if name != "reward"} | {"log_prob": policy[0]}
    else:
        common = both(values.get("common", zero))
        reference_common = both(facts.get("reference_common", zero))
        pairs = Pairs(*policy, *length, *reference, *common, *reference_common)
        if objective.kind == "reward":
            losses, extra = objective.fn(*policy, label[0], **spec.hyper)
        elif objective.batch_level:
            losses, extra, carry = objective.fn(pairs, masks["pairs"], carry, **spec.hyper)
        else:
            losses, extra = objective.fn(pairs, **spec.hyper)
        margin = extra["reward_chosen"] - extra["reward_rejected"]
        metrics = {
            "loss": losses,
            **extra,
            "reward_margin": margin,
            "reward_accuracy": (jnp.sign(margin) + 1) / 2,  # a tie, as before the first step, counts one half
        }
        if objective.kind == "preference":
            metrics |= {"log_prob_chosen": pairs.chosen, "log_prob_rejected": pairs.rejected}
    sums = {name: masked_sum(x, masks[count_of(spec, name)]) for name, x in metrics.items()}
    if "kl" in values:
        sums["kl_to_reference"] = jnp.sum(values["kl"][..., ::2] if objective.kind == "unpaired" else values["kl"])
    return sums, dict(carry)


def batch_loss(
    spec: LossSpec, params: Any, batch: Batch, carry: Mapping[str, Array]
) -> tuple[dict[str, Array], Metrics, dict[str, Array]]:
    """Sums of loss and metrics over a batch [microbatches, rows, length], one microbatch in memory at a time.

    Returns:
      the gradient of the loss's sum by `sequence_values`, [microbatches, rows, sequences]; the sums; running values.
    """

    def values_of(part: Batch) -> dict[str, Array]:
        absent = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, part))
        return jax.lax.cond(part["loss_mask"].any(), run, lambda _: absent, part)

    def run(part: Batch) -> dict[str, Array]:
        return sequence_values(spec, params, part)

    facts = jax.vmap(lambda part: sequence_facts(spec, part))(dict(batch))

    def loss(values: dict[str, Array]) -> tuple[Array, tuple[Metrics, dict[str, Array]]]:
        sums, after = sequence_loss(spec, values, facts, carry)
        return sums["loss"], (sums, after)

    slopes, (sums, after) = jax.grad(loss, has_aux=True)(jax.lax.map(values_of, dict(batch)))
    return slopes, sums, after


# Objectives of sampled responses


def rollout_loss(spec: LossSpec, params: Any, batch: Batch, counts: Counts) -> tuple[Float[Array, ""], Metrics]:
    """A microbatch's share of the loss of sampled responses, token by token, each with its weight in the whole batch.

    In the first pass over new responses (`on_policy` 1) the log-probs take the values that were measured before, so
    that ratios are exactly 1 whatever rounding another program has.
    """
    hyper, mask, ids = spec.hyper, batch["loss_mask"], batch["sequence_ids"]
    policy = nnx.merge(spec.graphdef, policy_part(params))
    hidden = lp.hidden_states(policy, batch)
    log_probs = lp.token_log_probs(
        policy, batch, chunk=spec.head_chunk, hidden=hidden, temperature=spec.temperature
    )
    old = batch["old_log_probs"]
    log_probs = jnp.where(batch["on_policy"] > 0, old + (log_probs - jax.lax.stop_gradient(log_probs)), log_probs)

    def of_sequences(x: Array) -> Array:
        """Each token's value replaced by the sum over its sequence."""
        sums = jnp.pad(sequence_sums(x, ids, spec.sequences), ((0, 0), (1, 0)))
        return jnp.take_along_axis(sums, ids, axis=1)

    now, before = (of_sequences(log_probs), of_sequences(old)) if hyper["ratio"] == "sequence" else (log_probs, old)
    losses, extra = clipped_policy_loss(
        now, before, batch["advantages"], clip_low=hyper["clip_low"], clip_high=hyper["clip_high"]
    )

    def weighted(x: Array) -> Array:
        return jnp.sum(jnp.where(mask, batch["weights"] * x, 0))

    def per_token(x: Array) -> Array:
        return masked_sum(x, mask) / jnp.maximum(counts["tokens"], 1)

    metrics = {"policy_loss": weighted(losses), "ratio": per_token(extra["ratio"])}
    metrics["clip_fraction"] = per_token(extra["clipped"])
    metrics["kl_to_old"] = per_token(kl_estimate(old, log_probs, "k3"))
    loss = metrics["policy_loss"]
    if "reference_log_probs" in batch:
        reference = batch["reference_log_probs"]
        metrics["kl_to_reference"] = per_token(kl_estimate(log_probs, reference, "k3"))
        kl = kl_estimate(log_probs, reference, hyper["kl_estimator"])
        loss += hyper["beta"] * weighted(kl)
    if "value" in params:
        apart = None if spec.value_graphdef is None else nnx.merge(spec.value_graphdef, params["value"])
        if apart is None:
            scores = hidden.astype(jnp.float32) @ params["value"]["score"].astype(jnp.float32)
        else:
            scores = lp.token_scores(apart, batch)
        values = lp.token_values(scores, ids)
        errors = clipped_value_loss(values, batch["old_values"], batch["returns"], clip=hyper["value_clip"])
        metrics["value_loss"] = per_token(errors)
        loss += hyper["value_coef"] * weighted(errors)
    return loss, metrics | {"loss": loss}
