"""Block sizes and limits of the CPU backends, by heuristic."""

# On average. At this many the C++ kernel is still five times as fast as the block loop; above is not measured.
NATIVE_ROWS_PER_GROUP = 8


def block_rows(rows: int, groups: int) -> int:
    """Rows per block: the power of two near half the mean group size, within [2, 128].

    A block costs one pass over its group's matrix, so larger blocks amortise that read; but the last block of every
    group is on average half wasted. Measured by bench/moe_layer.py.
    """
    half_mean = max(1, rows // (2 * max(groups, 1)))
    return min(128, max(2, 1 << (half_mean - 1).bit_length()))
