"""Kernels of a sparse mixture-of-experts model, one folder per op, behind one contract.

Every op takes ``implementation=None | name | sequence of names``; see ``pallas_kernels._implementation``.
"""

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.index_topk import index_topk, index_topk_step
from pallas_kernels.moe_dispatch import Dispatched, combine, dispatch
from pallas_kernels.sparse_mla import merge_partials, sparse_mla, sparse_mla_step

__all__ = [
    "Dispatched",
    "combine",
    "dispatch",
    "grouped_matmul",
    "index_topk",
    "index_topk_step",
    "merge_partials",
    "sparse_mla",
    "sparse_mla_step",
]
