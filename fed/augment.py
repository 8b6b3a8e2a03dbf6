"""More proxy inputs from the same ones: distillation needs inputs, not truths, so the teacher simply answers for the changed ones too."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

KINDS = ("none", "shift", "mix", "shift+mix")


def check(kind: str, copies: int, example: jax.ShapeDtypeStruct) -> None:
    """Refuses what does not fit the data."""
    if kind not in KINDS:
        raise ValueError(f"augment must be one of {', '.join(KINDS)}; got {kind!r}.")
    if copies < 1:
        raise ValueError(f"copies must be at least 1; got {copies}.")
    if kind != "none" and not jnp.issubdtype(example.dtype, jnp.floating):
        raise ValueError(f"augment must be none for tokens; got {kind!r}.")
    if "shift" in kind and len(example.shape) < 2:
        raise ValueError(
            f"augment='{kind}' shifts images; inputs have shape {example.shape}; use mix."
        )


@functools.partial(jax.jit, static_argnames=("kind", "copies"))
def proxy_inputs(inputs: Array, key: Array, *, kind: str, copies: int) -> Array:
    """The proxy inputs, and ``copies - 1`` changed versions of them ([copies * M, ...]).

    Args:
      inputs: [M, ...].
      key: of the changes.
      kind: none; shift (by up to an eighth of the side, zero beyond the edge); mix (with another input, share uniform in [0, 0.5]);
        shift+mix.
      copies: how many times as many.
    """
    parts = [inputs]
    for number in range(1, copies if kind != "none" else 1):
        own = jax.random.fold_in(key, number)
        changed = inputs
        if "shift" in kind:
            changed = _shift(changed, jax.random.fold_in(own, 0))
        if "mix" in kind:
            changed = _mix(changed, jax.random.fold_in(own, 1))
        parts.append(changed)
    return jnp.concatenate(parts)


def _shift(inputs: Array, key: Array) -> Array:
    most = max(1, inputs.shape[1] // 8)
    rest = [(0, 0)] * (inputs.ndim - 3)
    padded = jnp.pad(inputs, [(0, 0), (most, most), (most, most), *rest])
    starts = jax.random.randint(key, (inputs.shape[0], 2), 0, 2 * most + 1)

    def one(image: Array, start: Array) -> Array:
        at = (start[0], start[1], *[jnp.int32(0)] * (inputs.ndim - 3))
        return jax.lax.dynamic_slice(image, at, inputs.shape[1:])

    return jax.vmap(one)(padded, starts)


def _mix(inputs: Array, key: Array) -> Array:
    count = inputs.shape[0]
    other = jnp.take(inputs, jax.random.permutation(jax.random.fold_in(key, 0), count), axis=0)
    shape = (count, *[1] * (inputs.ndim - 1))
    share = jax.random.uniform(jax.random.fold_in(key, 1), shape, maxval=0.5)
    return inputs + share * (other - inputs)
