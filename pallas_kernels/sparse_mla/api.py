"""Public sparse latent attention."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import _checks, _implementation, paged
from pallas_kernels.sparse_mla import gradient, mosaic_gpu, mosaic_tpu, native, reference

_KERNELS = {"native": native, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}


def _refuse(scale: Any, **operands: jax.Array) -> None:
    """Raises NotImplementedError for what no kernel can do."""
    if isinstance(scale, jax.core.Tracer):
        raise NotImplementedError("the scale is compiled into the kernel, and this one is traced")
    _checks.not_empty(**operands)


def _kernel(backend: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(backend)
    def op(q, kv, indices, scale, value_dim):
        _refuse(scale, q=q, kv=kv)
        return backend(q, kv, indices, scale, value_dim)

    return op


def _step_kernel(backend: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(backend)
    def op(q, cached, layer, own, rows, pages, scale, value_dim):
        _refuse(scale, q=q, cached=cached, **({} if pages is None else {"pages": pages}))
        return backend(q, cached, layer, own, rows, pages, scale, value_dim)

    return op


_BACKENDS = {name: _kernel(module.sparse_mla) for name, module in _KERNELS.items()} | {
    "xla": gradient.differentiable(reference.sparse_mla)
}
_STEP_BACKENDS = {
    name: _step_kernel(module.sparse_mla_step) for name, module in _KERNELS.items()
} | {"xla": reference.sparse_mla_step}
_PREFERENCE = {"cpu": ("native", "xla"), "gpu": ("mosaic_gpu", "xla"), "tpu": ("xla",)}


def sparse_mla(
    q: Float[Array, "B T H C"],
    kv: Float[Array, "B S C"],
    indices: Int[Array, "B T K"],
    *,
    scale: float | Float[Array, ""],
    value_dim: int,
    implementation: _implementation.Implementation = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Attention over the latent rows that ``indices`` names, in the absorbed (MQA) form of MLA (spec 2.2).

    Keys are whole rows of ``kv``, values their first ``value_dim`` entries; all heads share them. Cost grows with
    K, not with S. Differentiable in q and kv.

    Args:
      q: absorbed queries, latent part first, then the rotary part.
      kv: cached rows of q's dtype, normalised latent then rotated key.
      indices: rows to attend to; -1 is no row. Distinct where not -1.
      scale: softmax scale (``ModelConfig.softmax_scale``); traced, only "xla" takes it.
      value_dim: length of the latent part.
      implementation: None, "native" (C++ on CPU), "mosaic_gpu" (Hopper, bfloat16), "mosaic_tpu", "xla", or a sequence.

    Returns:
      (out, lse): the normalised output, and the natural log of the softmax denominator in float32, so that parts over
      disjoint rows merge (``merge_partials``). A query without rows gives zeros and -inf.

    Raises:
      ValueError, TypeError: if shapes or dtypes disagree.
    """
    _checks.arrays("sparse_mla", q=q, kv=kv)
    _checks.integers("sparse_mla", indices=indices)
    if q.dtype != kv.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(
            f"sparse_mla: q and kv must have one floating dtype; got {q.dtype} and {kv.dtype}. Cast one, and decode stored rows (pallas_kernels.cache_rows) or give them to sparse_mla_step."
        )
    if q.ndim != 4 or kv.ndim != 3 or indices.ndim != 3:
        raise ValueError(
            f"sparse_mla: q must be [B, T, H, C], kv [B, S, C], indices [B, T, K]; got {q.shape}, {kv.shape}, {indices.shape}."
        )
    if q.shape[0] != kv.shape[0] or q.shape[3] != kv.shape[2] or indices.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"sparse_mla: B, T and C must agree; got q {q.shape}, kv {kv.shape}, indices {indices.shape}."
        )
    size, hint = kv.shape[2], "The last is the size of a row."
    value_dim = _checks.static_int("sparse_mla", "value_dim", value_dim, 1, size, hint)
    return _implementation.call(
        "sparse_mla", _BACKENDS, _PREFERENCE, implementation, q, kv, indices, scale, value_dim
    )


def sparse_mla_step(
    q: Float[Array, "B T H C"],
    cached: Shaped[Array, "L P S Z"],
    layer: Int[Array, ""] | int,
    own: Shaped[Array, "Bo O Z"],
    rows: Int[Array, "B T K"],
    *,
    scale: float | Float[Array, ""],
    value_dim: int,
    pages: Int[Array, "B W"] | None = None,
    implementation: _implementation.Implementation = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """``sparse_mla`` for new tokens over a cache and over rows of the same step, in one softmax (``pallas_kernels.paged``).

    Args:
      q: absorbed queries of the new tokens.
      cached: latent rows of all layers, in any format of ``pallas_kernels.cache_rows`` with ``value_dim`` values.
      layer: which of them; may be traced.
      own: the step's own latent rows, stored alike.
      rows: ``index_topk_step``'s result: below the capacity cached rows, from there on the step's own, -1 for none.
      scale: softmax scale; traced, only "xla" takes it.
      value_dim: V, the latent part of a row.
      pages: the sequences' pages; default page b for sequence b.
      implementation: None, "native" (C++ on CPU), "mosaic_gpu" (Hopper, bfloat16), "mosaic_tpu", "xla", or a sequence.

    Returns:
      (out, lse) as in ``sparse_mla``.

    Raises:
      ValueError, TypeError: for shapes, numbers or dtypes that don't fit, naming them.
    """
    _checks.floating("sparse_mla_step", q=q)
    _checks.integers("sparse_mla_step", rows=rows)
    if q.ndim != 4 or rows.ndim != 3 or rows.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"sparse_mla_step: q must be [B, T, H, C] and rows [B, T, K]; got {q.shape} and {rows.shape}."
        )
    size, hint = q.shape[3], "The last is the size of a row."
    value_dim = _checks.static_int("sparse_mla_step", "value_dim", value_dim, 1, size, hint)
    paged.check("sparse_mla_step", q.shape, cached, layer, own, pages, value_dim)
    return _implementation.call(
        "sparse_mla_step",
        _STEP_BACKENDS,
        _PREFERENCE,
        implementation,
        *(q, cached, layer, own, rows, pages, scale, value_dim),
    )
