"""The one table between parameter leaves and Hugging Face tensors.

Each row says: this piece of our leaf, seen as a view of *that* tensor. Loading assigns the view to
the piece, saving assigns the piece to the view; so the two directions cannot disagree. Names and
layouts: spec 1.3.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator

import numpy as np

from jaxmoe import params as params_lib
from jaxmoe.checkpoint._layout import LayerSlot, layer_slots
from jaxmoe.checkpoint._leaves import Index, piece_shape
from jaxmoe.config import ModelConfig

Shape = tuple[int, ...]
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Part:
    """``to_ours(tensor)`` is a view of the tensor, or of some rows, equal to ``leaf[index]``."""

    leaf: str
    index: Index
    to_ours: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a checkpoint. ``parts`` is empty for tensors that are known but not loaded."""

    name: str
    shape: Shape
    parts: tuple[Part, ...] = ()
    required: bool = True


# -- layouts: the shape of the file's tensor, and the view of it in our piece's shape --------------


@dataclasses.dataclass(frozen=True)
class _Same:
    """Stored as we store it; or flattened, as biases of several heads are."""

    flat: bool = False

    def shape(self, ours: Shape, config: ModelConfig) -> Shape:
        return (math.prod(ours),) if self.flat else ours

    def view(self, tensor: np.ndarray, ours: Shape, config: ModelConfig) -> np.ndarray:
        return tensor.reshape(ours, copy=False)


@dataclasses.dataclass(frozen=True)
class _Linear:
    """[out, in] in the file, [in..., out...] here; ``inputs`` counts our input dimensions.

    Splitting the axes of a transposed array never copies, which merging them could.
    """

    inputs: int = 1

    def shape(self, ours: Shape, config: ModelConfig) -> Shape:
        return math.prod(ours[self.inputs :]), math.prod(ours[: self.inputs])

    def view(self, tensor: np.ndarray, ours: Shape, config: ModelConfig) -> np.ndarray:
        return tensor.T.reshape(ours, copy=False)


@dataclasses.dataclass(frozen=True)
class _KvB:
    """kv_b_proj: rows are heads x (k_nope, then v), columns the latent."""

    value: bool

    def shape(self, ours: Shape, config: ModelConfig) -> Shape:
        c = config
        return c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank

    def view(self, tensor: np.ndarray, ours: Shape, config: ModelConfig) -> np.ndarray:
        heads = tensor.reshape(config.num_attention_heads, -1, config.kv_lora_rank, copy=False)
        split = config.qk_nope_head_dim
        return heads[:, split:].swapaxes(1, 2) if self.value else heads[:, :split]


@dataclasses.dataclass(frozen=True)
class _FusedHalf:
    """gate_up_proj [E, 2F, D]: rows of gate, then of up. Ours, for one half: [E, D, F]."""

    up: bool

    def shape(self, ours: Shape, config: ModelConfig) -> Shape:
        experts, model, hidden = ours
        return experts, 2 * hidden, model

    def view(self, tensor: np.ndarray, ours: Shape, config: ModelConfig) -> np.ndarray:
        hidden = ours[-1]
        return tensor[:, hidden * self.up : hidden * (self.up + 1)].swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class _FusedDown:
    """down_proj [E, D, F]; ours is [E, F, D]."""

    def shape(self, ours: Shape, config: ModelConfig) -> Shape:
        return ours[0], ours[2], ours[1]

    def view(self, tensor: np.ndarray, ours: Shape, config: ModelConfig) -> np.ndarray:
        return tensor.swapaxes(1, 2)


# -- the table -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Row:
    """A tensor name below the layer's prefix, the part of our leaf it fills, and the layout."""

    name: str
    layout: _Same | _Linear | _KvB | _FusedHalf | _FusedDown = _Same()
    at: Index = ()


def _linear(ours: str, theirs: str, inputs: int = 1) -> dict[str, tuple[_Row, ...]]:
    return {
        f"{ours}/weight": (_Row(f"{theirs}.weight", _Linear(inputs)),),
        f"{ours}/bias": (_Row(f"{theirs}.bias", _Same(flat=True)),),
    }


