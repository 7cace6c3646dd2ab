"""Malformed input of every kind: one screen that names the place, what was expected and the nearest valid name."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import tiny
from bad_input import (
    BYTES,
    CHATML,
    CONFIG,
    DEEP,
    HH,
    KEY,
    LABELS,
    PAIR,
    PROBE,
    PROMPT,
    SHAPE,
    again,
    answered,
    completion,
    data,
    experiment,
    fitted,
    header,
    jsonl,
    judge_template,
    labels,
    mine,
    model,
    parquet,
    probes,
    read_judge,
    rendered,
    reward,
    rows,
    saved_tokenizer,
    shape,
    talk,
    template,
    tensors,
)
from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax import judge, runs, snapshots
from vdjax.data import chat, stances
from vdjax.errors import CHARACTERS, LINES, UserError, one_screen
from vdjax.files import kept_lines, read_table, write_array
from vdjax.measure import holds, store
from vdjax.models import hf
from vdjax.models.config import from_hf
from vdjax.probes import sets
from vdjax.values import synthetic


class Bad(NamedTuple):
    name: str
    files: Mapping[str, Any]  # written into a folder: bytes, text, or rows of JSONL
    read: Callable[[Path], Any]  # what reads them
    says: tuple[str, ...]  # place, expectation, nearest name: all in the message


NO_CONFIG = {"mine.py": CONFIG}
BAD = [
    # Config files and flags
    Bad("key misspelt in a flag", NO_CONFIG, experiment("--config.sft.epoch=2"),
        ("--config.sft.epoch is no field", "did you mean 'epochs'")),
    Bad("group misspelt in a flag", NO_CONFIG, experiment("--config.porbes.path=x"),
        ("--config.porbes", "did you mean 'probes'")),
    Bad("key misspelt in a file", mine("c.stages", "c.probes.topcs = ()\n    c.stages"), experiment(),
        ("mine.py: config.probes.topcs is no field", "did you mean 'topics'")),
    Bad("top key misspelt in a file", mine("c.stages", "c.log_evry = 2\n    c.stages"), experiment(),
        ("mine.py: config.log_evry is no field", "did you mean 'log_every'")),
    Bad("key of a stage misspelt in a file", mine("c.dpo", "c.sft.optimizer.lerning_rate = 1.0\n    c.dpo"),
        experiment(), ("mine.py: config.sft.optimizer.lerning_rate", "did you mean 'learning_rate'")),
    Bad("key of a stage misspelt in its call", mine("'sft', data", "'sft', bach_size=2, data"), experiment(),
        ("bach_size is no field", "did you mean 'batch_size'")),
    Bad("key of a judge misspelt", mine("'api', extra", "'api', vote=2, extra"), experiment(),
        ("vote is no field", "did you mean 'votes'")),
    Bad("wrong type in a file", mine("c.stages", "c.seed = 'one'\n    c.stages"), experiment(),
        ("mine.py, line 6: TypeError", "seed", "int")),
    Bad("wrong type in a flag", NO_CONFIG, experiment("--config.sft.epochs=two"),
        ("--config.sft.epochs: expected int such as 1, found 'two'",)),
    Bad("no Python literal in a flag", NO_CONFIG, experiment("--config.seed={[]: 1}"),
        ("--config.seed: expected int such as 0", "{[]: 1}")),
    Bad("infinite learning rate", NO_CONFIG, experiment("--config.sft.optimizer.learning_rate=1e999"),
        ("config.sft.optimizer.learning_rate=inf", "expected a finite number")),
    Bad("NaN in a file", mine("c.dpo", "c.sft.optimizer.warmup = float('nan')\n    c.dpo"), experiment(),
        ("mine.py: config.sft.optimizer.warmup=nan", "expected a finite number")),
    Bad("negative seed", NO_CONFIG, experiment("--config.seed=-1"), ("config.seed=-1", "expected at least 0")),
    Bad("seeds of text", NO_CONFIG, experiment("--config.seeds=('a',)"),
        ("config.seeds[0]='a'", "expected a whole number")),
    Bad("stage that is no text", NO_CONFIG, experiment("--config.stages=(['sft'],)"),
        ("config.stages[0]=['sft']", "expected the name of a stage")),
    Bad("objective misspelt", NO_CONFIG, experiment("--config.dpo.objective=simpoo"),
        ("simpoo", "did you mean 'simpo'")),
    Bad("choice misspelt", NO_CONFIG, experiment("--config.sft.data.truncation=respons_end"),
        ("config.sft.data.truncation='respons_end'", "did you mean 'response_end'")),
    Bad("huge value", NO_CONFIG, experiment(f"--config.sft.epochs={KEY}"), ("--config.sft.epochs: expected int",)),
    Bad("syntax error", mine("c.stages = (", "c.stages = ("  "("), experiment(), ("mine.py, line 6", "SyntaxError")),
    Bad("no config given", mine("return c", "return None"), experiment(),
        ("mine.py: get_config() gave NoneType", "expected the ConfigDict")),
    Bad("no such file", NO_CONFIG, lambda f: configs.load(str(f / "mime.py")), ("mime.py: no such file", "mine.py'")),
    Bad("part without a path", NO_CONFIG,
        experiment("--config.sft.data.path=", "--config.sft.data.parts=({'path':3},)"),
        ("config.sft.data.parts[0].path", "expected a file", "found 3")),
    Bad("part with a key misspelt", NO_CONFIG,
        experiment("--config.sft.data.path=", "--config.sft.data.parts=({'path':'a','fration':0.5},)"),
        ("config.sft.data.parts[0].fration is no field", "did you mean 'fraction'")),
    # Rows
    Bad("no rows", {"rows.jsonl": "\n\n"}, rows(), ("rows.jsonl", "holds no rows")),
    Bad("no JSON", {"rows.jsonl": jsonl(talk("a", "b")) + "{'a': 1}\n"}, rows(),
        ("rows.jsonl, line 2: not JSON", "expected one object a line")),
    Bad("no object", data(talk("a", "b"), [1]), rows(), ("rows.jsonl, line 2", "expected an object", "found list")),
    Bad("nested too deeply", {"rows.jsonl": DEEP}, rows(), ("rows.jsonl, line 1: not JSON", "nested too deeply")),
    Bad("array nested too deeply", {"rows.json": DEEP}, rows(name="rows.json"), ("rows.json", "nested too deeply")),
    Bad("number of too many digits", {"rows.jsonl": '{"messages": ' + "9" * 5000 + "}"}, rows(),
        ("rows.jsonl, line 1: not JSON", "digits")),
    Bad("not UTF-8", {"rows.jsonl": '{"text": "é"}'.encode("latin-1")}, rows("text"),
        ("rows.jsonl is not UTF-8 text",)),
    Bad("columns misspelt", data({"instruction": "a", "ouput": "b"}), rows(source="alpaca"),
        ("rows.jsonl", "need instruction, output", "no column 'output'; did you mean 'ouput'")),
    Bad("thousand columns", data({f"column_{i}": 1 for i in range(1000)}), rows(), 
        ("rows.jsonl: found columns column_0", "and 970 more", "need conversation |", "nearest")),
    Bad("column of 100k characters", data({KEY: 1}), rows(), ("rows.jsonl: found columns kkk", "nearest")),
    Bad("field missing", data({"instruction": "a", "output": " "}, {"instruction": "b"}), rows(),
        ("rows.jsonl:1", "1 x missing_field", "expected every field of the source")),
    Bad("field null", data({"instruction": "b", "output": None}), rows(),
        ("rows.jsonl:0", "1 x missing_field", "expected every field of the source")),
    Bad("field of the wrong type", data({"instruction": "b", "output": 3}), rows(),
        ("rows.jsonl:0", "1 x wrong_type", "expected text")),
    Bad("lone surrogate", {"rows.jsonl": '{"prompt": "a", "completion": "\\ud83d"}'}, rows(),
        ("rows.jsonl:0", "1 x invalid_unicode", "half of a surrogate pair")),
    Bad("empty text", data({"prompt": "a", "completion": " \n"}), rows(),
        ("rows.jsonl:0", "1 x empty_response", "expected responses that are not blank")),
    Bad("empty prompt", data({"prompt": "", "completion": "b"}), rows(),
        ("rows.jsonl:0", "1 x empty_prompt", "expected a prompt that is not blank")),
    Bad("prompts that differ", data({"chosen": HH + "So.", "rejected": HH.replace("Why", "How") + "No."}),
        rows("preference"), ("rows.jsonl:0", "1 x no_common_prompt", "expected chosen and rejected that begin")),
    Bad("conversations that differ before the last answer",
        data({"chosen": [*talk("a", "b", "c", "d")["messages"]], "rejected": [*talk("a", "x", "c", "e")["messages"]]}),
        rows("preference"), ("rows.jsonl:0", "1 x prompts_differ", "differ in their last answer alone")),
    Bad("equal responses", data(PAIR | {"rejected": "So. "}), rows("preference"),
        ("rows.jsonl:0", "1 x equal_responses", "is not the rejected one")),
    Bad("ends with the user", data(talk("a", "b", "c")), rows(),
        ("rows.jsonl:0", "1 x ends_without_answer", "last message is the assistant's")),
    Bad("no messages", data({"messages": []}), rows(),
        ("rows.jsonl:0", "1 x no_messages", "a question and its answer")),
    Bad("unknown role", data({"messages": [{"role": "bot", "content": "a"}]}), rows(),
        ("rows.jsonl:0", "1 x unknown_role", "system, user and assistant")),
    Bad("two answers in a row",
        data({"messages": [*talk("a", "b")["messages"], {"role": "assistant", "content": "c"}]}), rows(),
        ("rows.jsonl:0", "1 x roles_do_not_alternate", "user and assistant in turn")),
    Bad("NaN margin", {"rows.jsonl": json.dumps(PAIR | {"margin": float("nan")})}, rows("preference"),
        ("rows.jsonl:0", "1 x not_finite", "not NaN")),
    Bad("margin beyond all floats", {"rows.jsonl": json.dumps(PAIR | {"margin": 10**400})}, rows("preference"),
        ("rows.jsonl:0", "1 x not_finite", "a finite number")),
    Bad("NaN confidence",
        {"rows.jsonl": '{"statement": "a", "answer_matching_behavior": "Yes", "label_confidence": NaN}'},
        rows(topic="tea", view="support", align="support", min_confidence=0.5),
        ("rows.jsonl:0", "1 x not_finite", "not NaN")),
    Bad("label that is none", data({"prompt": "a", "completion": "b", "label": "good"}), rows("unpaired"),
        ("rows.jsonl:0", "1 x wrong_type", "expected text")),
    Bad("special tokens alone", data({"messages": talk("a", "<|im_end|><|endoftext|>")["messages"]}), rendered("sft"),
        ("rows.jsonl:0", "1 x special_token_in_text", "would forge a turn")),
    Bad("prompt of 100k characters", data({"prompt": "x" * 100_000, "completion": "y"}), rendered("sft"),
        ("rows.jsonl:0", "1 x prompt_too_long", "leave room for a response")),
    Bad("pair with a prompt of 100k characters", data(PAIR | {"prompt": "x" * 100_000}), rendered("preference"),
        ("rows.jsonl:0", "1 x prompt_too_long", "max_length")),
    Bad("pair that is cut to equal tokens", data(PAIR | {"chosen": "y" * 99 + "a", "rejected": "y" * 99 + "b"}),
        rendered("preference", max_length=60), ("rows.jsonl:0", "1 x equal_responses", "is not the rejected one")),
    Bad("files named twice", data(talk("a", "b")), lambda f: rows(path=[str(f / "rows.jsonl")] * 2)(f),
        ("rows.jsonl is named twice", "the same ids")),
    Bad("file misspelt", data(talk("a", "b")), rows(name="row.jsonl"), ("row.jsonl", "did you mean 'rows.jsonl'")),
    Bad("path of 5000 characters", {}, rows(name="x" * 5000), ("cannot be a path", "too long")),
    Bad("home of nobody", {}, rows(path="~nobody-of-that-name/rows.jsonl"), ("no such file", "~nobody-of-that-name")),
    Bad("suffix unknown", {"rows.csv": "a"}, rows(name="rows.csv"), ("rows.csv has an unknown suffix", ".jsonl")),
    Bad("cut gzip", {"rows.jsonl.gz": b"\x1f\x8b\x08\x00"}, rows(name="rows.jsonl.gz"),
        ("cannot read", "rows.jsonl.gz")),
    Bad("damaged Parquet", {}, parquet, ("cannot read", "rows.parquet")),
    Bad("option misspelt", data(talk("a", "b")), rows(options={"langage": "English"}),
        ("unknown key 'langage'", "did you mean 'language'")),
    Bad("option of the wrong type", data({"conversation": []}), rows(options={"language": 5}),
        ("language=5", "expected text")),
    Bad("list that is text", data(talk("a", "b")), rows(hold_out="abortion"),
        ("hold_out='abortion'", "a list of texts")),
    Bad("negative window", data(talk("a", "b")), rows(skip_examples=-1), ("skip_examples=-1", "at least 0")),
    Bad("source misspelt", data(talk("a", "b")), rows(source="alpacca"), ("source='alpacca'", "did you mean 'alpaca'")),
    Bad("stance that is none", {"s.jsonl": jsonl({"proposition": "a", "response": "b", "label": "suport"})},
        lambda f: stances.labelled(str(f / "s.jsonl")), ("s.jsonl:0: label='suport'", "did you mean 'support'")),
    Bad("kept data without its description", data(talk("a", "b")), again(lambda kept: (kept / "meta.json").unlink()),
        ("meta.json: cannot be read back",)),
    Bad("kept data cut short", data(talk("a", "b")),
        again(lambda kept: (kept / "tokens.npy").write_bytes(b"\x93NUMPY")),
        ("tokens.npy: cannot be read back", "remove")),
    Bad("kept data with a flipped bit", data(talk("a", "b")), again(lambda kept: tiny.flip(kept / "tokens.npy", -40)),
        ("tokens.npy: cannot be read back: it is not what was written", "remove")),
    Bad("kept data with Python objects", data(talk("a", "b")),
        again(lambda kept: write_array(kept / "questions.npy", np.array([{}], object))),
        ("questions.npy: cannot be read back", "allow_pickle=False", "remove")),
    # config.json
    Bad("size that is no number", shape(hidden_size="32"), model,
        ("config.json: hidden_size must be a positive whole number", "'32'")),
    Bad("size of zero", shape(vocab_size=0), model, ("config.json: vocab_size must be a positive whole number",)),
    Bad("size missing", shape(intermediate_size=...), model, ("config.json: intermediate_size is missing",)),
    Bad("size beyond int32", shape(vocab_size=10**12), model, ("config.json: vocab_size must be less than 2**31",)),
    Bad("billion layers", shape(num_hidden_layers=10**9), model,
        ("config.json: num_hidden_layers is 1000000000", "at most 10000")),
    Bad("more parameters than anyone has", shape(hidden_size=2**30, vocab_size=2**30), model,
        ("config.json: makes", "parameters", "hidden_size 1073741824")),
    Bad("heads that do not divide", shape(num_key_value_heads=3), model,
        ("config.json: num_attention_heads (4) must be a multiple of num_key_value_heads (3)",)),
    Bad("odd head", shape(head_dim=7), model, ("config.json: head_dim must be even",)),
    Bad("negative epsilon", shape(rms_norm_eps=-1e-6), model, ("config.json: rms_norm_eps must be a positive number",)),
    Bad("rope beyond all floats", shape(rope_theta=10**400), model,
        ("config.json: rope_theta must be a positive number",)),
    Bad("layer types that are no list", shape(layer_types=2), model, ("config.json: layer_types", "full_attention")),
    Bad("rope type that is none", shape(rope_scaling={"rope_type": ["llama3"]}), model,
        ("config.json: rope_scaling: rope type", "'default' and 'llama3'")),
    Bad("architecture of another kind", shape(architectures=[["LlamaForCausalLM"]]), model,
        ("config.json: architectures", "supported: LlamaForCausalLM")),
    Bad("rope type that is NaN", shape(rope_scaling={"rope_type": float("nan")}), model,
        ("config.json: rope_scaling: rope type nan", "'default' and 'llama3'")),
    Bad("field misspelt", shape(rms_norm_epz=1e-6), model, ("config.json: unknown field 'rms_norm_epz'",
        "did you mean 'rms_norm_eps'")),
    Bad("config.json that is no object", {"config.json": "[]"}, model, ("config.json: must hold a JSON object",)),
    Bad("config.json nested too deeply", {"config.json": DEEP}, model,
        ("config.json: cannot be read as JSON", "deeply")),
    Bad("no config.json", {}, model, ("config.json: cannot be read as JSON", "No such file")),
    # Tensors
    Bad("tensor missing", {}, tensors(lambda t: t | {"model.norm.weight": t.pop("lm_head.weight")[0]}),
        ("changed: 1 tensors are missing", "lm_head.weight")),
    Bad("tensor too many", {}, tensors(lambda t: t | {"model.layers.2.mlp.up_proj.weight": t["model.norm.weight"]}),
        ("changed: 1 tensors are unexpected", "model.layers.2.mlp.up_proj.weight")),
    Bad("tensor misshapen", {}, tensors(lambda t: t | {"model.norm.weight": np.zeros(33, np.float32)}),
        ("model.safetensors: model.norm.weight has shape (33,)", "config.json makes it (32,)")),
    Bad("tensor of whole numbers", {}, tensors(lambda t: t | {"model.norm.weight": np.zeros(32, np.int32)}),
        ("model.safetensors: model.norm.weight has dtype I32", "supported: F32, F16, BF16")),
    Bad("file cut short", {}, tensors(lambda t: safetensors.numpy.save(t)[:-50]),
        ("model.safetensors: cannot be read as safetensors",)),
    Bad("header longer than the file", {}, tensors(lambda t: header("{}", 2**40)), ("cannot be read as safetensors",)),
    Bad("header that is no JSON", {}, tensors(lambda t: header("{{}}")), ("cannot be read as safetensors",)),
    Bad("offsets beyond the file", {},
        tensors(lambda t: header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}')),
        ("model.safetensors: cannot be read as safetensors",)),
    Bad("index out of its folder", {hf.INDEX_FILE: '{"weight_map": {"a": "../a.safetensors"}}'},
        lambda f: hf.open_reader(f, from_hf(SHAPE, where="")), ("weight_map['a']", "in this directory")),
    Bad("weights as a pickle", {"pytorch_model.bin": b""}, lambda f: hf.open_reader(f, from_hf(SHAPE, where="")),
        ("neither model.safetensors", "pytorch_model.bin", "does not read")),
    Bad("snapshot that is none", {}, lambda f: snapshots.open_reader(f / "5"), ("5 is no snapshot",)),
    # Tokenizers and templates
    Bad("tokenizer larger than the model", shape(vocab_size=200), fitted,
        ("bytes: the tokenizer has 260 tokens", "vocab_size must be at least 260", "'<|im_end|>'")),
    Bad("damaged tokenizer.json", {}, saved_tokenizer(lambda f: (f / "tokenizer.json").write_text('{"model": 1}')),
        ("tokenizer: cannot load one from",)),
    Bad("stop id of no token", {},
        saved_tokenizer(lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 999}')),
        ("generation_config.json: eos_token_id 999", "no token of the tokenizer")),
    Bad("stop id that is text", {},
        saved_tokenizer(lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "abc"}')),
        ("generation_config.json: eos_token_id 'abc'",)),
    Bad("stop id that no machine word holds", {},
        saved_tokenizer(lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 99999999999999999999}')),
        ("generation_config.json: eos_token_id 99999999999999999999", "no token of the tokenizer")),
    Bad("generation_config.json that is no JSON", {},
        saved_tokenizer(lambda f: (f / "generation_config.json").write_text("{")),
        ("generation_config.json is no JSON object",)),
    Bad("template name misspelt", {}, lambda f: chat.pick_template(BYTES, "chatmll"),
        ("template: 'chatmll'", "did you mean 'chatml'")),
    Bad("template not UTF-8", {"mine.jinja": b"\xff"}, template, ("mine.jinja is not UTF-8 text",)),
    Bad("template with a syntax error", {"mine.jinja": "{% for %}"}, template, ("mine.jinja fails on an ordinary",)),
    Bad("template that divides by zero", {"mine.jinja": "{{ 1 / 0 }}"}, template, ("mine.jinja fails", "zero")),
    Bad("template without the answers", {"mine.jinja": "{{ messages[0].content }}"}, template,
        ("mine.jinja", "leaves out the answer")),
    Bad("template whose answers cannot be found", {"mine.jinja": "{{ messages | length }}{{ messages[-1].content }}"},
        template, ("mine.jinja", "is not how the whole conversation begins")),
    # Probes
    Bad("topic unknown", {"probes.jsonl": jsonl(PROBE)}, probes(topics=["te"]),
        ("topic 'te' is not in", "probes.jsonl", "did you mean 'tea'")),
    Bad("built-in topic misspelt", {}, lambda f: sets.load("builtin", topics=["abortoin"]),
        ("did you mean 'abortion'",)),
    Bad("duplicate ids", {"probes.jsonl": jsonl(PROBE, PROBE)}, probes(),
        ("probes.jsonl, line 2: id 'a' is already used at", "line 1", "unique")),
    Bad("probe without a topic", {"probes.jsonl": jsonl({"id": "a", "input": "b", "Topic": "c"})}, probes(),
        ("probes.jsonl, line 1: no field 'topic'", "expected id, input, topic", "did you mean 'Topic'")),
    Bad("optional field misspelt", {"probes.jsonl": jsonl(PROBE | {"polarty": 1})}, probes(),
        ("probes.jsonl, line 1: field 'polarty'", "did you mean 'polarity'")),
    Bad("polarity NaN", {"probes.jsonl": json.dumps(PROBE | {"polarity": float("nan")})}, probes(),
        ("probes.jsonl, line 1: polarity is nan", "expected +1, -1, or 0")),
    Bad("polarity beyond all floats", {"probes.jsonl": json.dumps(PROBE | {"polarity": 10**400})}, probes(),
        ("probes.jsonl, line 1: polarity is 1000", "expected +1, -1, or 0")),
    Bad("polarity that is a list", {"probes.jsonl": jsonl(PROBE | {"polarity": []})}, probes(),
        ("probes.jsonl, line 1: polarity is []", "expected +1, -1, or 0")),
    Bad("probe with a lone surrogate", {"probes.jsonl": jsonl(PROBE | {"input": "a\ud83d"})}, probes(),
        ("probes.jsonl, line 1: input", "no Unicode text")),
    Bad("empty probe", {"probes.jsonl": jsonl(PROBE | {"input": " "})}, probes(), ("line 1: input is empty",)),
    Bad("probes of another split", {"p.json": json.dumps({"dev": [], "tset": []})}, probes("p.json"),
        ("p.json: key 'tset'", "did you mean 'test'")),
    Bad("probes nested too deeply", {"p.json": DEEP}, probes("p.json"), ("p.json: not JSON", "nested too deeply")),
    Bad("comma in a cell", {"p.csv": "id,input,topic\n1,Well, why?,t\n"}, probes("p.csv"),
        ("p.csv, line 2: 4 fields", "the header names 3", "quote commas")),
    # Labels, judges, endpoints
    Bad("label unknown", {"labels.csv": "proposition,question,response,label\na,b,c,suport\n"}, labels,
        ("labels.csv, line 2: label 'suport'", "did you mean 'support'")),
    Bad("labels without a column", {"labels.csv": "proposition,question,response,lable\n"}, labels,
        ("labels.csv, line 1: no column 'label'", "did you mean 'lable'")),
    Bad("NaN grade", {"labels.csv": "proposition,question,response,label,graded\na,b,c,support,nan\n"}, labels,
        ("labels.csv, line 2: graded 'nan'", "expected a number from 0 to 1")),
    Bad("two labels of one person",
        {"labels.csv": "proposition,question,response,label,annotator\n" + "a,b,c,support,x\n" * 2}, labels,
        ("labels.csv, line 3: annotator 'x'", "line 2")),
    Bad("labels not UTF-8", {"labels.csv": b"proposition\xff"}, labels, ("labels.csv: is not UTF-8", "CSV UTF-8")),
    Bad("cell of 200k characters", {"labels.csv": f"proposition,question,response,label\na,b,{KEY}{KEY},support\n"},
        labels,
        ("labels.csv, line 2", "field larger than field limit")),
    Bad("template of a judge not UTF-8", {"mine.toml": b"\xff"}, read_judge, ("mine.toml is not UTF-8 text",)),
    Bad("template of a judge with a key misspelt", judge_template(prompts="''"), read_judge,
        ("mine.toml: unknown key 'prompts'", "did you mean 'prompt'")),
    Bad("NaN grade of a label", judge_template(labels=LABELS.replace("graded = 1", "graded = nan")), read_judge,
        ("mine.toml: labels[0]: graded=nan", "expected a number in [-1, 1]")),
    Bad("prompt of a judge that divides by zero", judge_template(prompt=repr(PROMPT + "{{ 1 / 0 }}")), read_judge,
        ("mine.toml: prompt: ZeroDivisionError",)),
    Bad("rows to judge with a lone surrogate", {"r.jsonl": '{"proposition": "a", "response": "\\ud83d"}'},
        lambda f: judge.read_rows(f / "r.jsonl"), ("r.jsonl:1", "no Unicode text")),
    Bad("rows to judge without a response", {"r.jsonl": '{"proposition": "a", "respond": "b"}'},
        lambda f: judge.read_rows(f / "r.jsonl"),
        ("r.jsonl:1: 'response' is missing", "found 'proposition', 'respond'")),
    Bad("tasks of one id", {"t.jsonl": jsonl(*[{"id": "x", "prompt": "a", "topic": "b", "proposition": "c"}] * 2)},
        lambda f: synthetic.read_tasks(f / "t.jsonl"), ("t.jsonl:2: id 'x' is used twice",)),
    Bad("instructions that are no jinja", {"mine.toml": 'system = "{{"\nuser = "b"'},
        lambda f: synthetic.read_template(str(f / "mine.toml")), ("mine.toml", "expected the jinja texts")),
    Bad("NaN reward", {"mine.py": "def score(prompts, responses):\n    return [float('nan')]\n"}, reward,
        ("mine.py:score' gave nan", "expected a finite number")),
    Bad("reward of another name", {"mine.py": "def scores(prompts, responses):\n    return [1]\n"}, reward,
        ("mine.py has no function score", "did you mean 'scores'")),
    Bad("reply of no choice", {}, answered({"choices": []}), ("m at http", "no chat completion")),
    Bad("reply that is no text", {}, answered(completion(content=[{"text": "A"}])),
        ("m at http", "no chat completion")),
    Bad("reply of endless tokens", {},
        answered(completion(usage={"prompt_tokens": 1, "completion_tokens": float("inf")})),
        ("m at http", "no chat completion")),
    Bad("reply with a log-prob that is none", {},
        answered(completion(choice={"logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": "x"}]}]}})),
        ("m at http", "no chat completion")),
    # What a workdir keeps
    Bad("workdir that is a file", {"run": ""}, lambda f: runs.held(f / "run").__enter__(),
        ("run: a file stands there or in its path", "expected a directory")),
    Bad("workdir in a file", {"run": ""}, lambda f: runs.held(f / "run" / "a").__enter__(),
        ("a: a file stands there or in its path", "expected a directory")),
    Bad("snapshot without what is saved beside arrays", {"5/_METADATA": "{}"}, lambda f: snapshots.open_reader(f / "5"),
        ("5/_CHECKPOINT_METADATA: cannot be read back",)),
    Bad("snapshot whose checksums are none", {"5/_METADATA": "", f"5/{snapshots.ABOUT}": '{"custom_metadata": [1]}'},
        lambda f: snapshots.open_reader(f / "5"), ("_CHECKPOINT_METADATA: cannot be read back: no checksums", "copy")),
    Bad("workdir with a damaged config.json", {"config.json": "{"},
        lambda f: runs.claim(configs.experiment(), f, ""), ("config.json: cannot be read back",)),
    Bad("workdir of another experiment", {"config.json": json.dumps({"config": {"seed": 7}})},
        lambda f: runs.claim(configs.experiment(), f, ""),
        ("holds an experiment with another config", "seed: 7 there")),
    Bad("stage without its facts", {"sft/done.json": "{}"}, lambda f: runs.done(f, "sft"),
        ("done.json: cannot be read back", "'total_steps' is missing")),
    Bad("table cut short", {"sft.parquet": b"PAR1"}, lambda f: read_table(f / "sft.parquet"),
        ("sft.parquet: cannot be read back", "writes it again")),
    Bad("table that is empty", {"drift.csv": ""}, lambda f: read_table(f / "drift.csv"),
        ("drift.csv: cannot be read",)),
    Bad("log with a damaged line", {"metrics.jsonl": '{"step": 1}\n{"ste\n'}, lambda f: kept_lines(f / "metrics.jsonl"),
        ("metrics.jsonl:2: cannot be read back",)),
    Bad("kept answers damaged", {"kept.jsonl": '["a", 1]\n[2]\n'},
        lambda f: synthetic._whole_lines(f / "kept.jsonl"),
        ("kept.jsonl:2: cannot be read back", "[hash, answer]")),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_bad_input_is_one_screen_with_the_place(bad: Bad, tmp_path: Path) -> None:
    for name, content in bad.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as found:
        bad.read(tmp_path)
    message = str(found.value)
    assert [part for part in bad.says if part not in message] == [], message
    assert len(message.split("\n")) <= LINES and len(message) <= CHARACTERS


def test_the_table_is_long_and_without_doubles() -> None:
    assert len(BAD) >= 60
    assert len({bad.name for bad in BAD}) == len(BAD)


def test_a_config_without_mistakes_is_taken(tmp_path: Path) -> None:
    """The rows above fail for what they change and not for what they share."""
    (tmp_path / "mine.py").write_text(CONFIG)
    assert isinstance(configs.load(str(tmp_path / "mine.py")), ConfigDict)
    (tmp_path / "mine.toml").write_text(judge_template()["mine.toml"])
    assert len(read_judge(tmp_path).labels) == 2
    (tmp_path / "config.json").write_text(shape()["config.json"])
    assert model(tmp_path).num_layers == 2
    assert answered(completion())(tmp_path)[0].text == "A"
    assert saved_tokenizer(lambda _: None)(tmp_path / "saved").stop_ids == CHATML.stop_ids


def test_a_log_that_a_kill_tore_goes_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert kept_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_damaged_table_is_made_again(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """And one that is whole is not."""
    file = tmp_path / "sft.parquet"
    store(pd.DataFrame({"asked_hash": ["a", "a"]}), file)
    assert holds(file, asked_hash="a") and not holds(file, asked_hash="b")
    file.write_bytes(file.read_bytes()[:-3])
    assert not holds(file, asked_hash="a")
    assert "sft.parquet: is damaged" in "".join(capfd.readouterr())


def test_a_screen_keeps_both_ends() -> None:
    assert one_screen("a\nb") == "a\nb"
    long = one_screen("\n".join(f"line {i}" for i in range(1000)))
    assert len(long.split("\n")) == LINES and long.startswith("line 0\n") and long.endswith("\nline 999")
    assert "[... 977 lines ...]" in long  # 12 + 1 + 11 lines: all others are counted
    wide = one_screen("begin" + "x" * 10**6 + "end")
    assert len(wide) <= CHARACTERS and wide.startswith("begin") and wide.endswith("end")
    assert re.search(r"\[\.\.\. \d+ characters \.\.\.\]", wide)
    one_screen("half \ud83d of a pair").encode()  # can be printed
