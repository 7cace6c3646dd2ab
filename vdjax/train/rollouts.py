"""Stages that learn from their own samples: responses, rewards, advantages, and updates on them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import grain
import jax.numpy as jnp
import numpy as np

from vdjax import sharding
from vdjax.data import pipeline
from vdjax.data.chat import Rendered
from vdjax.data.pipeline import Dataset
from vdjax.data.template import Template
from vdjax.models.functional import policy_part
from vdjax.models.lora import join
from vdjax.models.products import jit
from vdjax.objectives import OBJECTIVES
from vdjax.objectives.advantages import adapt_kl_coef, gae, group_relative, leave_one_out, per_token_rewards, whiten
from vdjax.objectives.policy_gradient import kl_estimate, token_weights
from vdjax.sampling.generate import Sampling, generate
from vdjax.sampling.text import response_text
from vdjax.train.losses import LossSpec
from vdjax.train.rewards import Responses, Reward
from vdjax.train.stage import Facts, Stage, Trainer, Update, compile_step, device_batch, facts_of, shares_trunk
from vdjax.train.step import TrainState, make_score_step

HELD_OUT = 2**31  # in place of the step in the seeds of held-out prompts


class Rollouts(NamedTuple):
    """Responses with what was measured of them. Arrays of tokens are [responses, max_new_tokens], 0 behind the end."""

    responses: Responses
    places: np.ndarray  # int64: of each token in `responses.data.tokens`
    mask: np.ndarray
    stopped: np.ndarray  # bool [responses]
    scores: np.ndarray  # float64 [responses]: rewards without penalties
    old: np.ndarray  # log-probs, in nats
    reference: np.ndarray
    values: np.ndarray
    gap: float  # mean difference between the sampler's log-probs and those of the scoring pass; NaN: other softmax
    seconds: float  # of sampling


Pass = Callable[[Any, Responses], np.ndarray]  # from parameters to a value of each token of `Responses.data`


class Source(NamedTuple):
    """What responses come from and are measured by."""

    stage: Stage
    sampling: Sampling
    tokenizer: Any
    template: Template
    reward: Reward
    log_probs: Pass
    reference: Callable[[Responses], np.ndarray]
    values: Pass | None


def prepare(
    stage: Stage, reward: Reward, tokenizer: Any, template: Template
) -> Callable[[Update, TrainState], Trainer]:
    """`supervised.prepare` for stages that sample; rewards are those of `reward`."""

    def trainer(update: Update, state: TrainState) -> Trainer:
        settings = stage.config.rollout
        sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)
        # Without adapters the reference is a second copy of the parameters; with them, what they lie beside.
        start = policy_part(update.frozen) or stage.start()
        log_probs = scoring_pass(stage, stage.model.graphdef, "log_probs")
        reference = scoring_pass(stage, stage.plain.graphdef, "log_probs") if stage.model.lora else log_probs
        source = Source(
            stage,
            sampling,
            tokenizer,
            template,
            reward,
            log_probs,
            lambda responses: reference(start, responses),
            scoring_pass(stage, stage.values.graphdef, "values") if stage.values else None,
        )
        step = compile_step(stage, update_spec(stage), update, state)
        return Trainer(
            lambda state, at: advance(source, step, update.frozen, state, at),
            0,
            (lambda state: evaluate(source, update.frozen, state)) if stage.plan.held_out else None,
        )

    return trainer


def update_spec(stage: Stage) -> LossSpec:
    """The loss of the updates: the stage's own, or of online preference optimization the one on its pairs."""
    name, hyper = stage.config.objective, stage.config.hyper.to_dict()
    if name == "online_dpo":
        name, hyper = inner_objective(hyper)
    return LossSpec(
        stage.model.graphdef,
        name,
        hyper,
        stage.plan.shape.sequences,
        stage.model.head_chunk,
        stage.config.rollout.temperature,
        stage.values.graphdef if stage.values and not shares_trunk(stage) else None,
    )


