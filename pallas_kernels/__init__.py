"""Kernels of a sparse mixture-of-experts model, one folder per op, behind one contract.

Every op takes ``implementation=None | name | sequence of names``; see ``pallas_kernels._implementation``.
"""

from pallas_kernels.fp8 import Fp8Block
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_fp8
from pallas_kernels.index_topk import index_topk, index_topk_step
from pallas_kernels.moe_dispatch import (
    Dispatched,
    Encoded,
    Payload,
    combine,
    decode_rows,
    dispatch,
    sefp_payload,
)
from pallas_kernels.sefp import Sefp, sefp_matmul, sefp_truncate
from pallas_kernels.sparse_mla import merge_partials, sparse_mla, sparse_mla_step

__all__ = [
    "Dispatched",
    "Encoded",
    "Fp8Block",
    "Payload",
    "Sefp",
    "combine",
    "decode_rows",
    "dispatch",
    "grouped_matmul",
    "grouped_matmul_fp8",
    "index_topk",
    "index_topk_step",
    "merge_partials",
    "sefp_matmul",
    "sefp_payload",
    "sefp_truncate",
    "sparse_mla",
    "sparse_mla_step",
]
