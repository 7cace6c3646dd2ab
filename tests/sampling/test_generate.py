"""Sampling with a cache, against the model without one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from vdjax import sharding
from vdjax.errors import UserError
from vdjax.models import hf, lora
from vdjax.models.functional import Model, make_model
from vdjax.models.log_probs import token_log_probs
from vdjax.sampling import Samples, Sampling, generate
from vdjax.sampling.decode import cache_slots, decode
from vdjax.sampling.generate import bucket, knobs, layout

MESH = sharding.make_mesh(devices=jax.devices()[:1])
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, tiny.VOCAB, n).tolist() for n in (5, 1, 40, 17, 3)]
SEEDS = [11, 12, 13, 14, 15]
NEW = 12


def sample(
    made: tuple[Model, Any],
    which: Sequence[int] = range(5),
    sampling: Sampling = Sampling(NEW),  # noqa: B008 - a tuple
    stop_ids: tuple[int, ...] = (),
    **options: Any,
) -> Samples:
    with jax.set_mesh(MESH):
        prompts, seeds = [PROMPTS[i] for i in which], [SEEDS[i] for i in which]
        return generate(*made, prompts, seeds, sampling, stop_ids, MESH, **options)


def equal(a: Samples, b: Samples, which: Sequence[int] = range(5)) -> None:
    for name, x, y in zip(Samples._fields, a, b, strict=True):
        compare = np.testing.assert_allclose if name == "log_probs" else np.testing.assert_array_equal
        compare(x, y[list(which)], **({"atol": 1e-4} if name == "log_probs" else {}))


@pytest.fixture(scope="module", params=["qwen", "llama"])
def made(request: pytest.FixtureRequest) -> tuple[Model, Any]:
    return request.getfixturevalue(request.param)


def test_greedy_is_the_argmax_of_the_whole_sequence_each_time(made: tuple[Model, Any]) -> None:
    model = nnx.merge(made[0].graphdef, made[1])
    rows = np.zeros((5, 52), np.int32)
    ends = np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in zip(rows, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    for i in range(NEW):  # what stands behind a token does not change its logits
        rows[np.arange(5), ends + i] = np.asarray(model.logits(rows))[np.arange(5), ends + i - 1].argmax(axis=1)
    got = sample(made, sampling=Sampling(NEW, temperature=0))
    np.testing.assert_array_equal(got.tokens, [row[end : end + NEW] for row, end in zip(rows, ends, strict=True)])
    assert len(np.unique(got.tokens)) > 10 and not got.stopped.any() and (got.lengths == NEW).all()


def test_log_probs_are_those_of_scoring(made: tuple[Model, Any]) -> None:
    stops = tuple(range(0, tiny.VOCAB, 9))
    got = sample(made, sampling=Sampling(NEW, temperature=1.5, top_k=50, top_p=0.9), stop_ids=stops)
    rows = np.zeros((5, 64), np.int32)
    mask = np.zeros((5, 64), bool)
    for i, prompt in enumerate(PROMPTS):
        end = len(prompt) + got.lengths[i]
        rows[i, :end] = [*prompt, *got.tokens[i, : got.lengths[i]]]
        mask[i, len(prompt) : end] = True
    ids = (np.arange(64) < mask.sum(axis=1, keepdims=True) + np.array([[len(p)] for p in PROMPTS])).astype(np.int32)
    batch = {"tokens": rows, "positions": np.tile(np.arange(64), (5, 1)), "segment_ids": ids, "sequence_ids": ids}
    model = nnx.merge(made[0].graphdef, made[1])
    batch = {name: jnp.asarray(x) for name, x in batch.items()} | {"loss_mask": jnp.asarray(mask)}
    want = np.asarray(token_log_probs(model, batch, chunk=16))
    assert len(set(got.lengths.tolist())) > 1
    np.testing.assert_allclose(got.log_probs[np.arange(NEW) < got.lengths[:, None]], want[mask], rtol=0, atol=1e-4)


def test_a_row_is_the_same_in_any_batch_bucket_and_order(qwen: tuple[Model, Any]) -> None:
    whole = sample(qwen)
    assert len({tuple(row) for row in whole.tokens.tolist()}) == 5
    for which, rows in (((4, 2, 0, 3, 1), 0), ((2, 4, 0), 1), ((0, 1, 4), 2), ((1,), 0)):
        equal(sample(qwen, which, rows=rows), whole, which)
    with jax.set_mesh(MESH):
        twice = generate(*qwen, [PROMPTS[0]] * 3, [(7, 1), (7, 2), (8, 1)], Sampling(NEW), (), MESH)
        alone = generate(*qwen, [PROMPTS[0]], [(8, 1)], Sampling(NEW), (), MESH)
    assert len({tuple(row) for row in twice.tokens.tolist()}) == 3
    equal(alone, twice, [2])


def test_rows_stop_at_their_own_stop_token(qwen: tuple[Model, Any]) -> None:
    free = sample(qwen)
    first, later = int(free.tokens[3, 0]), int(free.tokens[1, 4])
    got = sample(qwen, stop_ids=(first, later))
    for row, (tokens, want) in enumerate(zip(got.tokens.tolist(), free.tokens.tolist(), strict=True)):
        stops = [i for i, token in enumerate(want) if token in (first, later)]
        length = stops[0] + 1 if stops else NEW
        assert tokens == want[:length] + [0] * (NEW - length)
        assert (got.lengths[row], got.stopped[row]) == (length, bool(stops))
        assert not got.log_probs[row, length:].any() and got.log_probs[row, :length].all()
    assert got.lengths[3] == 1 and not got.stopped.all()
    # A stop token in the prompt does not count, and one that comes last does.
    for stop in (PROMPTS[2][7], PROMPTS[2][-1]):
        if stop not in free.tokens[2]:
            equal(sample(qwen, [2], stop_ids=(stop,)), free, [2])
    last = sample(qwen, [0], Sampling(1), stop_ids=(int(free.tokens[0, 0]),))
    assert last.tokens.tolist() == [[free.tokens[0, 0]]] and last.stopped.all() and (last.lengths == 1).all()
    assert not sample(qwen, [0], Sampling(1)).stopped.any()


def test_the_loop_ends_when_all_rows_have(qwen: tuple[Model, Any]) -> None:
    every = tuple(range(tiny.VOCAB))
    got = sample(qwen, stop_ids=every)
    assert (got.lengths == 1).all() and got.stopped.all() and not got.tokens[:, 1:].any()
    batch = layout([PROMPTS[0]], np.array([[1]]), (1, 16))
    made, params = qwen

    def steps(stop_ids: tuple[int, ...]) -> int:
        """Times that the loop's body ran: each call of the function below is one."""
        count: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            from vdjax.sampling import decode as module

            def counted(*arguments: Any) -> Any:
                jax.debug.callback(lambda: count.append(1))
                return forward(*arguments)

            forward = module.forward
            patch.setattr(module, "forward", counted)
            run = jax.jit(lambda p: decode(made.graphdef, p, batch, knobs(Sampling(9)), max_new_tokens=9,
                                           stop_ids=stop_ids, filtered=False))  # fmt: skip
            jax.block_until_ready(run(params))
            jax.effects_barrier()
        return len(count)

    assert (steps(()), steps(every)) == (8, 0)


