"""MoE layer speed against its ideal: the same multiplications as one batched matmul.

    python -m bench.moe_layer --tokens 2048 --json bench/results/moe_layer.json

The ideal gives every expert the same number of rows in one [E, M/E, D] x [E, D, F] batched matmul pair with the same
activation: no routing, no sorting, no imbalance. The layer routes, sorts, multiplies and combines, under uniform and skewed
loads. jax.lax.ragged_dot in place of the grouped matmul is the third side.
"""

import jax
import jax.numpy as jnp

from bench import _harness
from jaxmoe.layers.mlp import gate
from jaxmoe.moe import Experts, apply_experts
from jaxmoe.moe.experts import grouped_experts
from jaxmoe.report import median_row
from pallas_kernels import combine, dispatch
from pallas_kernels.numerics import precision_of

SHAPES = {  # experts, active, hidden, expert hidden
    "small": (32, 4, 512, 128),
    "e16": (16, 4, 512, 512),
    "e32": (32, 4, 512, 256),
    "e64": (64, 6, 512, 256),
    "medium": (64, 6, 1024, 512),
    "wide": (64, 6, 2048, 1408),
}


def _loads(key: jax.Array, tokens: int, experts: int, active: int, skew: str) -> jax.Array:
    """Distinct experts per token: uniform, or drawn from a Zipf-like distribution."""
    noise = jax.random.gumbel(key, (tokens, experts))
    bias = (
        jnp.zeros(experts)
        if skew == "uniform"
        else -1.5 * jnp.log1p(jnp.arange(experts, dtype=jnp.float32))
    )
    return jax.lax.top_k(noise + bias[None], active)[1].astype(jnp.int32)


def _layer(experts: Experts, implementation: str | None):
    @jax.jit
    def run(x, ids, weights, experts):
        if implementation is None:
            return apply_experts(x, ids, weights, experts)
        moved = dispatch(x, ids, experts.down.shape[0])
        y = grouped_experts(experts, moved.rows, moved.group_sizes, "silu", implementation)
        return combine(y, moved.position, weights)

    return lambda x, ids, weights: run(x, ids, weights, experts)


@jax.jit
def _ideal(rows, gate_up, down):
    precision = precision_of(rows.dtype)
    h = jnp.einsum("emd,edf->emf", rows, gate_up, precision=precision)
    h = gate(h.reshape(*h.shape[:2], 2, -1), "silu")
    return jnp.einsum("emf,efd->emd", h, down, precision=precision)


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:4])
    _harness.add_dtype(options)
    options.add_argument(
        "--ragged", action="store_true", help="also time jax.lax.ragged_dot (slow on CPU and GPU)"
    )
    args = options.parse_args()
    rows, ratios = [], {}
    for name in args.shapes:
        n, active, size, hidden = SHAPES[name]
        keys = jax.random.split(jax.random.key(args.seed), 4)
        gate_up = jax.random.normal(keys[0], (n, size, 2, hidden), args.dtype) * 0.05
        down = jax.random.normal(keys[1], (n, hidden, size), args.dtype) * 0.05
        x = jax.random.normal(keys[2], (args.tokens, size), args.dtype)
        weights = jnp.full((args.tokens, active), 1 / active)
        flat = gate_up.reshape(n, size, 2 * hidden)
        even = jax.random.normal(keys[3], (n, args.tokens * active // n, size), args.dtype)
        experts = Experts(gate_up, down, n)
        runs = {"ideal": lambda e=even, g=flat, d=down: _ideal(e, g, d)}
        layer, ragged = _layer(experts, None), _layer(experts, "ragged_dot")
        for skew in ("uniform", "skewed"):
            ids = _loads(keys[3], args.tokens, n, active, skew)
            runs[skew] = lambda i=ids, f=layer, x=x, w=weights: f(x, i, w)
            if args.ragged:
                runs[f"{skew}, ragged_dot"] = lambda i=ids, f=ragged, x=x, w=weights: f(x, i, w)
        measures = {name: _harness.device_timed(run) for name, run in runs.items()}
        seconds = _harness.interleave(measures, rounds=args.rounds)
        flops = 6 * args.tokens * active * size * hidden
        for side, values in seconds.items():
            entry = median_row(f"{name} {side}", [v * 1e3 for v in values], "ms")
            more = {"tokens": args.tokens, "dtype": args.dtype}
            rows.append(entry | {"gflops": flops / entry["value"] / 1e6} | more)
        ideal = rows[-len(seconds)]["value"]
        for side, entry in zip(list(seconds)[1:], rows[-len(seconds) + 1 :], strict=True):
            ratios[f"{name} {side} / ideal"] = entry["value"] / ideal
    _harness.finish("moe_layer", rows, ratios, args.json)


if __name__ == "__main__":
    main()
