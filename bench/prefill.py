"""Prefill speed: prompt tokens per second of one forward pass that fills the cache, against transformers.

python -m bench.prefill --preset small --batch 8 --prompt 512 --json bench/results/prefill_small.json
"""

import sys

import numpy as np

import jaxmoe
from bench import _harness


def _peer(model, tokens: np.ndarray):
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)

    def run() -> np.ndarray:
        with torch.no_grad():
            return model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).numpy()

    return run


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--preset", default="small")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--prompt", type=int, default=512)
    options.add_argument("--against", choices=["transformers", "none"], default="transformers")
    args = options.parse_args()
    params, config = _harness.weights(args.preset, args.seed)
    tokens = _harness.prompts(config, args.batch, args.prompt, args.seed)
    # One new token is the prefill and an argmax, with the cache built: the same work on both sides.
    runs = {"jaxmoe": lambda: np.asarray(jaxmoe.generate(params, config, tokens, 1))[:, 0]}
    if args.against == "transformers":
        for experts in _harness.EXPERT_IMPLEMENTATIONS:
            model = _harness.transformers_model(params, config, experts)
            runs[f"transformers ({experts or 'default'} experts)"] = _peer(model, tokens)
    outputs = {name: run() for name, run in runs.items()}
    seconds = _harness.time_interleaved(runs, rounds=args.rounds, warmup=1)
    rows, speed = [], {}
    for name, values in seconds.items():
        rows.append(_harness.row(f"{name}, prefill", [v * 1e3 for v in values], "ms"))
        speed[name] = args.batch * args.prompt / rows[-1]["value"] * 1e3
        rows.append({"name": f"{name}, prefill", "value": speed[name], "unit": "tokens/s"})
    ratios, same = {}, 1.0
    if args.against == "transformers":
        default, best = (
            speed["transformers (default experts)"],
            max(v for n, v in speed.items() if n != "jaxmoe"),
        )
        ratios = {
            "over_transformers_default": speed["jaxmoe"] / default,
            "over_transformers_best": speed["jaxmoe"] / best,
        }
        same = float(np.mean(outputs["jaxmoe"] == outputs["transformers (default experts)"]))
        rows.append({"name": "identical next tokens", "value": same, "unit": "fraction"})
    shape = {"preset": args.preset, "batch": args.batch, "prompt": args.prompt}
    _harness.finish("prefill", [r | shape for r in rows], ratios, args.json)
    if same < 1:
        sys.exit(
            "error: the two sides chose different tokens; the speeds above compare different work."
        )


if __name__ == "__main__":
    main()
