"""The training loop: resumable to the exact same losses, and honest about what it did."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmoe import checkpoint
from jaxmoe.config import ModelConfig
from jaxmoe.errors import JaxMoeError
from jaxmoe.model import PassOptions, run, unembed
from jaxmoe.moe import options_on
from jaxmoe.params import Params
from jaxmoe.train.config import TrainConfig, trajectory_of
from jaxmoe.train.data import Batch, Corpus, DataOptions, Loader, evaluation_rows, load_corpus
from jaxmoe.train.data.corpus import Tokenizer, check_tokenizer
from jaxmoe.train.dsa import index_recall, note_origin, origin_of
from jaxmoe.train.flops import peak_flops, step_flops
from jaxmoe.train.loss import cross_entropy
from jaxmoe.train.metrics import Metrics
from jaxmoe.train.processes import with_others
from jaxmoe.train.saver import Saver
from jaxmoe.train.signals import agree, deferred_signals, take_course
from jaxmoe.train.step import (
    TrainState,
    abstract_state,
    init_state,
    place_batch,
    read_batch,
    state_shardings,
    train_step,
)

logger = logging.getLogger(__name__)

CHECKPOINTS, TOKENS = "checkpoints", "tokens"  # of a run's directory
MAX_SKIPPED = 10  # steps in a row; parameters that give no finite loss on ten batches will give none on the next


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a caller's progress display gets after every step."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    bits_per_byte: float | None = None
    """Held-out bits per byte, when this step ended with an evaluation."""
    skipped: bool = False
    """The loss, its gradient or the update was not finite, so the step changed nothing."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Result of a run."""

    params: Params
    config: ModelConfig
    step: int
    bits_per_byte: float
    held_out_loss: float
    seconds: float
    directory: pathlib.Path
    corpus: Corpus = dataclasses.field(repr=False)


class LossNotFinite(JaxMoeError, FloatingPointError):
    """The loss or its gradient stays infinite or NaN; the message names the steps and the last checkpoint."""


# At module level: a fresh jit per evaluation would compile again each time.
@functools.partial(jax.jit, static_argnames=("config", "mesh", "attention"))
def scored_nats(
    params: Params, batch: Batch, config: ModelConfig, mesh: Mesh | None, attention: str = "sparse"
) -> jax.Array:
    """Sum of the nats of the targets that count, each by its weight: rows of width T + 1."""
    tokens, starts = batch.tokens[:, :-1], batch.starts[:, :-1]
    output = run(
        params, config, tokens, starts=starts, options=PassOptions(attention, moe=options_on(mesh))
    )
    nats = cross_entropy(unembed(params, output.hidden), batch.tokens[:, 1:])
    weights = batch.weights[:, 1:]
    return jnp.where(weights > 0, nats * weights, 0.0).sum()


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
    attention: str = "sparse",
    recall: bool = False,
) -> dict[str, Any]:
    """How well a model says held-out documents; by default with sparse attention, as at inference.

    Every target has at least half a window of context, or its document's beginning (``data.evaluation_rows``). Nats of tokens
    that end a document count, though they have no bytes: the model must also say where one ends.

    Args:
      params: parameters, on ``mesh`` if there is one.
      config: the model.
      corpus: whose held-out part is scored.
      max_bytes: how much of it, from its start.
      seq_len: window length.
      batch_size: windows at once.
      probe_bytes: score only about so many bytes, spread evenly.
      mesh: over which the windows are split.
      score: ``scored_nats`` for this config and mesh, compiled before; with sparse attention.
      attention: "sparse" or "dense".
      recall: also measure how much of dense attention the indexers keep (``dsa.index_recall``), on some of the windows.

    Returns:
      "bits_per_byte" of text, and "held_out_loss", nats per token. With ``recall``, if any query has to choose, "index_recall",
      the mean of "index_recall_layers", and "index_recall_at_most", which the best choice of as many keys would have.
    """
    rows, n_bytes = evaluation_rows(corpus, max_bytes, seq_len, probe_bytes)
    short = -len(rows.tokens) % batch_size
    rows = Batch(*(np.pad(x, ((0, short), (0, 0))) for x in rows))
    place = jnp.asarray if mesh is None else functools.partial(place_batch, mesh)
    score = score or functools.partial(scored_nats, config=config, mesh=mesh, attention=attention)
    nats = 0.0
    for i in range(0, len(rows.tokens), batch_size):
        nats += float(score(params, Batch(*(place(x[i : i + batch_size]) for x in rows))))
    result = {
        "bits_per_byte": nats / n_bytes / math.log(2),
        "held_out_loss": nats / float(rows.weights.sum(dtype=np.float64)),
    }
    if recall:
        layers = index_recall(params, config, rows, batch_size, place, mesh)
        if layers:
            kept, most = (list(part) for part in zip(*layers, strict=True))
            result |= {"index_recall": float(np.mean(kept)), "index_recall_layers": kept}
            result["index_recall_at_most"] = float(np.mean(most))
    return result


