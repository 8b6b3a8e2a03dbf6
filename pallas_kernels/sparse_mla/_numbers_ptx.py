"""From row numbers to addresses within the Hopper kernel, in PTX: Mosaic GPU has no gather by a vector of indices.

As XLA's computation before the kernel it cost 15 us with 128 queries: 273 for the op, 258 for the kernel in the same settings
(bench/results/gpu_kernels_sparse_mla.json).
"""

from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels.sparse_mla import _ptx
from pallas_kernels.sparse_mla.addresses import Numbering

THREADS = 128
WARPS = 4


def address_rows(
    numbers: Any, last: Any, pages: Any, layer: Any, own_begin: Any, numbering: Numbering
) -> None:
    """Replaces a query's row numbers by addresses, with the threads of a warpgroup.

    ``plgpu.commit_smem`` has to follow before another thread reads ``numbers`` or ``last``.

    Args:
      numbers: [S, 64] int32 in shared memory; negative ones stay.
      last: [WARPS] int32 in shared memory: takes the place behind the last number that isn't negative, as far as each warp saw.
      pages: [W] int32 in global memory, of the query's sequence.
      layer, own_begin: scalars, as of ``addresses.address_of``.
      numbering: what the numbers mean.
    """
    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
    count = numbers.shape[0] * numbers.shape[1]

    @plgpu.inline_mgpu(arg_types=(ref, ref, ref, scalar, scalar))
    def replace(ctx, numbers, last, pages, layer, own_begin):
        del ctx
        thread = arith.remui(mgpu.thread_idx(), _ptx.constant(THREADS))
        places = _ptx.address(numbers, 32), _ptx.address(last, 32), _ptx.address(pages, 64)
        scalars = (x.registers.flat[0] for x in (layer, own_begin))
        asm = address_asm(count, numbering)
        _ptx.asm(asm, "r,r,r,l,r,r", [thread, *places, *scalars])

    replace(numbers, last, pages, layer, own_begin)


def address_asm(count: int, numbering: Numbering) -> str:
    """PTX of ``address_rows`` for a thread.

    All loads of pages are under way before the first is awaited; numbers are read twice so that only pages take registers.

    Operands: thread of the warpgroup; numbers and last in shared memory; pages in global memory; layer; first own row.

    Args:
      count: of numbers.
      numbering: what they mean.
    """
    rounds = -(-count // THREADS)
    asm = [
        ".reg .pred in, some, own;",
        f".reg .b32 at, row, line, place, peak, page<{rounds}>;",
        ".reg .b64 from;",
        "mad.lo.s32 at, $0, 4, $1;",
        "mov.b32 peak, 0;",
    ]
    for i in range(rounds):
        asm += _load(i, count)
        asm += [
            f"@some add.s32 peak, $0, {i * THREADS + 1};",
            "max.s32 row, row, 0;",
            f"min.s32 row, row, {numbering.capacity - 1};",
            f"div.u32 row, row, {numbering.page_size};",
            "mad.wide.u32 from, row, 4, $3;",
            f"ld.global.b32 page{i}, [from];",
        ]
    for i in range(rounds):
        asm += _load(i, count) + _address(f"page{i}", numbering)
        asm += [f"@some st.shared.b32 [at+{i * THREADS * 4}], place;"]
    asm += [
        "redux.sync.max.s32 peak, peak, 0xffffffff;",
        "shr.u32 row, $0, 5;",
        "mad.lo.s32 row, row, 4, $2;",
        "st.shared.b32 [row], peak;",
    ]
    return "\n".join(["{", *asm, "}"])


def _load(i: int, count: int) -> list[str]:
    """The thread's ``i``-th number as row, -1 if it has none; and whether there is a row, as some."""
    left, load = count - i * THREADS, f"ld.shared.b32 row, [at+{i * THREADS * 4}];"
    if left < THREADS:
        load = f"@in {load}"
        asm = ["mov.b32 row, -1;", f"setp.lt.s32 in, $0, {left};", load]
    else:
        asm = [load]
    return [*asm, "setp.ge.s32 some, row, 0;"]


def _address(page: str, numbering: Numbering) -> list[str]:
    """place: the address of row."""
    size, capacity = numbering.page_size, numbering.capacity
    asm = [
        f"min.s32 place, row, {capacity - 1};",
        "max.s32 place, place, 0;",
        f"rem.u32 place, place, {size};",
        f"max.s32 {page}, {page}, 0;",
        f"mad.lo.s32 {page}, $4, {numbering.layer_pages}, {page};",
        f"mad.lo.s32 place, {page}, {size}, place;",
    ]
    if numbering.own:
        asm += [
            f"sub.s32 line, row, {capacity};",
            f"min.s32 line, line, {numbering.own - 1};",
            "add.s32 line, line, $5;",
            f"setp.ge.s32 own, row, {capacity};",
            "selp.b32 place, line, place, own;",
        ]
    return asm
