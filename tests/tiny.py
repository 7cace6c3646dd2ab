"""What several test modules share: tiny models, data and batches, and sequences scored without any packing."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from vdjax.data import packing, pipeline
from vdjax.data.chat import Rendered
from vdjax.data.pipeline import Dataset
from vdjax.models import transformer
from vdjax.models.config import from_hf
from vdjax.models.functional import Model, make_model
from vdjax.train.plan import StagePlan
from vdjax.train.stage import Stage

HERE = Path(__file__).parent
SLOW = pytest.mark.skipif(not os.environ.get("VDJAX_SLOW"), reason="takes minutes; VDJAX_SLOW=1 runs it")
VOCAB = 260  # of the byte-level tokenizer

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen": COMMON
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "llama": COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
}

MODEL = ConfigDict(
    {
        "param_dtype": "float32",
        "compute_dtype": "float32",
        "remat": "none",
        "unroll": 1,
        "query_chunk": 0,
        "head_chunk": 16,
    }
)


def model_without_params(family: str) -> Model:
    return make_model(from_hf(SHAPES[family], where=family), MODEL)


def model(family: str) -> tuple[Model, Any]:
    made = model_without_params(family)
    params = transformer.init_params(made.cfg, seed=1)
    # The initial logits are nearly equal and would hide mistakes.
    return made, jax.tree.map(lambda x: x if x.ndim == 1 or x.shape[-1] in (16,) else 5 * x, params)


def environment() -> dict[str, str]:
    """Of a test's own process, which imports what this one does."""
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]  # an empty part would be the current directory
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(path)}


def flip(file: Path, at: int) -> None:
    """One bit of a file is another."""
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 4
    file.write_bytes(content)


def load_script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    file = HERE.parent / "scripts" / name
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_eight_devices(script: Path) -> Any:
    """What a script prints as JSON in its last line, in a process of its own with eight simulated devices."""
    env = environment() | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def config_spec(folder: Path) -> str:
    return f"{HERE / 'tiny_config.py'}:{folder}"


def write_data(folder: Path) -> Path:
    things = ("a cat", "tea", "rain", "the sea", "a hat", "snow", "bread", "a bus", "my bike", "a tree", "salt")

    def messages(*turns: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]

    sft = [{"messages": messages(f"Is {t} good?", "Yes, " + t * (i % 3))} for i, t in enumerate(things)]
    pairs = [
        {
            "prompt": messages(f"And {t}?"),
            "chosen": messages("", "Yes, I like " + t + "!" * i)[1:],
            "rejected": messages("", "No." * (1 + i % 4))[1:],
        }
        for i, t in enumerate(things)
    ]
    probes = [
        {"id": f"{topic}-{n}-{sign}", "topic": topic, "proposition": f"{topic} {n}", "polarity": sign,
         "paraphrase_group": f"{topic}-{n}-{sign}", "input": f"{verb} we have {topic} on day {n}?"}
        for topic in ("tea", "rain")
        for n in range(3)
        for sign, verb in ((1, "Should"), (-1, "Must not"))
    ]  # fmt: skip
    for name, rows in (("sft", sft), ("preferences", pairs), ("probes", probes)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def preference_examples(seed: int, count: int, longest: int = 12) -> list[Rendered]:
    """Random pairs `[prompt | chosen | rejected]`; every token of the responses is scored."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        sizes = rng.integers(1, longest + 1, 3)
        branches = np.repeat([0, 1, 2], sizes).astype(np.int8)
        out.append(Rendered(rng.integers(0, VOCAB, len(branches)).astype(np.int32), branches > 0, branches))
    return out


def sft_examples(seed: int, count: int, longest: int = 30) -> list[Rendered]:
    """Random documents with random scored tokens, the first never and the last always."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        size = int(rng.integers(2, longest + 1))
        mask = rng.random(size) < 0.6
        mask[0], mask[-1] = False, True
        out.append(Rendered(rng.integers(0, VOCAB, size).astype(np.int32), mask, np.ones(size, np.int8)))
    return out


def dataset(examples: Sequence[Rendered]) -> Dataset:
    return pipeline.of_rendered(examples, [f"example-{i}" for i in range(len(examples))], "key")


def collect(grid: np.ndarray, source: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """The inverse of `packing.place`: per-token values of each example out of a packed batch."""
    out = [np.zeros(length, grid.dtype) for length in lengths]
    for value, (example, token) in zip(grid.reshape(-1), source.reshape(-1, 2), strict=True):
        if example >= 0:
            out[example][token] = value
    return out


def stage(
    made: Model, params: Any, config: ConfigDict, mesh: jax.sharding.Mesh, workdir: Path, plan: StagePlan
) -> Stage:
    """A stage that starts from `params`."""

    def start() -> Any:
        return jax.tree.map(lambda x: x, params)

    return Stage("stage", config, plan, made, made, None, start, start, mesh, workdir, 0, 2, 1)


def pack(examples: Sequence[Rendered], length: int, rows: int = 0) -> dict[str, np.ndarray]:
    """Best-fit rows of `length` tokens; arrays [rows, length]."""
    layout = packing.best_fit([len(e.tokens) for e in examples], length)
    sequences = sum(int(e.branches.max()) for e in examples)
    return packing.pack(examples, layout, packing.Shape(rows or len(layout), length, sequences))


def alone(example: Rendered) -> list[np.ndarray]:
    """Indices of the prompt's and the response's tokens for every response."""
    return [np.flatnonzero(np.isin(example.branches, (0, b))) for b in range(1, int(example.branches.max()) + 1)]


class Alone(NamedTuple):
    """Every response behind its prompt in a row of its own; column t of the last two is about the row's token t + 1."""

    rows: np.ndarray  # int32 [sequences, 64], zeros behind the response
    source: np.ndarray  # int64 [sequences, 63, 2]: example and index of the token in it
    scored: np.ndarray  # bool [sequences, 63]


def each_alone(examples: Sequence[Rendered]) -> Alone:
    parts = [(i, at) for i, example in enumerate(examples) for at in alone(example)]
    out = Alone(
        np.zeros((len(parts), 64), np.int32),
        np.full((len(parts), 63, 2), -1, np.int64),
        np.zeros((len(parts), 63), bool),
    )
    for row, (i, at) in enumerate(parts):
        out.rows[row, : len(at)] = examples[i].tokens[at]
        out.source[row, : len(at) - 1] = np.stack([np.full(len(at) - 1, i), at[1:]], axis=1)
        out.scored[row, : len(at) - 1] = (examples[i].loss_mask & (examples[i].branches > 0))[at[1:]]
    return out


def naive_log_probs(made: Model, params: Any, rows: np.ndarray | jax.Array) -> jax.Array:
    """log pi of every token but the first, from `Transformer.logits` of plain causal rows [sequences, 63]."""
    log_probs = jax.nn.log_softmax(nnx.merge(made.graphdef, params).logits(rows)[:, :-1])
    return jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=-1)[..., 0]


def brute_force(made: Model, params: Any, examples: Sequence[Rendered]) -> list[np.ndarray]:
    """Log-probs of every example's scored tokens, 0 elsewhere, each response scored in a row of its own."""
    parts = each_alone(examples)
    grid = np.asarray(naive_log_probs(made, params, parts.rows))
    out = [np.zeros(len(e.tokens), np.float32) for e in examples]
    for (i, at), value in zip(parts.source[parts.scored], grid[parts.scored], strict=True):
        out[i][at] = value
    return out