def inner_objective(hyper: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The objective on the pairs of online preference optimization; a `beta` of None is that objective's own."""
    given = {} if hyper["beta"] is None else {"beta": hyper["beta"]}
    return hyper["loss"], {**OBJECTIVES[hyper["loss"]].hyper, **given}


def scoring_pass(stage: Stage, graphdef: Any, what: Literal["log_probs", "values"]) -> Pass:
    step = jit(make_score_step(update_spec(stage)._replace(graphdef=graphdef), what))

    def run(params: Any, responses: Responses) -> np.ndarray:
        def fetched(batch: dict[str, np.ndarray]) -> np.ndarray:
            return sharding.fetch(step(params, device_batch(batch, stage.mesh)))

        return pipeline.score(responses.data, responses.batches, fetched)

    return run


def advance(
    source: Source, learn: Callable, frozen: Any, state: TrainState, step: int
) -> tuple[TrainState, dict[str, Any], Facts]:
    """Responses to the step's prompts, and the updates on them."""
    stage = source.stage
    config, indices = stage.config, np.asarray(stage.plan.steps[step])
    rollouts = roll_out(source, join(frozen, state.params), stage.plan.train, indices, step)
    kl_coef = float(state.carry.get("kl_coef", 0.0))
    if config.objective == "online_dpo":
        data, beside = pairs_to_learn(rollouts, config)
    else:
        data, beside = tokens_to_learn(rollouts, config, kl_coef)
    batches: list[dict[str, np.ndarray]] = []
    each = []
    for epoch in range(config.rollout.epochs):
        order = np.random.default_rng((stage.seed, step, epoch)).permutation(len(data))
        for part in np.array_split(order, config.rollout.minibatches):
            batches.append(minibatch(data, part, beside, stage, on_policy=not batches))
            state, metrics = learn(state, frozen, device_batch(batches[-1], stage.mesh))
            each.append(metrics)
    measured = measure(rollouts)
    if config.hyper.get("kl_target"):
        adapted = adapt_kl_coef(
            jnp.float32(kl_coef),
            jnp.float32(measured["kl"]),
            target=config.hyper.kl_target,
            horizon=config.hyper.kl_horizon,
            episodes=len(rollouts.scores),
        )
        everywhere = sharding.replicated(stage.mesh)
        state = state._replace(carry=state.carry | {"kl_coef": sharding.put_global(np.asarray(adapted), everywhere)})
    learned = [(metrics["tokens"] > 0).astype(jnp.float32) for metrics in each]  # not those without a token
    total = jnp.maximum(sum(learned), 1)
    means = {
        name: sum(share * metrics[name] for share, metrics in zip(learned, each, strict=True)) / total
        for name in each[0]
        if name != "finite"
    }
    finite = jnp.stack([metrics["finite"] for metrics in each]).all()
    facts = facts_of(batches, indices, **measured, **({"kl_coef": kl_coef} if state.carry else {}))
    return state, means | {"finite": finite}, facts


def evaluate(source: Source, frozen: Any, state: TrainState) -> dict[str, float]:
    """Rewards, lengths and KL of responses to the held-out prompts, with the same random numbers at every step."""
    prompts, size = source.stage.plan.held_out, source.stage.config.batch_size
    assert prompts
    source, params = source._replace(values=None), join(frozen, state.params)
    parts = np.array_split(np.arange(len(prompts)), -(-len(prompts) // size))
    rows = [measure(roll_out(source, params, prompts, part, HELD_OUT)) for part in parts]
    names = ("reward", "reward_std", "response_length", "stopped", "kl", "entropy")
    sizes = [len(part) for part in parts]
    return {f"eval_{name}": float(np.average([row[name] for row in rows], weights=sizes)) for name in names}


def roll_out(source: Source, params: Any, prompts: Dataset, indices: np.ndarray, step: int) -> Rollouts:
    """Samples responses to some of the prompts and measures them."""
    stage, sampling = source.stage, source.sampling
    samples, longest = stage.config.rollout.samples, sampling.max_new_tokens
    policy = policy_part(params)
    asked = [pipeline.example(prompts, i).tokens for i in indices]
    started = time.perf_counter()
    drawn = generate(
        stage.model,
        policy,
        [ids.tolist() for ids in asked for _ in range(samples)],
        # The place tells apart a prompt that stands twice in a step, at the border of two epochs.
        [(stage.seed, step, int(i), place, k) for place, i in enumerate(indices) for k in range(samples)],
        sampling,
        source.template.stop_ids,
        stage.mesh,
        rows=stage.config.rollout.rows,
    )
    seconds = time.perf_counter() - started

    answers = [tokens[:length] for tokens, length in zip(drawn.tokens, drawn.lengths, strict=True)]
    groups = [answers[i : i + samples] for i in range(0, len(answers), samples)]
    data = pipeline.of_rendered([with_answers(ids, group) for ids, group in zip(asked, groups, strict=True)])
    starts = np.flatnonzero(np.diff(data.branches, prepend=np.int8(0)) > 0)
    parts = steps_of(np.array_split(np.arange(len(data)), stage.config.rollout.minibatches))
    batches = pipeline.batches(data, parts, stage.plan.shape, stage.plan.microbatch_rows)
    texts = [response_text(ids.tolist(), source.tokenizer, source.template) for ids in answers]
    responses = Responses([prompts.prompts[i] for i in indices], texts, data, starts + drawn.lengths - 1, batches)

    mask = np.arange(longest) < drawn.lengths[:, None]
    places = np.where(mask, starts[:, None] + np.arange(longest), 0)

    def grid(flat: np.ndarray) -> np.ndarray:
        return np.where(mask, flat[places], 0)

    old = grid(source.log_probs(policy, responses))
    values = np.zeros_like(old)
    if source.values:
        # A value model of its own is whole; a head alone reads the policy's states.
        whole = (policy if shares_trunk(stage) else {}) | params["value"]
        values = grid(source.values({k: v for k, v in whole.items() if k != "lm_head"}, responses))
    plain = sampling.temperature == 1 and sampling.top_p == 1 and sampling.top_k == 0
    return Rollouts(
        responses,
        places,
        mask,
        drawn.stopped,
        source.reward(responses),
        old,
        grid(source.reference(responses)),
        values,
        float(np.abs(drawn.log_probs - old)[mask].mean()) if plain else math.nan,
        seconds,
    )


def measure(rollouts: Rollouts) -> dict[str, float]:
    """What is logged of responses: rewards as given, KL to the reference in nats a response, entropy in nats a token.

    Both are estimates from the responses alone: the mean of log pi/ref (k1), and of -log pi.
    """
    mask, lengths = rollouts.mask, rollouts.mask.sum(1)
    values = {
        "reward": rollouts.scores.mean(),
        "reward_std": rollouts.scores.std(),
        "response_length": lengths.mean(),
        "stopped": rollouts.stopped.mean(),
        "kl": (rollouts.old - rollouts.reference).sum(1).mean(),
        "entropy": -rollouts.old[mask].mean(),
        "sampler_gap": rollouts.gap,
        "sample_seconds": rollouts.seconds,
        "new_tokens_per_s": lengths.sum() / rollouts.seconds,
    }
    return {name: float(value) for name, value in values.items() if not math.isnan(value)}


def steps_of(parts: Sequence[np.ndarray]) -> grain.MapDataset:
    return grain.MapDataset.source(list(parts))


def with_answers(prompt: np.ndarray, answers: Sequence[np.ndarray]) -> Rendered:
    """A prompt (branch 0) with its responses (branches 1, 2, ...), all of them scored."""
    parts = [prompt, *answers]
    branches = np.repeat(np.arange(len(parts), dtype=np.int8), [len(part) for part in parts])
    return Rendered(np.concatenate(parts).astype(np.int32), branches > 0, branches)


def penalised(rollouts: Rollouts, config: Any) -> np.ndarray:
    """Rewards, less a penalty for responses that did not end; the prompt's own stop tokens do not count."""
    return rollouts.scores - config.reward.missing_eos_penalty * ~rollouts.stopped


def tokens_to_learn(rollouts: Rollouts, config: Any, kl_coef: float) -> tuple[Dataset, dict[str, np.ndarray]]:
    """The responses with each token's advantage, and with its return where there are values."""
    hyper, mask, values = config.hyper, jnp.asarray(rollouts.mask), jnp.asarray(rollouts.values)
    scores, old, reference = map(jnp.asarray, (penalised(rollouts, config), rollouts.old, rollouts.reference))
    kl = jnp.where(mask, kl_estimate(old, reference, hyper.kl_estimator), 0)
    grids = {"old_log_probs": old, "reference_log_probs": reference}
    if hyper.advantage == "gae":
        rewards = per_token_rewards(scores, kl, mask, kl_coef=kl_coef)
        rewards = whiten(rewards, mask, shift_mean=False) if hyper.whiten_rewards else rewards
        advantages, returns = gae(rewards, values, mask, gamma=hyper.gamma, lam=hyper.lam)
        grids |= {"advantages": whiten(advantages, mask), "returns": returns, "old_values": values}
    else:
        by_group = (scores - kl_coef * kl.sum(1)).reshape(-1, config.rollout.samples)
        if hyper.advantage == "leave_one_out":
            each = leave_one_out(by_group)
        else:
            each = group_relative(by_group, scale=hyper.advantage == "group_scaled")
        grids["advantages"] = each.reshape(-1, 1) * mask
    data = rollouts.responses.data
    beside = {name: np.zeros(len(data.tokens), np.float32) for name in grids}
    for name, grid in grids.items():
        beside[name][rollouts.places[rollouts.mask]] = np.asarray(grid)[rollouts.mask]
    return data, beside


def pairs_to_learn(rollouts: Rollouts, config: Any) -> tuple[Dataset, dict[str, np.ndarray]]:
    """The best and the worst response to each prompt as a pair; prompts with equally good responses are left out."""
    samples, data = config.rollout.samples, rollouts.responses.data
    by_group = penalised(rollouts, config).reshape(-1, samples)
    rendered, reference = [], []
    for group, scores in enumerate(by_group):
        pair = [int(scores.argmax()), int(scores.argmin())]
        if scores[pair[0]] == scores[pair[1]]:
            continue
        one = pipeline.example(data, group)
        rendered.append(with_answers(one.tokens[one.branches == 0], [one.tokens[one.branches == k + 1] for k in pair]))
        reference += [np.zeros((one.branches == 0).sum())]
        reference += [rollouts.reference[group * samples + k][rollouts.mask[group * samples + k]] for k in pair]
    if not rendered:  # nothing to learn: updates without a token
        return pipeline.take(data, 0, 0), {"reference_log_probs": np.zeros(0, np.float32)}
    return pipeline.of_rendered(rendered), {"reference_log_probs": np.concatenate(reference).astype(np.float32)}


def minibatch(
    data: Dataset, part: np.ndarray, beside: dict[str, np.ndarray], stage: Stage, *, on_policy: bool
) -> dict[str, np.ndarray]:
    """Some of the prompts with their responses as a batch, with the weights that their tokens have in its loss."""
    plan, config = stage.plan, stage.config
    if "advantages" in beside:
        branches = [pipeline.example(data, i).branches for i in part]
        lengths = np.array([np.bincount(b)[1:] for b in branches], np.int64).reshape(len(part), config.rollout.samples)
        longest = config.rollout.max_new_tokens
        weights = token_weights(lengths.ravel(), config.hyper.weights, max_new_tokens=longest).reshape(lengths.shape)
        beside = beside | {"weights": np.zeros(len(data.tokens), np.float32)}
        for i, size, weight in zip(part, lengths, weights, strict=True):
            end = data.offsets[i + 1]
            beside["weights"][end - size.sum() : end] = np.repeat(weight, size)
    batch = pipeline.batches(data, steps_of([part]), plan.shape, plan.microbatch_rows, beside)[0]
    if "advantages" in beside:
        batch["on_policy"] = np.full((*batch["tokens"].shape[:2], 1), on_policy, np.float32)
    return batch
