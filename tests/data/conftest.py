import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vdjax.data import tokenizer

CORPUS = [
    "User: What do you think about school uniforms?\n\nAssistant: I think they help. They also cost money.",
    "The capital of France is Paris, and the capital of Italy is Rome. 2024, 1999; 12 + 30 = 42!",
    "def f(x):\n    return x ** 2\n\n\nprint(f(3))  # nine",
    "Ça va? Größe, naïve, 東京, Привет. It's what we'd say, isn't it?",
]


@pytest.fixture(scope="session")
def byte_level() -> Any:
    return tokenizer.byte_level()


@pytest.fixture(scope="session")
def bpe() -> Any:
    """A byte-level BPE like that of GPT-2 or Llama-3: words are split by a regular expression; BOS by default."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "<|turn|>")],
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def letters() -> Callable[..., Any]:
    """Makes a tokenizer with one token a character of "abcdxyz: " and the given merges, first ones first."""

    def make(*merges: tuple[str, str]) -> Any:
        tokens = [*"abcdxyz: ", "</s>", *("".join(m) for m in merges)]
        backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges)))
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def rows_to_file(rows: Iterable[Any], name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return rows_to_file
