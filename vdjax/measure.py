"""From snapshots to scores: every probe is asked, responses are judged, and the workdir keeps all of it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax import hosts, runs
from vdjax.data import stances
from vdjax.errors import UserError
from vdjax.files import filling, read_kept, read_table, remove_tree, write_whole
from vdjax.judges import LABELS, Exchange, Judge, Verdicts
from vdjax.judges.local import check_fits
from vdjax.judges.open import check_judge, check_key, open_judge
from vdjax.models import hf
from vdjax.models.functional import Model
from vdjax.probes import evaluator, open_ended, readouts, score_table, sets
from vdjax.progress import progress_over, say
from vdjax.sampling import Sampling
from vdjax.setup import Setup

MEASURED = ("log_prob", "response", "tokens", "finish_reason", "degenerate")  # columns that say what was answered
COVERED = 0.9  # share of the responses that a judge must have verdicts on to be a readout


class Questions(NamedTuple):
    """What every snapshot is asked."""

    probes: list[sets.Probe]
    variants: list[readouts.Variant]
    items: list[readouts.Item]  # of forced choices
    prompts: list[open_ended.Prompt]  # of responses


class Series(NamedTuple):
    """Snapshots of one stage in the order of their steps."""

    stage: str
    steps: list[int]
    readers: Sequence[hf.Reader]
    ends: tuple[int, int]  # the first step and the last
    base: Any = None  # the parameters that adapters lie beside


def questions(config: ConfigDict, made: Setup) -> Questions:
    """Loads and renders the probes.

    Raises:
      UserError: a file, topic, readout, variant, probe or judge that cannot be used.
    """
    c = config.probes
    for name in c.judges:
        check_judge(name, config.judges[name])
    if config.judge_quality.stage:
        check_fits(config.judge_quality.template, made.tokenizer, made.template)
        labelled(config)
    probes = sets.load(c.path, topics=c.topics or None, max_per_topic=c.max_per_topic or None)
    variants = readouts.variants(c)
    items = readouts.items(probes, variants, c.readouts, made.tokenizer, made.template, c.max_length)
    sampled = "open_ended" in c.readouts
    for probe in probes * sampled:
        sets.judged(probe)
    prompts = open_ended.prompts(probes, variants, made.tokenizer, made.template, c.max_length) if sampled else []
    return Questions(probes, variants, items, prompts)


def check_keys(config: ConfigDict, stages: Sequence[str], workdir: Path) -> None:
    """UserError where a judge's key is missing that has not judged all of these stages once."""
    for name in config.probes.judges:
        if not all((workdir / "judgements" / name / f"{stage}.parquet").exists() for stage in stages):
            check_key(name, config.judges[name])


def ask(
    config: ConfigDict,
    made: Setup,
    asked: Questions,
    series: Series,
    workdir: Path,
    *,
    parent: str = "",
    models: str = "",
) -> None:
    """Asks a series: probes/STAGE.parquet and responses/STAGE.parquet. Answers to other questions are replaced.

    Args:
      parent: the stage whose last snapshot is the first one here, bit for bit: its answers are taken over.
      models: what tells the series from others that were asked in this workdir under the stage's name.
    """
    c = config.probes
    forced = readouts.asked_hash(asked.probes, asked.variants, c.readouts, made.template)
    free = open_ended.asked_hash(
        asked.prompts, made.template, sampling(config), samples=c.samples, replicates=c.replicates, seed=config.seed
    )
    most = evaluator.most_on_cpu(made.model, made.mesh, c.memory_gb)
    for folder, prompts, read, plain, copies, together in (
        ("probes", asked.items, answers, forced, 1, None),
        ("responses", asked.prompts, responses, free, 2, most),
    ):
        file = workdir / folder / f"{series.stage}.parquet"
        key = digest((plain, models)) if models else plain
        if holds(file, asked_hash=key):
            say(f"{series.stage}: {folder} are there already")
        elif prompts:
            inherited = workdir / folder / f"{parent}.parquet"
            start = first_snapshot(inherited, series) if holds(inherited, asked_hash=key) else None
            rest = series if start is None else series._replace(steps=series.steps[1:], readers=series.readers[1:])
            tables = []
            for part in held_at_once(config, made.model, made.mesh, rest, copies, together):
                kept = parts_of(file) / f"{part.steps[0]}-{part.steps[-1]}.parquet"
                if not holds(kept, asked_hash=key):
                    found = read(config, made, asked, part).assign(asked_hash=key)
                    store(found.drop_duplicates([c for c in found if c not in MEASURED], ignore_index=True), kept)
                tables.append(read_table(kept))
            store(pd.concat([start, *tables], ignore_index=True), file)
        drop_parts(file)


