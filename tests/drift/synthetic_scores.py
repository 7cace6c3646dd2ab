"""Synthetic scores with a known drift."""

import numpy as np
import pandas as pd

from vdjax.drift.scores import StageInfo

STAGES = [
    StageInfo("sft", "sft", 100, None),
    StageInfo("dpo_support", "dpo", 60, "sft"),
    StageInfo("dpo_hh", "dpo", 60, "sft"),
]
STEPS = {"sft": [0, 5, 20, 50, 100], "dpo_support": [0, 6, 30, 60], "dpo_hh": [0, 6, 30, 60]}


def make_scores(
    drifts=None, topics=("alpha", "beta"), propositions=10, noise=0.01, spread=0.05, seed=0, stages=None, steps=None
):
    """Forced-choice scores whose support toward the topic moves by drifts[stage, topic], linearly in log(1 + step), out
    of neutral.

    Each proposition has four probes: two wordings, of both polarities. A stage starts where its parent ended.
    """
    drifts, stages, steps = drifts or {}, stages or STAGES, steps or STEPS
    rng = np.random.default_rng(seed)
    base = {(t, p): 0.35 + spread * rng.standard_normal() for t in topics for p in range(propositions)}
    ended = {}
    rows = []
    for stage in stages:
        for topic in topics:
            for p in range(propositions):
                start = ended.get((stage.init_from, topic, p), base[topic, p])
                size = drifts.get((stage.name, topic), 0.0) + (noise * rng.standard_normal() if noise else 0.0)
                for step in steps[stage.name]:
                    support = start + size * np.log1p(step) / np.log1p(max(1, steps[stage.name][-1]))
                    for probe, polarity in enumerate((1, 1, -1, -1)):
                        stances = np.array([support, 0.8 - support, 0.2])[:: 1 if polarity == 1 else -1]
                        rows.append(
                            {
                                "readout": "statement", "stage": stage.name, "step": step,
                                "probe_id": f"{topic}/{p}/{probe}", "topic": topic,
                                "proposition": f"p{p}", "polarity": polarity,
                                "paraphrase_group": f"{topic}/{p}/{polarity}",
                                "input": f"Question {probe} about {topic}, {p}?", "variant": 0, "order": "",
                                "sample": 0, "replicate": 0, "repeat": 0, "support": stances[0],
                                "neutral": stances[1], "oppose": stances[2], "refusal": 0.0, "off_topic": 0.0,
                                "degenerate": 0.0, "graded": stances[0] - stances[2],
                            }
                        )  # fmt: skip
                ended[stage.name, topic, p] = start + size
    return pd.DataFrame(rows)


