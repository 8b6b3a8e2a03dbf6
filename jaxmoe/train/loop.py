"""The training loop: resumable to the exact same losses, and honest about what it did."""

import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import checkpoint
from jaxmoe.config import ModelConfig
from jaxmoe.model import run, unembed
from jaxmoe.params import Params, abstract_params
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import Corpus, batch, evaluation_windows, load_corpus
from jaxmoe.train.loss import cross_entropy
from jaxmoe.train.step import TrainState, init_state, make_optimizer, train_step

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a caller's progress display gets after every step."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    bits_per_byte: float | None = None
    """Held-out bits per byte, when this step ended with an evaluation."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Result of a run."""

    params: Params
    config: ModelConfig
    step: int
    bits_per_byte: float
    seconds: float
    directory: pathlib.Path
    corpus: Corpus = dataclasses.field(repr=False)




def _scorer(config: ModelConfig) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    def score(params: Params, windows: jax.Array, mask: jax.Array) -> jax.Array:
        output = run(params, config, windows[:, :-1])
        nats = cross_entropy(unembed(params, output.hidden), windows[:, 1:])
        return jnp.where(mask, nats, 0.0).sum()

    return jax.jit(score)


def evaluate(
    params: Params, config: ModelConfig, corpus: Corpus, *, max_bytes: int, seq_len: int, batch_size: int
) -> float:
    """Held-out bits per byte with sparse attention, as at inference.

    Every scored byte has at least half a window of context (``data.evaluation_windows``). The end-of-document
    tokens' nats count, their number does not: the model must also say where a file ends.
    """
    windows, mask = evaluation_windows(corpus, max_bytes, seq_len)
    n_bytes = int((mask & (windows[:, 1:] < 256)).sum())
    short = -len(windows) % batch_size
    windows = np.pad(windows, ((0, short), (0, 0)))
    mask = np.pad(mask, ((0, short), (0, 0)))
    score = _scorer(config)
    nats = sum(
        float(score(params, windows[i : i + batch_size], mask[i : i + batch_size]))
        for i in range(0, len(windows), batch_size)
    )
    return nats / n_bytes / math.log(2)


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Removes metric lines past ``step``, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)


def _same_run(saved: dict[str, Any], ours: dict[str, Any], directory: pathlib.Path) -> None:
    """Raises if a checkpoint belongs to another run than the one asked for."""
    for name, what in (("train_config", "training options"), ("corpus", "corpus"), ("model", "model config")):
        if saved.get(name) != ours[name]:
            old, new = saved.get(name) or {}, ours[name]
            changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
            shown = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed[:4])
            raise ValueError(
                f"{directory} holds a run with another {what} ({shown}); choose another directory, or use the same."
            )


def _resume(
    config: ModelConfig, train_config: TrainConfig, directory: pathlib.Path, identity: dict[str, Any]
) -> TrainState:
    checkpoints = directory / CHECKPOINTS
    if not checkpoints.is_dir() or checkpoint.latest_step(checkpoints) is None:
        return init_state(config, train_config)
    optimizer = make_optimizer(config, train_config)
    target = jax.eval_shape(optimizer.init, abstract_params(config))
    restored = checkpoint.restore(checkpoints, train_state=target)
    _same_run(restored.extra, identity, directory)
    return TrainState(jnp.asarray(restored.step, jnp.int32), restored.params, restored.train_state)


class _Run:
    """Owns a run's files."""

    def __init__(self, config, train_config, directory, corpus):
        self.config, self.train_config, self.directory = config, train_config, directory
        self.corpus = corpus
        self.identity = {
            "train_config": train_config.to_dict(),
            "corpus": corpus.fingerprint,
            "model": json.loads(json.dumps(config.to_dict())),
        }

    def save(self, state: TrainState) -> None:
        step = int(state.step)
        checkpoint.save(
            self.directory / CHECKPOINTS,
            state.params,
            self.config,
            step,
            train_state=state.opt_state,
            extra=self.identity,
            keep=self.train_config.keep,
            overwrite=True,
        )

    def evaluate(self, params: Params) -> float:
        c = self.train_config
        return evaluate(
            params, self.config, self.corpus, max_bytes=c.eval_bytes, seq_len=c.seq_len, batch_size=c.batch_size
        )


def _record(step: int, metrics: dict[str, jax.Array], seconds: float, tokens: int) -> dict[str, Any]:
    record: dict[str, Any] = {"step": step}
    for name, value in metrics.items():
        if name != "load":
            record[name] = float(value)
    if "load" in metrics:
        load = np.asarray(metrics["load"], np.float64)
        record["load_max_over_mean"] = [round(float(x), 4) for x in load.max(1) / load.mean(1)]
        record["load"] = np.asarray(metrics["load"]).tolist()
    return record | {"seconds": round(seconds, 4), "tokens_per_s": round(tokens / seconds, 1)}


def train(
    config: ModelConfig,
    train_config: TrainConfig,
    directory: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Trains a byte-level model, or goes on where a run in ``directory`` stopped.

    After a crash or SIGKILL at any moment the resumed run has bit-identical losses: parameters, optimiser state
    and step are restored, and batches are a function of (seed, step).

    Args:
      config: the model; its vocabulary must hold bytes and special tokens (``presets.BYTE_VOCAB_SIZE``).
      train_config: the run.
      directory: gets ``checkpoints/`` and ``metrics.jsonl``.
      data: a file or directory of text; default the standard library's sources.
      on_progress: called after every step.

    Returns:
      ``Summary`` with the final parameters and held-out bits per byte.

    Raises:
      ValueError: for options that do not fit, too little data, or a directory that holds another run.
      FloatingPointError: if the loss is not finite; the checkpoint before it is intact.
    """
    train_config.check(config)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(data)
    this = _Run(config, train_config, directory, corpus)
    state = _resume(config, train_config, directory, this.identity)
    first = int(state.step)
    _drop_after(directory / METRICS, first)
    start, bits = time.perf_counter(), None
    with (directory / METRICS).open("a") as file:
        for step in range(first, train_config.steps):
            state, bits = _one(this, state, step, file, on_progress)
    bits = this.evaluate(state.params) if bits is None else bits
    return Summary(state.params, config, int(state.step), bits, time.perf_counter() - start, directory, corpus)


def _one(this: _Run, state: TrainState, step: int, file: Any, on_progress) -> tuple[TrainState, float | None]:
    c, began = this.train_config, time.perf_counter()
    tokens = batch(this.corpus, c.seed, step, c.batch_size, c.seq_len + 2)
    state, metrics = train_step(state, jnp.asarray(tokens), this.config, c)
    jax.block_until_ready(metrics)
    record = _record(step + 1, metrics, time.perf_counter() - began, c.batch_size * c.seq_len)
    if not math.isfinite(record["total_loss"]):
        raise FloatingPointError(
            f"the loss is {record['total_loss']} at step {step + 1}; lower learning_rate (now {c.learning_rate}). "
            f"Checkpoints up to step {checkpoint.latest_step(this.directory / CHECKPOINTS)} are intact."
        )
    last = step + 1 == c.steps
    bits = None
    if last or (step + 1) % c.eval_every == 0:
        bits = this.evaluate(state.params)
        record["bits_per_byte"] = bits
    file.write(json.dumps(record) + "\n")
    file.flush()
    if last or (step + 1) % c.save_every == 0:
        this.save(state)
    if on_progress is not None:
        on_progress(Progress(step + 1, c.steps, record["loss"], record["tokens_per_s"], bits))
    return state, bits
