"""What a report of ``bench.kernels`` says about the grouped products beside their times."""

from bench._kernels_grouped_matmul import ratios


def row(side, product, value, kind=", time"):
    return {"name": f"grouped_matmul, {side}, {product}, 8 tokens{kind}", "value": value}


def test_each_kernel_is_compared_with_what_was_timed_beside_it():
    rows = [
        {"name": "matmul 8 x 8 x 8, float32, time", "value": 1.0},
        row("native", "dx", 9.0, kind=""),  # not a time
        *(row("native", "dx", 3.0), row("batched", "dx", 2.0), row("ragged_dot", "dx", 12.0)),
        *(row("xla", "dw", 5.0), row("batched", "dw", 4.0), row("native", "forward", 1.0)),
    ]
    assert ratios(rows) == {
        "native, dx, 8 tokens: time over batched": 1.5,
        "native, dx, 8 tokens: speed over ragged_dot": 4.0,
        "ragged_dot, dx, 8 tokens: time over batched": 6.0,
        "xla, dw, 8 tokens: time over batched": 1.25,
    }
