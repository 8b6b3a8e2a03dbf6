"""New tokens over a cache: the step that decoding, chunked prefill and the engine are made of.

A step reads the cache and never writes it (``jaxmoe.cache``).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.cache import Cache
from jaxmoe.config import ModelConfig
from jaxmoe.layers import step_attention
from jaxmoe.layers.attention import Entries, gqa_step, mla_step
from jaxmoe.layers.linear import Stacked, embed, is_weight, linear, whole
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.rope import Rotation, rotation
from jaxmoe.model import LayerStats, concatenate, feed_forward, interleave, unembed
from jaxmoe.moe import ExpertTables, MoeOptions
from jaxmoe.params import Params


class _StepState(NamedTuple):
    """Loop-invariant inputs of a step's layers."""

    entries: Entries
    rotation: Rotation
    sight: step_attention.Sight
    tables: ExpertTables | None
    moe: MoeOptions
    valid: jax.Array | None


def _step_layer(p, config, x, state, layer, index_layer, tables, selection):
    """One decoder layer of a step; returns x, entries, stats, selection."""
    h = rms_norm(x, p["attention_norm"], config.rms_norm_eps)
    operands = (p, config, h, state.rotation, state.entries, state.sight, layer)
    with jax.named_scope("attention"):
        if config.is_mla:
            h, entries, selection = mla_step(*operands, index_layer, selection)
        else:
            h, entries = gqa_step(*operands, selection)
    x = x + h
    h = rms_norm(x, p["mlp_norm"], config.rms_norm_eps)
    with jax.named_scope("mlp"):
        h, stats = feed_forward(p, config, h, tables, state.moe, state.valid)
    return x + h, entries, stats, selection


def _layer_of(member: dict, repeat: jax.Array) -> dict:
    """One layer of a segment's stacked parameters, by reference."""
    return jax.tree.map(lambda leaf: Stacked(leaf, repeat), member, is_leaf=is_weight)


class _Layers(NamedTuple):
    """How many layers there are: of all kinds, with an indexer, with experts."""

    all: int = 0
    indexed: int = 0
    routed: int = 0

    def after(self, kinds, repeats=1):
        """The counts after layers of these kinds, all ``repeats`` times."""
        return _Layers(
            self.all + repeats * len(kinds),
            self.indexed + repeats * sum(kind.indexer == "full" for kind in kinds),
            self.routed + repeats * sum(kind.mlp == "moe" for kind in kinds),
        )


def _tables_of(tables, layer):
    """The placement of the ``layer``-th layer with experts."""
    if tables is None or tables.copies.ndim == 1:
        return tables
    return jax.tree.map(lambda table: table[layer], tables)


def _run_step_segment(segment, members, config, x, state, first, selection):
    """Scans one segment; returns x, entries, stats, selection."""

    def body(carry, repeat):
        x, selection = carry
        entries, stats = [], []
        for j, member in enumerate(members):
            at = first.after(segment.kinds, repeat).after(segment.kinds[:j])
            p, tables = _layer_of(member, repeat), _tables_of(state.tables, at.routed)
            x, e, s, selection = _step_layer(
                p, config, x, state, at.all, at.indexed, tables, selection
            )
            entries.append(e)
            stats.append(s)
        return (x, selection), (entries, stats)

    repeats = jnp.arange(segment.repeats, dtype=jnp.int32)
    (x, selection), (entries, stats) = lax.scan(body, (x, selection), repeats)
    return x, interleave(entries), stats, selection


def _begin(config, x, cache, spans, valid, tables, moe, tiles):
    """What all layers of a step of x [B, T, D] share, and the selection before the first of them."""
    shape = x.shape[:2]
    sight = step_attention.Sight(cache.lengths, cache.pages, spans)
    turned = rotation(config, sight.positions(*shape))
    own, queries = sight.own_rows(*shape), shape[1]
    if tiles is not None and tiles.shape[1] > 1 and not step_attention.in_place(x.dtype):
        sight, queries = sight.tiled(tiles), tiles.shape[1]
    by_row = config.is_mla and step_attention.selects_rows(
        config.index_topk, cache.capacity, own, x.dtype, queries
    )
    selection = step_attention.nothing(
        sight, config.index_topk, cache.capacity, queries, by_row=by_row
    )
    return _StepState(cache.entries, turned, sight, tables, moe, valid), selection


class StepOutput(NamedTuple):
    """Result of a step.

    Attributes:
      hidden: [B, T, D], after the final norm.
      entries: rows for ``cache.write`` or ``cache.commit``, by name [L, B, T, size].
      stats: as in ``Output``.
    """

    hidden: jax.Array
    entries: Entries
    stats: list[list[LayerStats]]


