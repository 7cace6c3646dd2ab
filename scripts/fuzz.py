"""Feeds mutated files to what reads files of others, guided by coverage: python scripts/fuzz.py TARGET ... --seconds N

Each TARGET is one of TARGETS, or "all". Nothing but UserError may come out, with a message of one screen. Prints a line
for each target: executions, seconds of a core, edges of vdjax that were reached, crashes; for a crash also the
traceback and the file to repeat it with (python scripts/fuzz.py TARGET --repeat FILE). Exits with 1 after a crash.
--corpus DIR keeps what reached new edges, so that the next run goes on from there. Needs atheris: pip install
'vdjax[fuzz]'.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import httpx2
import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.numpy

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

coverage: Any = contextlib.nullcontext()
if __name__ == "__main__":
    import atheris

    coverage = atheris.instrument_imports(include=["vdjax", "tomllib"])
with coverage:
    from vdjax import chat_api, files, judge, runs, sample, snapshots
    from vdjax import config as configs
    from vdjax.data import chat, pipeline, sources, stances, tokenizer
    from vdjax.data.examples import Counts
    from vdjax.data.parsers import KINDS
    from vdjax.errors import CHARACTERS, LINES, UserError
    from vdjax.judges import api, human, prompts
    from vdjax.models import hf
    from vdjax.models.config import from_hf
    from vdjax.probes import sets
    from vdjax.values import synthetic

WORST: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 10**400, 0.5, float("nan"), float("inf"), "", " ", "\ud83d", "\x00", "a"),
    *([], {}, [[]], [{}], {"a": {}}, ["a", 1], "None", "<|im_end|>", "../a.safetensors", "x" * 300),
)


class Target(NamedTuple):
    seeds: tuple[bytes, ...]  # sound files
    read: Callable[[bytes, Path], Any]  # the bytes of a file, and a folder to write it into
    is_json: bool = False  # whole, or a value a line: values are mutated as well as bytes


# What is read


def text(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def in_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    def written(data: bytes, folder: Path) -> Any:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return written


BYTES = tokenizer.byte_level()
CHATML = chat.pick_template(BYTES)
SHAPE = {
    **{"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False},
}
SMALL = from_hf(SHAPE, where="SHAPE")
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 8192}
TALK: list[chat.Message] = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
ROWS = (
    text({"messages": TALK}, {"messages": TALK[1:]}),
    text({"conversation": TALK, "toxic": False, "redacted": False, "language": "English"}),
    text({"instruction": "a", "input": "b", "output": "c"}),
    text({"prompt": "a", "completion": "b", "label": True}),
    text({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5}),
    text({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}),
    text({"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "No."}]}),
    text({"prompt": "a", "support": "b", "oppose": "c"}, {"text": "a"}),
)
PROBE = {"id": "a", "input": "b", "topic": "c", "proposition": "d", "polarity": -1, "paraphrase_group": "e"}
CSV = b"proposition,question,response,label,graded,annotator\na,b,c,support,0.5,x\n"
ENDPOINT = chat_api.Endpoint("http://h/v1", "m", "", 1, 0, 0, 1.0, 9, 9.0, 1.0, 1.0)
REPLY = {
    "choices": [
        {
            "message": {"content": "A", "refusal": None},
            "finish_reason": "stop",
            "logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": -0.1}]}]},
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


def each_way(ways: Sequence[Any], read: Callable[[Any], Any]) -> None:
    """UserError where the file is refused each way that it may be read."""
    refused = []
    for way in ways:
        try:
            read(way)
        except UserError as error:
            refused.append(error)
    if len(refused) == len(ways):
        raise refused[0]


def rows(file: Path) -> None:
    """Every row of every kind of example is used, dropped or an error; what is used is rendered or dropped."""

    def of(kind: str) -> None:
        counts = Counts()
        examples = list(sources.load({"path": str(file), "kind": kind}, counts=counts))
        used = len(examples) / (2 if kind == "unpaired" and examples[0].id.endswith(":chosen") else 1)
        assert counts.rows == used + counts.dropped.total(), f"{kind}: a row is lost"
        for example in examples:
            if kind != "unpaired":
                chat.render(example, kind, BYTES, CHATML, max_length=64, counts=counts)

    each_way(list(KINDS), of)


def parquet_bytes(values: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), out)
    return out.getvalue()


def npy_bytes() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(6, dtype=np.int32))
    return out.getvalue()


def config_json(file: Path) -> None:
    each_way(("vocab", "score"), lambda head: from_hf(hf.read_config(file.parent), where=str(file), head=head))


def checkpoint() -> bytes:
    shapes = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4), "model.norm.weight": (4,)}
    wide = {"self_attn.q_proj": (4, 4), "self_attn.k_proj": (2, 4), "self_attn.v_proj": (2, 4)}
    wide |= {"self_attn.o_proj": (4, 4), "mlp.gate_proj": (4, 4), "mlp.up_proj": (4, 4), "mlp.down_proj": (4, 4)}
    norms = {"input_layernorm": (4,), "post_attention_layernorm": (4,)}
    shapes |= {f"model.layers.0.{name}.weight": size for name, size in (wide | norms).items()}
    return safetensors.numpy.save({name: np.zeros(size, np.float32) for name, size in shapes.items()})


def weights(file: Path) -> None:
    (file.parent / hf.INDEX_FILE).unlink(missing_ok=True)
    read = hf.open_reader(file.parent, SMALL)
    read(("layers", "q_proj"), (slice(0, 1), slice(0, 4), slice(0, 4)))
    read(("embed",), (slice(0, 8), slice(0, 4)))


def index(file: Path) -> None:
    (file.parent / hf.SINGLE_FILE).unlink(missing_ok=True)
    (file.parent / "a.safetensors").write_bytes(checkpoint())
    hf.open_reader(file.parent, SMALL)


def tokenizer_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        BYTES.save_pretrained(folder)
        found = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    special = json.dumps(BYTES.special_tokens_map).encode()
    return found | {"generation_config.json": b'{"eos_token_id": [257, 259]}', "special_tokens_map.json": special}


TOKENIZER = tokenizer_files()


def tokenizer_part(name: str) -> Target:
    def read(data: bytes, folder: Path) -> None:
        for other, content in TOKENIZER.items():
            (folder / other).write_bytes(content)
        (folder / name).write_bytes(data)
        loaded = tokenizer.load(folder)
        template = chat.pick_template(loaded)
        chat.render_conversation((TALK[0],), "So.", loaded, template, max_length=64, counts=Counts())

    return Target((TOKENIZER[name],), read, is_json=name.endswith(".json"))


def reply(data: bytes, folder: Path) -> None:
    response = httpx2.Response(200, content=data, request=httpx2.Request("POST", "http://h/v1"))
    chat_api._server_message(response, "key")
    try:
        found = chat_api._parse(response, "h", "key")
    except chat_api._Unavailable as error:  # with which it ends when asking again does not help
        raise UserError(str(error)) from error
    used(found)
    used(chat_api.Reply(*json.loads(json.dumps(found))))


def used(reply: chat_api.Reply) -> None:
    reply.text.encode()
    api.letter_mass(reply, 5)
    api.read_vote(reply.text, 5)
    chat_api.cost(ENDPOINT, reply.input_tokens, reply.output_tokens)


def prompts_file(file: Path) -> None:
    for where, row in files.json_objects(file, "--prompts", "prompt or messages", sample.ADDED):
        sample.prompt_of(row, where)


def labelled(file: Path) -> None:
    stances.labelled(str(file))


def flag(data: bytes, folder: Path) -> None:
    config = configs.experiment()
    config.sft = configs.stage("sft", data={"path": "a.jsonl"})
    config.stages, config.model.name = ("sft",), "llama3.2-1b"
    configs.override(config, "--config." + data.decode("utf-8", "replace"))
    configs.check(config, "mine.py")


def replies_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "replies.sqlite"
        with chat_api._open(file) as db:
            db.execute("INSERT INTO replies VALUES ('a', ?)", (json.dumps(["A", "stop", None, 3, 1]),))
            db.execute("INSERT INTO calls VALUES (1, 'm at http://h/v1', 0.5)")
        return file.read_bytes()


def replies(file: Path) -> None:
    chat_api.spent(ENDPOINT, file)
    with chat_api._open(file) as db:
        known = chat_api._known(db, ["a", "b"])
    for reply in known.values():
        used(reply)


def about_snapshot(file: Path) -> None:
    (file.parent / "_METADATA").touch()
    snapshots._changed(snapshots.open_reader(file.parent).checksums, {"norm": 5})


def kept_data(name: str) -> Callable[[bytes, Path], Any]:
    """A part of a rendered data set that was kept."""

    def read(data: bytes, folder: Path) -> None:
        for part in ("tokens", "loss_mask", "branches", "offsets", "labels", "questions"):
            (folder / f"{part}.npy").write_bytes(files.with_digest(npy_bytes()))
        (folder / "meta.json").write_bytes(text({"ids": [], "prompts": [], "counts": {}, "key": "a"}))
        (folder / name).write_bytes(data if name == "meta.json" else files.with_digest(data))
        pipeline._read(folder)

    return read


def kept_config(file: Path) -> None:
    runs.read_config(file)
    runs.claim(configs.experiment(), file.parent, "")


TARGETS = {
    "rows_jsonl": Target(ROWS, in_file("rows.jsonl", rows), True),
    "rows_json": Target(
        tuple(b"[" + row.strip().replace(b"\n", b",") + b"]" for row in ROWS), in_file("r.json", rows), True
    ),
    "rows_gz": Target(tuple(map(gzip.compress, ROWS)), in_file("rows.jsonl.gz", rows)),
    "rows_text": Target((b"one\n\ntwo\n",), in_file("rows.txt", rows)),
    "rows_parquet": Target((parquet_bytes([{"messages": TALK}, {"messages": None}]),), in_file("r.parquet", rows)),
    "stance_rows": Target(
        (text({"proposition": "a", "question": "b", "response": "c", "label": "support", "topic": "d"}),),
        in_file("s.jsonl", labelled),
        True,
    ),
    "statements": Target(
        (text({"statement": "a", "answer_matching_behavior": " Yes", "label_confidence": 0.9}),),
        in_file(f"{min(stances.VIEWS)}.jsonl", labelled),
        True,
    ),
    "config_json": Target(
        (text(SHAPE), text(SHAPE | {"rope_scaling": ROPE, "layer_types": ["full_attention"], "head_dim": 2})),
        in_file("config.json", config_json),
        True,
    ),
    "safetensors": Target((checkpoint(),), in_file(hf.SINGLE_FILE, weights)),
    "safetensors_index": Target(
        (text({"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}),),
        in_file(hf.INDEX_FILE, index),
        True,
    ),
    "tokenizer_json": tokenizer_part("tokenizer.json"),
    "tokenizer_config": tokenizer_part("tokenizer_config.json"),
    "generation_config": tokenizer_part("generation_config.json"),
    "special_tokens_map": tokenizer_part("special_tokens_map.json"),
    "chat_template": Target(
        (BYTES.chat_template.encode(), b"{% for m in messages %}{{ m.role }}: {{ m['content'] }}\n{% endfor %}"),
        in_file("mine.jinja", lambda file: chat.pick_template(BYTES, str(file))),
    ),
    "probes_jsonl": Target((text(PROBE),), in_file("p.jsonl", sets.load), True),
    "probes_json": Target((text([PROBE]), text({"dev": [PROBE], "test": []})), in_file("p.json", sets.load), True),
    "probes_csv": Target((b"id,input,topic,polarity\na,b,c,-1\n",), in_file("p.csv", sets.load)),
    "labels_csv": Target((CSV,), in_file("labels.csv", human.read_labels)),
    "judge_template": Target(
        ((prompts.FOLDER / "stance-v1.toml").read_bytes(),),
        in_file("mine.toml", lambda file: prompts.read_template(str(file))),
    ),
    "instructions": Target(
        (b'system = "Be brief."\nuser = "{{ question }} {{ proposition }} {{ side }}"\n',),
        in_file("mine.toml", lambda file: synthetic.read_template(str(file))),
    ),
    "rows_to_judge": Target(
        (text({"proposition": "a", "question": "b", "response": "c"}),), in_file("r.jsonl", judge.read_rows), True
    ),
    "prompts": Target((text({"prompt": "a"}), text({"messages": TALK[:1]})), in_file("p.jsonl", prompts_file), True),
    "tasks": Target(
        (text({"id": "x", "prompt": "a", "topic": "b", "proposition": "c"}),),
        in_file("t.jsonl", synthetic.read_tasks),
        True,
    ),
    "api_reply": Target((text(REPLY), text({"error": {"message": "no"}})), reply, True),
    "flag": Target((b"sft.optimizer.learning_rate=1e-3", b"stages=('sft',)", b"sft.data.parts=({'path': 'a'},)"), flag),
    "kept_config": Target(
        (text({"config": {"seed": 1, "stages": [], "model": {"path": ""}}}),), in_file("config.json", kept_config), True
    ),
    "kept_meta": Target((text({"ids": [], "prompts": [], "counts": {}, "key": "a"}),), kept_data("meta.json"), True),
    "kept_array": Target((npy_bytes(),), kept_data("tokens.npy")),
    "kept_replies": Target((replies_bytes(),), in_file("replies.sqlite", replies)),
    "kept_about": Target(
        (text({"custom_metadata": {"checksums": {"norm": 5}}}),), in_file(snapshots.ABOUT, about_snapshot), True
    ),
    "kept_log": Target((text({"step": 1, "loss": 2.0}),), in_file("metrics.jsonl", files.kept_lines), True),
    "kept_csv": Target((b"stage,step,value\nsft,1,0.5\n",), in_file("drift.csv", files.read_table)),
    "kept_parquet": Target((parquet_bytes([{"stage": "sft", "value": 0.5}]),), in_file("s.parquet", files.read_table)),
    "kept_answers": Target(
        (text(["a", ["b", "stop"]], ["c", "support"]),),
        in_file("kept.jsonl", synthetic._whole_lines),
        True,
    ),
}


# How it is mutated and run


def run_once(target: Target, data: bytes, folder: Path) -> None:
    """Raises what must not come out, AssertionError for a message that is too long."""
    try:
        target.read(data, folder)
    except UserError as error:
        message = str(error)
        assert len(message) <= CHARACTERS and len(message.split("\n")) <= LINES, "a message of more than one screen"


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """The same with one value, or one key, replaced by another or by one of WORST; unchanged where it is no JSON."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except (ValueError, RecursionError):
        return data
    holder: dict[str, Any] = {"": value}
    places = list(_places(holder))
    parent, key = rng.choice(places)
    other_parent, other_key = rng.choice(places)
    action = rng.randrange(5)
    if action == 0 and parent is not holder:
        del parent[key]
    elif action == 1 and isinstance(parent, dict) and parent is not holder:
        parent[rng.choice([str(other_key), f"{key}x", "\ud83d"])] = parent.pop(key)
    else:
        parent[key] = json.loads(json.dumps(other_parent[other_key] if action == 2 else rng.choice(WORST)))
    lines[at] = json.dumps(holder[""]).encode()
    return b"\n".join(lines)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a JSON tree."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def fuzz(name: str, seconds: int, corpus: Path, found: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix="vdjax-fuzz-"))
    for i, seed in enumerate(target.seeds):
        (corpus / f"seed-{i}").write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        out = mutated_json(data, rng) if target.is_json and rng.random() < 0.7 else data
        return atheris.Mutate(out, most) if out == data else out[:most]

    longest = max(4096, 2 * max(map(len, target.seeds)))
    flags = [f"-max_total_time={seconds}", f"-max_len={longest}", "-timeout=60", "-rss_limit_mb=6000"]
    flags += [f"-artifact_prefix={found}/", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *flags], lambda data: run_once(target, data, folder), custom_mutator=mutate)
    atheris.Fuzz()


