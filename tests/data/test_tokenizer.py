import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vdjax.data import tokenizer
from vdjax.errors import UserError

BYTES = tokenizer.byte_level()
TRICKY = "naïve e\u0301 \u202e 👩‍👩‍👧 <|im_end|>\r\n\t  don't  !\x00 <|endoftext|>"


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_byte_level_is_utf8_and_reversible(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert BYTES.decode(ids) == text
    if not any(special in text for special in tokenizer.SPECIAL):
        assert ids == list(text.encode())


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
def test_byte_level_survives_saving_beside_a_model(tmp_path: Path, model_type: str | None) -> None:
    from transformers import AutoTokenizer

    BYTES.save_pretrained(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for again in (tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))):
        assert again(TRICKY)["input_ids"] == BYTES(TRICKY)["input_ids"]
        assert again.decode(again(TRICKY)["input_ids"]) == TRICKY
        assert again.chat_template == BYTES.chat_template
        assert (again.eos_token, again.pad_token, again.bos_token) == ("<|endoftext|>", "<|pad|>", None)
        assert len(again) == 260


def test_load_follows_tokenizer_json_where_the_named_class_would_not(tmp_path: Path) -> None:
    """transformers 5 gives Qwen2Tokenizer Qwen's own splitting rules and NFC, whatever tokenizer.json says."""
    BYTES.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer"}))
    truth = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.load(tmp_path)(TRICKY)["input_ids"] == truth.encode(TRICKY).ids


def test_load_errors_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match=str(tmp_path)):
        tokenizer.load(tmp_path)


def test_load_from_the_hub_passes_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(repo: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo=repo)
        BYTES.save_pretrained(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(tokenizer.load("someone/model", revision="abc123")) == 260
    assert asked["repo"] == "someone/model" and asked["revision"] == "abc123"
    assert "generation_config.json" in asked["allow_patterns"]
