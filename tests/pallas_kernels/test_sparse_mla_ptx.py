"""The Hopper kernel's PTX, interpreted: what is stored when it decodes 8-bit rows or turns row numbers into addresses."""

import operator
import re
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.sparse_mla import _numbers_ptx, _ptx, _rows_ptx, addresses

LINES, THREADS, TILE_BYTES = 8, 8, 1024  # lines of a tile, threads of a line


# MLIR's operations on integers that are not negative.
ARITH = types.SimpleNamespace(
    addi=operator.add,
    muli=operator.mul,
    divui=operator.floordiv,
    remui=operator.mod,
    xori=operator.xor,
)


class Threads:
    """Threads that run PTX in step: registers [threads], memory in bytes; knows what the kernel's PTX uses."""

    def __init__(self, operands, memory, shared_bytes):
        self.registers = {f"${i}": np.asarray(v, np.int64) for i, v in enumerate(operands)}
        self.memory, self.shared = memory, np.zeros(shared_bytes, np.uint8)
        self.stores = []  # addresses [threads] of each

    def run(self, text):
        for line in text.strip("{}\n").splitlines():
            if not line.startswith(".reg"):
                self.step(line.rstrip(";"))

    def value(self, name):
        if name in self.registers:
            return self.registers[name]
        return np.int64(int(name, 0))

    def step(self, line):
        predicate = True
        if line.startswith("@"):
            name, line = line[1:].split(" ", 1)
            predicate = self.registers[name]
        operation, rest = line.split(" ", 1)
        names = re.findall(r"-?\$?\w+", rest)
        words = 4 if ".v4" in operation else 1
        if operation.startswith("ld"):
            memory = self.memory if ".global" in operation else self.shared
            return self.load(memory, names[:words], names[words:], predicate)
        if operation.startswith("st"):
            return self.store(names[:-words], names[-words:], predicate)
        to, *sources = names
        result = getattr(self, operation.split(".")[0])(
            *(self.value(s) for s in sources), operation=operation
        )
        self.registers[to] = self.chosen(predicate, result, to)

    def chosen(self, predicate, result, to):
        return result if predicate is True else np.where(predicate, result, self.value(to))

    def address(self, names):
        return sum((self.value(n) for n in names), np.int64(0))

    def load(self, memory, to, place, predicate):
        at = np.where(predicate, self.address(place), 0)[:, None] + np.arange(4 * len(to))
        words = memory[at].view(np.uint32 if len(to) > 1 else np.int32).astype(np.int64)
        for i, name in enumerate(to):
            self.registers[name] = self.chosen(predicate, words[:, i], name)

    def store(self, place, sources, predicate):
        at = self.address(place)
        words = np.stack([np.broadcast_to(self.value(s), at.shape) for s in sources], -1)
        which = np.broadcast_to(predicate, at.shape)
        data = words.astype(np.uint32).view(np.uint8)
        self.shared[(at[:, None] + np.arange(4 * len(sources)))[which]] = data[which]
        self.stores.append(at)

    def setp(self, a, b, operation):
        return {"ge": np.greater_equal, "lt": np.less, "ne": np.not_equal}[operation[5:7]](a, b)

    def mad(self, a, b, c, operation):
        return a * b + c

    def sub(self, a, b, operation):
        return a - b

    def min(self, a, b, operation):
        return np.minimum(a, b)

    def max(self, a, b, operation):
        return np.maximum(a, b)

    def div(self, a, b, operation):
        return a // b

    def rem(self, a, b, operation):
        return a % b

    def redux(self, a, members, operation):
        assert operation == "redux.sync.max.s32" and members == 0xFFFF_FFFF
        return np.repeat(a.reshape(-1, 32).max(1), 32)

    def mov(self, a, operation):
        return a

    def selp(self, a, b, p, operation):
        return np.where(p, a, b)

    def add(self, a, b, operation):
        return a + b

    def shr(self, a, b, operation):
        return a >> b

    def lop3(self, a, b, c, table, operation):
        result = np.int64(0)
        for i in range(8):
            chosen = (x if i >> bit & 1 else ~x for bit, x in ((2, a), (1, b), (0, c)))
            if int(table) >> i & 1:
                result = result | np.bitwise_and.reduce(np.broadcast_arrays(*chosen))
        return result & 0xFFFF_FFFF

    def prmt(self, a, b, selector, operation):
        both, result = a | b << 32, np.int64(0)
        for i in range(4):
            choice = int(selector) >> 4 * i & 15
            assert choice < 8  # sign replication is not in use
            result = result | (both >> 8 * choice & 255) << 8 * i
        return result

    def mul(self, a, b, operation):
        assert operation == "mul.rn.bf16x2"
        halves = (
            np.ascontiguousarray(np.broadcast_to(x, np.shape(a)).astype(np.uint32))
            .view(ml_dtypes.bfloat16)
            .astype(np.float32)
            for x in (a, b)
        )
        product = np.multiply(*halves).astype(ml_dtypes.bfloat16)  # float32 holds it, then rounds
        return product.view(np.uint32).astype(np.int64)


