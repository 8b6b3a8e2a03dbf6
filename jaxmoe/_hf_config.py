"""Translation between ``ModelConfig`` and Hugging Face ``config.json`` (spec 1.1)."""

import json
import pathlib
from typing import Any

from jaxmoe.config import ROPE_TYPES, ModelConfig, RopeConfig

# Fields copied by name when the model type knows them.
_COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_bias", "tie_word_embeddings",
    "initializer_range", "bos_token_id", "eos_token_id",
)  # fmt: skip
_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MOE = (
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
)  # fmt: skip
_INDEX = ("index_n_heads", "index_head_dim", "index_topk")

# Class defaults of transformers' configuration classes: a config.json may omit what equals them.
_DEEPSEEK_DEFAULTS = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "norm_topk_prob": True, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_DEEPSEEK_DEFAULTS, "max_position_embeddings": 4096},
    "deepseek_v32": {**_DEEPSEEK_DEFAULTS, "max_position_embeddings": 163840},
    "glm_moe_dsa": {
        **_DEEPSEEK_DEFAULTS, "vocab_size": 154880, "hidden_size": 6144, "intermediate_size": 12288,
        "num_hidden_layers": 78, "num_attention_heads": 64, "q_lora_rank": 2048, "v_head_dim": 256,
        "qk_nope_head_dim": 192, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "index_n_heads": 32,
        "max_position_embeddings": 202752,
    },
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
_COUNTS = (
    "num_hidden_layers", "first_k_dense_replace", "moe_layer_freq", "index_topk_freq", "index_skip_topk_offset",
)  # fmt: skip
_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "llama": "LlamaForCausalLM",
}
# Settings that change the logits and that this library implements for one value only.
_FIXED = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
}


def read_config_json(source: Any) -> dict[str, Any]:
    """``source`` as a dict: a mapping, a JSON file, or a directory holding ``config.json``."""
    if isinstance(source, dict):
        return source
    path = pathlib.Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"no Hugging Face config at {path}; pass a dict, a config.json, or a directory with one."
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} must hold a JSON object; got a {type(config).__name__}. Download it again."
        )
    return config


def from_hf(source: Any) -> ModelConfig:
    """See ``ModelConfig.from_hf``."""
    hf = read_config_json(source)
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(_DEFAULTS))}."
        )
    for name, value in _FIXED.items():
        if hf.get(name) not in (None, value):
            raise ValueError(
                f"{name}={hf[name]!r} is not supported; jaxmoe implements {name}={value!r}."
            )
    values = {
        **_DEFAULTS[model_type],
        **{k: v for k, v in hf.items() if v is not None or k == "q_lora_rank"},
    }
    _check_kinds(values)
    names = list(_COMMON)
    extra: dict[str, Any] = {"rope": _rope_from_hf(hf, values)}
    if model_type == "llama":
        names += ["num_key_value_heads", "head_dim", "mlp_bias"]
        extra["rope_interleave"] = False
    else:
        names += [*_MLA, *_MOE]
        extra |= _deepseek_fields(model_type, hf, values)
        if model_type != "deepseek_v3":
            names += _INDEX
    fields = {name: values[name] for name in names if values.get(name) is not None}
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
    return ModelConfig(**{**fields, **extra})


def _check_kinds(values: dict[str, Any]) -> None:
    """The kinds of settings that are computed with before ``ModelConfig`` checks its own fields."""
    for kind, word, names in (
        (int, "an integer", _COUNTS),
        (list, "a list", ("mlp_layer_types", "indexer_types")),
        (dict, "an object", ("rope_parameters", "rope_scaling")),
    ):
        for name in names:
            if name in values and not isinstance(values[name], kind):
                raise ValueError(
                    f"{name} must be {word}; got {values[name]!r}. Correct config.json."
                )