def held_at_once(
    config: ConfigDict, model: Model, mesh: jax.sharding.Mesh, series: Series, copies: int, most: int | None
) -> list[Series]:
    """The series in parts that are asked, and kept, one after the other: as many snapshots as memory holds at once, and
    no more than `most`.

    All have one size, so that one program serves them; the last may name its last snapshot more than once.
    """
    memory = config.probes.memory_gb * 1e9
    copies *= mesh.shape["data"] if model.lora else 1
    groups = evaluator.groups(len(series.steps), model, memory, copies, most)
    return [
        series._replace(steps=[series.steps[i] for i in group], readers=[series.readers[i] for i in group])
        for group in groups
    ]


def parts_of(file: Path) -> Path:
    """Where the parts of a table lie that is not whole yet."""
    return file.parent / "parts" / file.stem


def drop_parts(file: Path) -> None:
    if hosts.index() == 0 and parts_of(file).exists():
        remove_tree(parts_of(file))


def first_snapshot(parent: Path, series: Series) -> pd.DataFrame:
    """What the parent's last snapshot answered, as the answers of the first snapshot of a series."""
    table = read_table(parent)
    return table[table["step"] == table["step"].max()].assign(stage=series.stage, step=series.steps[0])


def sampling(config: ConfigDict) -> Sampling:
    c = config.probes
    return Sampling(c.max_new_tokens, c.temperature, c.top_p, c.top_k)


def answers(config: ConfigDict, made: Setup, asked: Questions, series: Series) -> pd.DataFrame:
    """Every forced-choice answer's log-prob under every snapshot, one row each."""
    say(f"{series.stage}: {len(asked.probes)} probes, {len(asked.items)} prompts, {len(series.steps)} snapshots")
    sums, counts = evaluator.evaluate(
        made.model,
        series.readers,
        asked.items,
        made.mesh,
        base=series.base,
        rows=config.probes.rows,
        memory_bytes=config.probes.memory_gb * 1e9,
        progress=lambda batches, total: progress_over(batches, total, f"{series.stage} probes"),
    )
    tables = [
        readouts.raw_table(one, counts, asked.items, asked.probes).assign(step=step)
        for one, step in zip(sums, series.steps, strict=True)
    ]
    about = {"stage": series.stage, "seed": config.seed, "template_hash": readouts.wordings_hash(made.template)}
    return pd.concat(tables, ignore_index=True).assign(**about)


def responses(config: ConfigDict, made: Setup, asked: Questions, series: Series) -> pd.DataFrame:
    """Every response of every snapshot, one row each."""
    c = config.probes
    say(f"{series.stage}: {len(asked.prompts)} prompts, {c.samples} responses each, {len(series.steps)} snapshots")
    return open_ended.sample(
        made.model,
        series.readers,
        series.steps,
        asked.prompts,
        sampling(config),
        made.tokenizer,
        made.template,
        made.mesh,
        stage=series.stage,
        seed=config.seed,
        samples=c.samples,
        replicates=c.replicates,
        replicated=series.ends,
        base=series.base,
        memory_bytes=c.memory_gb * 1e9,
        progress=lambda batches, total: progress_over(batches, total, f"{series.stage} responses"),
    )


