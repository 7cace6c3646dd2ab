"""Hugging Face checkpoints: safetensors slices straight into sharded parameters, and back."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from vdjax.errors import UserError
from vdjax.files import as_path, check_no_model, local_copy, read_object
from vdjax.models.config import ModelConfig
from vdjax.models.transformer import Params, abstract

ParamPath = tuple[str, ...]
Index = tuple[slice, ...]
Reader = Callable[[ParamPath, Index], np.ndarray]
Source = tuple[Any, int | None]  # a parameter and, of a stacked one, the layer

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ALIGNMENT = 64  # bytes, of arrays on CPU
READERS = min(8, os.cpu_count() or 1)  # parts of a parameter that are read at once
READ_BYTES = 64 * 2**20  # a slice larger than this is read in parts

# Our parameter -> Hugging Face tensor. Those of a layer are [in, out] here and [out, in] there.
TENSORS: dict[ParamPath, str] = {
    ("embed",): "model.embed_tokens.weight",
    ("layers", "q_proj"): "model.layers.{}.self_attn.q_proj.weight",
    ("layers", "k_proj"): "model.layers.{}.self_attn.k_proj.weight",
    ("layers", "v_proj"): "model.layers.{}.self_attn.v_proj.weight",
    ("layers", "o_proj"): "model.layers.{}.self_attn.o_proj.weight",
    ("layers", "q_norm"): "model.layers.{}.self_attn.q_norm.weight",
    ("layers", "k_norm"): "model.layers.{}.self_attn.k_norm.weight",
    ("layers", "gate_proj"): "model.layers.{}.mlp.gate_proj.weight",
    ("layers", "up_proj"): "model.layers.{}.mlp.up_proj.weight",
    ("layers", "down_proj"): "model.layers.{}.mlp.down_proj.weight",
    ("layers", "attention_norm"): "model.layers.{}.input_layernorm.weight",
    ("layers", "mlp_norm"): "model.layers.{}.post_attention_layernorm.weight",
    ("final_norm",): "model.norm.weight",
    ("lm_head",): "lm_head.weight",
    ("score",): "score.weight",  # [width] here and [1, width] there
}


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The local directory of a model: an existing directory as it is, else a download from the bucket or the hub.

    Raises:
      UserError: neither a directory nor a model that the hub gives out.
    """
    directory = as_path(path_or_id)
    if directory.is_dir():
        return local_copy(directory)
    name = str(path_or_id)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such directory")
    files = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=["*/*"])
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(f"{name}: neither a directory nor a model that the hub gives out: {error}") from error