def in_child(name: str, seconds: int, corpus: Path, found: Path) -> NoReturn:
    """Ends this process without going back into what its parent is in the middle of."""
    status = 1
    try:
        fuzz(name, seconds, corpus, found)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def campaign(name: str, seconds: int, kept: Path | None, found: Path) -> bool:
    """Fuzzes a target in a process of its own and prints the summary; whether it went without a crash.

    The process is a fork of this one, which has imported everything.
    """
    corpus = kept / name if kept else Path(tempfile.mkdtemp(prefix="vdjax-corpus-"))
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix="vdjax-fuzz-", suffix=".log") as output:
        child = os.fork()
        if not child:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            in_child(name, seconds, corpus, found)
        _, status, used = os.wait4(child, 0)
        log = Path(output.name).read_text(encoding="utf-8", errors="replace")
    runs_done = re.findall(r"stat::number_of_executed_units:\s*(\d+)|^#(\d+)\s", log, re.M)
    executions = max((int(a or b) for a, b in runs_done), default=0)
    edges = max(map(int, re.findall(r"cov: (\d+)", log)), default=0)
    crashed = status != 0
    seconds_of_core = used.ru_utime + used.ru_stime
    done = f"{executions} executions, {seconds_of_core:.0f} s of a core, {edges} edges, {int(crashed)} crashes"
    print(f"{name}: {done}", flush=True)
    if crashed:
        print(log[-4000:])
    if not kept:
        shutil.rmtree(corpus)
    return not crashed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=["all", *TARGETS], metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=300, help="of each target")
    parser.add_argument("--corpus", type=Path, help="folder with a folder for each target")
    parser.add_argument("--found", type=Path, default=Path(tempfile.gettempdir()), help="where crashing files are put")
    parser.add_argument("--repeat", type=Path, help="read this file once instead")
    flags = parser.parse_args(arguments)
    if flags.repeat:
        with tempfile.TemporaryDirectory() as folder:
            run_once(TARGETS[flags.targets[0]], flags.repeat.read_bytes(), Path(folder))
        return 0
    names = list(TARGETS) if "all" in flags.targets else flags.targets
    return int(not all([campaign(name, flags.seconds, flags.corpus, flags.found) for name in names]))


if __name__ == "__main__":
    sys.exit(main())
