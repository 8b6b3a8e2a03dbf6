"""Model configuration: one frozen dataclass for DeepSeek-V3, V3.2, GLM-5 and dense Llama-3.

Field names are those of Hugging Face ``config.json`` so that a reader who knows one knows the other.
A config is hashable and therefore static under ``jax.jit``.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


_WORDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    type(None): "None",
}
# What counts as a value of a field's type: NumPy's numbers do, and JSON has lists where Python has tuples.
_ACCEPTED = {int: numbers.Integral, float: numbers.Real, tuple: (tuple, list)}


def _check_types(config: Any) -> None:
    """Every field of a dataclass against its annotation, so that what JSON got wrong is named."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        options = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else ()
        kinds = [typing.get_origin(kind) or kind for kind in options or (field.type,)]
        number_for_flag = isinstance(value, bool) and bool not in kinds
        _require(
            not number_for_flag and any(isinstance(value, _ACCEPTED.get(k, k)) for k in kinds),
            f"{field.name} must be {' or '.join(_WORDS.get(k, k.__name__) for k in kinds)}; got {value!r}. "
            "Correct its type.",
        )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: frequencies and their context extension (spec 2.3).

    ``original_max_position_embeddings`` is the context length before extension; ``factor`` the extension
    ratio. ``mscale``/``mscale_all_dim`` only matter for YaRN: the first scales cos/sin relative to the
    second, the second enters the softmax scale squared.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        _check_types(self)
        _require(
            self.type in ROPE_TYPES,
            f"rope type must be one of {ROPE_TYPES}; got {self.type!r}. Convert the checkpoint's rope_scaling to one of these.",
        )
        _require(
            self.theta > 1, f"rope theta must be > 1; got {self.theta}. DeepSeek uses 10000.0."
        )
        if self.type != "default":
            _require(
                self.factor >= 1,
                f"rope factor must be >= 1 for type {self.type!r}; got {self.factor}. Give the ratio of the extended to "
                "the original length, or type='default'.",
            )
        if self.type in ("llama3", "yarn"):
            _require(
                bool(self.original_max_position_embeddings),
                f"rope type {self.type!r} needs original_max_position_embeddings; got "
                f"{self.original_max_position_embeddings}. Give the context length before extension.",
            )

    def softmax_mscale(self) -> float:
        """Factor on the MLA softmax scale: mscale(mscale_all_dim)**2 under YaRN, else 1 (spec 2.3)."""
        if self.type == "default" or not self.mscale_all_dim:
            return 1.0
        return _yarn_mscale(self.factor, self.mscale_all_dim) ** 2

    def cos_sin_scale(self) -> float:
        """Factor on cos and sin (1.0 for the released DeepSeek weights, where both mscales are equal)."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return _yarn_mscale(self.factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What one decoder layer is made of. ``indexer``: None (dense attention), "full", or "shared" (reuses the previous selection)."""

    mlp: str
    indexer: str | None


