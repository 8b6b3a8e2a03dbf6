"""What training with 8-bit products costs in loss: the same run with and without, and the products' own errors.

    python -m bench.fp8_training --preset tiny --steps 200 --seeds 0 1 2 --json bench/results/fp8_training.json

Both runs of a seed have the same parameters to start with and the same data. Short runs that differ a little drift apart in either direction,
so one seed says little. DeepSeek-V3 reports a training loss within 0.25 % of bfloat16's.
"""

import dataclasses
import pathlib
import statistics
import tempfile

import jax
import jax.numpy as jnp

from bench import _harness
from jaxmoe import ModelConfig, presets
from jaxmoe.train import TrainConfig, train
from pallas_kernels import grouped_matmul, grouped_matmul_fp8


def product_errors(seed: int) -> dict[str, float]:
    """Deviation of y, dx and dw from float32's, over these's deviation."""
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = jnp.full(4, 256, jnp.int32)
    x = jax.random.normal(keys[0], (1024, 512))
    w = jax.random.normal(keys[1], (4, 512, 256))
    dy = jax.random.normal(keys[2], (1024, 256))

    def products(multiply):
        y, back = jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)
        return dict(zip(("y", "dx", "dw"), (y, *back(dy)), strict=True))

    exact, ours = products(grouped_matmul), products(grouped_matmul_fp8)
    return {n: float(jnp.std(ours[n] - exact[n]) / jnp.std(exact[n])) for n in exact}


def held_out_losses(config: ModelConfig, run: TrainConfig, data: str | None) -> list[dict]:
    """Rows of the held-out loss of the run without and with 8-bit products, in nats."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for fp8 in (False, True):
            output = pathlib.Path(directory) / str(fp8)
            summary = train(config, dataclasses.replace(run, fp8=fp8), output, data=data)
            name = f"held-out loss, {'8-bit products' if fp8 else 'float32'}, seed {run.seed}"
            row = {"name": name, "value": summary.held_out_loss, "unit": "nats"}
            rows.append(row | {"steps": run.steps, "seconds": summary.seconds})
    return rows


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--preset", default="tiny", choices=sorted(presets))
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--seq-len", type=int, default=256)
    options.add_argument("--seeds", nargs="+", type=int, help="of the runs; default --seed")
    options.add_argument("--data", help="text; default the standard library's sources")
    args = options.parse_args()
    config = presets[args.preset].replace(initializer_range=0.06)
    run = TrainConfig(
        steps=args.steps,
        batch_size=args.batch,
        seq_len=args.seq_len,
        eval_every=args.steps,
        eval_bytes=65536,
        save_every=args.steps,
    )
    rows = [
        {"name": f"8-bit product {name}, relative error", "value": error, "unit": ""}
        for name, error in product_errors(args.seed).items()
    ]
    ratios = {}
    for seed in args.seeds or [args.seed]:
        exact, rounded = held_out_losses(config, dataclasses.replace(run, seed=seed), args.data)
        rows += [exact, rounded]
        ratio = rounded["value"] / exact["value"]
        ratios[f"held-out loss, 8-bit products / float32, seed {seed}"] = ratio
    ratios["held-out loss, 8-bit products / float32, mean"] = statistics.mean(ratios.values())
    _harness.finish("fp8_training", rows, ratios, args.json)


if __name__ == "__main__":
    main()
