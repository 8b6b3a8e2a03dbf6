"""Speculative decoding with the multi-token-prediction module against plain decoding, on a trained model.

    jaxmoe demo
    python -m bench.speculation runs/demo --json bench/results/speculation.json

One run, same weights, same prompts (pieces of Python's own library), engines taking turns. All must give the same tokens.
How much is gained depends on how often the module is right, which random weights cannot show.
"""

import dataclasses
import pathlib
import sysconfig
import time
from typing import Any

import numpy as np

from bench import _harness
from jaxmoe.cli._models import load
from jaxmoe.engine import Engine, EngineOptions, SamplingParams
from jaxmoe.report import median_row


def _prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random pieces of the standard library's source."""
    rng = np.random.default_rng(seed)
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_bytes() for file in rng.choice(files, count)]
    starts = [int(rng.integers(0, max(len(text) - length, 1))) for text in texts]
    return [list(text[s : s + length]) for text, s in zip(texts, starts, strict=True)]


def _generate(engine: Engine, prompts: list[list[int]], args: Any) -> tuple[float, list]:
    """Tokens per second and the tokens."""
    sampling = SamplingParams(
        max_new_tokens=args.new, ignore_eos=True, temperature=args.temperature, seed=args.seed
    )
    began = time.perf_counter()
    results = engine.generate(prompts, sampling)
    seconds = time.perf_counter() - began
    return args.new * len(prompts) / seconds, [result.token_ids for result in results]


def _measure(engines: dict[int, Engine], args: Any, batch: int) -> tuple[list[dict], dict]:
    speeds: dict[int, list[float]] = {drafts: [] for drafts in engines}
    before = {drafts: engine.stats() for drafts, engine in engines.items()}
    for turn in range(args.rounds):
        prompts = _prompts(batch, args.prompt, args.seed + turn)
        tokens = {}
        for drafts, engine in engines.items():
            speed, tokens[drafts] = _generate(engine, prompts, args)
            speeds[drafts].append(speed)
        if any(each != tokens[0] for each in tokens.values()):
            raise SystemExit("error: speculation has changed tokens; please report this.")
    rows, ratios = [], {}
    for drafts, values in speeds.items():
        name = f"{drafts} drafts, batch {batch}"
        rows.append(median_row(name, values, "tokens/s", prompt=args.prompt, new=args.new))
        if drafts:
            after = engines[drafts].stats()
            guessed = after.drafted_tokens - before[drafts].drafted_tokens
            right = after.accepted_tokens - before[drafts].accepted_tokens
            share = {"name": f"{name}, accepted", "value": 100 * right / guessed, "unit": "%"}
            rows.append(share | {"drafted": guessed, "accepted": right})
            ratios[f"{name}, over none"] = rows[-2]["value"] / rows[0]["value"]
    return rows, ratios


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=5)
    options.add_argument("model", help="a trained run or checkpoint with an MTP module")
    options.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--new", type=int, default=128)
    options.add_argument("--temperature", type=float, default=0.0)
    args = options.parse_args()
    params, config = load(args.model)
    plain = EngineOptions(max_running=max(args.batch), prefix_reuse=False)
    engines = {
        drafts: Engine(
            params, config, options=dataclasses.replace(plain, speculative_tokens=drafts)
        )
        for drafts in (0, *args.drafts)
    }
    for engine in engines.values():
        engine.warmup()
    rows, ratios = [], {}
    for batch in args.batch:
        more_rows, more_ratios = _measure(engines, args, batch)
        rows, ratios = rows + more_rows, ratios | more_ratios
    for engine in engines.values():
        engine.close()
    _harness.finish("speculation", rows, ratios, args.json)


if __name__ == "__main__":
    main()
