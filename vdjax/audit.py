"""The values of data: python -m vdjax.audit --data PATH[,PATH] --judge DIR --workdir DIR, or --run WORKDIR --judge DIR

Finds the examples that touch each topic of a probe set (vdjax.values.retrieval), has a judge say which stance their
responses take toward the topic, and writes WORKDIR/audit: hits.parquet (every response with its verdict), values.csv
(the stances of SFT responses, or of chosen and of rejected ones), gaps.csv (how far chosen ones are from rejected ones)
and value_gaps.png. With --run the data of every stage of that run are audited, and what they predict is set against
the drift that was measured: against_drift.csv and gap_against_drift.png.
"""

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from ml_collections import ConfigDict
from scipy import stats

from vdjax import config as configs
from vdjax import runs, runtime
from vdjax.cli import run_cli
from vdjax.data import mixture, pipeline, sources
from vdjax.data.examples import Counts, Example
from vdjax.drift.bootstrap import Units, bootstrap_means
from vdjax.drift.distances import distances
from vdjax.drift.significance import sign_flip_p_values
from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange, Judge
from vdjax.probes import sets
from vdjax.progress import say
from vdjax.train.plan import data_kind
from vdjax.values import output, retrieval

POOLED = "all"
SIDES = {"sft": ("sft",), "preference": ("chosen", "rejected")}
QUANTITIES = (*LABELS, "graded")
RESAMPLES = 9999
PERMUTATIONS = 19999
SWAPS = 1999
GAP_COLUMNS = (
    ("data", "topic", "n", "js", "js_low", "js_high", "js_null")
    + ("signed", "signed_low", "signed_high", "p", "n_signed")
)  # fmt: skip
AGAINST_COLUMNS = (
    ("stage", "topic", "side", "n", "gap", "gap_low", "gap_high", "predicted", "drift", "drift_low", "drift_high")
    + ("agrees", "readout")
)  # fmt: skip


class Audit(NamedTuple):
    """hits: a row a response: data, id, topic, proposition, score (BM25), side, prompt, response, LABELS, graded,
    judge, judge_hash. values: data, topic, side, n, n_graded, and each of QUANTITIES with _low and _high.
    gaps: GAP_COLUMNS.
    """

    hits: pd.DataFrame
    values: pd.DataFrame
    gaps: pd.DataFrame
    notes: tuple[str, ...]


def audit(
    examples: Iterable[Example],
    kind: str,
    probes: Sequence[sets.Probe],
    judge: Judge,
    *,
    data: str = "",
    max_per_topic: int = 0,
    seed: int = 0,
) -> Audit:
    """Which stances the examples' responses take toward the topics that they touch. Deterministic in `seed`.

    All verdicts are toward the proposition of the topic that is most like the example, and so, of built-in topics, in
    the topic's direction. The topic "all" is about all examples that touch some topic, each counted once.

    Args:
      kind: "sft" or "preference".
      data: name of the data set in the tables.
      max_per_topic: judge at most so many examples of a topic, those most like a proposition. 0: all.
    """
    found = retrieval.find(examples, probes, max_per_topic=max_per_topic)
    touched = len(found.examples)
    note = f"{data}: {found.read} examples read, {touched} touch a topic ({len(found.matches)} matches)"
    rows: list[dict[str, Any]] = []
    for match in found.matches:
        example = found.examples[match.example]
        about = {"data": data, "index": match.example, "id": example.id, "topic": match.topic}
        about |= {"proposition": match.proposition, "score": match.score, "prompt": retrieval.question(example)}
        rows += [about | {"side": s, "response": r} for s, r in zip(SIDES[kind], example.responses, strict=True)]
    verdicts = judge.judge([Exchange(r["proposition"], r["prompt"], r["response"]) for r in rows], 0) if rows else None
    names = ("data", "index", "id", "topic", "proposition", "score", "side", "prompt", "response")
    hits = pd.DataFrame(rows, columns=list(names))
    for i, name in enumerate(LABELS):
        hits[name] = verdicts.p[:, i] if verdicts else np.zeros(0)
    hits["graded"] = np.asarray(verdicts.graded, float) if verdicts else np.zeros(0)
    hits = hits.assign(judge=judge.name, judge_hash=judge.hash)
    # Both answers of a pair or neither: a gap is between answers to the same question.
    unjudged = hits[list(LABELS)].isna().any(axis=1).groupby([hits["topic"], hits["index"]]).transform("any")
    notes = [note]
    if unjudged.any():
        lost = hits.loc[unjudged, ["topic", "index"]].drop_duplicates()
        notes.append(f"{data}: {len(lost)} of {len(found.matches)} matches left out: {judge.name} has no verdict")
        hits = hits[~unjudged]
    topics = [t for t in dict.fromkeys(p.topic for p in probes) if (hits["topic"] == t).any()]
    groups = [(topic, hits[hits["topic"] == topic]) for topic in topics] + [(POOLED, hits)] * bool(topics)
    values = [_values(data, topic, side, rows, seed) for topic, rows in groups for side in SIDES[kind]]
    gaps = [_gap(data, topic, rows, seed) for topic, rows in groups if kind == "preference"]
    columns = ["data", "topic", "side", "n", "n_graded"]
    columns += [f"{name}{end}" for name in QUANTITIES for end in ("", "_low", "_high")]
    return Audit(
        hits.drop(columns="index"),
        pd.DataFrame(values, columns=columns),
        pd.DataFrame(gaps, columns=list(GAP_COLUMNS)),
        tuple(notes),
    )