def same_run(saved: dict[str, Any], ours: dict[str, Any], directory: pathlib.Path) -> None:
    """Raises ValueError if what was saved belongs to another run than ``ours``."""
    for name, new in ours.items():
        old = saved.get(name) or {}
        old = trajectory_of(old) if name == "training options" else old
        if not (isinstance(old, dict) and isinstance(new, dict)):
            old, new = {name: old}, {name: new}
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        if changed:
            shown = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed[:4])
            raise ValueError(
                f"{directory} holds a run with another {name} ({shown}); choose another directory, or use the same."
            )


def corpus_of(
    config: ModelConfig,
    directory: pathlib.Path,
    data: DataOptions | str | os.PathLike[str] | None,
    *,
    resume: bool = True,
    init_from: str | os.PathLike[str] | None = None,
) -> Corpus:
    """The corpus of a run, as of ``train``: what is refused is refused before tokens are made and kept in the directory."""
    checkpoints = directory / CHECKPOINTS
    begun = checkpoint.latest_step(checkpoints) is not None
    if begun and not resume:
        raise ValueError(
            f"{directory} already holds a run; resume it, or choose another directory."
        )

    def check(tokenizer: Tokenizer, fingerprint: dict[str, Any]) -> None:
        check_tokenizer(tokenizer, config.vocab_size, init_from)
        if begun:
            same_run(checkpoint.restore_extra(checkpoints), {"corpus": fingerprint}, directory)

    return load_corpus(data, directory / TOKENS, check)


