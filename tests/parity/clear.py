"""Models and inputs for comparing two ways through one model, when rounding must not decide anything."""

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe
from jaxmoe.layers import core_attention
from jaxmoe.model import PassOptions, run, unembed
from jaxmoe.params import path_name

# Two ways through a model differ by about 1e-6; a choice by less than this could fall either way.
UNDECIDED = 5e-6


def sharp_params(config: jaxmoe.ModelConfig, seed: int = 0) -> dict:
    """Parameters sharper than initial ones, with uneven norms and biases: nothing is flat, zero or one.

    At the full unit scale two float32 passes that add products one after another differ by more than 1e-5 in about
    one logit of 650 000, with or without the C++ kernels: each is that far from float64 (docs/log.md).
    """
    key = jax.random.key(seed)
    spread = config.replace(initializer_range=0.7 * config.hidden_size**-0.5)
    params = jaxmoe.init_params(spread, key)

    def shake(path, leaf):
        name = path_name(path)
        if not name.endswith(("norm/weight", "bias")):
            return leaf
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(shake, params)


class _Margin:
    """The smallest relative distance at the boundary of a choice, over everything seen."""

    def __init__(self):
        self.smallest = math.inf

    def watch(self, values: jax.Array, k: int) -> None:
        """Notes the gap between the k-th and the next of ``values`` [..., N], traced or not."""
        if k >= values.shape[-1]:
            return
        best = -jnp.sort(-values, axis=-1)
        taken, left = best[..., k - 1], best[..., k]
        finite = jnp.isfinite(values)
        scale = jnp.where(finite, jnp.abs(values), jnp.float32(0)).max(-1)
        gap = jnp.where(jnp.isfinite(left), (taken - left) / scale, jnp.inf)
        jax.debug.callback(self._note, gap.min())

    def _note(self, gap) -> None:
        self.smallest = min(self.smallest, float(gap))


@contextlib.contextmanager
def _watching(margin: _Margin) -> Iterator[None]:
    """Spies on the selections of keys and of experts while a pass is traced."""

    def spy(original: Callable, values: jax.Array, k: int) -> jax.Array:
        margin.watch(values, k)
        return original(values, k)

    with (
        mock.patch.object(
            core_attention, "select_mask", functools.partial(spy, core_attention.select_mask)
        ),
        mock.patch.object(jax.lax, "top_k", functools.partial(spy, jax.lax.top_k)),
    ):
        yield


def clear_case(
    params: dict, config: jaxmoe.ModelConfig, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [B, T] on which no choice of keys, experts or next token is close, and their logits."""
    margin = _Margin()

    @jax.jit
    def whole(params, tokens):
        with _watching(margin):
            options = PassOptions(core="masked")  # whose selection can be watched
            logits = unembed(params, run(params, config, tokens, options=options).hidden)
        margin.watch(logits, 1)
        return logits

    for seed in range(50):
        margin.smallest = math.inf
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, config.vocab_size, shape, dtype=np.int32)
        logits = np.asarray(whole(params, tokens))
        jax.effects_barrier()
        if margin.smallest > UNDECIDED:
            return tokens, logits
    raise RuntimeError(f"none of 50 inputs of shape {shape} leaves every choice clear")