def fetch_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """The dict of the config.json of a directory or hub id, without its weights.

    Raises:
      UserError: neither a directory nor a model that the hub gives out.
    """
    directory = as_path(name)
    if directory.is_dir():
        return read_config(directory)
    try:
        return read_object(Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(f"{name}: neither a directory nor a model that the hub gives out: {error}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The dict of a model directory's config.json."""
    return read_object(directory / "config.json")


def open_reader(directory: Path, cfg: ModelConfig, head: Literal["vocab", "score"] = "vocab") -> Reader:
    """Checks every tensor of a checkpoint and returns a function that reads any slice of a parameter.

    The reader takes a parameter's path in `params` and one slice an axis, in our layout (layers stacked, [in, out]),
    and returns that slice in the dtype of the file; it reads nothing else and holds no file open.

    Args:
      head: "score" reads a sequence-classification checkpoint of one label, a reward model (`Transformer`).

    Raises:
      UserError: a tensor is missing, unexpected, misshapen or of another dtype than float32, float16 or bfloat16; an
        index or file is broken; a tied model holds an lm_head that differs from its embedding.
    """
    files = _tensor_files(directory)
    _check_tensors(directory, files, tensor_shapes(cfg, head), cfg.tie_embeddings and head == "vocab")

    def read_tensor(name: str, index: Index) -> np.ndarray:
        # Opened anew for each slice: a kept mapping would count all that was ever read as this process's memory.
        with safetensors.safe_open(files[name], "np") as file:
            return file.get_slice(name)[index]

    def read(path: ParamPath, index: Index) -> np.ndarray:
        if path == ("score",):
            return read_tensor(TENSORS[path], (slice(0, 1), *index))[0]
        if path[0] != "layers":
            return read_tensor(TENSORS[path], index)
        layers = range(cfg.num_layers)[index[0]]
        parts = [read_tensor(TENSORS[path].format(i), index[:0:-1]).T for i in layers]
        return parts[0][None] if len(parts) == 1 else np.stack(parts)

    return read


def tensor_shapes(cfg: ModelConfig, head: Literal["vocab", "score"] = "vocab") -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in _leaves(abstract(cfg, head=head)[1]):
        if path[0] == "layers":
            shapes |= {TENSORS[path].format(i): leaf.shape[:0:-1] for i in range(cfg.num_layers)}
        else:
            shapes[TENSORS[path]] = (1, *leaf.shape) if path == ("score",) else leaf.shape
    return shapes


def place(reader: Reader, abstract_params: Params, shardings: Params) -> Params:
    """Parameters read into their shardings: each device's part is read, cast and put there before the next is read.

    Args:
      reader: from `open_reader`.
      abstract_params: shapes and dtypes, from `vdjax.models.transformer.abstract`.
      shardings: the same tree of shardings.
    """

    def load(path: ParamPath, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        def read_part(bounds: Index) -> np.ndarray:
            out = _empty(bounds, leaf.dtype)
            _read_into(out, reader, path, bounds)
            return out

        return _place_parts(leaf.shape, sharding, read_part)

    return _map_leaves(load, abstract_params, shardings)


def stack_place(readers: Sequence[Reader], abstract_params: Params, shardings: Params) -> Params:
    """Like `place` for several checkpoints of one shape, with a snapshot axis where `snapshot_axes` says.

    Args:
      shardings: of the stacked parameters, the snapshot axis included.
    """

    def load(path: ParamPath, leaf: jax.ShapeDtypeStruct, axis: int, sharding: jax.sharding.Sharding) -> jax.Array:
        def read_part(bounds: Index) -> np.ndarray:
            out = _aligned(bounds, leaf.dtype)
            snapshots = range(bounds[axis].start, bounds[axis].stop)
            for snapshot, own in zip(snapshots, np.moveaxis(out, axis, 0), strict=True):
                _read_into(own, readers[snapshot], path, bounds[:axis] + bounds[axis + 1 :])
            return out

        return _place_parts((*leaf.shape[:axis], len(readers), *leaf.shape[axis:]), sharding, read_part)

    return _map_leaves(load, abstract_params, snapshot_axes(abstract_params), shardings)


def snapshot_axes(params: Params) -> Params:
    """Position of the snapshot axis of every leaf: after `layer` where layers are stacked, else first."""
    return _map_leaves(lambda path, _: 1 if path[0] == "layers" else 0, params)


def save(
    params: Params,
    cfg: ModelConfig,
    out_dir: Path,
    *,
    hf_config: Mapping[str, Any],
    dtype: DTypeLike | None = None,
    max_shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes config.json and safetensors shards that transformers loads; a shard at a time is in host memory.

    All processes must call it; the first one writes. With the dtype of the checkpoint that `params` came from, the
    tensors are bit for bit those of that checkpoint. Tied models write no lm_head, reward models `score` in its place.

    Args:
      hf_config: config.json; its dtype field is set to `dtype`.
      dtype: of the tensors; None takes the dtype that `hf_config` names, else that of `params`.
      max_shard_bytes: a shard is at most this large, or holds a single tensor.
      metadata: of each safetensors file, beside the `format` that transformers asks for.

    Raises:
      UserError: `out_dir` already holds a model, or its dtype is not float32, float16 or bfloat16.
    """
    own = hf_config.get("dtype") or hf_config.get("torch_dtype") or params["embed"].dtype
    name = str(own if dtype is None else jnp.dtype(dtype))
    if name not in DTYPES.values():
        raise UserError(f"{out_dir}: dtype {name} is not one of {', '.join(DTYPES.values())}")
    out_dtype = jnp.dtype(name)
    sources = list(_export_order(params, cfg))
    shards = _shards(sources, out_dtype.itemsize, max_shard_bytes)
    writes = jax.process_index() == 0
    if writes:
        check_no_model(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: fetch(source, out_dtype) for name, source in shard}
        weight_map |= dict.fromkeys(tensors, file)
        if writes:
            safetensors.numpy.save_file(tensors, out_dir / file, {"format": "pt", **(metadata or {})})
        del tensors
    if not writes:
        return
    if len(shards) > 1:
        size = sum(_export_size(source) for _, source in sources)
        totals = {"total_parameters": size, "total_size": size * out_dtype.itemsize}
        write_json(out_dir / INDEX_FILE, {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))})
    key = "dtype" if "dtype" in hf_config else "torch_dtype"
    write_json(out_dir / "config.json", {**hf_config, key: out_dtype.name})


def _export_order(params: Params, cfg: ModelConfig) -> Iterator[tuple[str, Source]]:
    """Tensor names in the order of transformers' state dict, each with a parameter and, if stacked, its layer."""
    yield TENSORS["embed",], (params["embed"], None)
    for layer in range(cfg.num_layers):
        for path, name in TENSORS.items():
            if path[0] == "layers" and path[1] in params["layers"]:
                yield name.format(layer), (params["layers"][path[1]], layer)
    yield TENSORS["final_norm",], (params["final_norm"], None)
    if "score" in params:
        yield TENSORS["score",], (params["score"][None], None)
    elif not cfg.tie_embeddings:
        yield TENSORS["lm_head",], (params["lm_head"], None)


def _export_size(source: Source) -> int:
    leaf, layer = source
    return math.prod(leaf.shape if layer is None else leaf.shape[1:])


def fetch(source: Source, dtype: np.dtype) -> np.ndarray:
    """A tensor in Hugging Face layout on this host."""
    leaf, layer = source
    value = leaf if layer is None else leaf[layer]
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    host = np.asarray(value)
    return np.ascontiguousarray(host if layer is None else host.T, dtype)


def _shards(sources: list[tuple[str, Source]], itemsize: int, max_bytes: float) -> list[list[tuple[str, Source]]]:
    shards: list[list[tuple[str, Source]]] = []
    room = 0.0
    for name, source in sources:
        size = _export_size(source) * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append((name, source))
        room -= size
    return shards


def _place_parts(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, read_part: Callable[[Index], np.ndarray]
) -> jax.Array:
    """A global array of parts, each read once for all devices that hold it and let go before the next is read."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        part = read_part(tuple(slice(*b) for b in bounds))
        arrays += [jax.device_put(part, device).block_until_ready() for device in holders]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _empty(bounds: Index, dtype: DTypeLike) -> np.ndarray:
    return np.empty([b.stop - b.start for b in bounds], jnp.dtype(dtype))


def _aligned(bounds: Index, dtype: DTypeLike) -> np.ndarray:
    """Like `_empty`, where JAX on CPU takes the memory as it is, without a copy: for arrays that no program is given to
    change in place."""
    shape = [b.stop - b.start for b in bounds]
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(jnp.dtype(dtype)).reshape(shape)


def _read_into(out: np.ndarray, reader: Reader, path: ParamPath, bounds: Index) -> None:
    """Fills `out` with a slice of a parameter, READERS parts at once: the layers of a stacked kernel, of others at most
    about READ_BYTES (or one row)."""
    rows = 1 if out.ndim == 3 else max(1, READ_BYTES * len(out) // max(out.nbytes, 1))

    def fill(start: int) -> None:
        first = bounds[0].start + start
        stop = min(first + rows, bounds[0].stop)
        out[start : start + rows] = reader(path, (slice(first, stop), *bounds[1:]))

    with ThreadPoolExecutor(READERS) as pool:  # transposing a kernel takes longer than reading it
        list(pool.map(fill, range(0, len(out), rows)))


def _leaves(params: Params, prefix: ParamPath = ()) -> Iterator[tuple[ParamPath, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _leaves(dict(value), (*prefix, name))
        else:
            yield (*prefix, name), value


def _map_leaves(function: Callable[..., Any], params: Params, *others: Params) -> Params:
    """Like `jax.tree.map`, but the function also takes each leaf's path, as a tuple of names, in front."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(tuple(key.key for key in path), *leaves), params, *others
    )


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        other = ", ".join(sorted(f.name for f in directory.glob("*.bin"))[:3])
        found = f"; it holds {other}, a format that vdjax does not read" if other else ""
        raise UserError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE}{found}")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must name the file of each tensor")
    stored: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map[{tensor!r}] is {name!r}, not a safetensors file in this directory")
        if name not in stored:
            with _open(directory / name) as file:
                stored[name] = set(file.keys())
        if tensor not in stored[name]:
            raise UserError(f"{index}: {tensor} should be in {name}, but is not")
    return {tensor: directory / name for tensor, name in weight_map.items()}


def _check_tensors(directory: Path, files: dict[str, Path], shapes: dict[str, tuple[int, ...]], tied: bool) -> None:
    # Old Llama checkpoints store rope frequencies, which follow from config.json; some tied ones store the head twice.
    extra = {name for name in files if name not in shapes and not name.endswith(".rotary_emb.inv_freq")}
    embed, head = TENSORS["embed",], TENSORS["lm_head",]
    if tied and head in extra and embed in files:
        _check_tied(files[embed], files[head])
        extra.remove(head)
    for kind, names in (("missing", shapes.keys() - files.keys()), ("unexpected", extra)):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(f"{directory}: {len(names)} tensors are {kind} for its config.json: {listed}")
    for path in sorted(set(files.values())):
        with _open(path) as file:
            for name in sorted(shapes.keys() & set(file.keys())):
                tensor = file.get_slice(name)
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if shape != shapes[name]:
                    raise UserError(f"{path}: {name} has shape {shape}, but config.json makes it {shapes[name]}")
                if dtype not in DTYPES:
                    raise UserError(f"{path}: {name} has dtype {dtype}; supported: {', '.join(DTYPES)}")


def _check_tied(embed_file: Path, head_file: Path) -> None:
    with _open(embed_file) as one, _open(head_file) as other:
        embed, head = one.get_slice(TENSORS["embed",]), other.get_slice(TENSORS["lm_head",])
        shape = embed.get_shape()
        rows = max(1, READ_BYTES // (4 * max(math.prod(shape[1:]), 1)))
        same = shape == head.get_shape() and all(
            np.array_equal(embed[i : min(i + rows, shape[0])], head[i : min(i + rows, shape[0])])
            for i in range(0, shape[0], rows)
        )
    if not same:
        raise UserError(
            f"{head_file}: lm_head.weight differs from model.embed_tokens.weight, although config.json says "
            "tie_word_embeddings; set it to false"
        )


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, "np")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
