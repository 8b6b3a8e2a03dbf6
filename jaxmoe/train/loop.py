"""The training loop: resumable to the exact same losses, and honest about what it did."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmoe import checkpoint
from jaxmoe.config import ModelConfig
from jaxmoe.errors import JaxMoeError
from jaxmoe.model import PassOptions, run, unembed
from jaxmoe.moe import MoeOptions
from jaxmoe.params import Params
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import Corpus, batch, evaluation_windows, load_corpus
from jaxmoe.train.loss import cross_entropy
from jaxmoe.train.step import (
    TrainState,
    abstract_state,
    init_state,
    place_batch,
    state_shardings,
    train_step,
)

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


class LossNotFinite(JaxMoeError, FloatingPointError):
    """The loss became infinite or NaN; the message names the step and what is still good."""


# At module level: a fresh jit per evaluation would compile again each time.
@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def scored_nats(
    params: Params, windows: jax.Array, mask: jax.Array, config: ModelConfig, mesh: Mesh | None
) -> jax.Array:
    """Sum of the nats of the targets that count: windows [B, T + 1] int32, mask [B, T] bool."""
    moe = MoeOptions() if mesh is None else MoeOptions("all_to_all", mesh)
    output = run(params, config, windows[:, :-1], options=PassOptions(moe=moe))
    nats = cross_entropy(unembed(params, output.hidden), windows[:, 1:])
    return jnp.where(mask, nats, 0.0).sum()


def evaluate(
    params: Params,
    config: ModelConfig,
    corpus: Corpus,
    *,
    max_bytes: int,
    seq_len: int,
    batch_size: int,
    probe_bytes: int | None = None,
    mesh: Mesh | None = None,
    score: Callable[..., jax.Array] | None = None,
) -> float:
    """Held-out bits per byte with sparse attention, as at inference.

    Every scored byte has at least half a window of context (``data.evaluation_windows``). The end-of-document
    tokens' nats count, their number does not: the model must also say where a file ends.

    Args:
      params: parameters, on ``mesh`` if there is one.
      config: the model.
      corpus: whose held-out part is scored.
      max_bytes: how much of it, from its start.
      seq_len: window length.
      batch_size: windows at once.
      probe_bytes: score only about so many bytes, spread evenly.
      mesh: over which the windows are split.
      score: ``scored_nats`` for this config and mesh, compiled before.
    """
    windows, mask = evaluation_windows(corpus, max_bytes, seq_len, probe_bytes)
    n_bytes = int((mask & (windows[:, 1:] < 256)).sum())
    short = -len(windows) % batch_size
    windows = np.pad(windows, ((0, short), (0, 0)))
    mask = np.pad(mask, ((0, short), (0, 0)))
    place = jnp.asarray if mesh is None else functools.partial(place_batch, mesh)
    score = score or functools.partial(scored_nats, config=config, mesh=mesh)
    nats = 0.0
    for i in range(0, len(windows), batch_size):
        piece = place(windows[i : i + batch_size]), place(mask[i : i + batch_size])
        nats += float(score(params, *piece))
    return nats / n_bytes / math.log(2)


def drop_after(path: pathlib.Path, step: int) -> None:
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
    for name in ("training options", "corpus", "model config"):
        old, new = saved.get(name) or {}, ours[name]
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        if changed:
            shown = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed[:4])
            raise ValueError(
                f"{directory} holds a run with another {name} ({shown}); choose another directory, or use the same."
            )


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying in the middle of a step; a second one takes its course.

    Signals can only be caught in the main thread; in others nothing changes.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def remember(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Run:
    """Owns a run's files."""

    def __init__(
        self,
        config: ModelConfig,
        train_config: TrainConfig,
        directory: pathlib.Path,
        corpus: Corpus,
        mesh: Mesh | None,
    ):
        self.config, self.train_config, self.directory = config, train_config, directory
        self.corpus, self.mesh = corpus, mesh
        self.checkpoints = directory / CHECKPOINTS
        self.place = jnp.asarray if mesh is None else functools.partial(place_batch, mesh)
        # As JSON gives them back.
        self.identity = json.loads(
            json.dumps(
                {
                    "training options": train_config.trajectory(),
                    "corpus": corpus.fingerprint,
                    "model config": config.to_dict(),
                }
            )
        )

    def start(self) -> TrainState:
        """The last checkpoint's state, or a fresh one."""
        if checkpoint.latest_step(self.checkpoints) is None:
            return init_state(self.config, self.train_config, self.mesh)
        target = abstract_state(self.config, self.train_config).opt_state
        restored = checkpoint.restore(self.checkpoints, self.mesh, train_state=target)
        _same_run(restored.extra, self.identity, self.directory)
        step = jnp.asarray(restored.step, jnp.int32)
        state = TrainState(step, restored.params, restored.train_state)
        if self.mesh is None:
            return state
        return jax.device_put(state, state_shardings(self.config, self.train_config, self.mesh))

    def save(self, state: TrainState) -> None:
        """Saves what ``start`` needs."""
        checkpoint.save(
            self.checkpoints,
            state.params,
            self.config,
            int(state.step),
            train_state=state.opt_state,
            extra=self.identity,
            keep=self.train_config.keep,
            overwrite=True,
        )

    def evaluate(self, params: Params, *, final: bool) -> float:
        """Held-out bits per byte, of all ``eval_bytes`` or of a sample of them."""
        c = self.train_config
        return evaluate(
            params,
            self.config,
            self.corpus,
            max_bytes=c.eval_bytes,
            seq_len=c.seq_len,
            batch_size=c.batch_size,
            probe_bytes=None if final else c.probe_bytes,
            mesh=self.mesh,
        )

    def step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """One optimiser step, and its line of ``metrics.jsonl``."""
        c, began = self.train_config, time.perf_counter()
        tokens = batch(self.corpus, c.seed, step, c.batch_size, c.seq_len + 2)
        state, metrics = train_step(state, self.place(tokens), self.config, c, self.mesh)
        metrics = jax.device_get(metrics)
        record = record_of(step + 1, metrics, time.perf_counter() - began, c.batch_size * c.seq_len)
        self.check_finite(record)
        return state, record

    def check_finite(self, record: dict[str, Any]) -> None:
        """Raises LossNotFinite if a step's loss is not."""
        if math.isfinite(record["total_loss"]):
            return
        c, saved = self.train_config, checkpoint.latest_step(self.checkpoints)
        kept = "Nothing was saved yet." if saved is None else f"Step {saved} is saved and good."
        raise LossNotFinite(
            f"the loss is {record['total_loss']} at step {record['step']}; lower learning_rate (now {c.learning_rate}) "
            f"or clip_norm ({c.clip_norm}). {kept}"
        )