@dataclasses.dataclass(frozen=True)
class Segment:
    """A repeated group of layers: ``kinds`` in order, ``repeats`` times. One segment is one ``lax.scan``."""

    kinds: tuple[LayerKind, ...]
    repeats: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only language model.

    ``kv_lora_rank`` set means MLA (DeepSeek); unset means grouped-query attention (Llama).
    ``index_topk`` set adds the lightning indexer and top-k sparse attention (V3.2, GLM-5).
    ``n_routed_experts`` set makes layers from ``first_k_dense_replace`` on sparse mixtures.

    Raises:
      ValueError: for combinations that no model can have, with the rule, the values and a way out.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    # Multi-head latent attention.
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    # Lightning indexer.
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    index_topk: int | None = None
    indexer_rope_interleave: bool = False
    indexer_types: tuple[str, ...] | None = None
    # Mixture of experts.
    n_routed_experts: int | None = None
    n_shared_experts: int = 0
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    mlp_layer_types: tuple[str, ...] | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # The rest.
    num_nextn_predict_layers: int = 0
    rope: RopeConfig = RopeConfig()
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1

    # -- construction ---------------------------------------------------------------------------

    def __post_init__(self):
        _check_types(self)
        self._check_positive()
        self._fill_defaults()
        self._check_attention()
        self._check_indexer()
        self._check_moe()

    def _fill_defaults(self) -> None:
        put = functools.partial(object.__setattr__, self)
        for name in ("indexer_types", "mlp_layer_types", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                put(name, tuple(getattr(self, name)))
        if self.is_mla:
            put("num_key_value_heads", self.num_attention_heads)
            put("head_dim", None)
        else:
            if self.num_key_value_heads is None:
                put("num_key_value_heads", self.num_attention_heads)
            if self.head_dim is None:
                _require(
                    self.hidden_size % self.num_attention_heads == 0,
                    f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                    f"({self.num_attention_heads}) when head_dim is not given; set head_dim.",
                )
                put("head_dim", self.hidden_size // self.num_attention_heads)

    def _check_positive(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            integer = isinstance(value, int) and not isinstance(value, bool)
            if integer and not field.name.endswith("_token_id"):
                least = 0 if field.name in _MAY_BE_ZERO else 1
                off = ", or None" if field.default is None else ""
                _require(
                    value >= least,
                    f"{field.name} must be >= {least}; got {value}. Give {least} or more{off}.",
                )
        _require(
            self.hidden_act in ACTIVATIONS,
            f"hidden_act must be one of {ACTIVATIONS}; got {self.hidden_act!r}.",
        )

    def _check_attention(self) -> None:
        if self.is_mla:
            missing = [
                n
                for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
                if getattr(self, n) is None
            ]
            _require(
                not missing,
                f"MLA (kv_lora_rank={self.kv_lora_rank}) also needs {', '.join(missing)}; set them, or unset "
                "kv_lora_rank for grouped-query attention.",
            )
            _require(
                self.qk_rope_head_dim % 2 == 0,
                f"qk_rope_head_dim must be even (rotary pairs); got {self.qk_rope_head_dim}. Add or drop one.",
            )
            return
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({self.num_key_value_heads}); use a divisor.",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head_dim must be even (rotary pairs); got {self.head_dim}. Set head_dim.",
        )
        for name in ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            _require(
                getattr(self, name) is None,
                f"{name}={getattr(self, name)} belongs to MLA, but kv_lora_rank is unset; set kv_lora_rank or drop {name}.",
            )

    def _check_indexer(self) -> None:
        fields = ("index_topk", "index_n_heads", "index_head_dim")
        given = [n for n in fields if getattr(self, n) is not None]
        if not given:
            _require(
                self.indexer_types is None,
                "indexer_types is set but index_topk is not; set index_topk.",
            )
            return
        missing = [n for n in fields if n not in given]
        _require(
            not missing,
            f"the indexer needs {', '.join(fields)} together; missing {', '.join(missing)}. Set all or none.",
        )
        _require(
            self.is_mla and self.q_lora_rank is not None,
            f"index_topk={self.index_topk} needs MLA with a query latent (the indexer reads it); got "
            f"kv_lora_rank={self.kv_lora_rank}, q_lora_rank={self.q_lora_rank}. Set both or unset index_topk.",
        )
        _require(
            self.index_head_dim >= self.qk_rope_head_dim,
            f"index_head_dim ({self.index_head_dim}) must be >= qk_rope_head_dim ({self.qk_rope_head_dim}): the rotary part is inside it.",
        )
        if self.indexer_types is not None:
            _require(
                len(self.indexer_types) == self.num_hidden_layers,
                f"indexer_types has {len(self.indexer_types)} entries for num_hidden_layers={self.num_hidden_layers}; give one per layer.",
            )
            bad = sorted(set(self.indexer_types) - {"full", "shared"})
            _require(not bad, f"indexer_types may hold 'full' or 'shared'; got {bad}.")
            _require(
                self.indexer_types[0] == "full",
                "indexer_types[0] must be 'full': a shared layer needs an earlier selection.",
            )

    def _check_moe(self) -> None:
        if self.mlp_layer_types is not None:
            _require(
                len(self.mlp_layer_types) == self.num_hidden_layers
                and set(self.mlp_layer_types) <= {"dense", "sparse"},
                f"mlp_layer_types must hold 'dense' or 'sparse' for each of {self.num_hidden_layers} layers; got {self.mlp_layer_types}.",
            )
        if not self.n_routed_experts:
            _require(
                "sparse" not in (self.mlp_layer_types or ()),
                "mlp_layer_types names sparse layers but n_routed_experts is unset; set n_routed_experts.",
            )
            return
        e, k, g = self.n_routed_experts, self.num_experts_per_tok, self.n_group
        _require(
            k is not None and self.moe_intermediate_size is not None,
            f"n_routed_experts={e} also needs num_experts_per_tok and moe_intermediate_size; got {k} and {self.moe_intermediate_size}.",
        )
        _require(
            e % g == 0,
            f"n_routed_experts ({e}) must be a multiple of n_group ({g}); use a divisor of {e}.",
        )
        _require(
            self.topk_group <= g,
            f"topk_group ({self.topk_group}) must be <= n_group ({g}); lower topk_group.",
        )
        _require(
            g == 1 or e // g >= 2,
            f"each expert group needs >= 2 experts (a group's score is its top-2 sum); got {e} experts in {g} groups. Lower n_group.",
        )
        reachable = e // g * self.topk_group
        _require(
            k <= reachable,
            f"num_experts_per_tok ({k}) must be <= the {reachable} experts that {self.topk_group} of {g} groups hold; "
            "raise topk_group or lower num_experts_per_tok.",
        )

    # -- derived --------------------------------------------------------------------------------

    @property
    def is_mla(self) -> bool:
        """True when attention is multi-head latent attention."""
        return self.kv_lora_rank is not None

    @property
    def is_moe(self) -> bool:
        """True when at least one layer has routed experts."""
        return any(kind.mlp == "moe" for kind in self.layer_kinds)

    @property
    def qk_head_dim(self) -> int:
        """Size of one query/key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def rope_dim(self) -> int:
        """Number of rotated dimensions of a head."""
        return self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def softmax_scale(self) -> float:
        """Attention scale; includes YaRN's mscale squared for MLA (spec 2.3)."""
        scale = self.qk_head_dim**-0.5
        return scale * self.rope.softmax_mscale() if self.is_mla else scale

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each decoder layer, in order."""
        kinds = []
        for i in range(self.num_hidden_layers):
            if self.mlp_layer_types is not None:
                sparse = self.mlp_layer_types[i] == "sparse"
            else:
                sparse = bool(self.n_routed_experts) and i >= self.first_k_dense_replace
            indexer = None
            if self.index_topk is not None:
                indexer = "full" if self.indexer_types is None else self.indexer_types[i]
            kinds.append(LayerKind("moe" if sparse else "dense", indexer))
        return tuple(kinds)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """``layer_kinds`` compressed into repeated groups, greedily; each becomes one scan."""
        return _compress(self.layer_kinds)

    @property
    def mtp_kind(self) -> LayerKind:
        """Kind of a multi-token-prediction layer: like the last layer, with an indexer of its own."""
        return LayerKind(self.layer_kinds[-1].mlp, None if self.index_topk is None else "full")

    @property
    def model_type(self) -> str:
        """The Hugging Face model type this architecture is written as."""
        if not self.is_mla:
            return "llama"
        if self.index_topk is None:
            return "deepseek_v3"
        shared = "shared" in (self.indexer_types or ())
        return "glm_moe_dsa" if self.indexer_rope_interleave or shared else "deepseek_v32"

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with ``changes`` applied and checked."""
        return dataclasses.replace(self, **changes)

    # -- Hugging Face ---------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: Any) -> "ModelConfig":
        """Builds a config from a ``config.json``: a dict, a file, or a directory that holds one.

        Raises:
          ValueError: for an unsupported model type, or a setting that would change the logits and is not implemented.
        """
        from jaxmoe._hf_config import from_hf

        return from_hf(source)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` dict that ``transformers`` reads as this architecture."""
        from jaxmoe._hf_config import to_hf

        return to_hf(self)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict; ``from_dict`` inverts it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Inverse of ``to_dict``."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        _require(
            not unknown,
            f"unknown ModelConfig fields {unknown}; this checkpoint was written by a newer jaxmoe.",
        )
        fields = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }  # JSON has no tuples
        return cls(**{**fields, "rope": RopeConfig(**data["rope"])})


_MAY_BE_ZERO = {"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"}


def _compress(kinds: tuple[LayerKind, ...]) -> tuple[Segment, ...]:
    """Greedy run-length encoding with periods: the (period, repeats) covering most layers from each position wins."""
    segments, i = [], 0
    while i < len(kinds):
        best_period, best_repeats = 1, 1
        for period in range(1, min(8, len(kinds) - i) + 1):
            repeats = 1
            while kinds[i : i + period] == kinds[i + repeats * period : i + (repeats + 1) * period]:
                repeats += 1
            # A longer period must cover strictly more than a shorter one, and must really repeat.
            if (period == 1 or repeats > 1) and period * repeats > best_period * best_repeats:
                best_period, best_repeats = period, repeats
        segments.append(Segment(kinds[i : i + best_period], best_repeats))
        i += best_period * best_repeats
    return tuple(segments)
