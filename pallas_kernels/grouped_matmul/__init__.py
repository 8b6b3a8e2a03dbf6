"""Grouped matmul: rows sorted by group, one weight matrix per group."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
