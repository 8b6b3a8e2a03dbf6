"""A small federation: blobs of four classes, ragged clients, one empty."""

import jax
import jax.numpy as jnp
import numpy as np

import fed

CLASSES, WIDTH = 4, 6


def blobs(count, seed=0):
    """Points around four centres."""
    generator = np.random.default_rng(seed)
    centres = 2 * np.random.default_rng(7).standard_normal((CLASSES, WIDTH))
    labels = generator.integers(0, CLASSES, count).astype(np.int32)
    points = centres[labels] + generator.standard_normal((count, WIDTH))
    return fed.Dataset(points.astype(np.float32), labels, CLASSES, "blobs")


def splits(count=360, seed=0):
    return fed.split(blobs(count, seed), proxy=80, validation=40, test=60, seed=seed)


def ragged(total, sizes, seed=0):
    """A partition with these sizes, of some of ``total`` examples."""
    order = np.random.default_rng(seed).permutation(total)[: sum(sizes)]
    return fed.Partition(np.split(order, np.cumsum(sizes)[:-1]), total, "ragged")


def mlp(hidden=5, **more):
    return fed.architectures.mlp((WIDTH,), (hidden,), CLASSES, **more)


def largest_difference(a, b):
    return max(
        float(jnp.max(jnp.abs(x - y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def equal(a, b):
    """Same structure, same bits."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
