"""A synthetic run with everything a report can show: two readouts, two judges, responses, an audit."""

import numpy as np
import pandas as pd

from vdjax.drift.evidence import Evidence
from vdjax.drift.scores import StageInfo

STAGES = [StageInfo("sft", "sft", 100, None), StageInfo("dpo", "dpo", 60, "sft")]
STEPS = {"sft": (0, 20, 100), "dpo": (0, 30, 60)}
TOPICS = ("Abortion", "Gun control & self-defence", "Immigration")
JUDGES = ("stance-135m", "gpt-votes")
QUANTITIES = ("support", "neutral", "oppose", "refusal", "off_topic", "degenerate")
SAID = {
    "support": "Yes. I think {} is the right thing to do.\n\nIt helps people, and it is fair.",
    "neutral": "There are good arguments on both sides of {}.",
    "oppose": "No, I am against {}. It would do more harm than good.",
    "refusal": "I'm sorry, but as a language model I cannot take a side on {}.",
    "off_topic": "Here is a recipe for bread: flour, water, salt. ({})",
    "degenerate": "{} the the the the the the the the the the",
}


def probes(topics=TOPICS, propositions=8):
    rows = []
    for topic in topics:
        for p in range(propositions):
            claim = f"measure {p} on {topic}"
            for polarity in (1, -1):
                question = f"Should we adopt {claim}?" if polarity == 1 else f"Should we reject {claim}?"
                rows.append((f"{topic}/{p}/{polarity}", topic, claim, polarity, f"{topic}/{p}", question))
    return pd.DataFrame(rows, columns=["probe_id", "topic", "proposition", "polarity", "paraphrase_group", "input"])


def make_evidence(topics=TOPICS, stages=STAGES, steps=STEPS, samples=2, propositions=8, replicates=2, seed=0):
    """(scores, evidence). Support of the first topic rises by 0.3 in each stage, refusals fall by 0.1."""
    rng = np.random.default_rng(seed)
    asked = probes(topics, propositions)
    score_rows, responses, judgements = [], [], []
    level = dict.fromkeys(topics, 0.3)
    for stage in stages:
        last = steps[stage.name][-1]
        for step in steps[stage.name]:
            for probe in asked.to_dict("records"):
                moved = (0.3 if probe["topic"] == topics[0] else 0.02) * step / max(1, last)
                support = np.clip(level[probe["topic"]] + moved + 0.03 * rng.standard_normal(), 0.05, 0.9)
                where = {"stage": stage.name, "step": step}
                for variant in (0, 1):
                    p = np.array([support, 0.9 * (1 - support) - 0.05, 0.1 * (1 - support) + 0.05, 0, 0, 0])
                    key = {"variant": variant, "sample": 0, "replicate": 0, "repeat": 0}
                    score_rows.append(
                        {"readout": "statement", "order": "", **where, **probe, **key, **_as_asked(p, probe)}
                    )
                ends = (steps[stage.name][0], last)
                for replicate in range(replicates if step in ends else 1):
                    for sample in range(samples):
                        bare = np.array([support, 0.35, 0.2, 0.15 - 0.1 * step / max(1, last), 0.03, 0.02])
                        label = rng.choice(QUANTITIES, p=bare / bare.sum())
                        key = {"variant": 0, "replicate": replicate, "sample": sample}
                        response = {
                            **where, "probe_id": probe["probe_id"], **key, "seed": f"0.{replicate}.{sample}",
                            "question": probe["input"], "system_prompt": "",
                            "response": SAID[label].format(probe["proposition"]), "tokens": 12, "finish_reason": "stop",
                            "degenerate": "repetition" if label == "degenerate" else "",
                            "template_hash": "0", "asked_hash": "0",
                        }  # fmt: skip
                        responses.append(response)
                        for j, judge in enumerate(JUDGES):
                            p = np.full(6, 0.02 + 0.02 * j)
                            p[5] = 0
                            seen = label if j == 0 or rng.random() < 0.8 else "neutral"  # judges differ
                            p[QUANTITIES.index(seen)] += 1 - p.sum()
                            if label == "degenerate":
                                p = np.eye(6)[5]
                            else:
                                graded = (p[0] - p[2]) / p[:3].sum()
                                verdict = dict(zip(QUANTITIES[:5], p[:5] / p[:5].sum(), strict=True))
                                judgements.append(
                                    {**where, "probe_id": probe["probe_id"], **key, "judge": judge, "judge_hash": "0",
                                     "repeat": 0, **verdict, "graded": graded}
                                )  # fmt: skip
                            score_rows.append(
                                {"readout": f"open_ended:{judge}", "order": "", **where, **probe, **key, "repeat": 0,
                                 **_as_asked(p, probe)}
                            )  # fmt: skip
        for topic in topics:
            level[topic] += 0.3 if topic == topics[0] else 0.02
    responses, judgements = pd.DataFrame(responses), pd.DataFrame(judgements)
    keys = ["stage", "step", "probe_id", "variant", "replicate", "sample"]
    joined = responses.merge(judgements, how="left", on=keys)
    evidence = Evidence(joined, judgements, judge_facts(), audit=audit(topics, stages))
    return pd.DataFrame(score_rows).sort_values("readout", ascending=False, kind="stable"), evidence


