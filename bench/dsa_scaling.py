"""How the time and memory of core attention grow with the context: sparse by row, with its indexer, against dense.

    python -m bench.dsa_scaling --uses decode --longest 131072 --json bench/results/dsa_scaling_decode.json
    python -m bench.dsa_scaling --uses prefill train --forms dense sparse core --divide-heads 4 --topk 512 --longest 16384 --rounds 1 --budget-s 50 \
        --json bench/results/dsa_scaling_whole.json

One layer's core. dense: the expanded form over all pairs. sparse: scoring, selection and the absorbed form over the selected rows, with
the indexer's loss in training; core: the same for rows that are given. masked: as sparse, but over all pairs, as short sequences are
computed (``sparse_attention.GATHER_FACTOR``). Projections are on no side. Three uses: a prompt's forward pass,
forward and backward of training, and a decode step over a cache that holds the context. Memory is what XLA plans for temporaries.
The layer is V3.2's. ``--divide-heads`` leaves a part of its heads, attention's and the indexer's alike, so that a CPU can take whole
sequences: the proportions, on which ratios depend, stay (down to 16 index heads, which the CPU kernel computes together), as they do with
topk an equal part of the context (2048 of 128K, 512 of 32K).
Exponents are fitted (least squares of the logarithms) over the longer half of the contexts. The published figures to compare with are
whole-model costs at 128K: decode 8.65x, prefill 3.56x cheaper (spec 8.1).
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import _harness
from jaxmoe.config import ModelConfig
from jaxmoe.layers import core_attention, sparse_attention, step_attention
from jaxmoe.layers.indexer import IndexInputs
from jaxmoe.presets import presets
from jaxmoe.report import median_row

USES = ("prefill", "train", "decode")
FORMS = ("dense", "sparse", "core", "masked")


def _random(seed: int, dtype: Any, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def _index(c: ModelConfig, seed: int, dtype: Any, queries: int, keys: int) -> IndexInputs:
    shapes = ((1, queries, c.index_n_heads, c.index_head_dim), (1, keys, c.index_head_dim))
    q, k = _random(seed, dtype, *shapes)
    return IndexInputs(
        q, k, _random(seed + 1, jnp.float32, (1, queries, c.index_n_heads))[0] * 0.05
    )


def whole(c: ModelConfig, form: str, length: int, seed: int, dtype: Any, *, train: bool):
    """(function, arguments) of a whole sequence; in training of gradients with respect to all arrays that have one."""
    options = core_attention.Options(c.softmax_scale, index_loss=train and form != "dense")
    options = options._replace(topk=None if form == "dense" else c.index_topk)
    heads, latent = c.num_attention_heads, c.kv_lora_rank
    index = _index(c, seed, dtype, length, length)
    if form in ("dense", "masked"):
        wide = (1, length, heads, c.qk_nope_head_dim + c.qk_rope_head_dim)
        arguments = _random(seed, dtype, wide, wide, (1, length, heads, c.v_head_dim))

        def attend(q, k, v, index):
            return core_attention.causal_attention(q, k, v, options, index=index)

    else:
        size = latent + c.qk_rope_head_dim
        arguments = _random(seed, dtype, (1, length, heads, size), (1, length, size))
        given = jax.jit(sparse_attention.choose, static_argnums=1)(index, c.index_topk)

        def attend(q, kv, index):
            rows = given if form == "core" else None
            return sparse_attention.sparse_attention(
                q, kv, options, value_dim=latent, index=index, selection=rows
            )

    def total(*arguments):
        result = attend(*arguments)
        return result.out.astype(jnp.float32).sum() + result.index_loss

    arguments.append(index)
    if not train:
        return lambda *arguments: attend(*arguments).out, arguments
    return jax.grad(total, argnums=tuple(range(len(arguments)))), arguments


def decode(c: ModelConfig, form: str, length: int, seed: int, dtype: Any):
    """(function, arguments) of one new token over a cache of ``length`` tokens, in the absorbed form on both sides."""
    size = c.kv_lora_rank + c.qk_rope_head_dim
    q, cached, own = _random(
        seed, dtype, (1, 1, c.num_attention_heads, size), (1, 1, length, size), (1, 1, size)
    )
    index = _index(c, seed, dtype, 1, 1)
    (keys,) = _random(seed + 2, dtype, (1, 1, length, c.index_head_dim))
    sight = step_attention.Sight(jnp.full(1, length, jnp.int32))

    def run(q, cached, own, index, keys):
        by_row = step_attention.selects_rows(
            c.index_topk if form == "sparse" else None, length, 1, dtype
        )
        before = step_attention.nothing(
            sight, c.index_topk if form == "sparse" else None, length, 1, by_row=by_row
        )
        if form == "sparse":
            operands = (keys, 0, index.k, sight, before, c.index_topk)
            before = step_attention.select(index, *operands)
        more = {"scale": c.softmax_scale, "value_dim": c.kv_lora_rank}
        return step_attention.latent_attention(q, cached, 0, own, sight, before, **more)

    return run, [q, cached, own, index, keys]


def build(
    c: ModelConfig, use: str, form: str, length: int, seed: int, dtype: Any
) -> tuple[Callable[[], Any], int]:
    """A call without arguments, compiled; and the bytes of its temporaries."""
    if use == "decode":
        function, arguments = decode(c, form, length, seed, dtype)
    else:
        function, arguments = whole(c, form, length, seed, dtype, train=use == "train")
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: compiled(*arguments), compiled.memory_analysis().temp_size_in_bytes


def exponent(lengths: list[int], values: list[float]) -> float:
    """Slope of the logarithms over the longer half of the lengths (at least three)."""
    some = max(3, -(-len(lengths) // 2))
    return float(np.polyfit(np.log(lengths[-some:]), np.log(values[-some:]), 1)[0])


def measured(
    config: ModelConfig, use: str, form: str, args: argparse.Namespace, dtype: Any
) -> list[dict]:
    """A row per context, up to the longest, or the first that takes longer than the budget."""
    rows, length = [], args.shortest
    shape = {"preset": args.preset, "dtype": args.dtype, "topk": config.index_topk}
    shape["heads"] = config.num_attention_heads
    while length <= args.longest:
        call, size = build(config, use, form, length, args.seed, dtype)
        measure = _harness.device_timed(call, calls=3)
        first = measure()
        rounds = min(args.rounds, int(args.budget_s / 2 / max(first, 1e-4)))
        values = [measure() * 1e3 for _ in range(rounds)] or [first * 1e3]
        more = {"temporary_bytes": size, "context": length, **shape}
        rows.append(median_row(f"{use}, {form}, {length}", values, "ms", **more))
        print(f"{rows[-1]['name']}: {rows[-1]['value']:.4g} ms, {size / 2**20:.1f} MiB", flush=True)
        if first > args.budget_s:
            break
        length *= 2
    return rows


def compared(use: str, time: dict, memory: dict) -> dict[str, float]:
    """Exponents of each form, and dense over sparse at the longest context that both have."""
    ratios = {}
    for what, table in (("time", time), ("memory", memory)):
        for form, values in table.items():
            if len(values) >= 3:
                ratios[f"{use}, {form}, exponent of {what}"] = exponent(
                    list(values), list(values.values())
                )
        both = set(table.get("dense", {})) & set(table.get("sparse", {}))
        if both:
            last = max(both)
            ratios[f"{use}, dense over sparse at {last}, {what}"] = (
                table["dense"][last] / table["sparse"][last]
            )
    return ratios


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    _harness.add_dtype(options)
    options.add_argument("--preset", default="deepseek_v32")
    options.add_argument("--divide-heads", type=int, default=1, help="leave this part of the heads")
    options.add_argument("--topk", type=int, help="selected keys; default the preset's")
    options.add_argument("--shortest", type=int, default=1024)
    options.add_argument("--longest", type=int, default=65536)
    options.add_argument("--uses", nargs="+", choices=USES, default=list(USES))
    options.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options.add_argument(
        "--budget-s", type=float, default=20.0, help="no longer context once a call takes so long"
    )
    args = options.parse_args()
    config, dtype = presets[args.preset], jnp.dtype(args.dtype)
    heads = (config.num_attention_heads, config.index_n_heads)
    if args.divide_heads < 1 or any(n % args.divide_heads for n in heads):
        options.error(
            f"--divide-heads must divide {args.preset}'s {heads[0]} heads and {heads[1]} of the indexer; got {args.divide_heads}. Use a "
            "power of two."
        )
    config = config.replace(
        index_topk=args.topk or config.index_topk,
        num_attention_heads=config.num_attention_heads // args.divide_heads,
        index_n_heads=config.index_n_heads // args.divide_heads,
    )
    rows, ratios = [], {}
    for use in args.uses:
        time, memory = {}, {}
        for form in args.forms:
            if use == "decode" and form in ("core", "masked"):
                continue
            found = measured(config, use, form, args, dtype)
            rows += found
            time[form] = {r["context"]: r["value"] for r in found}
            memory[form] = {r["context"]: max(r["temporary_bytes"], 1) for r in found}
        ratios |= compared(use, time, memory)
    _harness.finish("dsa_scaling", rows, ratios, args.json)


if __name__ == "__main__":
    main()
