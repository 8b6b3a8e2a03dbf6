"""Tuning a trained model for every SEFP width at once, and the methods that it is compared with: ``quant.otaro_tune`` on this model."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import quant
from jaxmoe import params as params_lib
from jaxmoe.config import ModelConfig
from jaxmoe.train._tune_files import Files, Scores, Weights, told
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import Batch, Corpus, Loader
from jaxmoe.train.dsa import initial_params, note_origin, origin_of
from jaxmoe.train.loop import SkippedSteps, evaluate
from jaxmoe.train.loss import loss as model_loss
from jaxmoe.train.metrics import Metrics
from jaxmoe.train.step import learning_rate, make_optimizer, update_biases
from pallas_kernels.sefp.format import NARROWEST
from quant import BpsConfig, LaaConfig, Lora, OtaroConfig, TuneState, bps, otaro

METHODS = ("otaro", "uniform", "round_robin", "joint", "fixed:W", "ptq")
NESTED = "+nested"  # after a method's name: weights are rounded so, in training and after it


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Which width each step of method otaro takes, and when gradients at low widths move the weights (specification 2.2, 2.3)."""

    reading: str = "loss_seeking"
    """What the search looks for: loss_seeking, the width with the highest loss, or loss_avoiding."""
    exploration: float = 1.0
    """Weight of what was visited rarely (lambda); a few units are nearly round robin."""
    loss_decay: float = 0.9
    """Of the running loss of each width."""
    low_widths: tuple[int, ...] = (4, 3)
    """Widths whose gradients are collected; none: every step moves the weights."""
    low_steps: int = 2
    """How many of them make one optimiser step."""
    low_reduce: str = "sum"
    """mean or sum of them."""
    low_flush: str = "drop"
    """What becomes of those left at the end: drop, or apply."""


@dataclasses.dataclass(frozen=True)
class Widths:
    """Result of one method.

    Attributes:
      method: its name.
      losses: held-out nats per token at each width.
      bits_per_byte: the same per byte of text.
      unquantised: held-out nats per token of the weights as they are.
      bytes: of the parameters at each width.
      visits: steps at each width; 0 stands for all of them.
      tuned: how many numbers were: all parameters, or those of the adapters; 0 if nothing was.
      seconds: of tuning; what an earlier process spent isn't in it.
      directory: checkpoints and metrics; None if nothing was tuned.
    """

    method: str
    losses: dict[int, float]
    bits_per_byte: dict[int, float]
    unquantised: float
    bytes: dict[int, int]
    visits: dict[int, int]
    tuned: int
    seconds: float
    directory: pathlib.Path | None

    @property
    def mean(self) -> float:
        """Of the losses over the widths."""
        return sum(self.losses.values()) / len(self.losses)


def otaro_config(
    method: str, steps: int, search: SearchOptions = SearchOptions(), seed: int = 0
) -> OtaroConfig:
    """The run that a method's name stands for.

    otaro: path search and accumulation. uniform, round_robin: widths at random or in turn. joint: the mean loss of all widths.
    fixed:W: one width; fixed:8 is tuning at the highest and truncating. ptq: no quantisation in training, rounding to nearest for each
    width after it: six files. Each with "+nested" instead rounds to the code that serves all widths best (``sefp.encode``): one file.

    Raises:
      ValueError: for a name that there isn't.
    """
    plain = LaaConfig(low=())
    if method.endswith(NESTED):
        inner = otaro_config(method.removesuffix(NESTED), steps, search, seed)
        return dataclasses.replace(inner, rounding="nested")
    if method == "otaro":
        s = search
        search_config = BpsConfig(
            reading=s.reading, exploration=s.exploration, decay=s.loss_decay, seed=seed
        )
        collect = LaaConfig(s.low_widths, s.low_steps, s.low_reduce, s.low_flush)
        return OtaroConfig(steps, search_config, collect)
    if method in ("uniform", "round_robin"):
        return OtaroConfig(steps, BpsConfig(schedule=getattr(bps, method), seed=seed), plain)
    if method == "joint":
        return OtaroConfig(steps, laa=plain, objective="joint")
    if method == "ptq":
        return OtaroConfig(steps, BpsConfig(widths=(8,)), plain, rules=())
    fixed = re.fullmatch(r"fixed:([3-8])", method)
    if fixed is None:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} with W from 3 to 8, or one of them with {NESTED}; got {method!r}."
        )
    return OtaroConfig(steps, BpsConfig(widths=(int(fixed[1]),)), plain)