def test_snapshots_under_vmap_each_give_their_own(llama: tuple[Model, Any]) -> None:
    made, params = llama
    trees = [jax.tree.map(lambda x, k=k: x * (1 + 0.1 * k), params) for k in range(3)]
    axes = hf.snapshot_axes(params)
    stacked = jax.tree.map(lambda axis, *leaves: jnp.stack(leaves, axis), axes, *trees)
    free = [sample((made, tree)) for tree in trees]
    stops = (int(free[0].tokens[0, 1]), int(free[1].tokens[1, 3]), *free[2].tokens[:, 0].tolist())
    batch = layout(PROMPTS, np.array(SEEDS)[:, None], (5, 48))

    def one(params: Any) -> Samples:
        how = {"max_new_tokens": NEW, "stop_ids": stops, "filtered": False}
        return decode(made.graphdef, params, batch, knobs(Sampling(NEW)), **how)

    many = jax.jit(jax.vmap(one, in_axes=(axes,), spmd_axis_name="snapshot"))
    with jax.set_mesh(MESH):
        got = many(stacked)
    for k, tree in enumerate(trees):
        equal(sample((made, tree), stop_ids=stops), Samples(*(np.asarray(x[k]) for x in got)))
    assert (got.lengths[2] == 1).all() and (got.lengths[0] > 1).any()
    assert len({np.asarray(x).tobytes() for x in got.tokens}) == 3
    # One condition for all: no part of the loop chooses between old and new caches.
    text = many.lower(stacked).as_text()
    assert f"tensor<3x5x2x8x{cache_slots(48, NEW)}xf32>" in text
    assert not [line for line in text.splitlines() if "select" in line and f"5x2x8x{cache_slots(48, NEW)}xf32>" in line]


