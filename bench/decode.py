"""Decode speed: tokens per second of greedy decoding after the prompt, against transformers.

    python -m bench.decode --preset small --batch 8 --prompt 512 --new 64 --json bench/results/decode_small.json

Same weights, same prompts, one run, taking turns. Decoding is timed as generate(new) minus generate(1) on both sides,
and transformers also as its bare forward pass, called step by step on a cache that the prompt has filled: the
harder peer, without the overhead of its generate(). The share of identical tokens is reported.
"""

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import jaxmoe
from bench import _harness
from jaxmoe.report import median_row


def _difference(generate: Callable[[int], Any], new: int) -> Callable[[], float]:
    """Seconds of decoding: all tokens minus the first."""
    whole, prefill = _harness.timed(lambda: generate(new)), _harness.timed(lambda: generate(1))
    return lambda: whole() - prefill()


def _generate(model: Any, tokens: np.ndarray, produced: list[np.ndarray]) -> Callable[[int], None]:
    import torch

    ids = torch.tensor(tokens, dtype=torch.long, device=model.device)
    kwargs = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def run(count: int) -> None:
        with torch.no_grad():
            out = model.generate(ids, min_new_tokens=count, max_new_tokens=count, **kwargs)
        produced.append(out[:, ids.shape[1] :].cpu().numpy())

    return run


def _step_loop(
    model: Any, tokens: np.ndarray, new: int, produced: list[np.ndarray]
) -> Callable[[], float]:
    import torch

    ids = torch.tensor(tokens, dtype=torch.long, device=model.device)
    with torch.no_grad():
        first = model(ids, use_cache=True, logits_to_keep=1)

    def measure() -> float:
        cache = copy.deepcopy(first.past_key_values)
        token = first.logits[:, -1].argmax(-1)
        out = [token]
        with torch.no_grad():
            began = time.perf_counter()
            for _ in range(new - 1):
                step = model(token[:, None], past_key_values=cache, use_cache=True)
                token = step.logits[:, -1].argmax(-1)
                out.append(token)
            result = torch.stack(out, 1).cpu().numpy()  # waits for the device
            seconds = time.perf_counter() - began
        produced.append(result)
        return seconds

    return measure


def _rows(
    seconds: dict[str, list[float]], args: Any, shape: dict[str, Any]
) -> tuple[list[dict], dict[str, float]]:
    """Report rows of each side's step and speed, and the speeds in tokens per second."""
    rows, speed = [], {}
    for name, values in seconds.items():
        steps = [v / (args.new - 1) * 1e3 for v in values]
        rows.append(median_row(f"{name}, decode step", steps, "ms", **shape))
        speed[name] = args.batch / rows[-1]["value"] * 1e3
        rows.append({"name": f"{name}, decode", "value": speed[name], "unit": "tokens/s", **shape})
    return rows, speed


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    _harness.add_peers(options)
    _harness.add_dtype(options)
    options.add_argument("--preset", default="small")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--prompt", type=int, default=512)
    options.add_argument("--new", type=int, default=64)
    args = options.parse_args()
    params, config = _harness.weights(args.preset, args.seed, args.dtype)
    tokens = _harness.prompts(config, args.batch, args.prompt, args.seed)

    def ours_generate(count: int) -> np.ndarray:
        return np.asarray(jaxmoe.generate(params, config, tokens, count))

    measures = {"jaxmoe": _difference(ours_generate, args.new)}
    produced: list[np.ndarray] = []
    if args.against == "transformers":
        for name, model in _harness.peers(args.peers, params, config).items():
            measures[f"{name}, generate"] = _difference(
                _generate(model, tokens, produced), args.new
            )
            measures[f"{name}, bare steps"] = _step_loop(model, tokens, args.new, produced)
    seconds = _harness.interleave(measures, rounds=args.rounds, warmup=1)

    shape = {name: getattr(args, name) for name in ("preset", "dtype", "batch", "prompt", "new")}
    rows, speed = _rows(seconds, args, shape)
    ours = ours_generate(args.new)
    same = [np.mean(ours[:, : theirs.shape[1]] == theirs) for theirs in produced]
    same = float(np.mean(same)) if same else 1.0
    rows.append({"name": "identical tokens", "value": same, "unit": "fraction", **shape})
    _harness.finish(
        "decode", rows, _harness.ratios_over_peers(speed.pop("jaxmoe"), speed), args.json
    )
    # Random weights have near-ties, at which float32 sums of another order part for the rest of a sequence.
    if same < 0.9 and args.dtype == "float32":
        sys.exit(
            "error: the two sides produced different tokens; the speeds above compare different work."
        )


if __name__ == "__main__":
    main()
