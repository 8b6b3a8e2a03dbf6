"""The model over whole sequences: layers scanned in segments. ``jaxmoe.steps`` has the cached step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import LayerKind, ModelConfig
from jaxmoe.layers import core_attention, sparse_attention
from jaxmoe.layers.attention import Entries, Whole, gqa_sequence, mla_sequence
from jaxmoe.layers.linear import PRODUCT as HEADS_PRODUCT
from jaxmoe.layers.linear import Stacked, dense, embed, linear, matmul, merged_stack, transposed
from jaxmoe.layers.mlp import mlp
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.rope import Rotation, rotation
from jaxmoe.moe import Experts, ExpertTables, MoeOptions, apply_experts, route
from jaxmoe.moe.balance import sequence_balance_loss
from jaxmoe.moe.experts import PRODUCT as EXPERTS_PRODUCT
from jaxmoe.moe.route import expert_load
from jaxmoe.params import Params
from pallas_kernels.numerics import dot
from quant.tensor import SefpTensor

ATTENTION_MODES = ("sparse", "dense")
CORES = (None, "masked", "gathered")
REMAT = ("none", "full", "core", "dots")
# Of many matrices at once: each is several products to JAX, or none that it knows.
PRODUCTS = (HEADS_PRODUCT, EXPERTS_PRODUCT)


class LayerStats(NamedTuple):
    """What a layer reports besides its output; zeros or empty where it does not apply.

    Attributes:
      expert_ids: [B, T, A] int32 chosen experts, best first.
      load: [E] int32 (token, choice) pairs per expert.
      balance_loss: float32, the sequence-wise balance loss without its coefficient.
      index_loss: float32, the indexer's KL summed over queries.
      index_recall: float32 [3], ``core_attention.Result.recall``; None if not asked for.
    """

    expert_ids: jax.Array
    load: jax.Array
    balance_loss: jax.Array
    index_loss: jax.Array
    index_recall: jax.Array | None = None


class Output(NamedTuple):
    """Result of a whole-sequence pass.

    Attributes:
      hidden: [B, T, D], after the final norm.
      entries: rows to cache, by name [L, B, T, size].
      stats: one ``LayerStats`` per decoder layer, stacked [layers, ...] within each segment member.
    """

    hidden: jax.Array
    entries: Entries
    stats: list[list[LayerStats]]


class PassOptions(NamedTuple):
    """Static choices of a whole-sequence pass.

    Attributes:
      attention: "sparse" (the indexer selects topk keys) or "dense" (all visible keys; how the indexer is first trained).
      index_loss: compute the indexer's KL loss.
      moe: how experts are computed.
      remat: what each layer recomputes in the backward pass instead of keeping it, one of ``REMAT``: none; full, all but the
        layer's input; core, all but core attention's result, which is small and dear; dots, all but that and the products with
        weights.
      remat_moe: the same for layers with experts, whose activations are the most; None: as the others.
      core: how sparse attention is computed: "gathered" reads the selected rows only, "masked" multiplies all pairs and masks;
        None for what is faster at this length (``sparse_attention.gathers``). Equal up to rounding.
      index_recall: with "dense", measure how much of the attention the indexer's selection would have kept.
    """

    attention: str = "sparse"
    index_loss: bool = False
    moe: MoeOptions = MoeOptions()
    remat: str = "none"
    core: str | None = None
    index_recall: bool = False
    remat_moe: str | None = None

    def gathers(self, config: ModelConfig, length: int) -> bool:
        """Whether sequences of ``length`` are attended to by row."""
        if self.attention != "sparse" or not config.is_mla:
            return False
        return sparse_attention.gathers(length, config.index_topk, self.core)

    def remat_of(self, p: dict) -> str:
        """``remat`` of the layer with these parameters."""
        return self.remat if self.remat_moe is None or "moe" not in p else self.remat_moe


# -- one layer -------------------------------------------------------------------------------------


def feed_forward(
    p: dict,
    config: ModelConfig,
    x: jax.Array,
    tables: ExpertTables | None,
    options: MoeOptions,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, LayerStats]:
    """Dense MLP or routed plus shared experts, on x [B, T, D]; tokens that are not ``valid`` [B, T] use no expert."""
    batch, tokens, size = x.shape
    nothing = jnp.zeros((), jnp.float32)
    if "mlp" in p:
        none = jnp.zeros((batch, tokens, 0), jnp.int32)
        return mlp(p["mlp"], config, x), LayerStats(none, jnp.zeros(0, jnp.int32), nothing, nothing)
    flat = x.reshape(batch * tokens, size)
    with jax.named_scope("route"):
        routing = route(p["moe"]["router"], config, flat)
        if valid is not None:
            ids = jnp.where(valid.reshape(-1, 1), routing.expert_ids, -1)
            routing = routing._replace(expert_ids=ids)
    with jax.named_scope("experts"):
        y = apply_experts(
            flat,
            routing.expert_ids,
            routing.weights,
            _experts_of(p, options),
            activation=config.hidden_act,
            tables=tables,
            options=options,
        )
    if "shared" in p["moe"]:
        with jax.named_scope("shared_expert"):
            y = y + mlp(p["moe"]["shared"], config, flat)
    ids = routing.expert_ids.reshape(batch, tokens, -1)
    balance = sequence_balance_loss(routing.scores.reshape(batch, tokens, -1), ids)
    stats = LayerStats(ids, expert_load(ids, config.n_routed_experts), balance, nothing)
    return y.reshape(x.shape), stats


def _experts_of(p: dict, options: MoeOptions) -> Experts:
    gate_up, down = p["moe"]["experts"]["gate_up"], p["moe"]["experts"]["down"]
    slots = down.shape[0]
    if not isinstance(down, Stacked):
        return Experts(gate_up, down, slots)
    if options.path not in ("local", "exchange"):  # the others need one layer's slots as an array
        return Experts(dense(gate_up), dense(down), slots)
    stacks = (merged_stack(w.stack) for w in (gate_up, down))
    return Experts(*stacks, slots, down.layer * slots)


def sequence_layer(
    p: dict,
    config: ModelConfig,
    x: jax.Array,
    r: Rotation,
    options: PassOptions,
    tables: ExpertTables | None = None,
    selection: jax.Array | None = None,
    starts: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    kind: LayerKind,
    keep_selection: bool = False,
) -> tuple[jax.Array, Entries, LayerStats, jax.Array | None]:
    """One decoder layer over whole sequences, x [B, T, D]; tokens that are not ``valid`` [B, T] use no expert."""
    sparse = options.attention == "sparse"
    core_options = core_attention.Options(
        scale=config.softmax_scale,
        topk=config.index_topk if sparse else None,
        index_loss=options.index_loss,
        keep_selection=keep_selection,
        recall_topk=config.index_topk if options.index_recall and not sparse else None,
    )
    whole = Whole(
        selection if kind.indexer == "shared" else None,
        starts,
        None if valid is None else valid.any(1),
        options.gathers(config, x.shape[1]),
        options.moe.mesh,
    )
    h = rms_norm(x, p["attention_norm"], config.rms_norm_eps)
    with jax.named_scope("attention"):
        attend = mla_sequence if config.is_mla else gqa_sequence
        h, entries, core = attend(p, config, h, r, core_options, whole)
    x = x + h
    h = rms_norm(x, p["mlp_norm"], config.rms_norm_eps)
    with jax.named_scope("mlp"):
        h, stats = feed_forward(p, config, h, tables, options.moe, valid)
    stats = stats._replace(index_loss=core.index_loss, index_recall=core.recall)
    return x + h, entries, stats, core.selection


# -- whole sequences -------------------------------------------------------------------------------


def interleave(members: list[Entries]) -> Entries:
    """Entries of a segment's members, each [R, ...], in layer order [R * members, ...]."""
    names = {name for member in members for name in member}
    joined = {}
    for name in sorted(names):
        having = [member[name] for member in members if name in member]
        stacked = jnp.stack(having, axis=1)
        joined[name] = stacked.reshape(-1, *stacked.shape[2:])
    return joined