def test_adapters_sample_as_the_merged_model(qwen: tuple[Model, Any]) -> None:
    base, params = qwen
    adapters = lora.Lora(4, 8.0, ("q_proj", "v_proj", "down_proj"))
    made = make_model(base.cfg, tiny.MODEL, lora=adapters)
    leaves = lora.adapters_of(made.params)["layers"]
    rng = np.random.default_rng(5)
    drawn = {"layers": {k: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32) for k, x in sorted(leaves.items())}}
    joined = lora.join(params, drawn)
    merged = sample((base, lora.merge(joined, adapters)))
    equal(sample((made, joined)), merged)
    assert (merged.tokens != sample(qwen).tokens).any()


def test_bfloat16_samples_with_float32_log_probs(qwen: tuple[Model, Any]) -> None:
    base, params = qwen
    config = tiny.MODEL.copy_and_resolve_references()
    config.compute_dtype = "bfloat16"
    made = make_model(base.cfg, config)
    exact, got = sample(qwen, sampling=Sampling(NEW, 0.0)), sample((made, params), sampling=Sampling(NEW, 0.0))
    assert got.log_probs.dtype == np.float32
    np.testing.assert_allclose(got.log_probs[:, 0], exact.log_probs[:, 0], atol=0.1)
    assert (got.log_probs != exact.log_probs).any()


def test_another_temperature_or_top_p_compiles_nothing(qwen: tuple[Model, Any], compiles: Any) -> None:
    sample(qwen)
    sample(qwen, sampling=Sampling(NEW, 0.5, 0.9))
    with compiles() as names:
        colder = sample(qwen, [3, 1, 4, 2, 0], Sampling(NEW, 0.3))
        sample(qwen, sampling=Sampling(NEW, 0.9, 0.2, 7))
    assert names == []
    assert (colder.tokens[::-1] != sample(qwen).tokens).any()


def test_widths_are_few_and_never_short() -> None:
    widths = [bucket(n) for n in range(1, 5000)]
    assert all(n <= w < max(n + 16, 1.25 * n + 1) for n, w in enumerate(widths, 1))
    assert len(set(widths)) < 32


def test_prompts_are_packed_equal_ones_once_and_found_again() -> None:
    prompts = [PROMPTS[2], PROMPTS[2], PROMPTS[0], PROMPTS[3], PROMPTS[2], PROMPTS[4], PROMPTS[1]]
    for groups, packed in ((1, 2), (2, 2)):
        batch = layout(prompts, np.arange(7)[:, None], (8, 48), groups)
        assert batch.tokens.shape == (groups, packed, 48) and batch.seeds[:, 0].tolist() == [*range(7), 0]
        assert batch.lengths.tolist() == [*map(len, prompts), 0]
        for row, prompt in enumerate(prompts):
            g, places = row // (8 // groups), batch.places.reshape(8, 48)[row, -len(prompt) :]
            tokens, positions, segments = (x[g].ravel()[places] for x in batch[:3])
            assert tokens.tolist() == prompt and positions.tolist() == list(range(len(prompt)))
            assert len(set(segments.tolist())) == 1 and segments[0] > 0
        assert (batch.segments > 0).sum() == (40 + 5 + 17 + 3 + 1 + (40 if groups == 2 else 0))


def test_wrong_arguments_are_refused(qwen: tuple[Model, Any]) -> None:
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0},
                  {"top_p": 1.5}, {"top_k": -1}):  # fmt: skip
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
            sample(qwen, sampling=Sampling(**({"max_new_tokens": 2} | wrong)))
    with jax.set_mesh(MESH):
        for prompts, seeds, text in (
            ([[1], []], [1, 2], "prompt 1 has no token"),
            ([[tiny.VOCAB]], [1], "prompt 0"),
            ([[1]], [1, 2], "1 prompts, but 2 seeds"),
            ([[1]], [-1], "seeds"),
        ):
            with pytest.raises(UserError, match=text):
                generate(*qwen, prompts, seeds, Sampling(2), (), MESH)
        assert generate(*qwen, [], [], Sampling(2), (), MESH).tokens.shape == (0, 2)


def test_eight_devices_give_the_tokens_of_one() -> None:
    found = tiny.on_eight_devices(Path(__file__).parent / "eight_devices_sample.py")
    one = found.pop("one")
    assert len(found) == 4 and len({tuple(row) for row in one["tokens"]}) == len(one["tokens"])
    assert len(set(one["lengths"])) > 1
    for many in found.values():
        assert many["tokens"] == one["tokens"] and many["lengths"] == one["lengths"]
        assert many["cache_part"] == many["wanted_part"]
        np.testing.assert_allclose(many["log_probs"], one["log_probs"], atol=1e-4)
