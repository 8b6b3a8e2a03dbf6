"""Block sizes: of the XLA backend by heuristic, of the Hopper kernels as measured or by heuristic."""

import dataclasses

from pallas_kernels import _pallas, _tuned

# Shared memory that one block of threads may have on Hopper, less what barriers take.
_SHARED_BYTES = _pallas.SHARED_MEMORY - 1024


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a Hopper kernel cuts its result and how far ahead it reads.

    Attributes:
      block_rows: rows that one warpgroup multiplies at a time; 64 or 128.
      block_columns: columns of the same; 64, 128, 192 or 256, a divisor of the result's.
      warpgroups: how many multiply, each a block of rows of its own; 1 or 2.
      stages: slots of the ring in shared memory; at least 2.
      panel_columns: tiles of this many columns come one after another before those of the next rows.
    """

    block_rows: int
    block_columns: int
    warpgroups: int
    stages: int
    panel_columns: int

    @property
    def tile_rows(self) -> int:
        """Rows of one tile."""
        return self.block_rows * self.warpgroups


def most_stages(block_rows: int, block_columns: int, warpgroups: int) -> int:
    """As many as shared memory holds beside what is being stored, up to eight."""
    slot = 2 * 64 * (block_rows * warpgroups + block_columns)
    return min(8, (_SHARED_BYTES - warpgroups * 2 * 2 * 64 * 64) // slot)


def _tiling(block_rows: int, block_columns: int, warpgroups: int, columns: int) -> Tiling:
    stages = most_stages(block_rows, block_columns, warpgroups)
    return Tiling(block_rows, block_columns, warpgroups, stages, columns)


def _widest(columns: int, limit: int = 256) -> int:
    """The widest block of at most ``limit`` that divides ``columns``, a multiple of 64."""
    return next(b for b in (256, 192, 128, 64) if b <= limit and columns % b == 0)


def key(product: str, rows: int, groups: int, inner: int, columns: int) -> str:
    """Of measured settings. Rows per group count by powers of two."""
    per_group = _tuned.size_class(rows // max(groups, 1))
    return f"{product} {groups} x {per_group} x {inner} x {columns}"


def _measured(*shape: str | int) -> Tiling | None:
    found = _tuned.lookup("grouped_matmul", key(*shape))
    return None if found is None else Tiling(**found)


def rows_tiling(rows: int, groups: int, inner: int, columns: int, product: str = "rows") -> Tiling:
    """Of y = x @ w[group], or of dx = dy @ w[group]^T with ``product="rows transposed"``."""
    measured = _measured(product, rows, groups, inner, columns)
    return measured or rows_heuristic(rows, groups, columns)


def rows_heuristic(rows: int, groups: int, columns: int) -> Tiling:
    """Few rows per group: one block of 64 rows, so that every matrix is read once, and so narrow that every multiprocessor has
    several to read. Many: two warpgroups share columns as wide as registers hold.
    """
    if rows <= 64 * groups:
        wide = min(rows, groups) * columns >= 3 * 128 * _pallas.multiprocessors()
        return _tiling(64, _widest(columns, 128 if wide else 64), 1, columns)
    return _tiling(64, _widest(columns), 2, columns)


def outer_tiling(rows: int, groups: int, inner: int, columns: int) -> Tiling:
    """Of dw[group] = x^T @ dy."""
    measured = _measured("outer", rows, groups, inner, columns)
    return measured or outer_heuristic(inner, columns)


def outer_heuristic(inner: int, columns: int) -> Tiling:
    """Two warpgroups, if their rows divide the result's."""
    return _tiling(64, _widest(columns), 2 if inner % 128 == 0 else 1, columns)


def block_rows(rows: int, groups: int) -> int:
    """Rows per block: the power of two near half the mean group size, within [2, 128].

    A block costs one pass over its group's matrix, so larger blocks amortise that read; but the last block of every
    group is on average half wasted. Measured by bench/moe_layer.py.
    """
    half_mean = max(1, rows // (2 * max(groups, 1)))
    return min(128, max(2, 1 << (half_mean - 1).bit_length()))
