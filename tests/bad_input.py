"""What reads malformed input in test_bad_input.py, each from a folder of files, and the sound files that it changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tiny
from fake_chat_server import Answer, serve

from vdjax import chat_api
from vdjax import config as configs
from vdjax.data import chat, pipeline, sources, tokenizer
from vdjax.data.examples import Counts
from vdjax.judges import human, prompts
from vdjax.models import hf
from vdjax.models.config import from_hf
from vdjax.probes import sets
from vdjax.setup import setup
from vdjax.train import rewards

BYTES = tokenizer.byte_level()
CHATML = chat.pick_template(BYTES)
SHAPE = tiny.SHAPES["llama"]
CONFIG = """
from vdjax import config as base
def get_config():
    c = base.experiment()
    c.model.name = 'llama3.2-1b'
    c.stages = ('sft', 'dpo')
    c.sft = base.stage('sft', data={'path': 'a.jsonl'})
    c.dpo = base.stage('dpo', data={'path': 'b.jsonl'})
    c.judges.api = base.judge('api', extra={'temperature': None})
    return c
"""
PROBE = {"id": "a", "input": "Is tea good?", "topic": "tea"}
PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
HH = "\n\nHuman: Why?\n\nAssistant: "
PROMPT = "{{ proposition }} {{ response }} ->"
LABELS = '[{text = "yes", label = "support", graded = 1}, {text = "no", label = "oppose", graded = -1}]'
DEEP = "[" * 100_000
KEY = "k" * 100_000


def rows(kind: str = "sft", name: str = "rows.jsonl", **spec: Any) -> Callable[[Path], Any]:
    """A data set of a stage, up to its last example."""
    return lambda folder: list(sources.load({"path": str(folder / name), "kind": kind, **spec}, counts=Counts()))


def rendered(kind: str, **fields: Any) -> Callable[[Path], Any]:
    """A data set as tokens."""

    def read(folder: Path) -> Any:
        objective = {"sft": "sft", "preference": "dpo"}[kind]
        stage = configs.stage(objective, data={"path": str(folder / "rows.jsonl")}, **fields)
        return pipeline.build(stage, kind, BYTES, CHATML, folder / "cache", seed=0)

    return read


def again(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A data set read from the folder that keeps it, once that is damaged."""

    def read(folder: Path) -> Any:
        rendered("sft")(folder)
        (kept,) = (folder / "cache").iterdir()
        damage(kept)
        return rendered("sft")(folder)

    return read


def experiment(*flags: str) -> Callable[[Path], Any]:
    return lambda folder: configs.load(str(folder / "mine.py"), flags)


def model(folder: Path) -> Any:
    return from_hf(hf.read_config(folder), where=str(folder / "config.json"))


def shape(**changes: Any) -> dict[str, Any]:
    kept = {name: value for name, value in (SHAPE | changes).items() if value is not ...}
    return {"config.json": json.dumps(kept)}


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], Any]:
    """A checkpoint whose tensors are changed; one of bytes is the whole file."""

    def read(folder: Path) -> Any:
        cfg = from_hf(SHAPE, where="SHAPE")
        full = {"model.embed_tokens.weight": (260, 32), "lm_head.weight": (260, 32), "model.norm.weight": (32,)}
        wide = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
        wide |= {"self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32)}
        wide |= {"mlp.down_proj": (32, 48), "input_layernorm": (32,), "post_attention_layernorm": (32,)}
        full |= {f"model.layers.{i}.{name}.weight": size for i in range(2) for name, size in wide.items()}
        found = {name: np.zeros(size, np.float32) for name, size in full.items()}
        hf.open_reader(saved(folder / "whole", found), cfg)
        return hf.open_reader(saved(folder / "changed", change(found)), cfg)

    return read


def saved(folder: Path, content: Any) -> Path:
    folder.mkdir()
    file = folder / hf.SINGLE_FILE
    file.write_bytes(content if isinstance(content, bytes) else safetensors.numpy.save(content))
    return folder


def header(text: str, length: int = 0) -> bytes:
    return (length or len(text)).to_bytes(8, "little") + text.encode()


def fitted(folder: Path) -> Any:
    """A model with a tokenizer of more tokens."""
    c = configs.experiment()
    c.model.path, c.tokenizer.path = str(folder), "bytes"
    return setup(c)


def template(folder: Path) -> Any:
    return chat.pick_template(BYTES, str(folder / "mine.jinja"))


def saved_tokenizer(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        BYTES.save_pretrained(folder)
        change(folder)
        return chat.pick_template(tokenizer.load(folder))

    return read


def labels(folder: Path) -> Any:
    return human.read_labels(folder / "labels.csv")


def probes(name: str = "probes.jsonl", **options: Any) -> Callable[[Path], Any]:
    return lambda folder: sets.load(folder / name, **options)


def judge_template(**parts: str) -> dict[str, str]:
    given = {"chat": "true", "letters": "false", "prompt": repr(PROMPT), "labels": LABELS} | parts
    return {"mine.toml": "\n".join(f"{key} = {value}" for key, value in given.items())}


def read_judge(folder: Path) -> Any:
    return prompts.read_template(str(folder / "mine.toml"))


def reward(folder: Path) -> Any:
    said = rewards.Responses(["Why?"], ["So."], None, None, None)
    return rewards.from_function(f"{folder / 'mine.py'}:score")(said)


def answered(content: Any) -> Callable[[Path], Any]:
    """A chat endpoint that answers with this."""

    def read(folder: Path) -> Any:
        with serve(lambda body, number: Answer(content)) as server:
            endpoint = chat_api.Endpoint(server.url, "m", "", 1, 0, 0, 5.0, 9, 9.0, 1.0, 1.0)
            return chat_api.ask(endpoint, [chat_api.Request((("user", "x"),), 0.0, 1)], folder / "replies")

    return read


def completion(**parts: Any) -> dict[str, Any]:
    choice = {"message": {"content": parts.get("content", "A")}, "finish_reason": "stop"}
    return {"choices": [choice | parts.get("choice", {})], "usage": parts.get("usage")}


def jsonl(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def talk(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def data(*values: Any) -> dict[str, str]:
    return {"rows.jsonl": jsonl(*values)}


def parquet(folder: Path) -> Any:
    (folder / "rows.parquet").write_bytes(b"PAR1" + bytes(200) + b"PAR1")
    return rows(name="rows.parquet")(folder)


def mine(old: str, new: str) -> dict[str, str]:
    assert old in CONFIG
    return {"mine.py": CONFIG.replace(old, new)}
