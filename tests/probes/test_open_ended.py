"""Responses of many snapshots at once, against sampling from one at a time; and which of them are degenerate."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from vdjax import sharding
from vdjax.data import chat, tokenizer
from vdjax.errors import UserError
from vdjax.models import lora
from vdjax.models.functional import Model, make_model
from vdjax.probes import evaluator, open_ended, sets
from vdjax.probes.open_ended import degenerate
from vdjax.probes.readouts import Variant
from vdjax.probes.sets import Probe
from vdjax.sampling import Samples, Sampling
from vdjax.sampling import generate as generate_one
from vdjax.sampling.decode import cache_slots
from vdjax.sampling.text import response_text

MESH = sharding.make_mesh(devices=jax.devices()[:1])
TOK = tokenizer.byte_level()
STOPS = tuple(range(0, tiny.VOCAB, 23))
TEMPLATE = replace(chat.pick_template(TOK, "plain"), stop_ids=STOPS)
VARIANTS = [Variant("", "{question}"), Variant("Hm.", "So: {question}")]
TEXTS = {"tea": "Is {tea} good for all of us, or not?", "ice": "And must ice be put in each drink?"}
PROBES = [Probe(name, "drinks", f"Have {name}.", 1, name, text) for name, text in TEXTS.items()]
ASKED = open_ended.prompts(PROBES, VARIANTS, TOK, TEMPLATE, 200)
HOW = Sampling(9, 0.7)
TOKENS = [prompt.tokens for prompt in ASKED for _ in range(2)]
SEEDS = [(5, 0, p, 0, s) for p in range(len(ASKED)) for s in range(2)]


def reader(params: Any) -> Callable[..., np.ndarray]:
    def read(path: tuple[str, ...], index: tuple[slice, ...]) -> np.ndarray:
        leaf = params
        for name in path:
            leaf = leaf[name]
        return np.asarray(leaf)[index]

    return read


def changed(params: Any, count: int, scale: float) -> list[Any]:
    rng = np.random.default_rng(1)
    return [
        jax.tree.map(lambda x: np.asarray(x) * (1 + scale * rng.normal(size=x.shape).astype(np.float32)), params)
        for _ in range(count)
    ]


def test_probes_are_asked_with_the_options_of_the_template() -> None:
    text = TEMPLATE.text + "{% if enable_thinking is false %} At once:{% endif %}"
    told = replace(TEMPLATE, text=text, options={"enable_thinking": False})
    for one, other in zip(ASKED, open_ended.prompts(PROBES, VARIANTS, TOK, told, 200), strict=True):
        assert chat.decode(other.tokens, TOK) == chat.decode(one.tokens, TOK) + " At once:"


@pytest.fixture(scope="module")
def snapshots(llama: tuple[Model, Any]) -> list[Any]:
    return changed(llama[1], 3, 0.3)


@pytest.fixture(scope="module")
def adapted(llama: tuple[Model, Any]) -> tuple[Model, list[Any]]:
    made = make_model(llama[0].cfg, tiny.MODEL, lora=lora.Lora(4, 8.0, ("q_proj", "v_proj", "down_proj")))
    rng = np.random.default_rng(2)
    shapes = lora.adapters_of(made.params)
    drawn = [jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes) for _ in range(3)]
    return made, drawn


def alone(made: Model, trees: list[Any]) -> list[Samples]:
    with jax.set_mesh(MESH):
        return [generate_one(made, tree, TOKENS, SEEDS, HOW, STOPS, MESH) for tree in trees]


def together(made: Model, trees: list[Any], **options: Any) -> Samples:
    return open_ended.generate(made, [reader(tree) for tree in trees], TOKENS, SEEDS, HOW, STOPS, MESH, **options)


def check_equal(found: Samples, wanted: list[Samples]) -> None:
    for name, x in zip(Samples._fields, found, strict=True):
        y = np.stack([getattr(samples, name) for samples in wanted])
        np.testing.assert_allclose(x, y, atol=1e-4 if name == "log_probs" else 0)
    distinct = {tuple(row) for samples in wanted for row in samples.tokens.tolist()}
    assert len(distinct) > 2 * len(TOKENS) and len(set(np.ravel([samples.lengths for samples in wanted]))) > 2


def test_a_cpu_takes_one_snapshot_at_a_time(llama: tuple[Model, Any], adapted: tuple[Model, list[Any]]) -> None:
    made = llama[0]
    assert evaluator.most_on_cpu(made, MESH, 0) == 1
    assert evaluator.most_on_cpu(made, MESH, 1e9) is evaluator.most_on_cpu(adapted[0], MESH, 0) is None
    assert evaluator.groups(9, made, 1e12, 2, 4) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(("fits", "rows", "calls"), [(5.8, 0, [1, 1]), (3.9, 4, [2, 2, 2])])
def test_each_snapshot_samples_what_it_would_alone(
    llama: tuple[Model, Any], snapshots: list[Any], compiles: Any, fits: float, rows: int, calls: list[int]
) -> None:
    """With its copy, a snapshot takes twice its size: groups of two, the last one padded, or each by itself."""
    found: list[int] = []

    def progress(batches: Any, total: int) -> Any:
        found.append(total)
        return batches

    memory = fits * evaluator.size_in_bytes(snapshots[0])
    with compiles() as names:
        out = together(llama[0], snapshots, memory_bytes=memory, rows=rows, progress=progress)
    assert names.count("jit(run)") == 1 and found == calls
    check_equal(out, alone(llama[0], snapshots))


def test_adapters_sample_what_each_merged_would_alone(
    llama: tuple[Model, Any], adapted: tuple[Model, list[Any]], compiles: Any
) -> None:
    made, adapters = adapted
    memory = 2 * (evaluator.size_in_bytes(llama[1]) + 2 * evaluator.size_in_bytes(adapters[0]))  # for two at once
    with compiles() as names:
        found = together(made, adapters, base=llama[1], memory_bytes=memory, rows=2)
    assert names.count("jit(run)") == 1
    check_equal(found, alone(llama[0], [lora.merge(lora.join(llama[1], own), made.lora) for own in adapters]))


def test_caches_stay_within_the_memory(llama: tuple[Model, Any], snapshots: list[Any]) -> None:
    row = open_ended.cache_bytes(llama[0], cache_slots(64, HOW.max_new_tokens))
    assert row == 2 * 2 * 2 * 8 * 80 * 4  # keys and values, layers, heads, dim, slots, bytes
    found: list[list[int]] = []

    def stop(batches: Any, total: int) -> Any:
        found.append([rows for _, (rows, _) in batches])
        return []

    for size in (3, 1):
        parts = [list(range(size))] * 2
        for rows, wanted in ((8, [8]), (3, [3, 3, 3]), (1, [1] * 8)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(evaluator, "groups", lambda *_, parts=parts: parts)
                together(llama[0], snapshots, memory_bytes=2 * size * row * (rows + 0.5), progress=stop)
            assert found[-2:] == [wanted] * 2


def table(made: Model, trees: list[Any], steps: list[int], asked: Any = ASKED, **options: Any) -> pd.DataFrame:
    memory = 5.8 * evaluator.size_in_bytes(trees[0])  # for two at once: the program of the tests above
    defaults = {"stage": "sft", "seed": 7, "samples": 2, "memory_bytes": memory}
    return open_ended.sample(
        made, [reader(t) for t in trees], steps, asked, HOW, TOK, TEMPLATE, MESH, **(defaults | options)
    )


@pytest.fixture(scope="module")
def responses(llama: tuple[Model, Any], snapshots: list[Any]) -> pd.DataFrame:
    """Of a snapshot, its twin and another, the ends sampled twice."""
    return table(llama[0], [snapshots[0], snapshots[0], snapshots[1]], [0, 4, 9], replicates=2, replicated=(0, 9))


def test_the_table_holds_every_response_with_its_key(responses: pd.DataFrame) -> None:
    assert list(responses.columns) == [
        "stage", "step", "probe_id", "variant", "replicate", "sample", "seed", "question", "system_prompt", "response",
        "tokens", "finish_reason", "degenerate", "template_hash", "asked_hash",
    ]  # fmt: skip
    key = ["step", "replicate", "variant", "probe_id", "sample"]
    wanted = [
        (step, replicate, v, probe.id, s)
        for step, replicates in ((0, 2), (4, 1), (9, 2))
        for replicate in range(replicates)
        for v in range(2)
        for probe in PROBES
        for s in range(2)
    ]
    assert list(responses[key].itertuples(index=False, name=None)) == wanted
    for row in responses.itertuples():
        assert row.seed == f"7.{row.replicate}.{zlib.crc32(row.probe_id.encode())}.{row.variant}.{row.sample}"
        text = TEXTS[row.probe_id]
        assert row.question == (text if row.variant == 0 else f"So: {text}")
        assert row.system_prompt == ("", "Hm.")[row.variant]
        assert row.degenerate == degenerate(row.response, row.finish_reason)
        assert row.finish_reason == "stop" or row.tokens == HOW.max_new_tokens
    assert set(responses["stage"]) == {"sft"} and responses["asked_hash"].nunique() == 1


def test_responses_are_those_of_their_seeds(
    llama: tuple[Model, Any], snapshots: list[Any], responses: pd.DataFrame
) -> None:
    last = responses[(responses["step"] == 9) & (responses["replicate"] == 1)]
    by_key = {(prompt.probe_id, prompt.variant): prompt.tokens for prompt in ASKED}
    tokens = [by_key[row.probe_id, row.variant] for row in last.itertuples()]
    seeds = [tuple(map(int, row.seed.split("."))) for row in last.itertuples()]
    with jax.set_mesh(MESH):
        out = generate_one(llama[0], snapshots[1], tokens, seeds, HOW, STOPS, MESH)
    for row, ids, length in zip(last.itertuples(), out.tokens, out.lengths, strict=True):
        assert row.response == response_text(ids[:length], TOK, TEMPLATE) and row.tokens == length


def test_random_numbers_are_common_to_snapshots_and_to_nothing_else(responses: pd.DataFrame) -> None:
    first = responses[responses["replicate"] == 0]
    text = {step: rows["response"].tolist() for step, rows in first.groupby("step")}
    assert text[0] == text[4] != text[9]
    assert len(set(text[0])) == len(text[0])  # samples of a prompt differ
    again = {n: rows["response"].tolist() for n, rows in responses[responses["step"] == 0].groupby("replicate")}
    assert not set(again[0]) & set(again[1])


def test_what_is_sampled_does_not_depend_on_what_else_is(
    llama: tuple[Model, Any], snapshots: list[Any], responses: pd.DataFrame
) -> None:
    fewer = table(llama[0], [snapshots[1]], [9], ASKED[2:], rows=4)
    same = responses[(responses["step"] == 9) & (responses["replicate"] == 0) & (responses["variant"] == 1)]
    assert fewer["response"].tolist() == same["response"].tolist()
    assert fewer["asked_hash"].iloc[0] != same["asked_hash"].iloc[0]


def test_hash_knows_everything_that_is_asked() -> None:
    def of(asked: Any = ASKED, how: Sampling = HOW, **options: int) -> str:
        return open_ended.asked_hash(asked, TEMPLATE, how, **({"samples": 2, "replicates": 1, "seed": 7} | options))

    others = [of(ASKED[:1]), of(how=HOW._replace(temperature=0.8)), of(samples=3), of(replicates=2), of(seed=8),
              of([ASKED[0]._replace(system_prompt="Hm."), *ASKED[1:]])]  # fmt: skip
    assert len({of(), *others}) == 7 and of() == of()


def test_what_cannot_be_asked_is_refused(llama: tuple[Model, Any], snapshots: list[Any]) -> None:
    with pytest.raises(UserError, match=r"probe tea: cannot be asked within probes.max_length=5 tokens: it has"):
        open_ended.prompts(PROBES, VARIANTS[:1], TOK, TEMPLATE, 5)
    forged = [Variant("", "<|im_end|>{question}")]
    with pytest.raises(UserError, match="probe tea: .*special_token_in_text"):
        open_ended.prompts(PROBES, forged, TOK, TEMPLATE, 100)
    for name in ("samples", "replicates"):
        with pytest.raises(UserError, match=f"probes.{name} is 0"):
            table(llama[0], snapshots[:1], [0], **{name: 0})
    with pytest.raises(UserError, match=r"probes.memory_gb: .* hold no snapshot"):
        together(llama[0], snapshots, memory_bytes=1.99 * evaluator.size_in_bytes(snapshots[0]))


def test_eight_devices_give_the_tokens_of_one() -> None:
    for found in tiny.on_eight_devices(Path(__file__).parent / "eight_devices_open_ended.py"):
        assert found["together"] == found["alone"]
        assert len({tuple(row) for rows in found["alone"] for row in rows}) > 12


SENTENCES = sorted({probe.input for probe in sets.load("builtin")})
LONG = "I think that people should be free to decide this for themselves, and the law should respect it. "


@pytest.mark.parametrize("text", ["", " \n\t", "...", "?!", "\u200b\x00", "- *", "。"])
def test_empty(text: str) -> None:
    assert degenerate(text, "stop") == degenerate(text, "length") == "empty"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("No. " * 14, ""),  # 55 characters: short, and its stance is plain
        ("No. " * 16, "repetition"),
        (LONG, ""),
        (LONG * 2, ""),
        (LONG * 3, "repetition"),
        (LONG * 2 + "And so on, as I said before; others may well think otherwise.", ""),
        ("".join(f"{i}. I agree with it.\n" for i in range(1, 30)), "repetition"),
        ("ha" * 40, "repetition"),
        ("我支持这个观点。" * 12, "repetition"),
        ("我支持这个观点,因为每个人都应该有权利决定自己的生活方式,而政府不应该干涉个人的选择,这是自由社会的基本原则,"
         "也是我们应该共同维护的价值观念。", ""),
        ("The the THE the  the\nthe " * 4, "repetition"),
    ],
)  # fmt: skip
def test_repetition(text: str, wanted: str) -> None:
    assert degenerate(text, "stop") == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Many people believe that", "cut_off"),
        ("\n\nMany people believe that 3.5 percent", "cut_off"),
        ("1. Many people believe", "cut_off"),
        ("- Many people", "cut_off"),
        ("Yes. Many people believe", ""),
        ('He said "Yes." and', ""),
        ("**No!** Many", ""),
        ("Is it?", ""),
        ("Reasons for it\n- Many people", ""),
        ("はい。多くの", ""),
        ("हाँ। बहुत", ""),
        ("是的！很多", ""),
    ],
)
def test_cut_off(text: str, wanted: str) -> None:
    assert degenerate(text, "length") == wanted and degenerate(text, "stop") == ""


@given(st.text(max_size=400), st.integers(1, 30), st.sampled_from(["stop", "length"]))
def test_every_text_is_of_one_kind(text: str, times: int, reason: str) -> None:
    assert degenerate(text * times, reason) in ("", "empty", "repetition", "cut_off")


@given(st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=12, unique=True))
def test_ordinary_sentences_are_not_degenerate(sentences: list[str]) -> None:
    assert degenerate(" ".join(sentences), "length") == ""


@given(st.sampled_from(SENTENCES), st.integers(3, 12))
def test_a_sentence_said_over_and_over_is_repetition(sentence: str, times: int) -> None:
    assert degenerate(f"{sentence} " * max(times, 1 + 80 // len(sentence)), "stop") == "repetition"
