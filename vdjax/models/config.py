"""Model shapes: from a Hugging Face config.json (every field is used or refused), to one, or by name."""

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from vdjax.errors import UserError, nearest
from vdjax.models import llama3, qwen3
from vdjax.models.llama3 import RopeScaling

FAMILIES: dict[str, ModuleType] = {llama3.FAMILY: llama3, qwen3.FAMILY: qwen3}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields of both families with the one value that leaves the numbers as vdjax computes them.
ONLY_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
}

# Fields that change no logit: names, ids, how transformers runs and generates.
NEUTRAL_FIELDS = _names("""
    _name_or_path name_or_path _commit_hash torch_dtype dtype transformers_version transformers.js_config
    unsloth_version unsloth_fixed use_cache initializer_range bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id tokenizer_class is_decoder return_dict output_hidden_states output_attentions
    _attn_implementation attn_implementation _attn_implementation_autoset gradient_checkpointing torchscript
    use_bfloat16 tf_legacy_loss tie_encoder_decoder id2label label2id num_labels problem_type finetuning_task
    task_specific_params prefix max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
""")

USED_FIELDS = _names("""
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings
    tie_word_embeddings layer_types
""")

MOE_FIELDS = _names("""
    num_experts num_local_experts num_experts_per_tok n_routed_experts n_shared_experts moe_intermediate_size
    decoder_sparse_step mlp_only_layers norm_topk_prob router_aux_loss_coef output_router_logits
""")


