"""Data sets, orders and batches: what a step is given, from the same seed the same, from any position on."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from vdjax import config as configs
from vdjax.data import chat, packing, pipeline, tokenizer
from vdjax.data.examples import Example
from vdjax.errors import UserError


def indices(steps: Any) -> list[list[int]]:
    return [list(map(int, step)) for step in steps]


def test_every_epoch_holds_every_example_once_in_an_order_of_its_own() -> None:
    found = np.concatenate(indices(pipeline.order(10, 5, 3, seed=4))).reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in found.tolist())
    assert len({tuple(epoch) for epoch in found.tolist()}) == 3
    assert indices(pipeline.order(10, 5, 3, seed=4)) == found.reshape(6, 5).tolist()
    assert indices(pipeline.order(10, 5, 3, seed=5)) != found.reshape(6, 5).tolist()


def test_the_last_batch_may_be_smaller() -> None:
    steps = indices(pipeline.order(5, 4, 2, seed=0))
    assert [len(step) for step in steps] == [4, 4, 2]
    assert Counter(i for step in steps for i in step) == dict.fromkeys(range(5), 2)
    assert indices(pipeline.in_order(5, 4)) == [[0, 1, 2, 3], [4]]


def test_an_iterator_goes_on_from_its_position() -> None:
    data = tiny.dataset(tiny.preference_examples(0, 9))
    steps = pipeline.order(9, 2, 2, seed=0)
    made = pipeline.batches(data, steps, pipeline.plan(data, steps, row_length=0, row_multiple=1), 1)
    whole = [batch["indices"].tolist() for batch in pipeline.iterate(made)]
    assert whole == indices(steps)
    first = pipeline.iterate(made)
    for _ in range(4):
        next(first)
    position = json.loads(json.dumps(first.get_state()))
    other = pipeline.iterate(made)
    other.set_state(position)
    assert [batch["indices"].tolist() for batch in other] == whole[4:]


def test_take_and_examples() -> None:
    made = tiny.preference_examples(1, 6)
    part = pipeline.take(tiny.dataset(made), 2, 5)
    assert len(part) == 3 and list(part.ids) == ["example-2", "example-3", "example-4"]
    for i in range(3):
        for got, want in zip(pipeline.example(part, i), made[i + 2], strict=True):
            np.testing.assert_array_equal(got, want)
    assert part.key != tiny.dataset(made).key
    assert pipeline.lengths(part).tolist() == [len(e.tokens) for e in made[2:5]]


@pytest.mark.parametrize("row_length", [0, 40, 200])
def test_the_planned_shape_fits_every_batch(row_length: int) -> None:
    data = tiny.dataset(tiny.preference_examples(2, 23))
    steps = pipeline.order(23, 5, 2, seed=0)
    shape = pipeline.plan(data, steps, row_length=row_length, row_multiple=3)
    assert shape.rows % 3 == 0 and shape.length == (row_length or shape.length)
    reference = np.arange(len(data.tokens), dtype=np.float32)
    rows_needed = 0
    for batch in pipeline.batches(data, steps, shape, 3, {"beside": reference}):
        assert batch["tokens"].shape == (shape.rows // 3, 3, shape.length)
        flat = {k: v.reshape(shape.rows, *v.shape[2:]) for k, v in batch.items() if k != "indices"}
        rows_needed = max(rows_needed, int((flat["segment_ids"] > 0).any(axis=1).sum()))
        ends = [int(data.offsets[i + 1] - data.offsets[i]) for i in batch["indices"]]
        for name, per_token in (("tokens", data.tokens), ("beside", reference)):
            for i, got in zip(batch["indices"], tiny.collect(flat[name], flat["source"], ends), strict=True):
                np.testing.assert_array_equal(got, per_token[data.offsets[i] : data.offsets[i + 1]])
    assert shape.rows - 3 < rows_needed <= shape.rows  # no more rows than needed


def test_a_row_that_is_too_short_is_refused_with_the_example() -> None:
    data = tiny.dataset(tiny.preference_examples(2, 9))
    longest = int(pipeline.lengths(data).argmax())
    with pytest.raises(UserError, match=rf"row_length=5, but example example-{longest} has \d+ tokens"):
        pipeline.plan(data, pipeline.in_order(9, 3), row_length=5, row_multiple=1)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_scores_come_back_to_their_tokens(batch_size: int) -> None:
    """A pass that returns a number for each token, whatever the layout."""
    data = tiny.dataset(tiny.preference_examples(3, 7))

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        return np.where(batch["loss_mask"], batch["tokens"] * 100.0 + batch["positions"], 0).astype(np.float32)

    steps = pipeline.in_order(7, batch_size)
    shape = pipeline.plan(data, steps, row_length=0, row_multiple=2)
    found = pipeline.score(data, pipeline.batches(data, steps, shape, 2), run)
    positions = np.concatenate([packing.positions_of(pipeline.example(data, i).branches) for i in range(7)])
    np.testing.assert_array_equal(found, np.where(data.loss_mask, data.tokens * 100.0 + positions, 0))


def test_build_renders_once_and_again_when_anything_changes(tiny_data: Path, tmp_path: Path) -> None:
    tok = tokenizer.byte_level()
    template = chat.pick_template(tok, "auto")
    file = tmp_path / "preferences.jsonl"
    shutil.copy(tiny_data / file.name, file)
    fields: dict[str, Any] = {"data": {"path": str(file)}, "max_length": 96}

    def build(**changes: Any) -> pipeline.Dataset:
        return pipeline.build(configs.stage("dpo", **(fields | changes)), "preference", tok, template, tmp_path, seed=0)

    one = build()
    assert len(one) == 11 and one.counts["rows"] == 11
    text = chat.decode(pipeline.example(one, 1).tokens, tok)
    assert "And tea?" in text and "Yes, I like tea!" in text and "No.No." in text
    meta = tmp_path / one.key / "meta.json"
    written = meta.stat().st_mtime_ns
    assert build().key == one.key and meta.stat().st_mtime_ns == written
    assert build(batch_size=7, epochs=5).key == one.key  # the tokens do not depend on these
    os.utime(file, (1, 1))  # as another host may have its copy
    assert build().key == one.key
    file.write_text(file.read_text().replace("Yes", "Yea"))
    assert build().key != one.key
    file.write_text(file.read_text().replace("Yea", "Yes"))
    truncated = build(max_length=40)
    assert truncated.key != one.key
    assert sum(truncated.counts["dropped"].values()) + sum(truncated.counts["noted"].values()) > 0
    assert build(data=fields["data"] | {"max_examples": 4}).key not in (one.key, truncated.key)


def test_no_usable_example_is_an_error_with_the_reasons(tiny_data: Path, tmp_path: Path) -> None:
    tok = tokenizer.byte_level()
    stage = configs.stage("dpo", data={"path": str(tiny_data / "preferences.jsonl")}, max_length=3)
    with pytest.raises(UserError, match=r"no example could be rendered(.|\n)*11 x prompt_too_long"):
        pipeline.build(stage, "preference", tok, chat.pick_template(tok, "auto"), tmp_path, seed=0)


def test_examples_that_ask_given_questions(tmp_path: Path) -> None:
    """In any turn, whatever the case and punctuation; the same from the cache, in a slice and in a mixture."""
    said = ("Tea?", "So.", "is it", "a")
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    rows = [
        {"messages": turns},
        {"messages": [{"role": "user", "content": "Tea or rain?"}, {"role": "assistant", "content": "Tea."}]},
        {"messages": [{"role": "user", "content": "  IS it!?"}, {"role": "assistant", "content": "Tea?"}]},
    ]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tok = tokenizer.byte_level()
    stage = configs.stage("sft", data={"path": str(tmp_path / "sft.jsonl")}, max_length=96)
    for _ in range(2):  # rendered, then read
        data = pipeline.build(stage, "sft", tok, chat.pick_template(tok, "auto"), tmp_path / "cache", seed=0)
        assert pipeline.asking(data, ["Is it?", "So."]) == ["sft.jsonl:0", "sft.jsonl:2"]
        assert pipeline.asking(data, ["tea"]) == ["sft.jsonl:0"] and pipeline.asking(data, []) == []
        assert pipeline.asking(pipeline.take(data, 1, 3), ["Is it?", "tea"]) == ["sft.jsonl:2"]
        assert pipeline.asking(pipeline.take(data, 0, 2), ["Is it?"]) == ["sft.jsonl:0"]
    stage.data.path, stage.data.parts = "", ({"path": str(tmp_path / "sft.jsonl"), "count": 1},) * 2
    mixed = pipeline.build(stage, "sft", tok, chat.pick_template(tok, "auto"), tmp_path / "cache", seed=0)
    assert pipeline.asking(mixed, ["Tea"]) == ["part0/sft.jsonl:0", "part1/sft.jsonl:0"]
    prompts = pipeline.build(
        configs.stage("ppo", data={"path": str(tmp_path / "sft.jsonl")}, max_length=240), "prompt", tok,
        chat.pick_template(tok, "auto"), tmp_path / "cache", seed=0,
    )  # fmt: skip
    assert pipeline.asking(prompts, ["tea or rain"]) == ["sft.jsonl:1"]


def test_mismatched_responses_come_from_the_next_other_prompt() -> None:
    examples = [Example(str(i), prompt, (f"r{i}",)) for i, prompt in enumerate("aabccb")]
    others = [e.responses for e in pipeline.with_mismatched(examples)]
    assert others == [("r0", "r2"), ("r1", "r2"), ("r2", "r3"), ("r3", "r5"), ("r4", "r5"), ("r5", "r0")]
    labelled = [e._replace(label=label) for e, label in zip(examples, (1.0, 0.0, 0.0, 1.0, 0.0, 0.5), strict=True)]
    others = [e.responses for e in pipeline.with_mismatched(labelled)]
    assert others == [("r0", "r3"), ("r1", "r2"), ("r2", "r4"), ("r3", "r0"), ("r4", "r1"), ("r5", "r0")]
    with pytest.raises(UserError, match="at least two prompts"):
        pipeline.with_mismatched(examples[:2])


def test_labels_and_prompts_are_kept(tiny_data: Path, tmp_path: Path) -> None:
    tok = tokenizer.byte_level()
    template = chat.pick_template(tok, "auto")
    stage = configs.stage("kto", data={"path": str(tiny_data / "preferences.jsonl")}, max_length=96)
    data = pipeline.build(stage, "unpaired", tok, template, tmp_path, seed=0)
    assert data.labels.tolist() == [1.0, 0.0] * 11 and not data.prompts
    assert pipeline.take(data, 3, 5).labels.tolist() == [0.0, 1.0]
    first, second = (pipeline.example(data, i) for i in (1, 3))
    assert (first.tokens[first.branches == 2] == second.tokens[second.branches == 1]).all()
    stage = configs.stage("ppo", data={"path": str(tiny_data / "preferences.jsonl")}, max_length=240)
    prompts = pipeline.build(stage, "prompt", tok, template, tmp_path, seed=0)
    assert prompts.prompts[1] == [{"role": "user", "content": "And tea?"}] and not prompts.loss_mask.any()
    assert len(prompts) == 11
