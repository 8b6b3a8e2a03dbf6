"""Prefill speed: prompt tokens per second of one forward pass that fills the cache, against transformers.

    python -m bench.prefill --preset small --batch 8 --prompt 512 --json bench/results/prefill_small.json

One new token is the prefill and an argmax, with the cache built: the same work on both sides.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import jaxmoe
from bench import _harness
from jaxmoe.report import median_row


def _theirs(model: Any, tokens: np.ndarray) -> Callable[[], np.ndarray]:
    import torch

    ids = torch.tensor(tokens, dtype=torch.long, device=model.device)

    def run() -> np.ndarray:
        with torch.no_grad():
            logits = model(ids, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1].argmax(-1).cpu().numpy()

    return run


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    _harness.add_peers(options)
    _harness.add_dtype(options)
    options.add_argument("--preset", default="small")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--prompt", type=int, default=512)
    args = options.parse_args()
    params, config = _harness.weights(args.preset, args.seed, args.dtype)
    tokens = _harness.prompts(config, args.batch, args.prompt, args.seed)
    runs = {"jaxmoe": lambda: np.asarray(jaxmoe.generate(params, config, tokens, 1))[:, 0]}
    if args.against == "transformers":
        for name, model in _harness.peers(args.peers, params, config).items():
            runs[name] = _theirs(model, tokens)
    outputs = [run() for run in runs.values()]
    seconds = _harness.interleave(
        {name: _harness.timed(run) for name, run in runs.items()}, rounds=args.rounds, warmup=0
    )
    shape = {"preset": args.preset, "dtype": args.dtype, "batch": args.batch, "prompt": args.prompt}
    rows, speed = [], {}
    for name, values in seconds.items():
        rows.append(median_row(f"{name}, prefill", [v * 1e3 for v in values], "ms", **shape))
        speed[name] = args.batch * args.prompt / rows[-1]["value"] * 1e3
        rows.append({"name": f"{name}, prefill", "value": speed[name], "unit": "tokens/s", **shape})
    same = float(np.mean([np.mean(outputs[0] == other) for other in outputs]))
    rows.append({"name": "identical next tokens", "value": same, "unit": "fraction", **shape})
    _harness.finish(
        "prefill", rows, _harness.ratios_over_peers(speed.pop("jaxmoe"), speed), args.json
    )
    if same < 1 and args.dtype == "float32":
        sys.exit(
            "error: the two sides chose different tokens; the speeds above compare different work."
        )


if __name__ == "__main__":
    main()