def _deepseek_fields(model_type: str, hf: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    fields: dict[str, Any] = {
        "num_nextn_predict_layers": hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers"))
        or 0,
        "first_k_dense_replace": values["first_k_dense_replace"],
        "rope_interleave": hf.get("rope_interleave", True) is not False,
    }
    frequency = values.get("moe_layer_freq") or 1
    types = hf.get("mlp_layer_types")
    first_dense = fields["first_k_dense_replace"]
    if types is None and frequency != 1:
        types = [
            "sparse" if i >= first_dense and i % frequency == 0 else "dense" for i in range(layers)
        ]
    if types is not None and list(types) != [
        "dense" if i < first_dense else "sparse" for i in range(layers)
    ]:
        fields["mlp_layer_types"] = tuple(types)
    if model_type == "glm_moe_dsa":
        fields["indexer_rope_interleave"] = True
        kinds = _glm_indexer_types(values, layers)
        fields["indexer_types"] = kinds if "shared" in kinds else None
    return fields


def _glm_indexer_types(values: dict[str, Any], layers: int) -> tuple[str, ...]:
    """GLM's cross-layer selection sharing: an explicit list, a pattern string, or a frequency with an offset."""
    if "indexer_types" in values:
        return tuple(values["indexer_types"])
    pattern = values.get("index_topk_pattern")
    if isinstance(pattern, str):  # ModelConfig refuses other letters
        return tuple({"F": "full", "S": "shared"}.get(c, c) for c in pattern)
    if pattern is not None:
        return tuple(pattern)
    frequency = max(values.get("index_topk_freq", 1), 1)
    offset = values.get("index_skip_topk_offset", 2)
    return tuple(
        "full" if max(i - offset + 1, 0) % frequency == 0 else "shared" for i in range(layers)
    )


def _rope_from_hf(hf: dict[str, Any], values: dict[str, Any]) -> RopeConfig:
    """Reads both spellings: ``rope_parameters`` (new) and ``rope_theta`` + ``rope_scaling`` (old)."""
    scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rope_parameters.partial_rotary_factor != 1 is not supported.")
    theta = float(scaling.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    known = set(RopeConfig.__dataclass_fields__) - {"theta", "type"}
    unknown = sorted(set(scaling) - known)
    if unknown:
        raise ValueError(f"rope_scaling fields {unknown} are not supported for rope type {kind!r}.")
    fields = {k: v for k, v in scaling.items() if v is not None}
    if kind in ("yarn", "llama3"):
        original = values["max_position_embeddings"]
        original = fields.setdefault("original_max_position_embeddings", original)
        if kind == "yarn" and "factor" not in fields:  # null means the ratio of the lengths
            fields["factor"] = values["max_position_embeddings"] / original
    if kind in ROPE_TYPES and "factor" not in fields:
        raise ValueError(f"rope type {kind!r} needs a factor; got {scaling}. Correct config.json.")
    return RopeConfig(theta=theta, type=kind, **fields)


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    out: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.theta}
    if rope.type == "default":
        return out
    names = {
        # mscale_all_dim scales MLA's softmax whatever the type.
        "linear": ("factor", "mscale_all_dim"),
        "llama3": (
            "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "mscale_all_dim",
        ),
        "yarn": (
            "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "attention_factor", "truncate",
        ),
    }[rope.type]  # fmt: skip
    return out | {n: getattr(rope, n) for n in names if getattr(rope, n) is not None}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """See ``ModelConfig.to_hf``."""
    kind = config.model_type
    if kind == "llama" and config.is_moe:
        raise ValueError(
            "no supported Hugging Face type has grouped-query attention with routed experts; export an MLA or a dense model."
        )
    if kind in ("deepseek_v32", "glm_moe_dsa") and not config.rope_interleave:
        raise ValueError(
            "rope_interleave=False with an indexer has no Hugging Face type; set rope_interleave=True."
        )
    if kind == "glm_moe_dsa" and not config.indexer_rope_interleave:
        raise ValueError(
            "indexer_types with 'shared' layers is glm_moe_dsa, which rotates the indexer interleaved; got "
            "indexer_rope_interleave=False. Set it to True, or make every layer 'full'."
        )
    out: dict[str, Any] = {"architectures": [_ARCHITECTURES[kind]], "model_type": kind}
    names = [*_COMMON, "num_key_value_heads"]
    if kind == "llama":
        names += ["head_dim", "mlp_bias"]
    else:
        names += [*_MLA, "rope_interleave"] if kind == "deepseek_v3" else list(_MLA)
        names += list(_INDEX) if config.index_topk is not None else []
        out |= _moe_to_hf(config)
        if config.indexer_types is not None:
            out["indexer_types"] = list(config.indexer_types)
    out |= {name: getattr(config, name) for name in names}
    if isinstance(config.eos_token_id, tuple):
        out["eos_token_id"] = list(config.eos_token_id)
    out["rope_parameters"] = _rope_to_hf(config)
    return out


def _moe_to_hf(config: ModelConfig) -> dict[str, Any]:
    sparse = ["sparse" if kind.mlp == "moe" else "dense" for kind in config.layer_kinds]
    first_dense = sparse.index("sparse") if "sparse" in sparse else len(sparse)
    regular = sparse == ["dense"] * first_dense + ["sparse"] * (len(sparse) - first_dense)
    if config.model_type == "deepseek_v3" and not regular:
        raise ValueError(f"deepseek_v3 needs its dense layers first; got mlp_layer_types={sparse}.")
    out: dict[str, Any] = {
        "first_k_dense_replace": first_dense,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    if config.model_type != "deepseek_v3":
        out["mlp_layer_types"] = sparse
    if config.n_routed_experts:
        out |= {name: getattr(config, name) for name in _MOE}
    return out
