"""``jaxmoe demo``: train, save, restore on another mesh, write text, serve and lose a rank. Some minutes on a laptop."""

import dataclasses
import pathlib
import shutil
import time

import jax
import numpy as np
import rich.console
import rich.panel

from jaxmoe import checkpoint
from jaxmoe.cli.generate import stream_text
from jaxmoe.cli.recover import recover
from jaxmoe.cli.train import run_and_report
from jaxmoe.report import make_report, write_report
from jaxmoe.sharding import make_mesh
from jaxmoe.tokenizer import ByteTokenizer
from jaxmoe.train.config import demo_config
from jaxmoe.train.data import DataOptions

DEVICES = 2  # no more than cores: XLA starts a thread for each, and they take time from each other
RANKS = 4
PROMPT = "def __init__(self, "


def _simulate_devices() -> None:
    """Splits the CPU into several devices, if JAX has not started yet: the checkpoint is restored across them."""
    try:
        jax.config.update("jax_num_cpu_devices", DEVICES)
    except RuntimeError:
        pass  # already initialised, e.g. in a test: use the devices there are


def _restore_elsewhere(
    output: pathlib.Path, params, console: rich.console.Console
) -> checkpoint.Restored:
    """Restores the last checkpoint onto a mesh of all devices and checks it against the trained parameters."""
    experts = min(len(jax.devices()), DEVICES)
    mesh = make_mesh(expert=experts, devices=jax.devices()[:experts])
    began = time.perf_counter()
    restored = checkpoint.restore(output / "checkpoints", mesh)
    equal = jax.tree.all(
        jax.tree.map(
            lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), params, restored.params
        )
    )
    if not equal:
        raise RuntimeError(
            "the restored parameters differ from the trained ones; please report this."
        )
    console.print(
        f"restored step {restored.step} onto a mesh of {experts} devices (experts split {experts} ways) "
        f"in {time.perf_counter() - began:.1f} s: bit-identical"
    )
    return restored


def demo(
    output: pathlib.Path = pathlib.Path("runs/demo"),
    steps: int | None = None,
    seed: int = 0,
    fresh: bool = True,
    json: pathlib.Path | None = None,
) -> None:
    """Trains a small DeepSeek-V3.2-shaped model on real text, saves it, restores it on another mesh, writes text; then serves it on
    four processes, kills one under load and brings it back.

    Args:
      output: Directory of the run.
      steps: Training steps; default: about three minutes of them on two cores.
      seed: Random seed.
      fresh: Start over; with --no-fresh go on with an interrupted run.
      json: Also write a JSON report.
    """
    console = rich.console.Console(soft_wrap=True, highlight=False)
    _simulate_devices()
    if fresh and (output / "metrics.jsonl").exists():
        shutil.rmtree(output)
    began = time.perf_counter()
    config, train_config = demo_config()
    steps = train_config.steps if steps is None else steps
    train_config = dataclasses.replace(train_config, steps=steps, seed=seed)
    summary, rows, ratios = run_and_report(config, train_config, output, DataOptions(), console)
    _restore_elsewhere(output, summary.params, console)
    text, count = stream_text(
        summary.params,
        config.replace(eos_token_id=None),  # always so much text: a young model likes to end
        ByteTokenizer(),
        PROMPT,
        300,
        temperature=1.0,
        top_p=0.9,
        seed=seed,
    )
    console.print(rich.panel.Panel(rich.markup.escape(PROMPT + text), title="generated", width=100))
    console.print(f"serving it on {RANKS} processes, one of which will be killed under load")
    recover(str(output), ranks=RANKS, seed=seed, baselines=False, output=output / "recover")
    seconds = time.perf_counter() - began
    console.print(f"everything is in {output}; the whole demo took {seconds:.0f} s")
    rows += [
        {"name": "generated", "value": count, "unit": "tokens", "text": text},
        {"name": "whole demo", "value": seconds, "unit": "s"},
    ]
    if json is not None:
        write_report(json, make_report("demo", rows, ratios))
