"""From a warpgroup's share of the stored bits to bfloat16 operands of WGMMA, without moving any between threads.

WGMMA wants from a thread, of outputs r and r + 8, pairs of neighbours along K; a word of nibbles holds such pairs 16 bits apart, so
that four rotations and a mask make eight weights. What the masks leave is read as subnormal bfloat16: sign in bit 15, the magnitude
a in bits 0 to 6, its highest bit always in bit 6. One multiplication by 2^127 makes it normal. An eighth bit goes to bit 7, where it
counts 128, and 255/128 a + (a + 128 bit) / 128 = 2 a + bit. All of it is exact, and every weight comes out as w * 2^(1 - E),
whatever the width.

Four planes of 32 bits become words of nibbles by transposing 4 x 4 bits, which takes two groups at a time to fill.
On Hopper, integer operations run at half the rate of others; a pair takes 1.75 of them at width 3, about 4 at 4 and 10 at 8.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sefp.format import GROUP

TILE = 64  # outputs of a warpgroup
# bfloat16 factors: of seven bits; of seven bits if there is an eighth; and of all eight.
ALONE, SEVEN, EIGHT = 0x7F00, 0x7EFF, 0x7B00  # 2^127, 2^126 * 255 / 128, 2^119
# Words [64 outputs, 8] and halfwords [64, 4] of a group seen as [32, 16] and [32, 8], which TMA can copy. Thread 4 r + c of a warp
# has words 2 c and 2 c + 1, or halfword c, of outputs r and r + 8.
WORDS, HALFWORDS = (
    plgpu.Layout.TILED(
        plgpu.Tiling(((32, 8 * size), (8, 8 * size), (4, 8 * size), (size,))),
        warp_dims=(-7,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )
    for size in (2, 1)
)


def ordered(x: jax.Array) -> jax.Array:
    """x [B, K] in the order of the operands: column 16 i + 8 h + 2 c + b of a group is its element 16 c + 8 h + 4 b + i."""
    rows, inner = x.shape
    groups = x.reshape(rows, inner // GROUP, 4, 2, 2, 4)  # c, h, b, i
    return groups.transpose(0, 1, 5, 3, 2, 4).reshape(rows, inner)


def operands(
    words: Sequence[jax.Array], planes: Sequence[Sequence[jax.Array]], interpret: Any
) -> list[jax.Array]:
    """bfloat16 [64, 64] for each of one or two groups.

    Args:
      words: uint32 [32, 16] of each group.
      planes: uint16 [32, 8] of each plane and group.
      interpret: whether the simulator runs this: it has no registers to look into.
    """
    bits = [_side_by_side(plane) for plane in planes]
    nibbles, last = _transposed(bits[:4]), bits[4:]
    result = []
    for g, both in enumerate(words):
        numbers, eighth = [], []
        for i in range(4):
            for h, word in enumerate(_apart(both, interpret)):
                turned = _rotated(word, 4 * i - 4)
                number = turned & jnp.uint32(0x8070_8070)
                if planes:
                    number |= (nibbles[i] >> (4 * g + 8 * h)) & jnp.uint32(0x000F_000F)
                numbers.append(number)
                for plane in last:
                    bit = _shifted(plane, i + 4 * g + 8 * h - 7) & jnp.uint32(0x0080_0080)
                    eighth.append(number | bit)
        result.append(_operand(numbers, eighth, interpret))
    return result


def _side_by_side(plane: Sequence[jax.Array]) -> jax.Array:
    """Bits of two groups in one word: bit 16 b + 8 h + 4 g + i is that of element 8 h + 4 b + i of the thread's 16."""
    result = None
    for g, halfword in enumerate(plane):
        word = halfword.astype(jnp.uint32)
        word = (word | (word << 12)) & jnp.uint32(0x0F0F_0F0F)
        result = word if result is None else result | (word << (4 * g))
    return result


def _transposed(planes: Sequence[jax.Array]) -> list[Any]:
    """Up to four words, highest first: bit i of a nibble goes to the nibble of the i-th result, the first word's to its bit 3."""
    absent = [None] * (4 - len(planes))
    rows = [*absent, *reversed(planes)]
    rows[0], rows[2] = _swapped(rows[0], rows[2], 2, 0x3333_3333)
    rows[1], rows[3] = _swapped(rows[1], rows[3], 2, 0x3333_3333)
    rows[0], rows[1] = _swapped(rows[0], rows[1], 1, 0x5555_5555)
    rows[2], rows[3] = _swapped(rows[2], rows[3], 1, 0x5555_5555)
    return rows