def check(train_config: TrainConfig) -> None:
    """Raises ValueError for options of training that tuning doesn't have."""
    c = train_config
    if not c.trains_model or c.index_weight == 0:
        raise ValueError(
            f"tuning trains the whole model; got stage={c.stage}, index_weight={c.index_weight}. Choose another stage, and a positive weight."
        )
    if c.accumulate != 1:
        raise ValueError(f"tuning reads a batch in one pass; got accumulate={c.accumulate}. Use 1.")


@functools.lru_cache(maxsize=4)
def _parts(config: ModelConfig, c: TrainConfig, lora: Lora | None) -> dict[str, Any]:
    """What ``otaro_tune`` needs of the model; the same objects for the same options, so that methods share programs."""

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, dict]:
        return model_loss(params_lib.cast(params, config, c.compute_dtype), config, c, batch)

    def adjust(params: Any, aux: dict) -> Any:
        return update_biases(params, aux["load"], c.bias_update_speed)

    def whole(count: jax.Array) -> jax.Array:
        return jnp.ones((), jnp.float32)

    # The rate falls with steps, of which accumulation makes fewer updates: so it is a factor outside of the optimiser.
    return {
        "loss": loss,
        "merge": lora,
        # With adapters the routers' biases stay, as everything does that is no matrix.
        "adjust": adjust if lora is None else None,
        "optimizer": make_optimizer(config, c, whole, None if lora is None else True),
        "schedule": learning_rate(c),
    }


def abstract_state(
    config: ModelConfig, train_config: TrainConfig, run: OtaroConfig, lora: Lora | None = None
) -> TuneState:
    """The state of a run as ``jax.ShapeDtypeStruct``s. With ``lora`` there are the model's parameters beside it.

    Raises:
      ValueError: for a ``lora`` that doesn't fit the model.
    """
    optimizer = _parts(config, train_config, lora)["optimizer"]

    def init(params: params_lib.Params) -> TuneState:
        tuned = params if lora is None else lora.init(params, jax.random.key(0))
        return otaro.init_state(tuned, run, optimizer)

    return jax.eval_shape(init, params_lib.abstract_params(config))