def concatenate(parts: list[Entries]) -> Entries:
    """Entries of consecutive segments, one after another."""
    return {
        name: jnp.concatenate([p[name] for p in parts if name in p])
        for name in sorted(set().union(*parts))
    }


def _remat(layer: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The layer with what ``PassOptions.remat`` says recomputed in the backward pass."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    core = policies.save_only_these_names(*core_attention.SAVED, *sparse_attention.SAVED)
    keep = {
        "full": policies.nothing_saveable,
        "core": core,
        "dots": policies.save_from_both_policies(
            policies.save_from_both_policies(core, policies.save_only_these_names(*PRODUCTS)),
            policies.dots_with_no_batch_dims_saveable,
        ),
    }[remat]
    return jax.checkpoint(layer, static_argnums=(1, 4), policy=keep)


def _positions(tokens: jax.Array, starts: jax.Array | None) -> jax.Array:
    """Positions [B, T] within each token's document."""
    row = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return row if starts is None else row - starts


def _no_selection(
    config: ModelConfig, options: PassOptions, shape: tuple[int, int]
) -> jax.Array | None:
    """The form of a selection that layers hand on, where some share it; None where none does."""
    sharing = any(kind.indexer == "shared" for kind in config.layer_kinds)
    if not sharing or options.attention != "sparse":
        return None
    batch, length = shape
    if options.gathers(config, length):
        return jnp.full((batch, length, config.index_topk), -1, jnp.int32)
    return jnp.zeros((batch, length, length), bool)


def run(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    starts: Int[Array, "B T"] | None = None,
    tables: ExpertTables | None = None,
    valid: Bool[Array, "B T"] | None = None,
    options: PassOptions = PassOptions(),
) -> Output:
    """A whole-sequence pass; everything that prefill, training and ``forward`` need.

    Args:
      params: parameters.
      config: the model.
      tokens: token ids.
      positions: positions for the rotary embedding; default 0.. within each document. Causality follows array order.
      starts: index within the row of the first token of each token's document (packed documents): a query sees the tokens from
        there up to itself. None: one document per row.
      tables: expert placement; None means expert e in slot e.
      valid: tokens that count in the statistics; others, such as padding, use no expert. Default all.
      options: static choices.
    """
    r = rotation(config, _positions(tokens, starts) if positions is None else positions)
    x = embed(params["embed"]["weight"], tokens)
    selection = _no_selection(config, options, tokens.shape)
    keep = selection is not None
    all_entries, all_stats = [], []
    for segment, stacked in zip(config.segments, params["segments"], strict=True):

        def body(carry, members, kinds=segment.kinds):
            x, selection = carry
            entries, stats = [], []
            for kind, p in zip(kinds, members, strict=True):
                layer = functools.partial(sequence_layer, kind=kind, keep_selection=keep)
                layer = _remat(layer, options.remat_of(p))
                x, e, s, chosen = layer(p, config, x, r, options, tables, selection, starts, valid)
                selection = chosen if keep else None
                entries.append(e)
                stats.append(s)
            return (x, selection), (entries, stats)

        (x, selection), (entries, stats) = lax.scan(body, (x, selection), stacked)
        all_entries.append(interleave(entries))
        all_stats.append(stats)
    hidden = rms_norm(x, params["norm"], config.rms_norm_eps)
    return Output(hidden, concatenate(all_entries), all_stats)


def unembed(params: Params, hidden: Float[Array, "*S D"]) -> Float[Array, "*S V"]:
    """Logits in float32 (spec 11, trap 23) from final hidden states."""
    if "lm_head" in params:
        weight = params["lm_head"]["weight"]
    else:
        weight = transposed(params["embed"]["weight"])
    if isinstance(weight, SefpTensor):
        return linear(hidden.astype(jnp.float32), {"weight": weight})
    if hidden.dtype == weight.dtype == jnp.bfloat16:  # whose products are exact in float32
        flat = hidden.reshape(-1, hidden.shape[-1])
        return dot(flat, weight, (1, 0)).reshape(*hidden.shape[:-1], weight.shape[1])
    return matmul(hidden.astype(jnp.float32), weight.astype(jnp.float32))


def mtp_hidden(
    p: dict,
    params: Params,
    config: ModelConfig,
    hidden: Float[Array, "B T D"],
    next_tokens: Int[Array, "B T"],
    *,
    options: PassOptions = PassOptions(),
    tables: ExpertTables | None = None,
    starts: Int[Array, "B T"] | None = None,
    valid: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], LayerStats]:
    """One multi-token-prediction module (spec 6): normalised hidden states that predict one token further.

    Args:
      p: the module, ``params["mtp"][i]``.
      params: the model (for the shared embedding).
      config: the model.
      hidden: the previous depth's hidden states, after its final norm.
      next_tokens: the token after each position (t_{i+1}).
      options: static choices.
      tables: expert placement.
      starts: as of ``run``. At a document's end the next token is another's: what that gives no query of either sees.
      valid: as of ``run``.

    Returns:
      (hidden states that predict t_{i+2} through the shared head, statistics of the module's layer).
    """
    embedded = embed(params["embed"]["weight"], next_tokens)
    embedded = rms_norm(embedded, p["embed_norm"], config.rms_norm_eps)
    previous = rms_norm(hidden, p["hidden_norm"], config.rms_norm_eps)
    # Embedding first: the checkpoint's order, not the report's equation 21.
    x = linear(jnp.concatenate([embedded, previous], axis=-1), p["proj"])
    layer = functools.partial(sequence_layer, kind=config.mtp_kind)
    layer = _remat(layer, options.remat_of(p["layer"]))
    r = rotation(config, _positions(next_tokens, starts))
    x, _, stats, _ = layer(p["layer"], config, x, r, options, tables, None, starts, valid)
    return rms_norm(x, p["norm"], config.rms_norm_eps), stats


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _forward(params, config, tokens, positions, tables, options):
    output = run(params, config, tokens, positions=positions, tables=tables, options=options)
    return unembed(params, output.hidden)