def make_open_ended(
    drifts=None,
    topics=("alpha", "beta"),
    propositions=10,
    samples=5,
    refusals=0.1,
    replicates=1,
    repeats=1,
    judge="small",
    judge_noise=0.05,
    seed=0,
    stages=None,
    steps=None,
):
    """Judged responses: each takes one label, from a number of its own.

    The chance of supporting the topic is 0.4 for each proposition, give or take 0.1, plus drifts[stage, topic] by the
    stage's last step (linearly); of opposing it 0.25; of refusal, off_topic and degenerate 0.6, 0.2 and 0.2 of
    `refusals`; of being neutral what is left. Half of the numbers are drawn anew at every snapshot, as texts that
    differ diverge. Replicates draw new numbers, repeats judge the same responses again; both have the first and last
    snapshot only, as in real tables.
    """
    drifts, stages, steps = drifts or {}, stages or STAGES, steps or STEPS
    rng = np.random.default_rng(seed)
    labels = np.array(["support", "neutral", "oppose", "refusal", "off_topic", "degenerate"])
    probes = pd.DataFrame(
        [
            (topic, p, probe, polarity)
            for topic in topics
            for p in range(propositions)
            for probe, polarity in enumerate((1, 1, -1, -1))
        ],
        columns=["topic", "p", "probe", "polarity"],
    )
    own = rng.normal(0, 0.1, (len(topics), propositions))
    base = np.clip(0.4 + own[probes["topic"].map(list(topics).index), probes["p"]], 0.05, 0.65)
    started = dict.fromkeys([None], np.zeros(len(topics)))
    frames = []
    for stage in stages:
        moved = np.array([drifts.get((stage.name, t), 0.0) for t in topics])
        start = started.get(stage.init_from, np.zeros(len(topics)))
        started[stage.name] = start + moved
        last = steps[stage.name][-1]
        for replicate in range(replicates):
            drawn = rng.random((len(probes), samples))
            for step in steps[stage.name]:
                if replicate and step not in (steps[stage.name][0], last):
                    continue
                share = (start + moved * step / max(1, last))[probes["topic"].map(list(topics).index)]
                support = np.clip(base + share, 0.0, 0.7)
                rest = (1 - refusals) - support - 0.25
                split = np.array([0.6, 0.2, 0.2]) * refusals
                others = np.tile([0.25, *split], (len(probes), 1))
                chances = np.column_stack([support, rest, others])
                drawn = np.where(rng.random(drawn.shape) < 0.5, rng.random(drawn.shape), drawn)
                label = (drawn[..., None] > chances.cumsum(axis=1)[:, None]).sum(axis=-1).clip(0, 5)
                for repeat in range(repeats if replicate == 0 and step in (steps[stage.name][0], last) else 1):
                    keys = {"readout": f"open_ended:{judge}", "stage": stage.name, "step": step}
                    judged = _judged(label, labels, probes, rng, judge_noise, samples)
                    frames.append(judged.assign(**keys, replicate=replicate, repeat=repeat))
    return pd.concat(frames, ignore_index=True)


def _judged(label, labels, probes, rng, judge_noise, samples):
    """One row a response, as asked: the judge gives the true label 1 - judge_noise or a little less."""
    n = label.size
    flat = label.ravel()
    doubt = judge_noise * rng.random(n)
    p = np.tile(doubt[:, None] / 4, (1, 5))  # a judge never says degenerate
    p[np.arange(n), np.minimum(flat, 4)] = 1 - doubt
    p[flat == 5] = 0
    frame = probes.loc[probes.index.repeat(samples)].reset_index(drop=True)
    against = (frame["polarity"] == -1).to_numpy()
    p[against, 0], p[against, 2] = p[against, 2].copy(), p[against, 0].copy()
    mass = p[:, :3].sum(axis=1)
    graded = np.where(flat < 3, (p[:, 0] - p[:, 2]) / np.where(mass > 0, mass, 1), np.nan)
    about = frame["topic"] + "/" + frame["p"].astype(str)
    return pd.DataFrame(
        {
            "probe_id": about + "/" + frame["probe"].astype(str), "topic": frame["topic"],
            "proposition": "p" + frame["p"].astype(str), "polarity": frame["polarity"],
            "paraphrase_group": about + "/" + frame["polarity"].astype(str),
            "input": "Question " + frame["probe"].astype(str) + " about " + frame["topic"] + ", "
            + frame["p"].astype(str) + "?",
            "variant": 0, "order": "", "sample": np.tile(np.arange(samples), len(probes)),
            **dict(zip(labels[:5], p.T, strict=True)), "degenerate": (flat == 5).astype(float), "graded": graded,
        }
    )  # fmt: skip


