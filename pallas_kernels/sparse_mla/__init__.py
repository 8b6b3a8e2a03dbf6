"""Attention over latent rows chosen by index."""

from pallas_kernels.sparse_mla.api import merge_partials, sparse_mla

__all__ = ["merge_partials", "sparse_mla"]
