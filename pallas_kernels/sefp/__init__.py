"""SEFP: weights that share an exponent per group and hold every width inside the widest; quantising, and multiplying from the bits."""

from pallas_kernels.sefp.api import sefp_matmul, sefp_truncate
from pallas_kernels.sefp.format import (
    GROUP,
    MASTER_WIDTH,
    Sefp,
    bits_per_weight,
    decode,
    encode,
    unrepresentable,
)

__all__ = [
    "GROUP",
    "MASTER_WIDTH",
    "Sefp",
    "bits_per_weight",
    "decode",
    "encode",
    "sefp_matmul",
    "sefp_truncate",
    "unrepresentable",
]
