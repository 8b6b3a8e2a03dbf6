"""What the benches share: interleaved timing, and the transformers peer on the same weights."""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import jaxmoe
from jaxmoe import checkpoint
from jaxmoe.report import make_report, write_report

# What to run, its work, and that work's unit per second.
Runs = dict[str, tuple[Callable[[], Any], float, str]]


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    """``run``, which must block until its result is there, as a function that returns its seconds."""

    def measure() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return measure


def device_timed(run: Callable[[], Any], calls: int = 20) -> Callable[[], float]:
    """``run``, which must return arrays without waiting for them, as a function that returns its seconds on the device.

    On accelerators several calls queue up, so that dispatch and waiting, a hundred microseconds or more, stay out of it. On CPU an
    untimed call goes before, so that caches hold what this function leaves there and not what another one of the turn did.
    """
    if jax.default_backend() == "cpu":
        again = timed(lambda: jax.block_until_ready(run()))
        return lambda: (again(), again())[1]

    def measure() -> float:
        began = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        return (time.perf_counter() - began) / calls

    return measure


def interleave(
    measures: Mapping[str, Callable[[], float]], *, rounds: int = 10, warmup: int = 2
) -> dict[str, list[float]]:
    """Calls functions that return seconds, in turns (A B A B ...), so that drift of the machine hits all alike.

    Warm-up rounds (compilation, caches) are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(warmup + rounds):
        for name, measure in measures.items():
            value = measure()
            if turn >= warmup:
                seconds[name].append(value)
    return seconds


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every bench has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", help="write the report here")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--rounds", type=int, default=10)
    return options


def add_peers(options: argparse.ArgumentParser) -> None:
    """Options of benches that have transformers as the peer."""
    options.add_argument("--against", choices=["transformers", "none"], default="transformers")
    options.add_argument(
        "--peers",
        nargs="+",
        default=["default"],
        choices=["default", "eager", "grouped_mm", "batched_mm"],
        help="transformers' expert implementations to compare with",
    )


def add_dtype(options: argparse.ArgumentParser) -> None:
    """The type that weights and caches have on both sides."""
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")


def finish(bench: str, rows: list[dict], ratios: dict[str, float], path: str | None) -> None:
    """Prints the rows and ratios and writes the report."""
    width = max(len(r["name"]) for r in rows)
    for r in rows:
        print(f"{r['name']:{width}}  {r['value']:12.4g} {r['unit']}")
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    if path:
        write_report(path, make_report(bench, rows, ratios))


def weights(
    preset: str, seed: int, dtype: str = "float32", *, dense: bool = False
) -> tuple[Any, jaxmoe.ModelConfig]:
    """Parameters and config of a preset without its MTP module, which no peer runs in plain generation.

    Matrices are four times the initial scale: logits then differ enough between tokens for greedy outputs
    to be comparable (in float32; with bfloat16 near-ties part the two sides soon). With ``dense`` no layer has experts.
    """
    if preset not in jaxmoe.presets:
        raise SystemExit(f"--preset must be one of {', '.join(jaxmoe.presets)}; got {preset!r}.")
    config = jaxmoe.presets[preset].replace(num_nextn_predict_layers=0)
    if dense:
        config = config.replace(first_k_dense_replace=config.num_hidden_layers)
    params = jaxmoe.init_params(config, jax.random.key(seed), dtype=dtype)
    return jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params), config


def prompts(config: jaxmoe.ModelConfig, batch: int, length: int, seed: int) -> np.ndarray:
    """Random byte prompts, int32 [batch, length]."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, min(256, config.vocab_size), (batch, length)).astype(np.int32)


def transformers_model(params: Any, config: jaxmoe.ModelConfig, experts: str | None = None) -> Any:
    """The same weights in the same type as a transformers model, on the kind of device that JAX uses.

    Args:
      params: parameters.
      config: the model.
      experts: transformers' expert implementation; None leaves its default.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(
            "--against transformers needs the extra 'parity': pip install 'jaxmoe[parity]'."
        ) from error
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--against transformers on a GPU needs a PyTorch that sees it; got one without CUDA."
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.save_hf(directory, params, config)
        more = {} if experts is None else {"experts_implementation": experts}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, params["embed"]["weight"].dtype.name), **more
        )
    return model.eval().to(device)


def peers(names: list[str], params: Any, config: jaxmoe.ModelConfig) -> dict[str, Any]:
    """transformers models by expert implementation; "default" leaves transformers' own choice."""
    return {
        f"transformers ({name} experts)": transformers_model(
            params, config, None if name == "default" else name
        )
        for name in names
    }


def ratios_over_peers(ours: float, theirs: Mapping[str, float]) -> dict[str, float]:
    """Our speed over each peer's."""
    return {f"over {name}": ours / value for name, value in theirs.items()}
