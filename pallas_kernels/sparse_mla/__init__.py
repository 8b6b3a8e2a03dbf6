"""Attention over latent rows chosen by index."""

from pallas_kernels.sparse_mla.api import merge_partials, sparse_mla, sparse_mla_step

__all__ = ["merge_partials", "sparse_mla", "sparse_mla_step"]
