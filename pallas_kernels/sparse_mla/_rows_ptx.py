"""Copying rows by index into shared memory, in PTX: Mosaic GPU has no operation for it.

TMA copies whole boxes, and one row is not a box of the tiled and swizzled layout that wgmma reads: [64, C] lies as [8, C / 64]
tiles of 8 x 64 numbers, 128 bytes a line, and line r has its eight 16-byte pieces in the order p ^ r. So each thread of a
warpgroup copies pieces: of lines r, r + 16, r + 32, r + 48 of the block, where r = thread / 8, piece thread % 8 of each tile.
"""

from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.sparse_mla import _ptx

BLOCK = 64  # rows
_LINES = 16  # rows that a warpgroup's 128 threads reach at a time, 8 threads each
_TILE_BYTES = 1024
_VALUES = 512  # of an 8-bit row: four tiles of 128, whose scales are one load
# bfloat16 2^120, twice: what the bits of float8_e4m3fn, shifted into those of bfloat16, are short of their value.
_BIAS = 0x7B807B80


def copy_rows(
    cached: Any, own: Any, index: Any, block: Any, transforms: tuple[Any, ...], values: int
) -> None:
    """Starts and awaits a warpgroup's copy of 64 rows; rows of index -1 become zeros.

    The writes are ordinary ones: ``plgpu.commit_smem`` has to follow before wgmma reads them.

    Args:
      cached: [N, size] in global memory, bfloat16 or (uint8) a row of ``cache_rows`` with 512 values.
      own: [O, size] like it.
      index: [64] int32 in shared memory; below N a row of ``cached``, from there on of ``own``.
      block: [64, C] bfloat16 in shared memory.
      transforms: of ``block``: tiles of (8, 64), swizzled by 128 bytes.
      values: V; the rest C - V of an 8-bit row is stored in bfloat16.
    """
    ref = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(ref, ref, ref, plgpu.RefType(transforms)))
    def copy(ctx, cached, own, index, block):
        del ctx
        row_bytes, eight_bit = _row_bytes(cached), _is_bytes(cached)
        tiles = ir.MemRefType(block.type).shape[1]
        thread = arith.remui(mgpu.thread_idx(), _ptx.constant(128))
        line, piece = arith.divui(thread, _ptx.constant(8)), arith.remui(thread, _ptx.constant(8))
        swizzle = arith.remui(line, _ptx.constant(8))
        first = arith.muli(arith.divui(line, _ptx.constant(8)), _ptx.constant(tiles * _TILE_BYTES))
        first = arith.addi(first, arith.muli(swizzle, _ptx.constant(128)))
        first = arith.addi(first, _ptx.address(block, 32))
        place = arith.addi(first, arith.muli(arith.xori(piece, swizzle), _ptx.constant(16)))
        offset = arith.extui(_ptx.integer(64), arith.muli(piece, _ptx.constant(16)))
        step = (_LINES // 8) * tiles * _TILE_BYTES
        numbers = [_load_index(index, line, i * _LINES) for i in range(BLOCK // _LINES)]
        sources = [_source(cached, own, number, row_bytes) for number in numbers]
        begin, skip = (values // 64, _VALUES + 4 * (_VALUES // 128)) if eight_bit else (0, 0)
        for i, (number, source) in enumerate(zip(numbers, sources, strict=True)):
            asm = [
                f"cp.async.cg.shared.global [$0+{i * step + tile * _TILE_BYTES}], [$1+{skip + (tile - begin) * 128}], 16, $2;"
                for tile in range(begin, tiles)
            ]
            valid = arith.cmpi(arith.CmpIPredicate.sge, number, _ptx.constant(0))
            # Of 16 bytes, what is copied; the rest is zeros.
            size = arith.select(valid, _ptx.constant(16), _ptx.constant(0))
            _ptx.asm("\n".join(asm), "r,l,r", [place, arith.addi(source, offset), size])
        for i in range(0, BLOCK // _LINES if eight_bit else 0, 2):
            lines = [arith.addi(first, _ptx.constant(j * step)) for j in (i, i + 1)]
            _decode_values(lines, sources[i : i + 2], numbers[i : i + 2], piece, swizzle)
        _ptx.asm("cp.async.wait_all;", "", [])

    copy(cached, own, index, block)


def prefetch_rows(cached: Any, own: Any, index: Any) -> None:
    """Calls a block's rows into the L2 cache; arguments as in ``copy_rows``."""
    ref = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(ref, ref, ref))
    def prefetch(ctx, cached, own, index):
        del ctx
        row_bytes = _row_bytes(cached)
        lines = -(-row_bytes // 128)
        thread = arith.remui(mgpu.thread_idx(), _ptx.constant(128))
        # Two threads a row; with an odd number of lines both call the middle one.
        row = _load_index(index, arith.divui(thread, _ptx.constant(2)), 0)
        begin = arith.muli(arith.remui(thread, _ptx.constant(2)), _ptx.constant(lines // 2 * 128))
        source = arith.addi(
            _source(cached, own, row, row_bytes), arith.extui(_ptx.integer(64), begin)
        )
        asm = [f"prefetch.global.L2 [$0+{i * 128}];" for i in range(lines - lines // 2)]
        _ptx.asm("\n".join(asm), "l", [source])

    prefetch(cached, own, index)


def decode_asm() -> str:
    """PTX that turns a thread's 64 values of each of two rows into bfloat16: 16 of each tile of 128.

    Operands: byte offsets of the thread's first and second 16 bytes to store, and whether (1) the second come first, so that
    threads of a line never meet in a bank; then for each row its line in shared memory, its first 16 values and its scales in
    global memory, and its number, negative for none.
    A value's bits s eeee mmm become s 0000eeee mmm0000, which is the value times 2^-120, subnormal ones too. NaN becomes 480.
    """
    load, store = [], []
    for r in range(2):
        line, values, scales, number = (f"${3 + 4 * r + i}" for i in range(4))
        load += [f"setp.ge.s32 p, {number}, 0;"]
        load += [f"mov.b32 s{4 * r + i}, 0;" for i in range(4)]
        load += [f"mov.b32 w{16 * r + i}, 0;" for i in range(16)]
        load += [f"@p ld.global.v4.b32 {_registers('s', 4 * r)}, [{scales}];"]
        for tile in range(4):
            words = _registers("w", 16 * r + 4 * tile)
            load += [f"@p ld.global.v4.b32 {words}, [{values}+{128 * tile}];"]
        store += [f"add.s32 at0, {line}, $0;", f"add.s32 at1, {line}, $1;"]
        for tile in range(4):
            store += _decode_tile(f"s{4 * r + tile}", 16 * r + 4 * tile)
            at = 2 * tile * _TILE_BYTES
            store += [f"st.shared.v4.b32 [at0+{at}], {_registers('x', 0)};"]
            store += [f"st.shared.v4.b32 [at1+{at}], {_registers('x', 4)};"]
    head = [
        ".reg .pred p, q;",
        ".reg .b32 s<8>, w<32>, h<8>, x<8>, t, u, bias, at0, at1;",
        "setp.ne.s32 q, $2, 0;",
        f"mov.b32 bias, {_BIAS:#x};",
    ]
    return "\n".join(["{", *head, *load, *store, "}"])


def _decode_tile(scale: str, first: int) -> list[str]:
    """Words w``first``.. of four values each, as x0..7, the second half before the first if q."""
    asm = [f"prmt.b32 {scale}, {scale}, 0, 0x3232;"]  # a power of two is exact in bfloat16
    for word in range(4):
        for half, order in enumerate(("0x1404", "0x3424")):
            to = f"h{2 * word + half}"
            asm += [
                f"prmt.b32 t, w{first + word}, 0, {order};",
                "and.b32 u, t, 0x80008000;",
                "shr.b32 t, t, 4;",
                f"lop3.b32 {to}, t, 0x07F007F0, u, 0xEA;",  # (t and mask) or u
                f"mul.rn.bf16x2 {to}, {to}, bias;",
                f"mul.rn.bf16x2 {to}, {to}, {scale};",
            ]
    return asm + [f"selp.b32 x{i}, h{(i + 4) % 8}, h{i}, q;" for i in range(8)]


def _registers(name: str, first: int) -> str:
    return "{" + ", ".join(f"{name}{first + i}" for i in range(4)) + "}"


def _decode_values(
    lines: list[Any], sources: list[Any], numbers: list[Any], piece: Any, swizzle: Any
) -> None:
    """Pieces ``piece``, + 8, + 16, + 24 of the 32 16-byte pieces of two rows' values, decoded to where they belong."""
    operands = decoded_places(piece, swizzle)
    offset = arith.extui(_ptx.integer(64), arith.muli(piece, _ptx.constant(16)))
    for line, source, number in zip(lines, sources, numbers, strict=True):
        operands += [
            line,
            arith.addi(source, offset),
            arith.addi(source, _ptx.constant(_VALUES, 64)),
            number,
        ]
    _ptx.asm(decode_asm(), "r,r,r,r,l,l,r,r,l,l,r", operands)


def decoded_places(piece: Any, swizzle: Any) -> list[Any]:
    """The first three operands of ``decode_asm`` for a thread of a line: byte offsets, and whether the second half comes first."""
    # 16 values from 16 * piece on, of a tile of 128: which tile of 64, and which two of its 16-byte pieces.
    upper = arith.divui(piece, _ptx.constant(4))
    target = arith.muli(arith.remui(piece, _ptx.constant(4)), _ptx.constant(2))

    def place(piece: Any) -> Any:
        at = arith.muli(arith.xori(piece, swizzle), _ptx.constant(16))
        return arith.addi(arith.muli(upper, _ptx.constant(_TILE_BYTES)), at)

    first, second = (
        arith.addi(target, upper),
        arith.addi(target, arith.xori(upper, _ptx.constant(1))),
    )
    return [place(first), place(second), upper]


def _is_bytes(ref: Any) -> bool:
    return mgpu.bitwidth(ir.MemRefType(ref.type).element_type) == 8


def _row_bytes(ref: Any) -> int:
    kind = ir.MemRefType(ref.type)
    return kind.shape[1] * mgpu.bitwidth(kind.element_type) // 8


def _load_index(index: Any, line: Any, skip: int) -> Any:
    at = arith.addi(_ptx.address(index, 32), arith.muli(line, _ptx.constant(4)))
    return _ptx.asm(f"ld.shared.b32 $0, [$1+{4 * skip}];", "=r,r", [at], _ptx.integer(32))


def _source(cached: Any, own: Any, row: Any, row_bytes: int) -> Any:
    """Global address of a row; of row 0 for -1."""
    count = _ptx.constant(ir.MemRefType(cached.type).shape[0])
    is_own = arith.cmpi(arith.CmpIPredicate.sge, row, count)
    base = arith.select(is_own, _ptx.address(own, 64), _ptx.address(cached, 64))
    row = arith.select(is_own, arith.subi(row, count), arith.maxsi(row, _ptx.constant(0)))
    return arith.addi(
        base, arith.muli(arith.extui(_ptx.integer(64), row), _ptx.constant(row_bytes, 64))
    )