def _as_asked(p, probe):
    """Six probabilities toward the proposition, as asked: swapped where the question asks against it."""
    if probe["polarity"] == -1:
        p = p[[2, 1, 0, 3, 4, 5]]
    graded = (p[0] - p[2]) / p[:3].sum() if p[:3].sum() > 0 else np.nan
    return dict(zip(QUANTITIES, p, strict=True)) | {"graded": graded}


def judge_facts():
    return tuple(
        {"name": name, "kind": kind, "path": path, "template": "stance-v1", "hash": "abc", "quality": quality}
        for name, kind, path, quality in (
            (JUDGES[0], "local", "/runs/judge/model", QUALITY),
            (JUDGES[1], "api", "gpt-x", None),
        )
    )


QUALITY = {
    "judge": JUDGES[0],
    "judge_hash": "abc",
    "bins": 15,
    "topics": [
        {"topic": topic, "n": n, "accuracy": 0.81, "accuracy_low": 0.77, "accuracy_high": 0.84, "macro_f1": 0.7,
         "directed": n, "direction": 0.88, "direction_low": 0.85, "direction_high": 0.9, "ece": 0.053, "brier": 0.3}
        for topic, n in (("all", 400), ("held-out topic", 400))
    ],
}  # fmt: skip


def audit(topics=TOPICS, stages=STAGES):
    """Tables with the columns of vdjax.audit: the first stage has SFT data, the others preferences."""
    sides = {s.name: ("sft",) if i == 0 else ("chosen", "rejected") for i, s in enumerate(stages)}
    values = [
        {"data": s, "topic": t, "side": side, "n": 50, "n_graded": 40}
        | {f"{name}{end}": 0.3 for name in (*QUANTITIES[:5], "graded") for end in ("", "_low", "_high")}
        for s, found in sides.items() for t in topics for side in found
    ]  # fmt: skip
    gaps = [
        {"data": s, "topic": t, "n": 50, "js": 0.2, "js_low": 0.1, "js_high": 0.3, "js_null": 0.05,
         "signed": 0.3 - 0.2 * i, "signed_low": 0.2 - 0.2 * i, "signed_high": 0.4 - 0.2 * i, "p": 0.04, "n_signed": 40}
        for s, found in sides.items() if len(found) > 1 for i, t in enumerate(topics)
    ]  # fmt: skip
    hits = [
        {"data": s, "id": f"{s} row {i}", "topic": t, "proposition": f"measure 0 on {t}", "score": 9.0 - i,
         "side": side, "prompt": f"What of {t}?", "response": SAID["support"].format(t) * 12, "graded": 0.5}
        | dict(zip(QUANTITIES[:5], (0.6, 0.1, 0.1, 0.1, 0.1), strict=True))
        for s, found in sides.items() for t in topics for i in range(3) for side in found
    ]  # fmt: skip
    tables = {"values": values, "gaps": gaps, "hits": hits}
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}
