"""What sampled responses are worth: by a reward model, or by a Python function that the config names."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from vdjax import hosts, sharding
from vdjax.data import chat, packing, pipeline
from vdjax.data.examples import Counts
from vdjax.data.pipeline import Dataset
from vdjax.errors import UserError, nearest
from vdjax.models.functional import Model
from vdjax.models.products import jit
from vdjax.progress import say
from vdjax.train.losses import LossSpec
from vdjax.train.stage import device_batch
from vdjax.train.step import make_score_step


class Responses(NamedTuple):
    """Sampled responses, `len(texts) / len(prompts)` to each prompt, those of a prompt side by side."""

    prompts: Sequence[Any]  # text, or messages
    texts: Sequence[str]  # without stop and special tokens
    data: Dataset  # a prompt with its responses is one example
    ends: np.ndarray  # int64 [responses]: the place of each response's last token in `data.tokens`
    batches: grain.MapDataset  # all of `data`, packed into one shape


UNREADABLE = "..."

Reward = Callable[[Responses], np.ndarray]  # float64 [responses]


def from_function(name: str) -> Reward:
    """A reward function given as `module:function` or `FILE.py:function`.

    It is called with a list of prompts (text, or messages) and a list of responses (text), one prompt a response, and
    gives one number for each.

    Raises:
      UserError: there is no such function; when called, its result is not one finite number a response.
    """
    where, _, function_name = name.rpartition(":")
    if not where or not (where.endswith(".py") or all(part.isidentifier() for part in where.split("."))):
        raise UserError(f"reward.function={name!r}; expected module:function or FILE.py:function")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (ImportError, FileNotFoundError, SyntaxError) as error:
        raise UserError(f"reward.function={name!r}: {where} cannot be imported: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value)]
        hint = nearest(function_name, names)
        raise UserError(f"reward.function={name!r}: {where} has no function {function_name}{hint}")

    def scores_of(responses: Responses) -> list[float]:
        each = len(responses.texts) // len(responses.prompts)
        prompts = [prompt for prompt in responses.prompts for _ in range(each)]
        scores = list(function(prompts, list(responses.texts)))
        if len(scores) != len(prompts):
            raise UserError(f"reward.function={name!r} gave {len(scores)} rewards for {len(prompts)} responses")
        for text, score in zip(responses.texts, scores, strict=True):
            if not isinstance(score, int | float | np.number) or not math.isfinite(score):
                raise UserError(f"reward.function={name!r} gave {score!r} for {text[:80]!r}; expected a finite number")
        return [float(score) for score in scores]

    # A function may draw random numbers, and all processes must go on with the same rewards.
    return lambda responses: np.array(hosts.by_first(f"rewards by {name}", lambda: scores_of(responses)), np.float64)


def _load_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"vdjax_reward_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_model(model: Model, params: Any, mesh: jax.sharding.Mesh) -> Reward:
    """Scores by a reward model that reads the policy's own tokens: at the last token of each response."""
    score = scorer(model, mesh)

    def reward(responses: Responses) -> np.ndarray:
        scores = pipeline.score(responses.data, responses.batches, lambda batch: score(params, batch))
        return scores[responses.ends].astype(np.float64)

    return reward


def from_text(
    model: Model, params: Any, mesh: jax.sharding.Mesh, tokenizer: Any, template: chat.Template, max_length: int
) -> Reward:
    """Scores by a reward model with a tokenizer and template of its own, which reads the texts.

    A response is read as a whole turn, through the end that the template gives it, also where it was cut off. One that
    cannot be read (blank, or with the text of a special token) is scored as "...", and the number of these is said.
    """
    score, rows = scorer(model, mesh), 4 * sharding.batch_shards(mesh)
    shape = packing.Shape(rows, packing.row_lengths(max_length)[0], max_length)

    def reward(responses: Responses) -> np.ndarray:
        each, counts = len(responses.texts) // len(responses.prompts), Counts()

        def render(i: int, text: str) -> chat.Rendered | None:
            prompt, where = responses.prompts[i // each], f"response {i}"
            return chat.render_responses(
                prompt, [text], tokenizer, template, max_length=max_length, counts=counts, where=where
            )

        rendered = []
        for i, text in enumerate(responses.texts):
            out = render(i, text) or render(i, UNREADABLE)
            if out is None:
                raise UserError("\n".join([f"reward model: response {i}: its prompt cannot be read", *counts.lines()]))
            rendered.append(out)
        if counts.dropped:
            say(f"reward model: {counts.dropped.total()} responses read as {UNREADABLE!r}: {dict(counts.dropped)}")
        data = pipeline.of_rendered(rendered)
        steps = pipeline.in_order(len(data), rows)
        batches = pipeline.batches(data, steps, shape, rows)
        return pipeline.score(data, batches, lambda b: score(params, b))[data.offsets[1:] - 1].astype(float)

    return reward


def scorer(model: Model, mesh: jax.sharding.Mesh) -> Callable[[Any, dict[str, np.ndarray]], np.ndarray]:
    """A function from the parameters of a model with a score head and a batch to the scores of all its tokens."""
    spec = LossSpec(model.graphdef, "", {}, 0, model.head_chunk)
    step = jit(make_score_step(spec, "scores"))
    return lambda params, batch: sharding.fetch(step(params, device_batch(batch, mesh)))