def _by_example(rows: pd.DataFrame, side: str) -> Float[np.ndarray, "n 6"]:
    """QUANTITIES of each example's response; the mean over topics where an example touches several."""
    means = rows[rows["side"] == side].groupby("index")[list(QUANTITIES)].mean()
    return means.to_numpy(float)


def _units(values: Float[np.ndarray, "n C"]) -> Units:
    return Units(values, np.zeros((len(values), 1), int))


def _values(data: str, topic: str, side: str, rows: pd.DataFrame, seed: int) -> dict[str, Any]:
    values = _by_example(rows, side)
    stanced = ~np.isnan(values[:, -1])
    boot = bootstrap_means(_units(values), np.random.default_rng([seed, len(values)]), RESAMPLES)
    out: dict[str, Any] = {"data": data, "topic": topic, "side": side, "n": len(values), "n_graded": stanced.sum()}
    for i, name in enumerate(QUANTITIES):
        mean = float(np.nanmean(values[:, i])) if name != "graded" or stanced.any() else np.nan
        out |= {name: mean, f"{name}_low": boot.low[i], f"{name}_high": boot.high[i]}
    return out


def _gap(data: str, topic: str, rows: pd.DataFrame, seed: int) -> dict[str, Any]:
    """How far the chosen responses are from the rejected ones; 95% intervals over examples.

    js: Jensen-Shannon distance (base 2) of the mean distributions over LABELS. It is never negative, so it is to be
    read against js_null, its mean where chosen and rejected are swapped at random within the examples.
    signed: mean of graded(chosen) - graded(rejected), p by a paired sign-flip test. A response that takes no stance
    (graded NaN: a refusal, say) counts as 0, between the two sides; examples neither of whose responses takes one say
    nothing of a direction and are left out: n_signed examples are left.
    """
    chosen, rejected = (_by_example(rows, side) for side in SIDES["preference"])
    labels = slice(len(LABELS))
    rng = np.random.default_rng([seed, len(chosen)])
    js = _js(chosen[:, labels].mean(axis=0), rejected[:, labels].mean(axis=0))
    boot = bootstrap_means(_units(np.hstack([chosen[:, labels], rejected[:, labels]])), rng, RESAMPLES)
    resampled = _js(*boot.distribution.reshape(2, len(LABELS), -1).swapaxes(1, 2))
    tail = (1 - boot.level[0]) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail]) if len(chosen) > 1 else (np.nan, np.nan)
    middle, half = (chosen + rejected)[:, labels].mean(axis=0) / 2, (chosen - rejected)[:, labels] / 2 / len(chosen)
    change = rng.choice((-1.0, 1.0), (SWAPS, len(chosen))) @ half
    null = float(np.mean(_js(np.maximum(middle + change, 0), np.maximum(middle - change, 0))))
    graded = np.stack([chosen[:, -1], rejected[:, -1]], axis=1)
    graded = graded[~np.isnan(graded).all(axis=1)]
    difference = np.nan_to_num(graded[:, :1]) - np.nan_to_num(graded[:, 1:])
    signed = bootstrap_means(_units(difference), rng, RESAMPLES) if len(graded) else None
    p = sign_flip_p_values(_units(difference), rng, PERMUTATIONS)[0] if len(graded) else np.nan
    mean = float(difference.mean()) if len(graded) else np.nan
    ends = (signed.low[0], signed.high[0]) if signed else (np.nan, np.nan)
    return dict(
        zip(GAP_COLUMNS, (data, topic, len(chosen), js, low, high, null, mean, *ends, p, len(graded)), strict=True)
    )


def _js(first: np.ndarray, last: np.ndarray) -> Any:
    return distances(first, last)[0]