def judge(config: ConfigDict, made: Setup, asked: Questions, stages: Sequence[str], workdir: Path) -> list[Judge]:
    """Has every judge judge the responses of these stages: judgements/JUDGE/STAGE.parquet."""
    judges = []
    for name in config.probes.judges:
        known: Known = {}
        opened = remembering(open_judge(name, config.judges[name], made.mesh, runs.calls(workdir)), known)
        # The replies of an API are kept as they come, and labels of people cost no time.
        by_step = config.judges[name].kind == "local"
        for stage in stages:
            said = read_table(workdir / "responses" / f"{stage}.parquet")
            exchanges, keys = score_table.exchanges(said, asked.probes)
            repeats = config.judges[name].get("repeats", 1)
            key = digest((exchanges, keys.to_numpy().tolist(), repeats))
            file = workdir / "judgements" / name / f"{stage}.parquet"
            if holds(file, judge_hash=opened.hash, judged_hash=key):
                say(f"{stage}: judged by {name} already")
                recall(known, exchanges, keys, read_table(file))
            else:
                say(f"{stage}: {name} judges {len(exchanges)} of {len(said)} responses; the others are degenerate")
                steps = sorted(set(keys["step"]))
                tables = []
                for part in [[step] for step in steps] if by_step and steps else [steps]:
                    places = np.flatnonzero(keys["step"].isin(part))
                    mine, theirs = [exchanges[i] for i in places], keys.iloc[places].reset_index(drop=True)
                    kept = parts_of(file) / f"{'-'.join(map(str, part))}.parquet"
                    if by_step and holds(kept, judge_hash=opened.hash, judged_hash=key):
                        tables.append(read_table(kept))
                        recall(known, mine, theirs, tables[-1])
                        continue
                    tables.append(judged(opened, mine, theirs, repeats, steps).assign(judged_hash=key))
                    if len(part) < len(steps):
                        store(tables[-1], kept)
                store(pd.concat(tables).sort_values("repeat", kind="stable", ignore_index=True), file)
            drop_parts(file)
        judges.append(opened)
    return judges


Known = dict[tuple[Exchange, int], tuple[np.ndarray, float]]  # verdicts by exchange and repeat


def recall(known: Known, exchanges: Sequence[Exchange], keys: pd.DataFrame, table: pd.DataFrame) -> None:
    """Puts the verdicts of a table into `known`, so that a judge is asked what it were without an interruption."""
    place = dict(zip(keys.itertuples(index=False, name=None), exchanges, strict=True))
    columns = [*score_table.RESPONSE, "repeat", "graded", *LABELS]
    for *key, repeat, graded, s, n, o, r, t in table[columns].itertuples(index=False, name=None):
        known.setdefault((place[tuple(key)], repeat), (np.array([s, n, o, r, t]), graded))


def remembering(opened: Judge, known: Known) -> Judge:
    """The judge asked once of each exchange: children begin with the responses that their parent ended with."""

    def judge(exchanges: Sequence[Exchange], repeat: int) -> Verdicts:
        new = [exchange for exchange in dict.fromkeys(exchanges) if (exchange, repeat) not in known]
        for exchange, *verdict in zip(new, *opened.judge(new, repeat), strict=True) if new else ():
            known[exchange, repeat] = tuple(verdict)
        found = [known[exchange, repeat] for exchange in exchanges]
        return Verdicts(np.array([p for p, _ in found]).reshape(-1, len(LABELS)), np.array([g for _, g in found]))

    return opened._replace(judge=judge)