class Run:
    """Owns a run's files.

    Raises:
      ValueError: if the directory holds another run.
    """

    def __init__(
        self,
        config: ModelConfig,
        train_config: TrainConfig,
        directory: pathlib.Path,
        corpus: Corpus,
        mesh: Mesh | None,
        init_from: str | os.PathLike[str] | None = None,
    ):
        self.config, self.train_config, self.directory = config, train_config, directory
        self.corpus, self.mesh, self.init_from = corpus, mesh, init_from
        c = train_config
        self.loader = Loader(corpus, c.seed, c.batch_size, c.seq_len)
        self.checkpoints = directory / CHECKPOINTS
        self.skipped = SkippedSteps()
        self.flops = step_flops(config, train_config)
        # A run that goes on doesn't need what it began with.
        begun = checkpoint.latest_step(self.checkpoints) is not None
        saved = checkpoint.restore_extra(self.checkpoints) if begun else None
        origin = (saved or {}).get("initial parameters")
        # As JSON gives them back.
        self.identity = json.loads(
            json.dumps(
                {
                    "training options": train_config.trajectory(),
                    "corpus": corpus.fingerprint,
                    "model config": config.to_dict(),
                    "initial parameters": {} if init_from is None else origin_of(init_from, origin),
                }
            )
        )
        if saved is not None:
            same_run(saved, self.identity, directory)

    def peak_flops(self, ranks: int = 1) -> float:
        """Of all the run's devices: those of the mesh, or one of each of ``ranks``. CPU devices of one process share its cores."""
        one = peak_flops(self.train_config.compute_dtype)
        if jax.default_backend() == "cpu":
            return one * jax.process_count()
        return one * (ranks if self.mesh is None else self.mesh.size)

    def start(self) -> TrainState:
        """The last checkpoint's state, which this run may have saved itself, or a fresh one."""
        if checkpoint.latest_step(self.checkpoints) is None:
            return init_state(self.config, self.train_config, self.mesh, init_from=self.init_from)
        target = abstract_state(self.config, self.train_config).opt_state
        restored = checkpoint.restore(self.checkpoints, self.mesh, train_state=target)
        step = jnp.asarray(restored.step, jnp.int32)
        state = TrainState(step, restored.params, restored.train_state)
        if self.mesh is None:
            return state
        return jax.device_put(state, state_shardings(self.config, self.train_config, self.mesh))

    def save(self, state: TrainState, topology: dict[str, Any] | None = None) -> None:
        """Saves what ``start`` needs; ``topology`` as of ``checkpoint.save``."""
        checkpoint.save(
            self.checkpoints,
            state.params,
            self.config,
            int(state.step),
            train_state=state.opt_state,
            extra=self.identity,
            topology=topology,
            keep=self.train_config.keep,
            overwrite=True,
        )

    def evaluate(self, params: Params, *, final: bool) -> dict[str, Any]:
        """``evaluate`` on all ``eval_bytes`` or on a sample of them."""
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
            attention=c.held_out_attention,
            recall=self.config.index_topk is not None and c.index_weight > 0,
        )

    def summary(self, state: TrainState, held_out: dict[str, Any], seconds: float) -> Summary:
        """The run's outcome; NaN where a run that was stopped has not been evaluated."""
        return Summary(
            state.params,
            self.config,
            int(state.step),
            held_out.get("bits_per_byte", math.nan),
            held_out.get("held_out_loss", math.nan),
            seconds,
            self.directory,
            self.corpus,
        )

    def step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """One optimiser step, and its line of ``metrics.jsonl``."""
        c, began = self.train_config, time.perf_counter()
        rows = read_batch(
            self.mesh, functools.partial(self.loader, step), c.batch_size, c.accumulate
        )
        state, metrics = train_step(state, rows, self.config, c, self.mesh)
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - began
        return state, self.record(step + 1, metrics, seconds)

    def record(
        self, step: int, metrics: dict[str, Any], seconds: float, ranks: int = 1
    ) -> dict[str, Any]:
        """A step's line of ``metrics.jsonl``; ``ranks`` as of ``peak_flops``."""
        c = self.train_config
        line = record_of(step, metrics, seconds, c.batch_size * c.seq_len)
        return line | {"mfu": round(self.flops / seconds / self.peak_flops(ranks), 4)}


class SkippedSteps:
    """Counts steps skipped in a row."""

    def __init__(self):
        self._steps: frozenset[int] = frozenset()

    def check(self, record: dict[str, Any], train_config: TrainConfig) -> None:
        """Takes a step's record; raises LossNotFinite if too many were skipped."""
        # By number: after a rank is lost steps are done again.
        self._steps = self._steps | {record["step"]} if record["skipped"] else frozenset()
        if len(self._steps) < MAX_SKIPPED:
            return
        c = train_config
        raise LossNotFinite(
            f"steps {min(self._steps)} to {record['step']} were skipped because loss, gradient or update were not finite; lower "
            f"learning_rate (now {c.peak_learning_rate}) or clip_norm ({c.clip_norm}). What is saved of the run is finite."
        )


def progress_of(record: dict[str, Any], steps: int) -> Progress:
    """What a progress display gets of a step's record."""
    skipped, bits = bool(record["skipped"]), record.get("bits_per_byte")
    return Progress(record["step"], steps, record["loss"], record["tokens_per_s"], bits, skipped)


