"""A training step's speed: tokens per second, and the share of the device's measured matmul peak that its model FLOPs are.

    python -m bench.train_step --model 2b --batch 8 --seq-len 4096 --dtype bfloat16 --json bench/results/gpu_train_step.json
    python -m bench.train_step --model tiny --batch 8 --seq-len 256 --json bench/results/train_step.json

A step is forward, backward and AdamW on random tokens with experts under the balance that random weights give. The peak is that of a
large matrix product of the same type, measured in turns with the step. Model FLOPs as in ``jaxmoe.train.flops``.
"""

import jax
import numpy as np

from bench import _harness
from jaxmoe import presets
from jaxmoe.config import ModelConfig
from jaxmoe.model import REMAT
from jaxmoe.params import active_param_count, param_count
from jaxmoe.report import median_row
from jaxmoe.train import TrainConfig, init_state, train_step
from jaxmoe.train.config import COMPUTE_DTYPES, STAGES
from jaxmoe.train.data import Batch
from jaxmoe.train.flops import peak_flops, step_flops

# V3.2's proportions at sizes whose float32 weights and moments, and bfloat16 activations, fill one H200 (141 GB).
_LARGE = presets["deepseek_v32"].replace(
    vocab_size=32768,
    hidden_size=2048,
    intermediate_size=8192,
    moe_intermediate_size=1024,
    num_hidden_layers=10,
    first_k_dense_replace=1,
    num_attention_heads=16,
    num_key_value_heads=16,
    q_lora_rank=1024,
    n_routed_experts=32,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=4,
    index_n_heads=16,
    index_head_dim=128,
    index_topk=1024,
)
MODELS: dict[str, ModelConfig] = {
    "2b": _LARGE,
    "1b": _LARGE.replace(
        hidden_size=1536, intermediate_size=6144, moe_intermediate_size=768, q_lora_rank=768
    ),
}


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--model", default="tiny", choices=[*MODELS, "tiny", "small"])
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--seq-len", type=int, default=256)
    options.add_argument("--accumulate", type=int, default=1)
    options.add_argument("--dtype", choices=COMPUTE_DTYPES, default="float32")
    options.add_argument("--stage", choices=STAGES, default="pretrain")
    options.add_argument("--fp8", action="store_true", help="experts' products of 8 bits")
    options.add_argument("--remat", choices=REMAT, default="core")
    options.add_argument("--remat-moe", choices=REMAT)
    args = options.parse_args()
    config = MODELS.get(args.model) or presets[args.model]
    run = TrainConfig(
        stage=args.stage,
        batch_size=args.batch,
        seq_len=args.seq_len,
        accumulate=args.accumulate,
        compute_dtype=args.dtype,
        fp8=args.fp8,
        remat=args.remat,
        remat_moe=args.remat_moe,
    )
    run.check(config)
    state = init_state(config, run)
    shape = (args.batch, args.seq_len + 2)
    tokens = np.random.default_rng(args.seed).integers(0, 256, shape).astype(np.int32)
    batch = Batch(tokens, np.zeros(shape, np.int32), np.ones(shape, np.float32))

    def step() -> None:
        nonlocal state
        state, metrics = train_step(state, batch, config, run)
        jax.block_until_ready(metrics)

    def peak_seconds() -> float:
        peak_flops.cache_clear()
        return flops / peak_flops(args.dtype)

    flops = step_flops(config, run)
    measures = {"step": _harness.timed(step), "the same FLOPs at the measured peak": peak_seconds}
    seconds = _harness.interleave(measures, rounds=args.rounds)
    rows = [median_row(name, [v * 1e3 for v in values], "ms") for name, values in seconds.items()]
    taken, ideal = (row["value"] / 1e3 for row in rows)
    rows += [
        {"name": "tokens", "value": args.batch * args.seq_len / taken, "unit": "tokens/s"},
        {"name": "model FLOPs", "value": flops / taken / 1e12, "unit": "TFLOP/s"},
        {"name": "parameters", "value": param_count(config, include_mtp=True), "unit": ""},
        {"name": "active per token", "value": active_param_count(config), "unit": ""},
    ]
    _harness.finish("train_step", rows, {"MFU of the measured peak": ideal / taken}, args.json)


if __name__ == "__main__":
    main()