def tune(
    source: str | os.PathLike[str],
    method: str,
    config: ModelConfig,
    train_config: TrainConfig,
    corpus: Corpus,
    directory: str | os.PathLike[str],
    *,
    search: SearchOptions = SearchOptions(),
    lora: Lora | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Widths:
    """Tunes a trained model by one method and scores it at every width; goes on where a run in ``directory`` stopped.

    With ``lora`` the weights stay, routers' biases included, and low-rank additions to them are tuned. Checkpoints then hold merged weights,
    so that they are read like any other, and the adapters beside them; going on reads ``source`` again.

    Args:
      source: run or checkpoint with the parameters to start from.
      method: see ``otaro_config``.
      config: the model.
      train_config: steps, batches, learning rate, stage.
      corpus: what to train on, and what is held out.
      directory: gets ``checkpoints/`` (unquantised weights, ready for ``quant.quantize_params``) and ``metrics.jsonl``.
      search: of method otaro.
      lora: the additions; None to tune all weights.
      on_step: called with every line of the metrics.

    Raises:
      ValueError: for options that don't fit each other, or a directory with another run.
      LossNotFinite: after ten steps in a row without a finite loss.
    """
    c = train_config
    check(c)
    c.check(config)
    corpus.check(config.vocab_size, source)
    run, parts = otaro_config(method, c.steps, search, c.seed), _parts(config, c, lora)
    directory, target = pathlib.Path(directory), abstract_state(config, c, run, lora)
    identity = {
        "method": method,
        "search": dataclasses.asdict(search) if method.startswith("otaro") else {},
        "lora": told(lora),
        "training options": c.trajectory(),
        "corpus": corpus.fingerprint,
        "model config": config.to_dict(),
        "initial parameters": origin_of(source),
    }
    if run.rounding == "nested":
        identity["rounding"] = {"nested": NARROWEST}
    weights = Weights(source, config, c, lora)
    files = Files(directory, config, c, identity, weights)
    state = files.start(run, parts["optimizer"], target)
    corpus.put_tokenizer(directory)
    note_origin(directory, source)
    loader, began = Loader(corpus, c.seed, c.batch_size, c.seq_len), time.perf_counter()
    with Metrics(directory, int(state.step)) as metrics:
        keep = _Recorder(files, metrics, on_step)
        tuned = quant.otaro_tune(
            (),
            run,
            lambda step: Batch(*map(jnp.asarray, loader(step))),
            frozen=weights.frozen,
            state=state,
            on_step=keep,
            **parts,
        )
    seconds = time.perf_counter() - began
    rounding = "nearest" if method == "ptq" else run.rounding
    scored = files.scored or score(weights.whole(tuned.params), config, c, corpus, rounding)
    files.keep_scores(scored)
    numbers = sum(x.size for x in jax.tree.leaves(target.params))
    return Widths(method, *scored, _visits(directory), numbers, seconds, directory)


class _Recorder:
    """What happens after each step."""

    def __init__(self, files: Files, metrics: Metrics, on_step: Callable[[dict], None] | None):
        self.files, self.metrics, self.on_step = files, metrics, on_step
        self.skipped, self.began = SkippedSteps(), time.perf_counter()

    def __call__(self, state: TuneState, record: dict[str, Any]) -> None:
        c, now = self.files.train_config, time.perf_counter()
        seconds, self.began = now - self.began, now
        figures = record | {
            "seconds": round(seconds, 4),
            "tokens_per_s": round(c.batch_size * c.seq_len / seconds, 1),
        }
        self.metrics.write(figures)
        if record["step"] == c.steps or record["step"] % c.save_every == 0:
            self.files.save(state)
        if self.on_step is not None:
            self.on_step(figures)
        self.skipped.check(record, c)


def _visits(directory: pathlib.Path) -> dict[int, int]:
    counts: dict[int, int] = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        width = int(json.loads(line)["width"])
        counts[width] = counts.get(width, 0) + 1
    return dict(sorted(counts.items(), reverse=True))


_at_width = jax.jit(quant.fake_quantize, static_argnames=("rules", "rounding"))


def score(
    params: params_lib.Params,
    config: ModelConfig,
    train_config: TrainConfig,
    corpus: Corpus,
    rounding: str = "truncate",
) -> Scores:
    """Held-out losses at each width.

    The weights at a width are those that ``quant.quantize_params`` stores (with rounding to nearest, stored for that width alone).
    """
    c = train_config
    of = functools.partial(
        evaluate,
        config=config,
        corpus=corpus,
        max_bytes=c.eval_bytes,
        seq_len=c.seq_len,
        batch_size=c.batch_size,
    )
    found = {
        width: of(_at_width(params, jnp.asarray(width, jnp.int32), rounding=rounding))
        for width in bps.WIDTHS
    }
    losses = {width: one["held_out_loss"] for width, one in found.items()}
    bits = {width: one["bits_per_byte"] for width, one in found.items()}
    stored = jax.eval_shape(quant.quantize_params, params)
    sizes = {width: quant.nbytes(stored, width) for width in bps.WIDTHS}
    return losses, bits, of(params)["held_out_loss"], sizes


def score_source(
    source: str | os.PathLike[str],
    config: ModelConfig,
    train_config: TrainConfig,
    corpus: Corpus,
    rounding: str = "truncate",
) -> Widths:
    """The model as it was before tuning, rounded as ``sefp.encode`` says."""
    params = initial_params(config, train_config.seed, source)
    scored = score(params, config, train_config, corpus, rounding)
    return Widths("untuned" + (NESTED if rounding == "nested" else ""), *scored, {}, 0, 0.0, None)


def baselines(methods: Sequence[str]) -> list[str]:
    """Roundings of the untuned model that the methods should be seen beside."""
    return ["truncate", "nested"] if any(m.endswith(NESTED) for m in methods) else ["truncate"]
