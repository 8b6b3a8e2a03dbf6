"""Public lightning-index selection."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import _checks, _implementation, paged
from pallas_kernels.index_topk import mosaic_gpu, mosaic_tpu, native, reference, xla

_BACKENDS = {
    "mosaic_gpu": mosaic_gpu.index_topk,
    "mosaic_tpu": mosaic_tpu.index_topk,
    "native": native.index_topk,
    "reference": reference.index_topk,
    "xla": xla.index_topk,
}
_STEP_BACKENDS = {
    "mosaic_gpu": mosaic_gpu.index_topk_step,
    "mosaic_tpu": mosaic_tpu.index_topk_step,
    "native": native.index_topk_step,
    "reference": reference.index_topk_step,
    "xla": xla.index_topk_step,
}
# Nothing was ever measured on a TPU: its kernel is for those who name it.
_PREFERENCE = {"cpu": ("native", "xla"), "gpu": ("mosaic_gpu", "xla"), "tpu": ("xla",)}


def index_topk(
    q: Float[Array, "B T I K"],
    k: Float[Array, "B S K"],
    weights: Float[Array, "B T I"],
    topk: int,
    *,
    visible: Int[Array, "B T"] | None = None,
    implementation: _implementation.Implementation = None,
) -> Int[Array, "B T topk"]:
    """Positions of the ``topk`` keys with the largest index score for each query (DeepSeek-V3.2, spec 3.1).

    The score of key s for query t is sum_i weights[t, i] * relu(q[t, i] . k[s]), in float32. Exact; ties go to the lower
    position. Forward only: a selection has no gradient, and none passes here.

    Args:
      q: index queries, rotated.
      k: index keys, rotated; one per position, shared by the heads; in q's dtype.
      weights: signed head weights, all scale factors multiplied in.
      topk: how many to select; the result has min(topk, S) columns.
      visible: how many leading keys each query may see; None means causal with the last query at the last key.
      implementation: None, "mosaic_gpu" (Hopper), "mosaic_tpu", "native" (C++ on CPU), "xla", "reference", or a sequence.

    Returns:
      int32 positions, best first; -1 fills rows with fewer visible keys.

    Raises:
      ValueError, TypeError: for shapes, a topk or dtypes that don't fit, naming them.

    Example:
      >>> import jax.numpy as jnp
      >>> keys = jnp.array([[[1.0], [3.0], [2.0]]])
      >>> index_topk(jnp.ones((1, 1, 1, 1)), keys, jnp.ones((1, 1, 1)), 2).tolist()
      [[[1, 2]]]
    """
    _checks.floating("index_topk", q=q, k=k, weights=weights)
    _checks.integers("index_topk", visible=visible)
    if q.ndim != 4 or k.ndim != 3 or weights.shape != q.shape[:3]:
        raise ValueError(
            f"index_topk: q must be [B, T, I, K], k [B, S, K], weights [B, T, I]; got {q.shape}, {k.shape}, {weights.shape}."
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[2]:
        raise ValueError(f"index_topk: q and k must share B and K; got {q.shape} and {k.shape}.")
    if q.dtype != k.dtype:
        raise TypeError(
            f"index_topk: q is {q.dtype} but k is {k.dtype}; cast one to the other's dtype."
        )
    topk = _checks.static_int("index_topk", "topk", topk, 1)
    if visible is None:
        ahead = k.shape[1] - q.shape[1]
        if ahead < 0:
            raise ValueError(
                f"index_topk: {q.shape[1]} queries but {k.shape[1]} keys; pass visible= when queries are not the last positions."
            )
        visible = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32) + ahead + 1, q.shape[:2])
    if visible.shape != q.shape[:2]:
        raise ValueError(
            f"index_topk: visible must have q's [B, T], {q.shape[:2]}; got {visible.shape}."
        )
    q, k, weights = jax.lax.stop_gradient((q, k, weights))
    return _implementation.call(
        "index_topk", _BACKENDS, _PREFERENCE, implementation, q, k, weights, topk, visible
    )


def index_topk_step(
    q: Float[Array, "B T I K"],
    cached: Shaped[Array, "L P S Z"],
    layer: Int[Array, ""] | int,
    own: Shaped[Array, "Bo O Z"],
    weights: Float[Array, "B T I"],
    lengths: Int[Array, " B"],
    topk: int,
    *,
    pages: Int[Array, "B W"] | None = None,
    spans: Int[Array, "B T 2"] | None = None,
    implementation: _implementation.Implementation = None,
) -> Int[Array, "B T topk"]:
    """``index_topk`` for new tokens over a cache and over rows of the same step (``pallas_kernels.paged``).

    Args:
      q: index queries of the new tokens.
      cached: key cache of all layers, in any format of ``pallas_kernels.cache_rows`` (whatever q's dtype), where a key is all
        values.
      layer: which of them; may be traced.
      own: the step's own keys, stored alike; they come after the cached ones.
      weights: signed head weights, all scale factors multiplied in.
      lengths: valid cached keys of each sequence.
      topk: how many to select, at most the capacity + O.
      pages: the sequences' pages; default page b for sequence b.
      spans: first and end of the own keys that each query sees; default 0..t of its own sequence for query t.
      implementation: None, "mosaic_gpu" (Hopper), "native" (C++ on CPU), "xla", "reference", or a sequence.

    Returns:
      int32 rows in ascending order: below the capacity cached ones, from there on the step's own; -1 after the last.

    Raises:
      ValueError, TypeError: for shapes, numbers or dtypes that don't fit, naming them.
    """
    _checks.floating("index_topk_step", q=q, weights=weights)
    _checks.integers("index_topk_step", lengths=lengths, spans=spans)
    if q.ndim != 4:
        raise ValueError(f"index_topk_step: q must be [B, T, I, K]; got {q.shape}.")
    paged.check("index_topk_step", q.shape, cached, layer, own, pages, q.shape[3])
    if spans is None and own.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"index_topk_step: own must have a row per query, {q.shape[:2]}; got {own.shape}. Pass spans for others."
        )
    if spans is not None and spans.shape != (*q.shape[:2], 2):
        raise ValueError(
            f"index_topk_step: spans must be [B, T, 2] with q's {q.shape[:2]}; got {spans.shape}."
        )
    if weights.shape != q.shape[:3] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"index_topk_step: weights must be [B, T, I] and lengths [B], as in q {q.shape}; got {weights.shape}, {lengths.shape}."
        )
    most = paged.capacity_of(cached, pages) + own.shape[1]
    hint = "The last is the capacity + O."
    topk = _checks.static_int("index_topk_step", "topk", topk, 1, most, hint)
    q, cached, own, weights = jax.lax.stop_gradient((q, cached, own, weights))
    return _implementation.call(
        "index_topk_step",
        _STEP_BACKENDS,
        _PREFERENCE,
        implementation,
        *(q, cached, layer, own, weights, lengths, topk, pages, spans),
    )
