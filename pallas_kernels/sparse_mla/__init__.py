"""Attention over latent rows chosen by index."""

from pallas_kernels.sparse_mla.api import sparse_mla, sparse_mla_step
from pallas_kernels.sparse_mla.merge import merge_partials

__all__ = ["merge_partials", "sparse_mla", "sparse_mla_step"]