def run_step(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    cache: Cache,
    *,
    spans: Int[Array, "B T 2"] | None = None,
    tiles: Int[Array, "M Q"] | None = None,
    valid: Bool[Array, "B T"] | None = None,
    tables: ExpertTables | None = None,
    moe: MoeOptions = MoeOptions(),
) -> StepOutput:
    """New tokens over the cache; everything that ``step`` and the engine need. Pure: never writes the cache.

    On CPU with the C++ kernels and float32 parameters, whatever the cache's format, a latent-attention model's result for a token is the same, bit for bit,
    whichever other tokens share the step and however the tokens before it were cut into steps.

    Args:
      params: parameters.
      config: the model.
      tokens: the new tokens, each after what its sequence has in the cache and, with ``spans``, in this step.
      cache: what came before.
      spans: for tokens of several steps' worth of sequences in one flat row (B tokens of T = 1, say): the first and end
        of the step's tokens, counted over all of [B, T], that each one sees; its own is the last of them. Default:
        T tokens of each of B sequences.
      tiles: with flat tokens (T = 1), every valid one once, in rows of tokens of one sequence; -1 for none. Attention that
        has to copy what a token sees copies it once for each row. Default: once for each token.
      valid: false for padding, which then uses no expert; default all true.
      tables: expert placement, of all layers or with a leading axis of those with experts.
      moe: how experts are computed.
    """
    x = embed(params["embed"]["weight"], tokens)
    state, selection = _begin(config, x, cache, spans, valid, tables, moe, tiles)
    parts, all_stats, first = [], [], _Layers()
    for segment, members in zip(config.segments, params["segments"], strict=True):
        x, entries, stats, selection = _run_step_segment(
            segment, members, config, x, state, first, selection
        )
        parts.append(entries)
        all_stats.append(stats)
        first = first.after(segment.kinds, segment.repeats)
    hidden = rms_norm(x, {"weight": whole(params["norm"]["weight"])}, config.rms_norm_eps)
    return StepOutput(hidden, concatenate(parts), all_stats)


def run_mtp_step(
    p: dict,
    params: Params,
    config: ModelConfig,
    hidden: Float[Array, "B T D"],
    next_tokens: Int[Array, "B T"],
    cache: Cache,
    *,
    spans: Int[Array, "B T 2"] | None = None,
    tiles: Int[Array, "M Q"] | None = None,
    valid: Bool[Array, "B T"] | None = None,
    tables: ExpertTables | None = None,
    moe: MoeOptions = MoeOptions(),
) -> StepOutput:
    """``model.mtp_hidden`` for new tokens over a cache of the module's own (``init_cache(..., mtp=True)``).

    Args:
      p: the module, ``params["mtp"][i]``.
      params: the model, for the shared embedding.
      config: the model.
      hidden: the tokens' hidden states, after the final norm: ``run_step``'s, or the module's own to look further.
      next_tokens: the token after each.
      cache: the module's rows of the tokens before.
      spans: as in ``run_step``, like the next two.
      tiles: which tokens are of one sequence.
      valid: false for padding.
      tables: expert placement.
      moe: how experts are computed.

    Returns:
      hidden: states that predict, through the shared head, the token after ``next_tokens``.
      entries: rows of one layer.
    """
    p = jax.tree.map(whole, p, is_leaf=is_weight)
    state, selection = _begin(config, hidden, cache, spans, valid, tables, moe, tiles)
    embedded = embed(params["embed"]["weight"], next_tokens)
    embedded = rms_norm(embedded, p["embed_norm"], config.rms_norm_eps)
    previous = rms_norm(hidden, p["hidden_norm"], config.rms_norm_eps)
    # Embedding first: the checkpoint's order, not the report's equation 21.
    x = linear(jnp.concatenate([embedded, previous], axis=-1), p["proj"])
    first = jnp.zeros((), jnp.int32)
    x, entries, stats, _ = _step_layer(
        p["layer"], config, x, state, first, first, tables, selection
    )
    entries = {name: rows[None] for name, rows in entries.items()}
    return StepOutput(rms_norm(x, p["norm"], config.rms_norm_eps), entries, [[stats]])


def step(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    cache: Cache,
    *,
    tables: ExpertTables | None = None,
    moe: MoeOptions = MoeOptions(),
) -> tuple[Float[Array, "B T V"], Entries]:
    """T new tokens per sequence over the cache. Pure: reads the cache, never writes it.

    Args:
      params: parameters.
      config: the model.
      tokens: the new tokens, at positions ``cache.lengths + 0..T-1``.
      cache: what came before.
      tables: expert placement.
      moe: how experts are computed.

    Returns:
      (float32 logits, rows for ``cache.commit``).
    """
    output = run_step(params, config, tokens, cache, tables=tables, moe=moe)
    return unembed_step(params, output.hidden), output.entries


def unembed_step(params: Params, hidden: Float[Array, "*S D"]) -> Float[Array, "*S V"]:
    """``unembed`` as steps do it: a row's logits do not depend on how many rows there are."""
    if "lm_head" not in params or params["lm_head"]["weight"].dtype != jnp.float32:
        return unembed(params, hidden)
    weight = params["lm_head"]["weight"]
    return linear(hidden.astype(jnp.float32), {"weight": whole(weight)})
