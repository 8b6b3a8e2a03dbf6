"""Sparse core attention by row against the masked form that multiplies all pairs: outputs, losses, gradients, selections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.layers import core_attention, sparse_attention
from jaxmoe.layers.indexer import IndexInputs
from jaxmoe.sharding import make_mesh

BATCH, TOKENS, HEADS, SIZE, VALUES, TOPK = 2, 150, 4, 24, 16, 8
INDEX_HEADS, INDEX_SIZE = 16, 8
OPTIONS = core_attention.Options(scale=0.3, topk=TOPK, index_loss=True, keep_selection=True)
# Three documents in one row, one of them shorter than topk; two in the other.
STARTS = np.stack(
    [np.repeat([0, 60, 65], [60, 5, TOKENS - 65]), np.repeat([0, 149], [149, 1])]
).astype(np.int32)


def operands(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [
        (BATCH, TOKENS, HEADS, SIZE),
        (BATCH, TOKENS, SIZE),
        (BATCH, TOKENS, INDEX_HEADS, INDEX_SIZE),
        (BATCH, TOKENS, INDEX_SIZE),
        (BATCH, TOKENS, INDEX_HEADS),
    ]
    q, kv, *index = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    return q, kv, IndexInputs(*index)


def masked(q, kv, index, starts, valid, selection=None):
    """The absorbed form is attention of one group of heads, whose values are part of its keys."""
    keys = kv[:, :, None]
    return core_attention.causal_attention(
        q,
        keys,
        keys[..., :VALUES],
        OPTIONS,
        index=index,
        selection=selection,
        starts=starts,
        valid=valid,
    )


def gathered(q, kv, index, starts, valid, selection=None, mesh=None):
    return sparse_attention.sparse_attention(
        q,
        kv,
        OPTIONS,
        value_dim=VALUES,
        index=index,
        selection=selection,
        starts=starts,
        valid=valid,
        mesh=mesh,
    )


@functools.cache
def with_gradients(form, **more):
    """Compiled: result, and gradients of a weighted sum of outputs and of the index loss."""

    @jax.jit
    def run(q, kv, index, starts, valid):
        def total(q, kv, index):
            result = form(q, kv, index, starts, valid, **more)
            ramp = jnp.linspace(-1.0, 1.0, result.out.size, dtype=jnp.float32)
            weighted = (result.out * ramp.reshape(result.out.shape)).sum()
            return weighted + 2 * result.index_loss, result

        grads, result = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, kv, index)
        return result, grads

    return run


def as_mask(rows):
    mask = np.zeros((BATCH, TOKENS, TOKENS + 1), bool)
    np.put_along_axis(mask, np.asarray(rows), True, axis=-1)  # -1 is the last column
    return mask[..., :-1]


def same(ours, theirs):
    """Values of order one in float32, added up in another order."""
    np.testing.assert_allclose(ours.out, theirs.out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.index_loss, theirs.index_loss, rtol=1e-5)
    np.testing.assert_array_equal(as_mask(ours.selection), theirs.selection)


def same_gradients(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize("documents", [None, STARTS], ids=["one document", "packed"])
def test_both_forms_agree_in_values_and_gradients(documents):
    starts = None if documents is None else jnp.asarray(documents)
    valid = jnp.asarray([True, documents is None])
    ours, our_grads = with_gradients(gathered)(*operands(), starts, valid)
    theirs, their_grads = with_gradients(masked)(*operands(), starts, valid)
    same(ours, theirs)
    same_gradients(our_grads, their_grads)


def test_a_shared_selection_is_attended_to_in_both_forms():
    q, kv, index = operands()
    rows = sparse_attention.choose(index, TOPK)
    other = operands(1)[2]  # whose own choice would be another
    ours = jax.jit(gathered)(q, kv, other, None, None, rows)
    theirs = jax.jit(masked)(q, kv, other, None, None, jnp.asarray(as_mask(rows)))
    same(ours, theirs)


def test_chosen_rows_lie_in_the_querys_document_and_are_all_where_there_are_few():
    rows = np.asarray(sparse_attention.choose(operands()[2], TOPK, jnp.asarray(STARTS)))
    position = np.arange(TOKENS)
    chosen = rows >= 0
    assert ((rows >= STARTS[..., None]) | ~chosen).all()
    assert (rows <= position[None, :, None]).all()
    np.testing.assert_array_equal(chosen.sum(-1), np.minimum(position - STARTS + 1, TOPK))


def test_a_mesh_gives_the_results_of_one_device(devices):
    mesh = make_mesh(data=2, tensor=2, devices=devices[:4])
    arguments = (*operands(), jnp.asarray(STARTS), jnp.ones(BATCH, bool))
    alone, alone_grads = with_gradients(gathered)(*arguments)
    spread, grads = with_gradients(gathered, mesh=mesh)(*arguments)
    np.testing.assert_allclose(spread.out, alone.out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(spread.index_loss, alone.index_loss, rtol=1e-5)
    same_gradients(grads, alone_grads)


def planned_bytes(length):
    """What XLA plans for the gradient of a sequence's attention and index loss, over given rows."""
    options = OPTIONS._replace(keep_selection=False)
    shapes = [(1, length, HEADS, SIZE), (1, length, SIZE), (1, length, INDEX_HEADS, INDEX_SIZE)]
    shapes += [(1, length, INDEX_SIZE), (1, length, INDEX_HEADS)]
    given = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    rows = jax.ShapeDtypeStruct((1, length, TOPK), jnp.int32)

    def total(q, kv, iq, ik, iw, rows):
        more = {"index": IndexInputs(iq, ik, iw), "selection": rows}
        result = sparse_attention.sparse_attention(q, kv, options, value_dim=VALUES, **more)
        return result.out.sum() + result.index_loss

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)))
    return gradient.lower(*given, rows).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_its_square():
    # What belongs to every row, of which the sixteen index heads are most, and a bounded chunk of gathered rows.
    assert planned_bytes(16384) < 4.1 * planned_bytes(4096)
    assert planned_bytes(16384) < 16384 * 16384


def test_the_rule_masks_short_sequences_and_can_be_overridden():
    factor = sparse_attention.GATHER_FACTOR
    assert not sparse_attention.gathers(factor * 16, 16)
    assert sparse_attention.gathers(factor * 16 + 1, 16)
    assert sparse_attention.gathers(17, 16, "gathered")
    assert not sparse_attention.gathers(10**6, 16, "masked")
    assert not sparse_attention.gathers(16, 16, "gathered")  # nothing to choose
    assert not sparse_attention.gathers(10**6, None)
