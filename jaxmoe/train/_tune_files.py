"""What a tuning run keeps on disk, and the weights that it begins with."""

import dataclasses
import functools
import json
import os
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import quant
from jaxmoe import checkpoint
from jaxmoe import params as params_lib
from jaxmoe.config import ModelConfig
from jaxmoe.report import write_report
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.dsa import initial_params
from jaxmoe.train.loop import CHECKPOINTS, same_run
from quant import Lora, OtaroConfig, TuneState, otaro
from quant.rules import name_of

IDENTITY, SCORES = "tune.json", "widths.json"
_BY_WIDTH = ("losses", "bits_per_byte", "bytes")

# Held-out nats per token and bits per byte at each width, nats of the weights as they are, bytes at each width.
Scores = tuple[dict[int, float], dict[int, float], float, dict[int, int]]

_merged = jax.jit(lambda frozen, adapters, lora: lora(frozen, adapters), static_argnames="lora")


class Weights:
    """Owns the weights that a run begins with: they are tuned themselves, or stay while adapters beside them are."""

    def __init__(
        self,
        source: str | os.PathLike[str],
        config: ModelConfig,
        c: TrainConfig,
        lora: Lora | None,
    ):
        self.source, self.lora, self._seed = source, lora, c.seed
        self._read = functools.partial(initial_params, config, c.seed, source)

    @functools.cached_property
    def frozen(self) -> params_lib.Params | None:
        """What stays."""
        return None if self.lora is None else self._read()

    def begin(self) -> Any:
        """What is tuned, before the first step."""
        if self.lora is None:
            return self._read()
        # Not the key that draws the indexers that the source lacks.
        key = jax.random.fold_in(jax.random.key(self._seed), zlib.crc32(b"lora"))
        return self.lora.init(self.frozen, key)

    def whole(self, tuned: Any) -> params_lib.Params:
        """The model's parameters."""
        return tuned if self.lora is None else _merged(self.frozen, tuned, self.lora)

    def check(self, saved: params_lib.Params, adapters: Any) -> None:
        """Raises ValueError unless what stays and a checkpoint's ``adapters`` make that checkpoint's merged weights, ``saved``."""

        def same(path: Any, mine: jax.Array, theirs: jax.Array) -> None:
            # Equal bits where it was saved; another backend adds up A B in another order.
            tolerance = 1e-5 * np.max(np.abs(theirs), initial=0.0)
            if not np.allclose(mine, theirs, rtol=0.0, atol=tolerance):
                raise ValueError(
                    f"source must hold the weights that the run began with; {name_of(path)} in {os.fspath(self.source)} differs. "
                    "Name the source that they came from, or choose another directory."
                )

        jax.tree_util.tree_map_with_path(same, self.whole(adapters), saved)


def told(lora: Lora | None) -> dict[str, Any]:
    """The additions of a run, for its directory."""
    if lora is None:
        return {}
    values = dataclasses.asdict(lora)
    if lora.rules == quant.DEFAULT_RULES:
        del values["rules"]  # as everyone's
    return values


class Files:
    """Owns a run's checkpoints and metrics."""

    def __init__(
        self,
        directory: pathlib.Path,
        config: ModelConfig,
        c: TrainConfig,
        identity: Any,
        weights: Weights,
    ):
        self.directory, self.config, self.train_config = directory, config, c
        self.weights = weights
        self.checkpoints = directory / CHECKPOINTS
        directory.mkdir(parents=True, exist_ok=True)
        self._claim(json.loads(json.dumps(identity)))  # as JSON gives it back

    def _claim(self, identity: dict[str, Any]) -> None:
        """Writes down whose directory this is.

        Raises:
          ValueError: if it is another run's.
        """
        path = self.directory / IDENTITY
        if not path.exists():
            path.write_text(json.dumps(identity, indent=2) + "\n")
        same_run(json.loads(path.read_text()), identity, self.directory)

    def start(self, run: OtaroConfig, optimizer: Any, target: TuneState) -> TuneState:
        """The last checkpoint's state, which is like ``target``, or the first."""
        if checkpoint.latest_step(self.checkpoints) is None:
            return otaro.init_state(self.weights.begin(), run, optimizer)
        restored = checkpoint.restore(self.checkpoints, train_state=self._beside_params(target))
        step, tuned = jnp.asarray(restored.step, jnp.int32), restored.params
        opt_state, search, collected, *adapters = restored.train_state
        if adapters:
            (tuned,) = adapters
            self.weights.check(restored.params, tuned)
        return TuneState(step, tuned, opt_state, search, collected)

    def _beside_params(self, state: TuneState) -> tuple[Any, ...]:
        """What the model's parameters, with adapters merged, don't say of a state."""
        rest = (state.opt_state, state.bps, state.laa)
        return rest if self.weights.lora is None else (*rest, state.params)

    @property
    def scored(self) -> Scores | None:
        """Of the last step, if an earlier call made them on as many bytes."""
        path, c = self.directory / SCORES, self.train_config
        if not path.exists():
            return None
        kept = json.loads(path.read_text())
        if (kept["step"], kept["eval_bytes"]) != (c.steps, c.eval_bytes):
            return None
        losses, bits, sizes = ({int(w): x for w, x in kept[k].items()} for k in _BY_WIDTH)
        return losses, bits, kept["unquantised"], sizes

    def keep_scores(self, scores: Scores) -> None:
        """Writes down what takes as long as half of the tuning."""
        losses, bits, unquantised, sizes = scores
        c = self.train_config
        kept = {"step": c.steps, "eval_bytes": c.eval_bytes, "unquantised": unquantised}
        kept |= dict(zip(_BY_WIDTH, (losses, bits, sizes), strict=True))
        write_report(self.directory / SCORES, kept)

    def save(self, state: TuneState) -> None:
        """Saves what ``start`` needs."""
        checkpoint.save(
            self.checkpoints,
            self.weights.whole(state.params),
            self.config,
            int(state.step),
            train_state=self._beside_params(state),
            keep=self.train_config.keep,
            overwrite=True,
        )