def digest(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def judged(
    opened: Judge, exchanges: Sequence[Exchange], keys: pd.DataFrame, repeats: int, steps: Sequence[int]
) -> pd.DataFrame:
    """Verdicts on all exchanges; beyond the first time on the first and last snapshot's first replicate alone.

    `steps` are those of all snapshots, in order. Responses on which the judge has none, as people have who labelled a
    sample, have no row.
    """
    ends = keys["step"].isin((*steps[:1], *steps[-1:])) & (keys["replicate"] == 0)
    tables = []
    for repeat in range(repeats):
        chosen = np.flatnonzero(ends | (repeat == 0))
        if repeat and not len(chosen):
            break
        verdicts = opened.judge([exchanges[i] for i in chosen.tolist()], repeat)
        known = ~np.isnan(verdicts.p).any(axis=1)
        if not known.all():
            say(f"  {opened.name} has no verdict on {(~known).sum()} of {len(known)}")
        part = keys.iloc[chosen[known]].reset_index(drop=True)
        found = Verdicts(verdicts.p[known], verdicts.graded[known])
        tables.append(score_table.judgement_table(part, opened.name, opened.hash, found, repeat))
    return pd.concat(tables, ignore_index=True)


def judge_quality(config: ConfigDict, made: Setup, workdir: Path) -> None:
    """Measures the last snapshot of a stage as a judge: quality/ (`vdjax.judges.quality`)."""
    from vdjax.judges import quality  # draws

    c = config.judge_quality
    step = runs.done(workdir, c.stage)["total_steps"]
    fields = configs.judge("local", path=str(workdir / c.stage / "snapshots" / str(step)), template=c.template)
    items = labelled(config)
    opened = open_judge(c.stage, fields, made.mesh, workdir)
    file = workdir / "quality" / "quality.json"

    def measured() -> bool:
        return file.exists() and read_kept(file, "judge_hash")["judge_hash"] == opened.hash

    if hosts.by_first("a look for the judge's quality", measured):
        return say(f"{c.stage}: measured as a judge already")
    say(f"{c.stage}: judges {len(items)} labelled exchanges")
    with filling(workdir / "quality", "quality.json") as folder:
        quality.measure(opened, items, folder)


def labelled(config: ConfigDict) -> list[stances.Labelled]:
    """What judge_quality measures on; UserError where there is none."""
    c = config.judge_quality
    paths = [path.strip() for path in c.path.split(",")]
    return stances.labelled(paths[0] if len(paths) == 1 else paths, topics=c.topics, seed=config.seed, n=c.max_examples)


class Measured(NamedTuple):
    """What a workdir holds of its stages; `responses` and `judgements` are empty where nothing was sampled."""

    scores: pd.DataFrame
    responses: pd.DataFrame
    judgements: pd.DataFrame


def read(config: ConfigDict, asked: Questions, stages: Sequence[str], workdir: Path) -> Measured:
    """All readouts of these stages, in the order of the config's."""

    def tables(folder: Path) -> pd.DataFrame:
        return pd.concat([read_table(folder / f"{stage}.parquet") for stage in stages], ignore_index=True)

    said, verdicts, parts = pd.DataFrame(), pd.DataFrame(), []
    if asked.items:
        parts.append(score_table.from_answers(tables(workdir / "probes"), asked.probes))
    if asked.prompts:
        said = tables(workdir / "responses")
        each = {name: tables(workdir / "judgements" / name) for name in config.probes.judges}
        verdicts = pd.concat(each.values(), ignore_index=True)
        for name, mine in each.items():
            own = covered(said, mine, name)
            mine = mine.merge(own[score_table.RESPONSE], on=score_table.RESPONSE)
            parts.append(score_table.from_responses(own, mine, asked.probes, [name]))
    if not any(map(len, parts)):
        raise UserError("no readout: no judge has verdicts on enough responses; add a judge, or a forced choice")
    scores = pd.concat([part for part in parts if len(part)], ignore_index=True)
    order = {name: i for i, name in enumerate(config.probes.readouts)}
    place = scores["readout"].str.partition(":")[0].map(order)
    return Measured(scores.iloc[place.argsort(kind="stable")].reset_index(drop=True), said, verdicts)


def covered(said: pd.DataFrame, verdicts: pd.DataFrame, judge: str) -> pd.DataFrame:
    """The responses that a judge can be a readout of: without those, at all snapshots, that it left out at any.

    None where that leaves less than COVERED of them: such a judge is only compared with others.
    """
    same_draw = ["stage", "probe_id", "variant", "replicate", "sample"]
    first = verdicts.loc[verdicts["repeat"] == 0, score_table.RESPONSE]
    sound = said.loc[said["degenerate"] == "", score_table.RESPONSE].merge(first, how="left", indicator=True)
    left_out = sound.loc[sound["_merge"] == "left_only", same_draw].drop_duplicates()
    if left_out.empty:
        return said
    marked = said.merge(left_out, how="left", indicator=True)
    kept = said[(marked["_merge"] == "left_only").to_numpy()]
    left = (kept["degenerate"] == "").sum()
    whole = left >= COVERED * len(sound)
    what = "left out" if whole else "left out, which are too many: it is no readout"
    say(f"{judge}: {len(sound) - left} of {len(sound)} responses have no verdict at some snapshot; {what}")
    return kept if whole else said.iloc[:0]


def holds(file: Path, **wanted: str) -> bool:
    """Whether a table is there with one value in each of these columns, the wanted one."""

    def look() -> bool:
        try:
            if not file.exists():
                return False
            with file.open("rb") as content, pq.ParquetFile(content) as kept:
                if not set(wanted) <= set(kept.schema_arrow.names):
                    return False
                table = kept.read(list(wanted)).to_pandas()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            say(f"{file}: is damaged ({error}), and made again")
            return False
        return all(set(table[name]) <= {value} for name, value in wanted.items())

    return hosts.by_first(f"a look into {file.parent.name}/{file.name}", look)


def store(table: pd.DataFrame, file: Path) -> None:
    """Writes a table whole or not at all; all processes may read it afterwards."""
    what = f"{file.parent.name}/{file.name} to be written"
    hosts.by_first(what, lambda: write_whole(file, table.to_parquet(index=False)))
