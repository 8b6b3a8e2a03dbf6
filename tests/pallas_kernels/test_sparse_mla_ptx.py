"""The Hopper kernel's PTX that decodes 8-bit rows, interpreted: what it stores, and whether stores meet in a bank."""

import operator
import re
import types

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.sparse_mla import _rows_ptx

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
    """Threads that run PTX in step: registers [threads], memory in bytes; knows what ``decode_asm`` uses."""

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
        names = re.findall(r"\$?\w+", rest)
        if operation == "ld.global.v4.b32":
            return self.load(names[:4], names[4:], predicate)
        if operation == "st.shared.v4.b32":
            return self.store(names[:-4], names[-4:])
        to, *sources = names
        self.registers[to] = getattr(self, operation.split(".")[0])(
            *(self.value(s) for s in sources), operation=operation
        )

    def address(self, names):
        return sum((self.value(n) for n in names), np.int64(0))

    def load(self, to, place, predicate):
        at = np.where(predicate, self.address(place), 0)[:, None] + np.arange(16)
        words = self.memory[at].view(np.uint32).astype(np.int64)
        for i, name in enumerate(to):
            self.registers[name] = np.where(predicate, words[:, i], self.value(name))

    def store(self, place, sources):
        at = self.address(place)
        words = np.stack([np.broadcast_to(self.value(s), at.shape) for s in sources], -1)
        self.shared[at[:, None] + np.arange(16)] = words.astype(np.uint32).view(np.uint8)
        self.stores.append(at)

    def setp(self, a, b, operation):
        return a >= b if ".ge" in operation else a != b

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
    monkeypatch.setattr(_rows_ptx, "_c", int)
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
