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
    """Scores whose support toward the topic moves by drifts[stage, topic], linearly in log(1 + step), out of neutral.

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
                                "stage": stage.name, "step": step, "probe_id": f"{topic}/{p}/{probe}", "topic": topic,
                                "proposition": f"p{p}", "polarity": polarity, "paraphrase_group": f"{topic}/{p}",
                                "input": f"Question {probe} about {topic}, {p}?", "readout": "forced_choice",
                                "seed": 0, "template_hash": "0", "support": stances[0], "neutral": stances[1],
                                "oppose": stances[2],
                            }
                        )  # fmt: skip
                ended[stage.name, topic, p] = start + size
    return pd.DataFrame(rows)
