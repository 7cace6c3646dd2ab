"""The decoder of both families: layer-stacked parameters, packed rows in, hidden states out."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from vdjax.errors import UserError
from vdjax.models.attention import apply_rope, attention, rope_tables
from vdjax.models.config import ModelConfig
from vdjax.models.elementwise import gated, rms_norm
from vdjax.models.lora import Lora
from vdjax.models.products import matmul, matmul_by_rows
from vdjax.sharding import constrain, parts_of

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]

INIT_STDDEV = 0.02
LINEAR = "linear"  # name of the results that remat="dots" keeps
SUM_PARTS = 4  # of the sums over a kernel's inputs when `Transformer.logits` computes in float32: half the rounding


def product(
    x: Float[Array, "*rows inner"], kernel: Float[Array, "inner outer"], parts: int
) -> Float[Array, "*rows outer"]:
    """x @ kernel, with the sum over `inner` taken in `parts` parts: more of them round less and take longer."""
    pieces = zip(jnp.array_split(x, parts, axis=-1), jnp.array_split(kernel, parts, axis=0), strict=True)
    return sum((matmul(a, b) for a, b in pieces), start=jnp.zeros((), x.dtype))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike, axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param((INIT_STDDEV * jax.random.normal(rngs.params(), shape)).astype(dtype), axes=axes)


def _low_rank(rngs: nnx.Rngs, kernel: nnx.Param, rank: int) -> tuple[nnx.Param, nnx.Param]:
    """A uniform in +-1/sqrt(inputs) and B zero, as peft makes them; float32 whatever the kernel's dtype is."""
    (inputs, outputs), (input_axis, output_axis) = kernel.shape, kernel.get_metadata("axes")
    a = jax.random.uniform(rngs.params(), (inputs, rank), minval=-1, maxval=1) * inputs**-0.5
    return nnx.Param(a, axes=(input_axis, "rank")), nnx.Param(jnp.zeros((rank, outputs)), axes=("rank", output_axis))


def _ones(size: int, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.ones(size, dtype), axes=("norm",))


