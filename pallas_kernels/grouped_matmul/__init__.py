"""Grouped matmul: rows sorted by group, one weight matrix per group."""

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.fp8 import grouped_matmul_fp8

__all__ = ["grouped_matmul", "grouped_matmul_fp8"]