def against_drift(audited: Audit, drift: pd.DataFrame) -> pd.DataFrame:
    """What each stage's data predict for each topic, and what was measured: AGAINST_COLUMNS.

    gap: of preference data the signed gap; of SFT data the mean graded stance of the responses, which says where the
    policy is led but not where it starts from. predicted: the gap's sign. drift: the change of `graded`, toward the
    topic, by the first readout of `drift` (the table of drift.csv).

    Raises:
      UserError: a table without the quantity graded.
    """
    drift = drift[drift["stance"] == "graded"]
    if drift.empty:
        raise UserError("drift.csv holds no rows of the stance 'graded'; write the run's report anew")
    readout = drift["readout"].iloc[0]
    drift = drift[(drift["readout"] == readout) & (drift["topic"] != POOLED)].set_index(["stage", "topic"])
    gaps = {
        (g.data, g.topic): ("chosen - rejected", g.n, g.signed, g.signed_low, g.signed_high)
        for g in audited.gaps.itertuples()
    }
    sft = audited.values[audited.values["side"] == "sft"]
    gaps |= {(v.data, v.topic): ("sft", v.n, v.graded, v.graded_low, v.graded_high) for v in sft.itertuples()}
    rows = []
    for (stage, topic), (side, n, gap, low, high) in gaps.items():
        if (stage, topic) in drift.index:
            moved = drift.loc[(stage, topic)]
            predicted, measured = np.sign(gap), moved["magnitude"]
            known = not np.isnan(gap) and not np.isnan(measured)
            agrees = bool(predicted == np.sign(measured)) if known else None
            rows.append(
                (
                    stage,
                    topic,
                    side,
                    n,
                    gap,
                    low,
                    high,
                    predicted,
                    measured,
                    moved["ci_low"],
                    moved["ci_high"],
                    agrees,
                    readout,
                )
            )
    return pd.DataFrame(rows, columns=list(AGAINST_COLUMNS))


def agreement(against: pd.DataFrame) -> dict[str, Any]:
    """n pairs with a gap and a drift, how many agree in sign, and Spearman's rho with its p-value (NaN below three)."""
    both = against.dropna(subset=["gap", "drift"])
    agree = int(both["agrees"].astype(bool).sum())
    rho = p = float("nan")
    if len(both) > 2 and both["gap"].nunique() > 1 and both["drift"].nunique() > 1:
        rho, p = map(float, stats.spearmanr(both["gap"], both["drift"]))
    return {"n": len(both), "agree": agree, "spearman": rho, "p": p}


def joined(audits: Sequence[Audit]) -> Audit:
    def table(name: str) -> pd.DataFrame:
        parts = [getattr(a, name) for a in audits]
        return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)

    return Audit(table("hits"), table("values"), table("gaps"), tuple(note for a in audits for note in a.notes))


def load_examples(spec: dict[str, Any], kinds: Sequence[str], seed: int) -> tuple[str, Iterable[Example], Counts]:
    """Examples of the first of `kinds` that a data set can give; UserError of the first where there is none."""
    errors = []
    for kind in kinds:
        counts = Counts()
        try:
            return kind, sources.load(spec | {"kind": kind}, seed=seed, counts=counts), counts
        except UserError as error:
            errors.append(error)
    raise errors[0]


def stage_examples(stage: ConfigDict, seed: int) -> tuple[str, Iterable[Example], list[Counts]]:
    """What a stage learns from, before it is rendered; of a mixture, as many examples of each part as it has.

    Raises:
      UserError: data without responses, or those of a stage that learns from the policy's own.
    """
    kind = data_kind(stage.objective)
    if kind in ("text", "prompt"):
        raise UserError(f"the objective {stage.objective} learns from no stated answers")
    kinds = ["sft"] if kind == "sft" else ["preference"]
    shares = mixture.shares(stage.data.parts, stage.data.max_examples) if stage.data.get("parts") else [None]
    loaded = [load_examples(spec, kinds, seed) for spec in pipeline.specs(stage, kinds[0])]
    parts = [itertools.islice(examples, n) for (_, examples, _), n in zip(loaded, shares, strict=True)]
    return kinds[0], itertools.chain.from_iterable(parts), [counts for _, _, counts in loaded]


