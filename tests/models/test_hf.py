import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vdjax import models
from vdjax.errors import UserError
from vdjax.models import hf

GOLDENS = Path(__file__).parent.parent / "data" / "goldens"


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def bits(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def load(directory: Path) -> tuple[models.ModelConfig, dict[str, Any], Any]:
    config = hf.read_config(directory)
    model = models.load_pretrained(directory)
    return model.cfg, config, models.split(model)[1]


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(GOLDENS / name, tmp_path / name))


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDENS.glob("*/config.json")))
@pytest.mark.parametrize("shard_bytes", [5e9, 20e3])
def test_export_is_bit_identical(name: str, shard_bytes: float, tmp_path: Path) -> None:
    cfg, config, params = load(GOLDENS / name)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hf.save(params, cfg, tmp_path, hf_config=config, max_shard_bytes=shard_bytes)
    source, result = read_tensors(GOLDENS / name), read_tensors(tmp_path)
    assert result.keys() == source.keys()
    for tensor, value in source.items():
        assert result[tensor].dtype == value.dtype and result[tensor].shape == value.shape
        np.testing.assert_array_equal(bits(result[tensor]), bits(value), err_msg=tensor)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert models.from_hf(hf.read_config(tmp_path), where="x") == cfg


def test_shards_have_an_index_that_transformers_reads(tmp_path: Path) -> None:
    cfg, config, params = load(GOLDENS / "qwen3_gqa8")
    hf.save(params, cfg, tmp_path, hf_config=config, max_shard_bytes=40e3, metadata={"step": "7"})
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"] == {
        "total_parameters": models.num_params(cfg),
        "total_size": sum(value.nbytes for value in read_tensors(tmp_path).values()),
    }
    for file in files:
        with safetensors.safe_open(tmp_path / file, "np") as opened:
            assert opened.metadata() == {"format": "pt", "step": "7"}
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
            assert sum(sizes) <= 40e3 or len(sizes) == 1
    again = models.split(models.load_pretrained(tmp_path))[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_save_casts_and_keeps_what_is_there(tmp_path: Path) -> None:
    cfg, config, params = load(GOLDENS / "llama_mha")
    hf.save(params, cfg, tmp_path, hf_config=config, dtype=jnp.bfloat16)
    assert hf.read_config(tmp_path)["torch_dtype"] == "bfloat16"
    for name, value in read_tensors(tmp_path).items():
        original = read_tensors(GOLDENS / "llama_mha")[name]
        np.testing.assert_array_equal(value.view(np.uint16), original.astype(ml_dtypes.bfloat16).view(np.uint16))
    with pytest.raises(UserError, match="already holds"):
        hf.save(params, cfg, tmp_path, hf_config=config)
    with pytest.raises(UserError, match="float64"):
        hf.save(params, cfg, tmp_path / "new", hf_config={**config, "torch_dtype": "float64"})


def test_reader_gives_any_slice_in_our_layout() -> None:
    directory = GOLDENS / "qwen3_gqa2"
    cfg, _, params = load(directory)
    reader, tensors = hf.open_reader(directory, cfg), read_tensors(directory)
    up = np.stack([tensors[f"model.layers.{i}.mlp.up_proj.weight"].T for i in range(cfg.num_layers)])
    for index in ((slice(0, 2), slice(3, 9), slice(1, 36)), (slice(1, 2), slice(0, 20), slice(30, 37))):
        part = reader(("layers", "up_proj"), index)
        assert part.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(part, up[index])
    np.testing.assert_array_equal(reader(("embed",), (slice(50, 53), slice(2, 4))), params["embed"][50:53, 2:4])
    norms = reader(("layers", "k_norm"), (slice(0, 2), slice(64, 128)))
    np.testing.assert_array_equal(norms[1], tensors["model.layers.1.self_attn.k_norm.weight"][64:])


def test_large_slices_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, _, params = load(GOLDENS / "llama_gqa8")
    _, shapes = models.abstract(cfg)
    here = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    reader, sizes = hf.open_reader(GOLDENS / "llama_gqa8", cfg), []

    def measured(path: tuple[str, ...], index: tuple[slice, ...]) -> np.ndarray:
        part = reader(path, index)
        sizes.append((part.nbytes, len(part)))
        return part

    monkeypatch.setattr(hf, "READ_BYTES", 2000)
    jax.tree.map(np.testing.assert_array_equal, hf.place(measured, shapes, here), params)
    assert all(size <= 2000 or rows == 1 for size, rows in sizes)


def test_stacked_snapshots_are_the_single_ones() -> None:
    names = ("llama_gqa2", "llama_gqa2", "llama_gqa2")
    cfg, _, params = load(GOLDENS / names[0])
    readers = [hf.open_reader(GOLDENS / name, cfg) for name in names]
    doubled = lambda path, index: 2 * readers[1](path, index).astype(np.float32)  # noqa: E731
    _, shapes = models.abstract(cfg)
    axes = hf.snapshot_axes(shapes)
    assert axes["embed"] == 0 and axes["layers"]["q_proj"] == 1
    here = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    stacked = hf.stack_place([readers[0], doubled, readers[2]], shapes, here)
    for snapshot, factor in enumerate((1, 2, 1)):
        own = jax.tree.map(lambda leaf, axis, i=snapshot: jnp.take(leaf, i, axis), stacked, axes)
        jax.tree.map(lambda a, b, f=factor: np.testing.assert_array_equal(a, f * b), own, params)


def test_eight_devices_read_only_their_own_parts() -> None:
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    root = Path(__file__).parents[2]
    script = Path(__file__).parent / "eight_devices_place.py"
    done = subprocess.run(
        [sys.executable, script, GOLDENS / "llama_gqa2"],
        env=env | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["equal"] and result["stacked_equal"] and result["logit_error"] < 1e-4
    assert result["bytes_read"] == result["bytes_of_model"]
    assert result["largest_read"] <= result["largest_part"] < result["largest_leaf"]


def test_both_copies_of_a_tied_embedding_must_agree(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy("llama_gqa2")
    tensors = read_tensors(directory)
    embed = tensors["model.embed_tokens.weight"]
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(32, np.float32)}
    safetensors.numpy.save_file(tensors | {"lm_head.weight": embed} | inv_freq, directory / "model.safetensors")
    expected = load(GOLDENS / "llama_gqa2")[2]
    jax.tree.map(np.testing.assert_array_equal, load(directory)[2], expected)
    monkeypatch.setattr(hf, "READ_BYTES", 3000)  # the comparison goes by rows too
    jax.tree.map(np.testing.assert_array_equal, load(directory)[2], expected)
    other = embed.copy()
    other[-1, -1] += 1
    safetensors.numpy.save_file(tensors | {"lm_head.weight": other}, directory / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs"):
        load(directory)


def without(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


BROKEN: list[tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = [
    (without("model.norm.weight"), "1 tensors are missing for its config.json: model.norm.weight"),
    (without("lm_head.weight"), "missing.*lm_head.weight"),
    (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.ones(3)}, "unexpected.*q_proj.bias"),
    (lambda t: t | {"model.layers.2.mlp.up_proj.weight": np.ones(3)}, "unexpected.*layers.2.mlp.up_proj"),
    (lambda t: t | {"model.norm.weight": np.ones(13, np.float32)}, r"model.norm.weight has shape \(13,\).*\(12,\)"),
    (lambda t: t | {"model.norm.weight": np.ones(12, np.int8)}, "model.norm.weight has dtype I8"),
    (lambda t: t | {"model.norm.weight": np.ones(12, ml_dtypes.float8_e4m3fn)}, "model.norm.weight has dtype F8"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], message: str, copy: Callable[[str], Path]
) -> None:
    directory = copy("llama_mha")
    safetensors.numpy.save_file(change(read_tensors(directory)), directory / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(directory)


def test_broken_directories_are_named(copy: Callable[[str], Path]) -> None:
    directory = copy("llama_mha")
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        load(directory)
    weights.unlink()
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="neither model.safetensors nor .*pytorch_model.bin"):
        load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: cannot be read as JSON"):
        load(directory)
    with pytest.raises(UserError, match="no such directory"):
        hf.resolve(str(directory / "other"))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../model.safetensors", "..", "", 3])
def test_an_index_cannot_point_out_of_its_directory(name: Any, copy: Callable[[str], Path]) -> None:
    directory = copy("llama_mha")
    names = read_tensors(directory)
    (directory / "model.safetensors").rename(directory.parent / "model.safetensors")
    index = {"weight_map": {tensor: name for tensor in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a safetensors file in this directory"):
        load(directory)


def test_an_index_must_agree_with_its_files(copy: Callable[[str], Path]) -> None:
    directory = copy("llama_mha")
    names = read_tensors(directory)
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    jax.tree.map(np.testing.assert_array_equal, load(directory)[2], load(GOLDENS / "llama_mha")[2])
    index_file.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "lm_tail"], "part.safetensors")}))
    with pytest.raises(UserError, match="lm_tail should be in part.safetensors"):
        load(directory)
    index_file.write_text(json.dumps({"weight_map": dict.fromkeys(names, "gone.safetensors")}))
    with pytest.raises(UserError, match="gone.safetensors: cannot be read"):
        load(directory)
    index_file.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(UserError, match="weight_map must name"):
        load(directory)


def test_hub_ids_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append((name, revision))
        assert "*.safetensors" in allow_patterns and "*.bin" not in allow_patterns
        if name == "who/gone":
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        return str(GOLDENS / "llama_mha")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.load_pretrained("who/what", revision="abc").cfg.family == "llama"
    assert calls == [("who/what", "abc")]
    with pytest.raises(UserError, match="who/gone.*offline"):
        hf.resolve("who/gone")