def _swapped(low: Any, high: Any, shift: int, mask: int) -> tuple[Any, Any]:
    """The two words after the upper fields of ``low`` and the lower ones of ``high`` have changed places; None is zero."""
    mask, upper = jnp.uint32(mask), jnp.uint32(mask << shift)
    if low is None and high is None:
        return None, None
    if low is None:
        return (high & mask) << shift, high & upper
    if high is None:
        return low & mask, (low >> shift) & mask
    return (low & mask) | ((high << shift) & upper), ((low >> shift) & mask) | (high & upper)


def _shifted(words: jax.Array, right: int) -> jax.Array:
    return words >> right if right >= 0 else words << -right


def _rotated(words: jax.Array, right: int) -> jax.Array:
    right %= 32
    return (words >> right) | (words << (32 - right)) if right else words


def _apart(words: jax.Array, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """A thread's even and its odd words, [32, 8] each."""
    if interpret is not None:
        return words[:, ::2], words[:, 1::2]
    half = plgpu.ShapeDtypeStruct((32, 8), jnp.uint32, layout=HALFWORDS)

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=(half, half))
    def same_registers(_, words):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import vector

        one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        layout = HALFWORDS.to_mgpu()
        parts = []
        for h in range(2):
            registers = [
                vector.extract_strided_slice(one, r, [h], [1], [1]) for r in words.registers.flat
            ]
            registers = np.array(registers, object).reshape(layout.registers_shape((32, 8)))
            parts.append(
                mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=False)
            )
        return tuple(parts)

    return same_registers(words)


def _operand(numbers: list[jax.Array], eighth: list[jax.Array], interpret: Any) -> jax.Array:
    """bfloat16 [64, 64] from words of two numbers, i-major, and if there are eight bits from the same with the last in bit 7."""
    if interpret is not None:
        return _simulated_operand(numbers, eighth)

    @plgpu.inline_mgpu(
        arg_types=(HALFWORDS,) * len(numbers + eighth),
        return_type=plgpu.ShapeDtypeStruct((TILE, GROUP), jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def scaled(_, *words):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm, vector

        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())

        def constant(half):
            value = np.array(half << 16 | half, np.uint32).view(np.int32)
            return llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, int(value))).result

        def multiply_add(a, b, c):  # as PTX: LLVM might flush subnormal numbers
            return llvm.inline_asm(i32, [a, b, c], "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r")

        nothing = constant(0x8000)  # -0 twice
        registers = []
        for number, more in zip(words[:8], words[8:] or [None] * 8, strict=True):
            for row, register in enumerate(number.registers.flat):
                scale, rest = constant(ALONE), nothing
                if more is not None:
                    scale = constant(SEVEN)
                    whole = vector.extract(more.registers.flat[row], [], [0])
                    rest = multiply_add(whole, constant(EIGHT), nothing)
                value = multiply_add(vector.extract(register, [], [0]), scale, rest)
                value = vector.broadcast(ir.VectorType.get((1,), i32), value)
                registers.append(vector.bitcast(pair, value))
        layout = mgpu.WGMMA_LAYOUT
        shape = layout.registers_shape((TILE, GROUP))
        return mgpu.FragmentedArray(
            _registers=np.array(registers, object).reshape(shape), _layout=layout, _is_signed=None
        )

    return scaled(*numbers, *eighth)


def _simulated_operand(numbers: list[jax.Array], eighth: list[jax.Array]) -> jax.Array:
    """The same without subnormal numbers, which XLA flushes on CPU."""

    def placed(words: list[jax.Array]) -> jax.Array:
        halves = [lax.bitcast_convert_type(w, jnp.uint16).reshape(TILE, 4, 2) for w in words]
        return jnp.stack(halves, 1).reshape(TILE, GROUP).astype(jnp.int32)

    bits = placed(numbers)
    whole = 2 * (bits & 0x7F) + (placed(eighth) >> 7 & 1 if eighth else 0)
    whole = jnp.where((bits & 0x8000) != 0, -whole, whole)
    return (whole.astype(jnp.float32) * 2.0**-7).astype(jnp.bfloat16)