def audit_run(config: ConfigDict, probes: Sequence[sets.Probe], judge: Judge, max_per_topic: int = 0) -> Audit:
    """The data of every stage, each named as its stage; stages without stated answers are noted."""
    audits, notes = [], []
    for name in config.stages:
        try:
            kind, examples, _ = stage_examples(config[name], config.seed)
        except UserError as error:
            notes.append(f"{name}: not audited: {error}")
            continue
        audits.append(audit(examples, kind, probes, judge, data=name, max_per_topic=max_per_topic, seed=config.seed))
    if not audits:
        raise UserError("\n".join(["no stage's data can be audited", *notes]))
    made = joined(audits)
    return made._replace(notes=(*made.notes, *notes))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vdjax.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="PATH[,PATH]", help="files, directories or hub ids; each a data set of its own")
    what.add_argument("--run", type=Path, metavar="WORKDIR", help="audits the data of a run's stages")
    parser.add_argument("--judge", required=True, help="directory or hub id of a model; or one of a config's judges")
    parser.add_argument("--config", default="", metavar="FILE.py[:ARG]", help="whose judges; default: the run's")
    parser.add_argument("--template", default="", help="of a model as judge (vdjax/judges/templates)")
    parser.add_argument("--source", default="auto", help="schema of the data (vdjax.data.sources)")
    parser.add_argument("--kind", choices=tuple(SIDES), help="default: preference where the data have pairs")
    parser.add_argument("--probes", help="builtin or a probe file; default: the run's, or builtin")
    parser.add_argument("--topics", nargs="+", default=(), help="default: all")
    parser.add_argument("--max_per_topic", type=int, default=0, help="examples judged of each topic; default: all")
    parser.add_argument("--workdir", type=Path, help="default: the run's")
    flags, overrides = parser.parse_known_args()
    if flags.data and not flags.workdir:
        raise UserError("--data needs --workdir, where the tables are written")
    if flags.run and (flags.source != "auto" or flags.kind):
        raise UserError("--source and --kind are for --data; a run's config says what its stages read")
    if flags.max_per_topic < 0:
        raise UserError(f"--max_per_topic {flags.max_per_topic}: expected at least 0 (all)")
    config = run_config(flags.run) if flags.run else configs.experiment()
    if not flags.run:
        config.data = configs.stage("sft").data
        config.data.source = flags.source
    from vdjax.judges.open import judge_of_flags, open_judge

    if not flags.config and flags.judge in config.get("judges", {}):
        name, fields = flags.judge, config.judges[flags.judge]
    else:
        name, fields = judge_of_flags(config, flags.judge, flags.template, flags.config)
    configs.override_only(
        config, overrides, "mesh", *["data"] * (not flags.run), *["judges"] * (name in config.get("judges", {}))
    )
    probes = sets.load(flags.probes or config.probes.path, topics=flags.topics or config.probes.topics or None)
    drift_file = flags.run / "drift" / "drift.csv" if flags.run else None
    if drift_file and not drift_file.exists():
        raise UserError(f"{drift_file}: no such file; the run has no report yet")
    runtime.start()

    import jax

    from vdjax import sharding

    workdir = flags.workdir or flags.run
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    with jax.set_mesh(mesh):
        judge = open_judge(name, fields, mesh, runs.calls(workdir))
        if flags.run:
            audited = audit_run(config, probes, judge, flags.max_per_topic)
        else:
            audited = joined([audit_path(path.strip(), config, flags, probes, judge) for path in flags.data.split(",")])
    if jax.process_index():
        return
    for note in audited.notes:
        say(note)
    against = against_drift(audited, pd.read_csv(drift_file)) if drift_file else None
    found = agreement(against) if against is not None else {}
    tables = {"hits.parquet": audited.hits, "values.csv": audited.values, "gaps.csv": audited.gaps}
    output.write(workdir / "audit", tables, against, found)
    print(output.text(audited.values[["data", "topic", "side", "n", *QUANTITIES]], audited.gaps))
    if against is not None:
        print(
            f"\n{found['agree']} of {found['n']} drifts have the sign that the data predict; "
            f"Spearman {found['spearman']:.2f} (p = {found['p']:.3g})"
        )
    print(f"audit: {workdir / 'audit'}")


def audit_path(
    path: str, config: ConfigDict, flags: argparse.Namespace, probes: Sequence[sets.Probe], judge: Judge
) -> Audit:
    spec = {k: v for k, v in config.data.to_dict().items() if k not in ("parts", "order")} | {"path": path}
    kinds = [flags.kind] if flags.kind else ["preference", "sft"]
    kind, examples, counts = load_examples(spec, kinds, config.seed)
    name = Path(path).name
    made = audit(examples, kind, probes, judge, data=name, max_per_topic=flags.max_per_topic, seed=config.seed)
    return made._replace(notes=(*made.notes, *counts.lines()))


def run_config(workdir: Path) -> ConfigDict:
    """The config of a run; UserError where there is none."""
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"--run {workdir}: no config.json there; expected the workdir of a run")
    return ConfigDict(json.loads(file.read_text())["config"])


if __name__ == "__main__":
    run_cli(main)