def _mlp(ours: str, theirs: str) -> dict[str, tuple[_Row, ...]]:
    halves = ((f"{theirs}.gate_proj", 0), (f"{theirs}.up_proj", 1))
    return {
        f"{ours}/gate_up/weight": tuple(
            _Row(f"{n}.weight", _Linear(), (ALL, i)) for n, i in halves
        ),
        f"{ours}/gate_up/bias": tuple(_Row(f"{n}.bias", _Same(), (i,)) for n, i in halves),
        **_linear(f"{ours}/down", f"{theirs}.down_proj"),
    }


_LAYER: dict[str, tuple[_Row, ...]] = {
    "attention_norm/weight": (_Row("input_layernorm.weight"),),
    "mlp_norm/weight": (_Row("post_attention_layernorm.weight"),),
    # Latent attention. q_b rows are heads x (nope, rope), kv_a rows latent then rope: as ours.
    **_linear("attention/q_a", "self_attn.q_a_proj"),
    "attention/q_a_norm/weight": (_Row("self_attn.q_a_layernorm.weight"),),
    **_linear("attention/q_b", "self_attn.q_b_proj"),
    **_linear("attention/kv_a", "self_attn.kv_a_proj_with_mqa"),
    "attention/kv_a_norm/weight": (_Row("self_attn.kv_a_layernorm.weight"),),
    "attention/k_b/weight": (_Row("self_attn.kv_b_proj.weight", _KvB(value=False)),),
    "attention/v_b/weight": (_Row("self_attn.kv_b_proj.weight", _KvB(value=True)),),
    **_linear("attention/o", "self_attn.o_proj", inputs=2),
    # Grouped-query attention.
    **_linear("attention/q", "self_attn.q_proj"),
    **_linear("attention/k", "self_attn.k_proj"),
    **_linear("attention/v", "self_attn.v_proj"),
    # Lightning indexer. wq_b rows are heads x (rope, nope): as ours.
    **_linear("indexer/q_b", "self_attn.indexer.wq_b"),
    **_linear("indexer/k", "self_attn.indexer.wk"),
    "indexer/k_norm/weight": (_Row("self_attn.indexer.k_norm.weight"),),
    "indexer/k_norm/bias": (_Row("self_attn.indexer.k_norm.bias"),),
    **_linear("indexer/head_weights", "self_attn.indexer.weights_proj"),
    # Feed-forward.
    **_mlp("mlp", "mlp"),
    **_mlp("moe/shared", "mlp.shared_experts"),
    "moe/router/weight": (_Row("mlp.gate.weight", _Linear()),),
    "moe/router/bias": (_Row("mlp.gate.e_score_correction_bias"),),
    # One row per tensor of one expert; {expert} is filled in.
    "moe/experts/gate_up": (
        _Row("mlp.experts.{expert}.gate_proj.weight", _Linear(), (ALL, 0)),
        _Row("mlp.experts.{expert}.up_proj.weight", _Linear(), (ALL, 1)),
    ),
    "moe/experts/down": (_Row("mlp.experts.{expert}.down_proj.weight", _Linear()),),
}
# transformers' form in memory, which some tools write to disk.
_FUSED: dict[str, tuple[_Row, ...]] = {
    "moe/experts/gate_up": (
        _Row("mlp.experts.gate_up_proj", _FusedHalf(up=False), (ALL, ALL, 0)),
        _Row("mlp.experts.gate_up_proj", _FusedHalf(up=True), (ALL, ALL, 1)),
    ),
    "moe/experts/down": (_Row("mlp.experts.down_proj", _FusedDown()),),
}
_NO_QUERY_LATENT = {"attention/q_b/weight": (_Row("self_attn.q_proj.weight", _Linear()),)}
# Outside the decoder layers; full names.
_TOP: dict[str, _Row] = {
    "embed/weight": _Row("model.embed_tokens.weight"),
    "norm/weight": _Row("model.norm.weight"),
    "lm_head/weight": _Row("lm_head.weight", _Linear()),
}
# Below an MTP layer's prefix. proj's inputs are (embedding, hidden), as in the file.
_MTP: dict[str, _Row] = {
    "embed_norm/weight": _Row("enorm.weight"),
    "hidden_norm/weight": _Row("hnorm.weight"),
    "proj/weight": _Row("eh_proj.weight", _Linear()),
    "norm/weight": _Row("shared_head.norm.weight"),
}
MTP_ONLY_NAMES = (
    "enorm.weight",
    "hnorm.weight",
    "eh_proj.weight",
    "shared_head.norm.weight",
    "shared_head.head.weight",
)
MTP_EMBED_COPY, MTP_HEAD_COPY = "embed_tokens.weight", "shared_head.head.weight"


