"""The examples that an audit reads: of a data set, and of a stage those that it was trained on."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vdjax.data import mixture, pipeline, sources
from vdjax.data.examples import Counts, Example
from vdjax.errors import UserError
from vdjax.files import read_kept
from vdjax.setup import reading
from vdjax.train.plan import data_kind


def load_examples(
    specs: Sequence[dict[str, Any]], kinds: Sequence[str], seed: int
) -> tuple[str, list[tuple[Iterable[Example], Counts]]]:
    """Examples of the first of `kinds` that all data sets can give; UserError of the first where there is none."""
    errors = []
    for kind in kinds:
        counts = [Counts() for _ in specs]
        try:
            loaded = [sources.load(s | {"kind": kind}, seed=seed, counts=c) for s, c in zip(specs, counts, strict=True)]
            return kind, list(zip(loaded, counts, strict=True))
        except UserError as error:
            errors.append(error)
    raise errors[0]


def stage_examples(config: ConfigDict, name: str, workdir: Path) -> tuple[str, Iterator[Example], list[str]]:
    """What a stage of a run was trained on, with its texts whole, and notes on it.

    Those examples that could be rendered (found in WORKDIR/data, or rendered again), without the held-out ones and, of
    a stage that ended within its first epoch, without those that it did not come to.

    Raises:
      UserError: data without responses, or those of a stage that learns from the policy's own.
    """
    stage = config[name]
    needed = data_kind(stage.objective)
    if needed in ("text", "prompt"):
        raise UserError(f"the objective {stage.objective} learns from no stated answers")
    # Pairs say more than their responses one by one, also where the objective takes these.
    kinds = ["preference", "unpaired"] if needed == "unpaired" else [needed]
    kind, loaded = load_examples(pipeline.specs(stage, needed), kinds, config.seed)
    tokenizer, template, _ = reading(config)
    data = pipeline.build(stage, needed, tokenizer, template, workdir / "data", seed=config.seed)
    done, notes = workdir / name / "done.json", []
    if done.exists() and read_kept(done, "data_counts")["data_counts"] != data.counts:
        notes.append(f"{name}: the data changed since it was trained; audited is what they are now")
    ids = trained_ids(stage, data, config.seed)
    if (needed, kind) == ("unpaired", "preference"):
        ids = {id.removesuffix(":chosen").removesuffix(":rejected") for id in ids}
    return kind, _chosen([examples for examples, _ in loaded], bool(stage.data.get("parts")), ids), notes


def trained_ids(stage: ConfigDict, data: pipeline.Dataset, seed: int) -> set[str]:
    """Ids of the examples that a stage's steps went through (see `train.plan.plan_stage`)."""
    train = pipeline.take(data, 0, len(data) - stage.eval_examples)
    parts = mixture.part_numbers(train.ids) if stage.data.get("order") == "parts" else None
    steps = pipeline.order(len(train), stage.batch_size, stage.epochs, seed, parts)
    if not stage.max_steps or stage.max_steps * stage.batch_size >= len(train):
        return set(train.ids)
    return {train.ids[i] for step in range(stage.max_steps) for i in steps[step]}


def _chosen(parts: Sequence[Iterable[Example]], labelled: bool, ids: set[str]) -> Iterator[Example]:
    """The examples with these ids, which say the part in a mixture; what comes after the last of them is not read."""
    left = set(ids)
    for number, examples in enumerate(parts):
        mine = {id for id in left if not labelled or id.startswith(mixture.label(number, ""))}
        for example in examples if mine else ():
            id = mixture.label(number, example.id) if labelled else example.id
            if id in mine:
                yield example._replace(id=id)
                mine.remove(id)
            if not mine:
                break


def answers(examples: Iterable[Example], numbers: list[int]) -> Iterator[Example]:
    """Each answer of each conversation as an example of its own, with what came before it as prompt.

    Appends the number of the conversation of each to `numbers` as it goes, as examples are read one at a time.
    """
    for number, example in enumerate(examples):
        if not isinstance(example.prompt, str):
            for i, message in enumerate(example.prompt):
                if message["role"] == "assistant":
                    numbers.append(number)
                    yield example._replace(prompt=example.prompt[:i], responses=(message["content"],))
        numbers.append(number)
        yield example