class Layer(nnx.Module):
    """One decoder layer: attention, then a gated MLP, each after an RMSNorm and added to the residual stream."""

    def __init__(
        self,
        cfg: ModelConfig,
        query_chunk: int,
        kernels: bool,
        dtype: DTypeLike,
        lora: Lora | None,
        rngs: nnx.Rngs,
    ):
        self.cfg, self.query_chunk, self.kernels, self.lora = cfg, query_chunk, kernels, lora
        self.product = matmul  # of rows and a kernel; set anew where kernels are kept, or sums taken, in another way
        width, heads, kv_heads = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.attention_norm = _ones(width, dtype)
        self.q_proj = _normal(rngs, (width, heads), dtype, ("embed", "heads"))
        self.k_proj = _normal(rngs, (width, kv_heads), dtype, ("embed", "kv_heads"))
        self.v_proj = _normal(rngs, (width, kv_heads), dtype, ("embed", "kv_heads"))
        self.o_proj = _normal(rngs, (heads, width), dtype, ("heads", "embed"))
        if cfg.qk_norm:
            self.q_norm, self.k_norm = _ones(cfg.head_dim, dtype), _ones(cfg.head_dim, dtype)
        self.mlp_norm = _ones(width, dtype)
        self.gate_proj = _normal(rngs, (width, cfg.intermediate_size), dtype, ("embed", "mlp"))
        self.up_proj = _normal(rngs, (width, cfg.intermediate_size), dtype, ("embed", "mlp"))
        self.down_proj = _normal(rngs, (cfg.intermediate_size, width), dtype, ("mlp", "embed"))
        if lora:
            for name in lora.targets:
                a, b = _low_rank(rngs, getattr(self, name), lora.rank)
                setattr(self, f"{name}_lora_a", a)
                setattr(self, f"{name}_lora_b", b)

    def linear(self, x: Float[Array, "batch length inner"], name: str) -> Float[Array, "batch length outer"]:
        """x times the kernel `name`, with its adapter where there is one."""
        # Rows and their places in one axis could not be spread over devices both.
        rows = x if parts_of("length", x.shape[1]) > 1 else x.reshape(-1, x.shape[-1])
        kernel = getattr(self, name)[...].astype(x.dtype)
        out = self.product(rows, kernel)
        if self.lora and name in self.lora.targets:
            a, b = (getattr(self, f"{name}_lora_{side}")[...].astype(x.dtype) for side in "ab")
            out += matmul(matmul(rows, a), b) * (self.lora.alpha / self.lora.rank)
        return checkpoint_name(out, LINEAR).reshape(*x.shape[:-1], -1)

    def attention_inputs(
        self, x: Float[Array, "batch length width"], cos: Array, sin: Array
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values [batch, length, heads, dim], normed and rotated."""
        cfg = self.cfg

        def heads(name: str, axis: str) -> Array:
            out = self.linear(normed, name).reshape(*x.shape[:2], -1, cfg.head_dim)
            return constrain(out, ("batch", "length", axis, None))

        normed = rms_norm(x, self.attention_norm[...], cfg.rms_norm_eps)
        q, k, v = heads("q_proj", "heads_act"), heads("k_proj", "kv_heads_act"), heads("v_proj", "kv_heads_act")
        if cfg.qk_norm:
            q = rms_norm(q, self.q_norm[...], cfg.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], cfg.rms_norm_eps)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def attention(self, q: Array, k: Array, v: Array, *ids: Any) -> Float[Array, "batch length heads dim"]:
        return attention(q, k, v, *ids, query_chunk=self.query_chunk, kernels=self.kernels)

    def after_attention(
        self, x: Float[Array, "batch length width"], mixed: Float[Array, "batch length heads dim"]
    ) -> Float[Array, "batch length width"]:
        """The layer's output from its input and what its heads have mixed."""
        mixed = self.linear(mixed.reshape(*x.shape[:2], -1), "o_proj")
        x = constrain(x + mixed, ("batch", "length", "embed_act"))
        normed = rms_norm(x, self.mlp_norm[...], self.cfg.rms_norm_eps)
        inner = gated(self.linear(normed, "gate_proj"), self.linear(normed, "up_proj"))
        inner = constrain(inner, ("batch", "length", "mlp_act"))
        return constrain(x + self.linear(inner, "down_proj"), ("batch", "length", "embed_act"))

    def __call__(
        self, x: Float[Array, "batch length width"], cos: Array, sin: Array, ids: tuple[Any, ...]
    ) -> Float[Array, "batch length width"]:
        q, k, v = self.attention_inputs(x, cos, sin)
        return self.after_attention(x, self.attention(q, k, v, *ids))


class Transformer(nnx.Module):
    """A Llama-3 or Qwen-3 decoder.

    Parameters of all layers are stacked on a leading axis under `layers`; kernels are [layers, in, out]. `embed`
    and, where embeddings are not tied, `lm_head` are [vocab, width]. Each `nnx.Param` carries the logical names of
    its axes (without the layer axis) as metadata `axes`.

    Args:
      cfg: the shape.
      rngs: stream `params` makes the initial values, normal with deviation 0.02; norms are 1.
      param_dtype: dtype the parameters are kept in.
      compute_dtype: dtype of activations and matrix products; norms, rope, softmax and logits are float32.
      remat: what a layer recomputes in the backward pass: nothing, all but matrix products ("dots"), all ("full").
      unroll: layers per iteration of the layer loop; True unrolls it whole.
      query_chunk, kernels: how attention is computed (`vdjax.models.attention.attention`).
      lora: adapters of the layers' kernels, parameters NAME_lora_a and NAME_lora_b beside NAME; None: no adapters.
      head: "vocab", or "score" for a reward or value model: a `score` [width] in place of `lm_head`.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
        remat: Remat = "none",
        unroll: int | bool = 1,
        query_chunk: int = 0,
        kernels: bool = False,
        lora: Lora | None = None,
        head: Literal["vocab", "score"] = "vocab",
    ):
        if remat not in ("none", "dots", "full"):
            raise UserError(f"remat is {remat!r}; valid: none, dots, full")
        self.cfg = cfg
        self.compute_dtype = np.dtype(compute_dtype)
        self.remat = remat
        self.unroll = unroll
        table = (cfg.vocab_size, cfg.hidden_size)
        self.embed = _normal(rngs, table, param_dtype, ("vocab", "embed"))

        @nnx.split_rngs(splits=cfg.num_layers)
        @nnx.vmap
        def make_layers(rngs: nnx.Rngs) -> Layer:
            return Layer(cfg, query_chunk, kernels, param_dtype, lora, rngs)

        self.layers = make_layers(rngs)
        self.final_norm = _ones(cfg.hidden_size, param_dtype)
        if head == "score":
            self.score = nnx.Param(jnp.zeros(cfg.hidden_size, param_dtype), axes=("norm",))
        elif not cfg.tie_embeddings:
            self.lm_head = _normal(rngs, table, param_dtype, ("vocab", "embed"))

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"],
        sequence_ids: Int[Array, "batch length"] | None = None,
        prefix: Bool[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Hidden states after the final norm, in the compute dtype.

        Args:
          tokens: token ids.
          positions: rope positions; they need not follow the order of the row.
          segment_ids: 0 is padding; tokens see only their own segment (`vdjax.models.attention.visible`).
          sequence_ids: within a segment 0 is the shared prompt, other ids are responses blind to each other; None
            is all 0.
          prefix: true at tokens that all behind them in the row see; None is nowhere.
        """
        sequence_ids = jnp.zeros_like(segment_ids) if sequence_ids is None else sequence_ids
        x = self.embedded(tokens)
        cos, sin = rope_tables(self.cfg, constrain(positions, ("batch", "length")))
        graphdef, stacked = nnx.split(self.layers)

        def apply_layer(x: Array, params: Params) -> tuple[Array, None]:
            return nnx.merge(graphdef, params)(x, cos, sin, (segment_ids, sequence_ids, prefix)), None

        if self.remat != "none":
            policies = jax.checkpoint_policies
            policy = policies.nothing_saveable if self.remat == "full" else policies.save_only_these_names(LINEAR)
            # Without a loop between the forward and the recomputed layer XLA would merge the two.
            apply_layer = jax.checkpoint(apply_layer, policy=policy, prevent_cse=self.unroll is True)
        x, _ = jax.lax.scan(apply_layer, x, self.in_compute_dtype(nnx.to_pure_dict(stacked)), unroll=self.unroll)
        return rms_norm(x, self.final_norm[...], self.cfg.rms_norm_eps)

    def in_compute_dtype(self, stacked: Params) -> Params:
        """The stacked kernels as products take them; converted in the layer loop they would be kept once more."""
        return {name: p if name.endswith("norm") else p.astype(self.compute_dtype) for name, p in stacked.items()}

    def embedded(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """The embeddings of tokens, in the compute dtype."""
        tokens = constrain(tokens, ("batch_looked_up", None))
        x = jnp.take(self.embed[...], tokens, axis=0).astype(self.compute_dtype)
        # From the table's layout one mesh axis at a time: else each device would get the rows of all.
        x = constrain(x, ("batch_looked_up", None, "embed"))
        x = constrain(x, ("batch_looked_up", "length", "width_looked_up"))
        return constrain(x, ("batch", "length", "embed_act"))

    def scores(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch"]:
        """Float32 scores (rewards or values) of hidden states, of a model with the head "score"."""
        return hidden.astype(jnp.float32) @ self.score[...].astype(jnp.float32)

    @property
    def table(self) -> Float[Array, "vocab width"]:
        """The vocabulary head, in the dtype parameters are kept in."""
        return (self.embed if self.cfg.tie_embeddings else self.lm_head)[...]

    def project(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Float32 logits of hidden states: inputs in the compute dtype, sums in float32."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        return matmul_by_rows(rows, self.table.astype(hidden.dtype), jnp.float32).reshape(*hidden.shape[:-1], -1)

    def logits(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Float32 logits of whole rows, for tests and notebooks; training never makes this array.

        Args:
          tokens: token ids.
          positions: by default 0, 1, ... from the start of each segment.
          segment_ids: packed documents, 0 is padding; by default each row is one document.

        Raises:
          UserError: tokens are not [batch, length], or not ids of the vocabulary.
        """
        if np.ndim(tokens) != 2:
            raise UserError(f"tokens must have the shape [batch, length], not {np.shape(tokens)}")
        if not isinstance(tokens, jax.core.Tracer) and np.size(tokens):
            low, high = np.min(tokens), np.max(tokens)
            if low < 0 or high >= self.cfg.vocab_size:
                raise UserError(f"token ids must be in [0, {self.cfg.vocab_size}), but are in [{low}, {high}]")
        tokens = jnp.asarray(tokens)
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids)
        positions = segment_positions(segment_ids) if positions is None else jnp.asarray(positions)
        graphdef, params = split(self)
        return _logits(graphdef, params, tokens, positions, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, params: Params, tokens: Array, positions: Array, segment_ids: Array) -> Array:
    model = nnx.merge(graphdef, params)
    if model.compute_dtype != jnp.float32:
        return model.project(model(tokens, positions, segment_ids))
    # Nobody waits for these logits, but they are compared: make them as good as float32 can be on any device.
    with jax.default_matmul_precision("highest"):
        model.layers.product = functools.partial(product, parts=SUM_PARTS)
        hidden = model(tokens, positions, segment_ids)
        rows = product(hidden.reshape(-1, hidden.shape[-1]), model.table.astype(jnp.float32).T, SUM_PARTS)
    return rows.reshape(*tokens.shape, -1)


def segment_positions(segment_ids: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Positions that count from 0 at the start of each run of one segment id."""
    index = jnp.arange(segment_ids.shape[1])
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def split(model: Transformer) -> tuple[nnx.GraphDef, Params]:
    """The static part of a model and its parameters as a nested dict; `nnx.merge` takes them back."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def abstract(cfg: ModelConfig, **options: Any) -> tuple[nnx.GraphDef, Params]:
    """Like `split` of a new `Transformer(cfg, **options)`, with shapes and dtypes in place of arrays."""
    graphdef, params = split(_abstract_model(cfg, **options))
    # Without the shardings of the mesh that the first caller was under.
    return graphdef, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def param_axes(cfg: ModelConfig, **options: Any) -> Params:
    """Logical axis names of every parameter, in a tree like `params`; stacked ones begin with `layer`."""
    _, state = nnx.split(_abstract_model(cfg, **options))

    def axes(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[str, ...]:
        names = variable.get_metadata("axes")
        return ("layer", *names) if path[0] == "layers" else names

    return nnx.to_pure_dict(nnx.map_state(axes, state))


def init_params(cfg: ModelConfig, *, seed: int, param_dtype: DTypeLike = jnp.float32, shardings: Any = None) -> Params:
    """Seeded initial parameters, made where `shardings` (a tree like `params`) puts them."""

    flat, tree = jax.tree.flatten(shardings)
    return _initializer(cfg, jnp.dtype(param_dtype), tree, tuple(flat))(jax.random.key(seed))


@functools.cache
def _initializer(cfg: ModelConfig, param_dtype: jnp.dtype, tree: Any, shardings: tuple[Any, ...]) -> Any:
    def make(key: Array) -> Params:
        return split(Transformer(cfg, rngs=nnx.Rngs(params=key), param_dtype=param_dtype))[1]

    return jax.jit(make, out_shardings=jax.tree.unflatten(tree, shardings))


# Tracing takes a tenth of a second, and every snapshot that is opened needs it. Typed, for 1 and True are equal.
@functools.lru_cache(maxsize=None, typed=True)
def _abstract_model(cfg: ModelConfig, **options: Any) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), **options))