def record_of(step: int, metrics: dict[str, Any], seconds: float, tokens: int) -> dict[str, Any]:
    """A line of ``metrics.jsonl``."""
    record: dict[str, Any] = {"step": step}
    record |= {name: float(value) for name, value in metrics.items() if name != "load"}
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
    resume: bool = True,
    mesh: Mesh | None = None,
) -> Summary:
    """Trains a byte-level model, or goes on where a run in ``directory`` stopped.

    After a crash or SIGKILL at any moment the resumed run has bit-identical losses: parameters, optimiser state
    and step are restored, and batches are a function of (seed, step). SIGTERM and Ctrl-C save first.

    Args:
      config: the model; its vocabulary must hold bytes and special tokens (``presets.BYTE_VOCAB_SIZE``).
      train_config: the run.
      directory: gets ``checkpoints/`` and ``metrics.jsonl``, one JSON object per step.
      data: a file or directory of text; default the standard library's sources.
      on_progress: called after every step.
      resume: go on with a run found in ``directory``; otherwise finding one is an error.
      mesh: devices to train on (``sharding.make_mesh``); default: one. A batch that does not divide over them is padded.

    Returns:
      ``Summary`` with the final parameters and held-out bits per byte.

    Raises:
      ValueError: for options that do not fit each other, the model or the mesh; too little data; or a directory
        that holds another run.
      LossNotFinite: the checkpoint before it is intact.
    """
    train_config.check(config)
    directory = pathlib.Path(directory)
    this = Run(config, train_config, directory, load_corpus(data), mesh)
    if not resume and checkpoint.latest_step(this.checkpoints) is not None:
        raise ValueError(
            f"{directory} already holds a run; resume it, or choose another directory."
        )
    state = this.start()
    directory.mkdir(parents=True, exist_ok=True)
    drop_after(directory / METRICS, int(state.step))
    began = time.perf_counter()
    state, bits = _steps(this, state, on_progress)
    if bits is None:  # the run was complete already
        bits = this.evaluate(state.params, final=True)
    seconds = time.perf_counter() - began
    return Summary(state.params, config, int(state.step), bits, seconds, directory, this.corpus)


def _steps(
    this: Run, state: TrainState, on_progress: Callable[[Progress], None] | None
) -> tuple[TrainState, float | None]:
    """The remaining steps: the last state, and the last evaluation if there was a step."""
    c, bits = this.train_config, None
    with deferred_signals() as received, (this.directory / METRICS).open("a") as file:
        for step in range(int(state.step), c.steps):
            state, record = this.step(state, step)
            last, bits = step + 1 == c.steps, None
            if last or (step + 1) % c.eval_every == 0:
                bits = this.evaluate(state.params, final=last)
                record["bits_per_byte"] = bits
            # Asked once: a signal that comes after the decision to save must wait for the next step.
            stop = bool(received)
            # The line is with the operating system before the checkpoint that makes it final.
            file.write(json.dumps(record) + "\n")
            file.flush()
            if last or stop or (step + 1) % c.save_every == 0:
                this.save(state)
            if on_progress is not None:
                speed = record["tokens_per_s"]
                on_progress(Progress(step + 1, c.steps, record["loss"], speed, bits))
            if stop and not last:
                break
    for number in received:  # saved: now they take their usual course
        signal.raise_signal(number)
    return state, bits
