"""The targets of the fuzzer, without it: of seeds and mutations of them nothing but a UserError may come out."""

import random
from pathlib import Path

import pytest
import tiny

from vdjax.errors import UserError

fuzz = tiny.load_script("fuzz.py")
SLOW = {"tokenizer_json", "tokenizer_config", "generation_config", "special_tokens_map"}  # which load a tokenizer


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_target_takes_or_refuses_its_seeds_and_what_is_broken(name: str, tmp_path: Path) -> None:
    target, rng = fuzz.TARGETS[name], random.Random(name)
    for seed in target.seeds:
        fuzz.run_once(target, seed, tmp_path)
        for _ in range(1 if name in SLOW else 8):
            broken = fuzz.mutated_json(seed, rng) if target.is_json else seed[: rng.randrange(len(seed))]
            fuzz.run_once(target, broken, tmp_path)


# Seeds that are whole for what is parsed and refused by what comes after it.
REFUSED = {"statements-0", "safetensors_index-0", "flag-2", "kept_config-0", "api_reply-1"}


def test_seeds_are_sound(tmp_path: Path) -> None:
    """Else the fuzzer would never come beyond the first check."""
    refused = set()
    for name, target in fuzz.TARGETS.items():
        for i, seed in enumerate(target.seeds):
            (tmp_path / name).mkdir(exist_ok=True)
            try:
                target.read(seed, tmp_path / name)
            except UserError:
                refused.add(f"{name}-{i}")
    assert refused == REFUSED


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_target_refuses_one_of_what_is_no_such_file(name: str, tmp_path: Path) -> None:
    """Else it would not see what it is given. One is enough: of logs, an empty one is whole."""
    with pytest.raises(UserError):
        for data in (b"", b"\xff\x00{", b"[[\n[[\n"):
            fuzz.TARGETS[name].read(data, tmp_path)


def test_only_a_short_user_error_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def target(error: Exception) -> fuzz.Target:
        def read(data: bytes, folder: Path) -> None:
            raise error

        return fuzz.Target((), read)

    fuzz.run_once(target(UserError("a")), b"", tmp_path)
    with pytest.raises(KeyError):
        fuzz.run_once(target(KeyError("a")), b"", tmp_path)
    monkeypatch.setattr(UserError, "__str__", lambda error: "a\n" * 100)
    with pytest.raises(AssertionError, match="more than one screen"):
        fuzz.run_once(target(UserError("a")), b"", tmp_path)


def test_one_value_of_the_json_is_replaced() -> None:
    rng = random.Random(0)
    seen = {fuzz.mutated_json(b'{"a": {"b": [1, 2]}}\n{"c": 3}\n', rng) for _ in range(300)}
    assert len(seen) > 60 and b'{"a": {"b": [1]}}\n{"c": 3}\n' in seen
    assert fuzz.mutated_json(b"{", rng) == b"{"
