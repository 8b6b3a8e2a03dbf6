"""Block sizes of the XLA grouped matmul, by heuristic."""


def block_rows(rows: int, groups: int) -> int:
    """Rows per block.

    A block costs one pass over its group's matrix, so large blocks amortise that read, while blocks larger than
    the mean group waste multiplications on rows of other groups. The power of two near the mean group size,
    within [2, 128], balances the two; measured by bench/moe_layer.py.
    """
    mean = max(1, rows // max(groups, 1))
    return min(128, max(2, 1 << (mean - 1).bit_length()))
