"""Decode speed: tokens per second of greedy generation after the prompt, against transformers.

    python -m bench.decode --preset small --batch 8 --prompt 512 --new 64 --json bench/results/decode_small.json

Both sides generate from the same weights and prompts in one run, taking turns. The time of generating one token
(prefill) is subtracted from that of generating all. transformers runs at its default settings and with its other
expert implementations; both ratios are reported. The tokens of both sides must be identical.
"""

import sys

import numpy as np

import jaxmoe
from bench import _harness


def _peer(model, tokens: np.ndarray, new: int):
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)
    kwargs = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}

    def run() -> np.ndarray:
        with torch.no_grad():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs).numpy()[
                :, ids.shape[1] :
            ]

    return run


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--preset", default="small")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--prompt", type=int, default=512)
    options.add_argument("--new", type=int, default=64)
    options.add_argument("--against", choices=["transformers", "none"], default="transformers")
    args = options.parse_args()
    params, config = _harness.weights(args.preset, args.seed)
    tokens = _harness.prompts(config, args.batch, args.prompt, args.seed)

    def ours(new: int):
        return lambda: np.asarray(jaxmoe.generate(params, config, tokens, new))

    sides = {"jaxmoe": ours}
    if args.against == "transformers":
        for experts in _harness.EXPERT_IMPLEMENTATIONS:
            model = _harness.transformers_model(params, config, experts)
            name = f"transformers ({experts or 'default'} experts)"
            sides[name] = lambda new, model=model: _peer(model, tokens, new)
    outputs = {name: side(args.new)() for name, side in sides.items()}
    runs = {f"{name}|{new}": side(new) for name, side in sides.items() for new in (1, args.new)}
    seconds = _harness.time_interleaved(runs, rounds=args.rounds, warmup=1)

    rows, speed = [], {}
    for name in sides:
        pairs = zip(seconds[f"{name}|{args.new}"], seconds[f"{name}|1"], strict=True)
        step_ms = [(whole - prefill) / (args.new - 1) * 1e3 for whole, prefill in pairs]
        rows.append(_harness.row(f"{name}, per step", step_ms, "ms"))
        speed[name] = args.batch / rows[-1]["value"] * 1e3
        rows.append({"name": f"{name}, decode", "value": speed[name], "unit": "tokens/s"})
    ratios = {}
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
        rows.append({"name": "identical tokens", "value": same, "unit": "fraction"})
    shape = {"preset": args.preset, "batch": args.batch, "prompt": args.prompt, "new": args.new}
    _harness.finish("decode", [r | shape for r in rows], ratios, args.json)
    if ratios and same < 1:
        sys.exit(
            "error: the two sides produced different tokens; the speeds above compare different work."
        )


if __name__ == "__main__":
    main()
