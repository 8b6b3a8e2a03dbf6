"""MLIR of inline PTX: constants, addresses, and the assembly itself."""

from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def integer(bits: int) -> Any:
    """The type."""
    return ir.IntegerType.get_signless(bits)


def constant(value: int, bits: int = 32) -> Any:
    """An integer."""
    return arith.constant(integer(bits), ir.IntegerAttr.get(integer(bits), value))


def address(ref: Any, bits: int) -> Any:
    """Of a reference's first element: 32 bits in shared memory, 64 in global memory."""
    return llvm.ptrtoint(integer(bits), mgpu.memref_ptr(ref))


def asm(text: str, constraints: str, operands: list[Any], result: Any = None) -> Any:
    """PTX with operands $0, $1, ...; it is never moved nor left out."""
    result = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=True)