def layer_prefix(index: int) -> str:
    """Prefix of the tensors of decoder layer ``index``; MTP layers follow the main ones."""
    return f"model.layers.{index}."


def fused_name(index: int) -> str:
    """Name by which a layer's fused experts are recognised."""
    return layer_prefix(index) + _FUSED["moe/experts/down"][0].name


def tensors(config: ModelConfig, fused_layers: Collection[int] = ()) -> dict[str, HfTensor]:
    """Every tensor of a checkpoint of ``config``, by name, in file order.

    Args:
      config: the architecture.
      fused_layers: absolute indices of layers whose experts are stored fused.
    """
    table: dict[str, HfTensor] = {}
    for tensor in _all_tensors(config, fused_layers):
        known = table.get(tensor.name)
        if known is not None:  # kv_b_proj and fused gate_up_proj fill two places
            tensor = dataclasses.replace(tensor, parts=known.parts + tensor.parts)
        table[tensor.name] = tensor
    return table


def _all_tensors(config: ModelConfig, fused_layers: Collection[int]) -> Iterator[HfTensor]:
    specs = params_lib.flatten(params_lib.spec(config))
    yield _bind(_TOP["embed/weight"], "", "embed/weight", (), specs, config)
    slots = layer_slots(config)
    for slot in slots[: config.num_hidden_layers]:
        yield from _layer_tensors(slot, slot.index in fused_layers, specs, config)
    yield _bind(_TOP["norm/weight"], "", "norm/weight", (), specs, config)
    if config.tie_word_embeddings:  # some exporters write the tied head all the same
        yield HfTensor("lm_head.weight", (config.vocab_size, config.hidden_size), required=False)
    else:
        yield _bind(_TOP["lm_head/weight"], "", "lm_head/weight", (), specs, config)
    for i, slot in enumerate(slots[config.num_hidden_layers :]):
        prefix = layer_prefix(slot.index)
        for path, row in _MTP.items():
            yield _bind(row, prefix, f"mtp/{i}/{path}", (), specs, config)
        for copy in (MTP_EMBED_COPY, MTP_HEAD_COPY):
            yield HfTensor(prefix + copy, (config.vocab_size, config.hidden_size), required=False)
        yield from _layer_tensors(slot, slot.index in fused_layers, specs, config)


def _layer_tensors(
    slot: LayerSlot, fused: bool, specs: dict[str, params_lib.Spec], config: ModelConfig
) -> Iterator[HfTensor]:
    rows = {
        **_LAYER,
        **(_FUSED if fused else {}),
        **({} if config.q_lora_rank else _NO_QUERY_LATENT),
    }
    prefix = layer_prefix(slot.index)
    stack: Index = () if slot.stack is None else (slot.stack,)
    names = params_lib.flatten(params_lib.layer_spec(config, slot.kind))
    for path in names:
        leaf = f"{slot.path}/{path}"
        per_expert = path.startswith("moe/experts/") and not fused
        for expert in range(config.n_routed_experts or 0) if per_expert else (None,):
            at = stack if expert is None else (*stack, expert)
            for row in rows[path]:
                named = dataclasses.replace(row, name=row.name.format(expert=expert))
                yield _bind(named, prefix, leaf, at, specs, config)
    if slot.kind.mlp == "moe" and not config.n_shared_experts and config.is_mla:
        # transformers builds a shared expert of width zero and expects its empty tensors.
        wide, tall = (0, config.hidden_size), (config.hidden_size, 0)
        for name, shape in (("gate", wide), ("up", wide), ("down", tall)):
            full_name = f"{prefix}mlp.shared_experts.{name}_proj.weight"
            yield HfTensor(full_name, shape, required=False)


def _bind(
    row: _Row,
    prefix: str,
    leaf: str,
    at: Index,
    specs: dict[str, params_lib.Spec],
    config: ModelConfig,
) -> HfTensor:
    shape = specs[leaf].shape
    index = (*at, *row.at)
    index += (ALL,) * (len(shape) - len(index))
    ours = piece_shape(shape, index)
    part = Part(leaf, index, lambda tensor: row.layout.view(tensor, ours, config))
    return HfTensor(prefix + row.name, row.layout.shape(ours, config), (part,))
