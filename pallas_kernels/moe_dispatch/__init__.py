"""Dispatch and combine: tokens into expert order, and back with weights."""

from pallas_kernels.moe_dispatch.api import Dispatched, combine, dispatch

__all__ = ["Dispatched", "combine", "dispatch"]