def check_tokens(tokens: Any, config: ModelConfig, name: str = "tokens") -> jax.Array:
    """``tokens`` as an int32 array [B, T].

    Raises:
      ValueError, TypeError: for a wrong rank, an empty sequence, a dtype that is no integer, or (outside jit) ids
        outside the vocabulary.
    """
    array = tokens if isinstance(tokens, jax.core.Tracer) else np.asarray(tokens)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name} must be a non-empty [batch, length] array; got shape {array.shape}. Use {name}[None] for one."
        )
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integer token ids; got {array.dtype}. Cast with .astype('int32')."
        )
    if not isinstance(array, jax.core.Tracer) and (
        array.min() < 0 or array.max() >= config.vocab_size
    ):
        raise ValueError(
            f"{name} must lie in [0, vocab_size={config.vocab_size}); got {array.min()}..{array.max()}. Check the tokenizer."
        )
    return jnp.asarray(array, jnp.int32)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    tables: ExpertTables | None = None,
    options: PassOptions = PassOptions(),
) -> Float[Array, "B T V"]:
    """Logits of every position.

    Args:
      params: parameters (``init_params``, ``checkpoint.load_hf``, ``checkpoint.restore``).
      config: the model.
      tokens: token ids.
      positions: rotary positions; default 0..T-1.
      tables: expert placement; default expert e in slot e.
      options: attention mode, MoE path, rematerialisation.

    Returns:
      float32 logits.

    Raises:
      ValueError, TypeError: for tokens of the wrong shape, dtype or range.

    Example:
      >>> import jax, jaxmoe, numpy as np
      >>> config = jaxmoe.presets["tiny"]
      >>> params = jaxmoe.init_params(config, jax.random.key(0))
      >>> jaxmoe.forward(params, config, np.array([[72, 105]])).shape
      (1, 2, 320)
    """
    if options.attention not in ATTENTION_MODES:
        raise ValueError(
            f"options.attention must be one of {ATTENTION_MODES}; got {options.attention!r}."
        )
    if options.core not in CORES:
        raise ValueError(f"options.core must be one of {CORES}; got {options.core!r}.")
    for name, known in (("remat", REMAT), ("remat_moe", (None, *REMAT))):
        given = getattr(options, name)
        if given not in known:
            raise ValueError(f"options.{name} must be one of {known}; got {given!r}.")
    tokens = check_tokens(tokens, config)
    if positions is not None and positions.shape != tokens.shape:
        raise ValueError(
            f"positions must have tokens' shape {tokens.shape}; got {positions.shape}."
        )
    return _forward(params, config, tokens, positions, tables, options)