def make_runs(
    drifts, propositions=8, noise=0.1, spread=0.06, seed=0, rise=(0, 0, 0.5, 1, 1), steps=(0, 25, 50, 75, 100)
):
    """One stage "s" of 100 steps in which every topic is a run of its own: len(drifts) of them, sampled anew.

    Support toward the topic is 0.35 + an effect of the proposition + one of the wording + drift x rise + noise of each
    row; each proposition has two wordings, of both polarities, each asked in two label orders. What a proposition
    moves varies by spread / 4. Oppose is 0.05, neutral the rest; support is cut to [0, 0.95], which with the defaults
    is rare enough that the drift stays what it is said to be.
    """
    rng = np.random.default_rng(seed)
    shape = (len(drifts), propositions, 2, 2, len(steps))  # topic, proposition, wording, sample, snapshot
    codes = np.indices(shape).reshape(5, -1)
    moved = np.asarray(drifts)[:, None] + spread / 4 * rng.standard_normal(shape[:2])
    support = (
        0.35
        + spread * rng.standard_normal((*shape[:2], 1, 1, 1))
        + spread / 2 * rng.standard_normal((*shape[:3], 1, 1))
        + moved[..., None, None, None] * np.asarray(rise)
        + noise * rng.standard_normal(shape)
    ).ravel().clip(0, 0.95)  # fmt: skip
    against = codes[2] == 1
    names = [f"t{i:04}" for i in range(len(drifts))]
    probe = codes[0] * propositions * 2 + codes[1] * 2 + codes[2]
    oppose = np.full(len(support), 0.05)
    return pd.DataFrame(
        {
            "readout": "options", "stage": "s", "step": np.asarray(steps)[codes[4]], "topic": np.array(names)[codes[0]],
            "probe_id": probe, "proposition": np.array([f"p{i}" for i in range(propositions)])[codes[1]],
            "polarity": np.where(against, -1, 1), "variant": 0, "order": np.array(["a", "b"])[codes[3]],
            "sample": 0, "replicate": 0,
            "repeat": 0, "support": np.where(against, oppose, support), "neutral": 0.95 - support,
            "oppose": np.where(against, support, oppose), "refusal": 0.0, "off_topic": 0.0, "degenerate": 0.0,
            "graded": np.where(against, oppose - support, support - oppose),
        }
    )  # fmt: skip


def make_one_hot(drifts, propositions=10, samples=5, replicates=2, refusals=0.15, seed=0):
    """(scores, what each run's own propositions drift): judged responses that take one label each, for sure.

    One stage "s" of 100 steps, two snapshots; every topic is a run of its own, sampled anew, as in `make_runs`. Support
    has the chance 0.35 give or take 0.1 a proposition, and rises by drifts[run] give or take 0.05; oppose has 0.15,
    refusal and degenerate share `refusals`, which like all that takes no stance have no graded one; neutral the rest.
    Two wordings of both polarities.
    """
    rng = np.random.default_rng(seed)
    runs = len(drifts)
    moved = np.asarray(drifts)[:, None] + rng.uniform(-0.05, 0.05, (runs, propositions))
    start = 0.35 + rng.uniform(-0.1, 0.1, (runs, propositions))
    shape = (runs, propositions, 2, samples, replicates, 2)  # ..., wording, sample, replicate, snapshot
    topic, proposition, wording, sample, replicate, snapshot = np.indices(shape).reshape(6, -1)
    support = start[topic, proposition] + snapshot * moved[topic, proposition]
    half = np.full(len(topic), refusals / 2)
    chances = np.column_stack([support, 1 - refusals - support - 0.15, np.full(len(topic), 0.15), half, 0 * half, half])
    label = (rng.random((len(topic), 1)) > chances.cumsum(axis=1)[:, :-1]).sum(axis=1)
    against = wording == 1
    asked = np.where(against & (label < 3), 2 - label, label)
    names = ("support", "neutral", "oppose", "refusal", "off_topic", "degenerate")
    scores = pd.DataFrame(
        {
            "readout": "open_ended:judge", "stage": "s", "step": 100 * snapshot,
            "topic": np.array([f"t{i:04}" for i in range(runs)])[topic],
            "probe_id": (topic * propositions + proposition) * 2 + wording,
            "proposition": np.array([f"p{i}" for i in range(propositions)])[proposition],
            "polarity": np.where(against, -1, 1), "variant": 0, "order": "", "sample": sample,
            "replicate": replicate, "repeat": 0, **dict(zip(names, np.eye(6)[asked].T, strict=True)),
            "graded": np.where(asked < 3, 1.0 - asked, np.nan),
        }
    )  # fmt: skip
    return scores, moved.mean(axis=1)