# Python has a keyword of this name.
setattr(Threads, "and", lambda self, a, b, operation: a & b)


def stored_rows(rng, count):
    """Rows of 512 codes, every one of the 256 twice, and four powers of two; as bytes and as values in bfloat16."""
    codes = np.stack([rng.permutation(np.arange(512) % 256) for _ in range(count)]).astype(np.uint8)
    scales = np.exp2(rng.integers(-13, 10, (count, 4))).astype(np.float32)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = np.where(np.isnan(values), np.where(codes >> 7, -480, 480), values)
    values = values * np.repeat(scales, 128, axis=1)
    return np.concatenate([codes, scales.view(np.uint8)], axis=1), values.astype(ml_dtypes.bfloat16)


@pytest.fixture
def decoded(rng, monkeypatch):
    """(threads after the PTX, expected numbers): two rows for each line of a tile, the second row of line 5 absent."""
    monkeypatch.setattr(_rows_ptx, "arith", ARITH)
    monkeypatch.setattr(_ptx, "constant", int)
    rows, values = stored_rows(rng, 2 * LINES)
    values[LINES + 5] = 0
    line, thread = np.divmod(np.arange(LINES * THREADS), THREADS)
    operands = _rows_ptx.decoded_places(thread, line)
    for row in (line, LINES + line):
        begin = row * rows.shape[1]
        target = row // LINES * 8 * TILE_BYTES + row % LINES * 128
        operands += [target, begin + 16 * thread, begin + 512, np.where(row == LINES + 5, -1, row)]
    threads = Threads(operands, rows.reshape(-1), 2 * 8 * TILE_BYTES)
    threads.run(_rows_ptx.decode_asm())
    return threads, values


def test_every_8_bit_code_is_decoded_exactly_to_its_place_in_the_swizzled_tile(decoded):
    threads, values = decoded
    shared = threads.shared.view(ml_dtypes.bfloat16).reshape(2, 8, LINES, 8, 8)
    for row, expected in enumerate(values):
        half, line = divmod(row, LINES)
        pieces = shared[half, :, line][:, np.arange(8) ^ line].reshape(-1)
        np.testing.assert_array_equal(pieces.view(np.uint16), expected.view(np.uint16))


def test_the_threads_of_a_line_store_to_different_banks(decoded):
    """A request of 16 bytes is served for eight threads at a time: 32 banks of four bytes."""
    stores = decoded[0].stores
    assert len(stores) == 16
    for at in stores:
        pieces = at.reshape(LINES, THREADS) // 16 % 8
        np.testing.assert_array_equal(np.sort(pieces), np.tile(np.arange(8), (LINES, 1)))


def asked(rng, numbering, count, used):
    """Numbers of a query, pages, layer and first own row: gaps, numbers past the ends, nothing from ``used`` on."""
    numbers = rng.integers(-1, numbering.capacity + numbering.own + 3, count)
    numbers[used:] = -1
    pages = rng.permutation(1000)[: -(-numbering.capacity // numbering.page_size)]
    pages[-1] = -1 if len(pages) > 1 else pages[-1]
    return numbers.astype(np.int32), pages.astype(np.int32), 2, 90_000


@pytest.mark.parametrize(
    "numbering",
    [
        addresses.Numbering(1, page_size=64, layer_pages=1000, capacity=640, own=5, own_stride=5),
        addresses.Numbering(3, page_size=48, layer_pages=70, capacity=144, own=1),
        addresses.Numbering(7, page_size=5000, layer_pages=8, capacity=5000),
    ],
)
@pytest.mark.parametrize(("count", "used"), [(64, 64), (128, 0), (192, 131), (2048, 1500)])
def test_numbers_become_addresses_as_xla_computes_them(rng, numbering, count, used):
    numbers, pages, layer, own_begin = asked(rng, numbering, count, used)
    if used:
        numbers[used - 1] = 3
    threads = Threads(
        [np.arange(128), 0, 4 * count, 0, layer, own_begin], pages.view(np.uint8), 4 * count + 16
    )
    threads.shared[: 4 * count] = numbers.view(np.uint8)
    threads.run(_numbers_ptx.address_asm(count, numbering))
    got, last = np.split(threads.shared.view(np.int32), [count])
    expected = addresses.address_of(
        *map(jnp.asarray, (numbers, pages, own_begin, layer)), numbering
    )
    np.testing.assert_array_equal(got, expected)
    assert last.max() == used