def metrics_of(directory: pathlib.Path, step: int) -> contextlib.AbstractContextManager[Any]:
    """The run's ``Metrics`` in the process that writes them; in others a place where nothing is kept."""
    return Metrics(directory, step) if jax.process_index() == 0 else contextlib.nullcontext()


def record_of(step: int, metrics: dict[str, Any], seconds: float, tokens: int) -> dict[str, Any]:
    """Of a line of ``metrics.jsonl`` what does not depend on the run."""
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
    data: DataOptions | str | os.PathLike[str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    resume: bool = True,
    mesh: Mesh | None = None,
    init_from: str | os.PathLike[str] | None = None,
) -> Summary:
    """Trains a language model, or goes on where a run in ``directory`` stopped.

    After a crash or SIGKILL at any moment the resumed run has bit-identical losses: parameters, optimiser state
    and step are restored, and batches are a function of (seed, step) (``data.Loader``). SIGTERM and Ctrl-C save first, and
    whichever of several processes receives one, all save the same step and end.

    Args:
      config: the model; its vocabulary must hold the tokenizer's, for bytes ``presets.BYTE_VOCAB_SIZE``.
      train_config: the run.
      directory: gets ``checkpoints/``, ``metrics.jsonl`` with one JSON object per step, and TensorBoard's events; and ``tokens/``
        if they are made by a tokenizer file.
      data: what to train on, or just the path of text; default the standard library's sources, as bytes.
      on_progress: called after every step.
      resume: go on with a run found in ``directory``; otherwise finding one is an error.
      mesh: devices to train on (``sharding.make_mesh``); default: one. A batch that does not divide over them is padded.
      init_from: a run or checkpoint with whose parameters to start, and a fresh optimiser (``dsa.initial_params``): the stage before.

    Returns:
      ``Summary`` with the final parameters and held-out bits per byte.

    Raises:
      ValueError: for options that do not fit each other, the model or the mesh; too little data; or a directory
        that holds another run.
      LossNotFinite: the checkpoint before it is intact.
      ProcessLost: if another process of the run is gone.
    """
    train_config.check(config)
    directory = pathlib.Path(directory)
    corpus = corpus_of(config, directory, data, resume=resume, init_from=init_from)
    this = Run(config, train_config, directory, corpus, mesh, init_from)
    with with_others(lambda: checkpoint.latest_step(this.checkpoints)):
        this.peak_flops()  # measured while memory is free
        state = this.start()
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            corpus.put_tokenizer(directory)
            note_origin(directory, init_from)
        began = time.perf_counter()
        state, held_out = _steps(this, state, on_progress)
        if held_out is None:  # the run was complete already
            held_out = this.evaluate(state.params, final=True)
    return this.summary(state, held_out, time.perf_counter() - began)


def _steps(
    this: Run, state: TrainState, on_progress: Callable[[Progress], None] | None
) -> tuple[TrainState, dict[str, float] | None]:
    """The remaining steps: the last state, and the last evaluation if there was a step."""
    c, held_out, stop = this.train_config, None, None
    first = int(state.step)
    with (
        deferred_signals() as received,
        metrics_of(this.directory, first) as metrics,
        Saver(this.save) as saver,
    ):
        for step in range(first, c.steps):
            state, record = this.step(state, step)
            last, held_out = step + 1 == c.steps, None
            if last or (step + 1) % c.eval_every == 0:
                held_out = this.evaluate(state.params, final=last)
                record |= held_out
            # Asked once: a signal that comes after the decision to save must wait for the next step.
            stop = agree(received)
            if metrics is not None:
                metrics.write(record)  # before the checkpoint that makes it final
            if last or stop or (step + 1) % c.save_every == 0:
                saver.save(state)
            if on_progress is not None:
                on_progress(progress_of(record, c.steps))
            this.skipped.check(record, c)
            if stop and not last:
                break
    if stop:
        step = int(state.step)
        logger.warning("%s saved_step=%d (the same command goes on from there)", stop, step)
        received = [stop.number, *received]
    for number in dict.fromkeys(received):  # saved: now they take their usual course
        take_course(number)
    return state, held_out
