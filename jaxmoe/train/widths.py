"""What tuning for every width comes to: how methods compare, how fast each width decodes, and the picture of both."""

import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import quant
from jaxmoe.config import ModelConfig
from jaxmoe.generate import generate
from jaxmoe.train.tune import NESTED, Widths
from quant import bps


def decode_speeds(
    params: Any, config: ModelConfig, *, tokens: int = 32, rounds: int = 3
) -> dict[int, float]:
    """Tokens per second at which one sequence is generated at each width, and at 0 from the weights as they are.

    The median of ``rounds`` whole calls, in turns, their prompt of 8 tokens included: short, so that weights and not the cache are what
    is read.

    Args:
      params: arrays, not in SEFP.
      config: the model.
      tokens: how many a call generates.
      rounds: how often.

    Raises:
      ValueError: without a token or a round to time.
    """
    if tokens < 1 or rounds < 1:
        raise ValueError(
            f"tokens and rounds must be at least 1; got {tokens} and {rounds}. Leave the speeds out instead."
        )
    stored, prompt = quant.quantize_params(params), np.zeros((1, 8), np.int32)
    sides = {w: quant.at_width(stored, w) for w in bps.WIDTHS} | {0: params}
    seconds: dict[int, list[float]] = {width: [] for width in sides}
    for turn in range(-1, rounds):
        for width, side in sides.items():
            took = _seconds(functools.partial(generate, side, config, prompt, tokens))
            if turn >= 0:  # the first compiles
                seconds[width].append(took)
    return {width: tokens / statistics.median(values) for width, values in seconds.items()}


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    np.asarray(run())
    return time.perf_counter() - began


def compare(results: Sequence[Widths]) -> dict[str, float]:
    """What is asked of method otaro, with and without "+nested": its mean over the widths against every other method's, its E5M3 against
    the model tuned for E5M3 alone, its E5M8 against tuning without quantisation."""
    named, ratios = {r.method: r for r in results}, {}
    for ours in ("otaro", "otaro" + NESTED):
        if ours not in named:
            continue
        for name, other in named.items():
            if name != ours:
                ratios[f"mean_{ours}_over_{name}"] = named[ours].mean / other.mean
        if "fixed:3" in named:
            ratios[f"m3_{ours}_over_fixed:3"] = named[ours].losses[3] / named["fixed:3"].losses[3]
        if "ptq" in named:
            plain = named["ptq"].unquantised
            ratios[f"m8_{ours}_over_unquantised_tuning"] = named[ours].losses[8] / plain
    return ratios


def plot_widths(
    results: list[Widths], target: pathlib.Path, speeds: dict[int, float] | None = None
) -> pathlib.Path:
    """Draws held-out loss over width and over bytes, a curve per method; and the ``decode_speeds``."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3 if speeds else 2, figsize=(15 if speeds else 11, 4))
    axes[1].sharey(axes[0])
    for result in results:
        widths = list(result.losses)
        values = [result.losses[w] for w in widths]
        axes[0].plot(widths, values, "o-", markersize=3, label=result.method)
        axes[1].plot([result.bytes[w] / 1e6 for w in widths], values, "o-", markersize=3)
    axes[0].set(xlabel="mantissa bits", ylabel="held-out nats per token", title="loss per width")
    axes[1].set(xlabel="MB of parameters read", title="loss over bytes")
    axes[0].legend(fontsize="small")
    if speeds:
        axes[2].plot(bps.WIDTHS, [speeds[w] for w in bps.WIDTHS], "o-", markersize=3, color="black")
        axes[2].axhline(speeds[0], linestyle=":", color="black", label="not quantised")
        axes[2].set(xlabel="mantissa bits", ylabel="tokens/s, one sequence", title="decode speed")
        axes[2].set_ylim(bottom=0)
        axes[2].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target