# What only a mistake in a config.json goes beyond: more layers or parameters than anyone has trained.
MOST_LAYERS, MOST_PARAMETERS = 10_000, 10**14


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder: everything that, with the parameters, decides its logits."""

    family: Literal["llama", "qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_embeddings: bool
    qk_norm: bool


def named(name: str) -> ModelConfig:
    """The shape of a published model, such as `llama3.1-8b` or `qwen3-4b`, without any file.

    Raises:
      UserError: no such name.
    """
    shapes = {**llama3.SHAPES, **qwen3.SHAPES}
    if name not in shapes:
        raise UserError(f"no model is named {name!r}{nearest(name, shapes)}")
    return ModelConfig(**shapes[name])


def published(hub_id: str) -> ModelConfig | None:
    """The shape of a hub id such as meta-llama/Llama-3.1-8B-Instruct or Qwen/Qwen3-4B-Base, if it is one of `named`."""
    name = hub_id.rpartition("/")[2].lower().removeprefix("meta-").replace("llama-3", "llama3")
    name = re.sub(r"-(base|instruct)$", "", name)
    shapes = {**llama3.SHAPES, **qwen3.SHAPES}
    return ModelConfig(**shapes[name]) if name in shapes else None


def num_params(cfg: ModelConfig) -> int:
    """Parameters of the model; tied embeddings count once."""
    heads_width, kv_width = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    attention = cfg.hidden_size * (2 * heads_width + 2 * kv_width)
    norms = 2 * cfg.hidden_size + (2 * cfg.head_dim if cfg.qk_norm else 0)
    layer = attention + 3 * cfg.hidden_size * cfg.intermediate_size + norms
    tables = cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_embeddings else 2)
    return tables + cfg.num_layers * layer + cfg.hidden_size


def from_hf(
    config: Mapping[str, Any],
    *,
    where: str,
    ignore_fields: Collection[str] = (),
    head: Literal["vocab", "score"] = "vocab",
) -> ModelConfig:
    """Reads the dict of a config.json of `LlamaForCausalLM` or `Qwen3ForCausalLM`, or of a reward model of their kind.

    A field that is missing takes the default of transformers; a field that is null counts as missing. Both ways to
    write rope are read: `rope_theta` with `rope_scaling`, and `rope_parameters`.

    Args:
      config: the parsed config.json.
      where: its path, for messages.
      ignore_fields: unknown fields that, as the caller knows, do not change the numbers.
      head: "score" asks for `LlamaForSequenceClassification` or `Qwen3ForSequenceClassification` with one label.

    Raises:
      UserError: a field is unknown, asks for what vdjax does not compute, or is impossible; a reward model where a
        language model is asked for, or the reverse.
    """
    fields = {name: value for name, value in config.items() if value is not None}
    family = _family(fields, where, head)
    _check_fields(fields, family, where, ignore_fields)

    def size(name: str, default: int | None = None) -> int:
        return _size(fields, name, default, where)

    hidden_size, num_heads = size("hidden_size"), size("num_attention_heads")
    theta, scaling = _rope(fields, where)
    cfg = ModelConfig(
        family=family.FAMILY,
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=size("num_key_value_heads", num_heads),
        head_dim=size("head_dim", family.default_head_dim(hidden_size, num_heads)),
        rms_norm_eps=_positive(fields, "rms_norm_eps", 1e-6, where),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=size("max_position_embeddings", family.DEFAULT_MAX_POSITIONS),
        tie_embeddings=_flag(fields, "tie_word_embeddings", where),
        qk_norm=family is qwen3,
    )
    return check(cfg, where)


def check(cfg: ModelConfig, where: str) -> ModelConfig:
    """Returns `cfg` if its sizes fit together.

    Raises:
      UserError: they do not.
    """
    if cfg.num_heads % cfg.num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads ({cfg.num_heads}) must be a multiple of num_key_value_heads "
            f"({cfg.num_kv_heads})"
        )
    if cfg.num_layers > MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers is {cfg.num_layers}, expected at most {MOST_LAYERS}")
    if num_params(cfg) > MOST_PARAMETERS:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        sizes = ", ".join(f"{name} {getattr(cfg, name)}" for name in names)
        most = f"{num_params(cfg):.1e} parameters, expected at most {MOST_PARAMETERS:.0e}"
        raise UserError(f"{where}: makes {most}: {sizes}")
    if cfg.head_dim % 2:
        raise UserError(f"{where}: head_dim must be even for rope, but is {cfg.head_dim}")
    if cfg.rope_scaling and cfg.rope_scaling.high_freq_factor <= cfg.rope_scaling.low_freq_factor:
        raise UserError(f"{where}: rope: high_freq_factor must be greater than low_freq_factor")
    return cfg


def to_hf(
    cfg: ModelConfig,
    *,
    dtype: str,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """A config.json of a language model, as published models have it, for a model that vdjax made."""
    family = FAMILIES[cfg.family]
    rope = None if cfg.rope_scaling is None else {"rope_type": "llama3", **vars(cfg.rope_scaling)}
    return {
        "architectures": [family.ARCHITECTURE],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_position_embeddings,
        "model_type": cfg.family,
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "pad_token_id": pad_token_id,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_scaling": rope,
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": cfg.vocab_size,
        **family.ONLY_VALUES,
    }


def scoring(config: Mapping[str, Any], pad_token_id: int) -> dict[str, Any]:
    """A language model's config.json as that of the reward model with the same shape (`from_hf` with head "score").

    Args:
      pad_token_id: transformers scores the last token that is another; it must be none that ends what is scored.
    """
    labels: dict[str, Any] = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": pad_token_id}
    (language,) = config["architectures"]
    reward = {module.ARCHITECTURE: module.SCORE_ARCHITECTURE for module in FAMILIES.values()}
    kept = {name: value for name, value in config.items() if name not in ("num_labels", "problem_type")}
    return {**kept, **labels, "architectures": [reward[language]]}


def _family(fields: Mapping[str, Any], where: str, head: str) -> ModuleType:
    language = {module.ARCHITECTURE: module for module in FAMILIES.values()}
    reward = {module.SCORE_ARCHITECTURE: module for module in FAMILIES.values()}
    wanted, other = (reward, language) if head == "score" else (language, reward)
    names = fields.get("architectures")
    if names not in [[name] for name in wanted]:
        is_other = names in [[name] for name in other]
        kinds = ("a language model", "a reward model") if head == "score" else ("a reward model", "a language model")
        hint = f", {kinds[0]} where {kinds[1]} is needed" if is_other else ""
        raise UserError(f"{where}: architectures is {names!r}{hint}; supported: {', '.join(wanted)}")
    assert names
    family = wanted[names[0]]
    if fields.get("model_type", family.FAMILY) != family.FAMILY:
        raise UserError(f"{where}: model_type {fields['model_type']!r} does not go with architecture {names[0]!r}")
    if head == "score":
        labels = fields.get("id2label")  # transformers takes two labels where a config.json says nothing
        count = len(labels) if isinstance(labels, Mapping) else fields.get("num_labels", 2)
        if count != 1:
            raise UserError(f"{where}: a reward model has 1 label, but this model has {count!r} (id2label, num_labels)")
    return family


def _check_fields(fields: Mapping[str, Any], family: ModuleType, where: str, ignore_fields: Collection[str]) -> None:
    only_values = {**ONLY_VALUES, **family.ONLY_VALUES}
    neutral = NEUTRAL_FIELDS | family.NEUTRAL_FIELDS
    for name in ignore_fields:
        if name in USED_FIELDS or name in only_values:
            raise UserError(f"{where}: ignore_fields names {name!r}, which changes the numbers and cannot be ignored")
    if "quantization_config" in fields:
        raise UserError(f"{where}: quantization_config: quantised weights are not supported; use the full checkpoint")
    layers = fields.get("layer_types", [])
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise UserError(f"{where}: layer_types may hold only 'full_attention'; sliding windows are not supported")
    for name, value in fields.items():
        if name in only_values:
            wanted = only_values[name]
            if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
                raise UserError(f"{where}: {name} = {value!r} is not supported, only {wanted!r}")
        elif name in USED_FIELDS or name in neutral or name in ignore_fields:
            continue
        elif name in MOE_FIELDS:
            raise UserError(f"{where}: {name} = {value!r}: mixture-of-experts models are not supported")
        else:
            raise UserError(
                f"{where}: unknown field {name!r} = {value!r}, which may change the numbers; pass "
                f"ignore_fields=({name!r},) if it does not{nearest(name, USED_FIELDS)}"
            )


def _rope(fields: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    if "rope_scaling" in fields and "rope_parameters" in fields:
        raise UserError(f"{where}: has both rope_scaling and rope_parameters; keep one")
    key = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    rope = fields.get(key, {})
    if not isinstance(rope, Mapping):
        raise UserError(f"{where}: {key} must be an object, but is {rope!r}")
    rope = {name: value for name, value in rope.items() if value is not None}
    kinds = [rope.pop(name) for name in ("rope_type", "type") if name in rope]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise UserError(f"{where}: {key} has two types, {kinds[0]!r} and {kinds[1]!r}")
    kind = kinds[0] if kinds else "default"
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise UserError(f"{where}: {key}: partial_rotary_factor other than 1 is not supported")
    theta = _positive({"rope_theta": 10000.0, **fields, **rope}, "rope_theta", None, where)
    if "rope_theta" in rope and fields.get("rope_theta", theta) != theta:
        raise UserError(f"{where}: rope_theta is {fields['rope_theta']} at the top and {theta} in {key}; keep one")
    rope.pop("rope_theta", None)
    known: dict[str, set[str]] = {"llama3": set(RopeScaling.__dataclass_fields__), "default": set()}
    names = known.get(kind) if isinstance(kind, str) else None
    if names is None:
        raise UserError(f"{where}: {key}: rope type {kind!r} is not supported, only 'default' and 'llama3'")
    for name in rope:
        if name not in names:
            raise UserError(f"{where}: {key}: unknown field {name!r} of rope type {kind!r}{nearest(name, names)}")
    if kind == "default":
        return theta, None
    place = f"{where}: {key}"
    return theta, RopeScaling(
        factor=_positive(rope, "factor", None, place),
        low_freq_factor=_positive(rope, "low_freq_factor", None, place),
        high_freq_factor=_positive(rope, "high_freq_factor", None, place),
        original_max_position_embeddings=_size(rope, "original_max_position_embeddings", None, place),
    )


def _size(fields: Mapping[str, Any], name: str, default: int | None, where: str) -> int:
    value = fields.get(name, default)
    if value is None:
        raise UserError(f"{where}: {name} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {name} must be a positive whole number, but is {value!r}")
    if value >= 2**31:
        raise UserError(f"{where}: {name} must be less than 2**31, but is {value!r}")
    return value


def _positive(fields: Mapping[str, Any], name: str, default: float | None, where: str) -> float:
    value = fields.get(name, default)
    if value is None:
        raise UserError(f"{where}: {name} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{where}: {name} must be a positive number, but is {value!r}")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str, where: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name} must be true or false, but is {value!r}")
    return value
