"""Tokenizers: those of pretrained models, and a byte-level one that needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vdjax.errors import UserError
from vdjax.files import as_path, local_copy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "*.jinja",
)
SPECIAL = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")


def load(path_or_id: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or hub id, splitting text exactly as its tokenizer.json says.

    The class that tokenizer_config.json names is not used where there is a tokenizer.json: transformers 5 rebuilds some
    classes' splitting rules from its own code, and a file that names the wrong one is read wrongly without a word.

    Raises UserError when there is no tokenizer, or none that gives character offsets.
    """
    from transformers import PreTrainedTokenizerFast

    directory = as_path(path_or_id)
    directory = local_copy(directory) if directory.is_dir() else _download(str(path_or_id), revision)
    try:
        if (directory / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(str(directory))
        from transformers import AutoTokenizer  # takes half a second

        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # the Rust parser raises plain Exception for a damaged file
        raise UserError(f"tokenizer: cannot load one from {path_or_id}: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer: {path_or_id} has no fast tokenizer, and only those give character offsets")
    return tokenizer


def last_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of a token: of vocabularies with gaps it is beyond their length."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:  # hub errors are OSErrors or ValueErrors
        raise UserError(f"tokenizer: {repo!r} is no local directory, and the hub does not give it: {error}") from error


def byte_level() -> PreTrainedTokenizerBase:
    """256 tokens, one a byte of UTF-8 (id = byte), then SPECIAL; the ChatML template; no BOS.

    Like Qwen-3 it has two stop ids: <|endoftext|> (its eos) and <|im_end|> (the end of a turn). Any text without a lone
    surrogate survives encoding and decoding. Saved with `save_pretrained`, it loads like every Hugging Face tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from vdjax.data.template import read_template

    vocab = {char: byte for byte, char in enumerate(byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=list(SPECIAL[2:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = read_template("chatml").replace("{{- bos_token -}}\n", "")
    return tokenizer


def byte_characters() -> list[str]:
    """The printable stand-in of every byte in GPT-2's byte-level alphabet (Radford et al. 2019, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
