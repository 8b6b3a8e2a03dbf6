"""Dispatch and combine: tokens into expert order, and back with weights."""

from pallas_kernels.moe_dispatch.api import Dispatched, combine, dispatch
from pallas_kernels.moe_dispatch.payload import Encoded, Payload, decode_rows, sefp_payload

__all__ = ["Dispatched", "Encoded", "Payload", "combine", "decode_rows", "dispatch", "sefp_payload"]
