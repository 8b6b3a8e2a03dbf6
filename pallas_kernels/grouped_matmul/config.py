"""Block sizes of the XLA backend, by heuristic."""


def block_rows(rows: int, groups: int) -> int:
    """Rows per block: the power of two near half the mean group size, within [2, 128].

    A block costs one pass over its group's matrix, so larger blocks amortise that read; but the last block of every
    group is on average half wasted. Measured by bench/moe_layer.py.
    """
    half_mean = max(1, rows // (2 * max(groups, 1)))
    return min(128, max(2, 1 << (half_mean - 1).bit_length()))
