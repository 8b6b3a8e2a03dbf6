"""The contract of ``implementation=``, on made-up backends and on every real op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import _implementation
from pallas_kernels.grouped_matmul import api as grouped_matmul_api
from pallas_kernels.index_topk import api as index_topk_api
from pallas_kernels.moe_dispatch import api as moe_dispatch_api
from pallas_kernels.sefp import api as sefp_api
from pallas_kernels.sparse_mla import api as sparse_mla_api


def _refuse(reason):
    def backend(*args, **kwargs):
        raise NotImplementedError(reason)

    return backend


def _invalid(*args, **kwargs):
    raise ValueError("the input is wrong")


BACKENDS = {
    "xla": lambda x: ("xla", x),
    "fast": lambda x: ("fast", x),
    "small": _refuse("only 64 rows"),
    "big": _refuse("only 128 columns"),
    "broken": _invalid,
}


def call(implementation, preference):
    return _implementation.call("my_op", BACKENDS, preference, implementation, 7)


def test_none_takes_the_first_backend_of_the_platform_that_does_not_refuse():
    platform = jax.default_backend()
    assert call(None, {platform: ("fast", "xla")}) == ("fast", 7)
    assert call(None, {platform: ("small", "xla", "fast")}) == ("xla", 7)


def test_none_means_xla_on_a_platform_without_preferences():
    assert call(None, {}) == ("xla", 7)


def test_a_name_takes_exactly_that_backend():
    assert call("fast", {jax.default_backend(): ("xla",)}) == ("fast", 7)


def test_a_named_backend_that_refuses_never_falls_back():
    with pytest.raises(NotImplementedError, match="only 64 rows"):
        call("small", {jax.default_backend(): ("small", "xla")})


def test_a_sequence_falls_through_to_the_first_that_does_not_refuse():
    assert call(("small", "big", "fast"), {}) == ("fast", 7)
    assert call(["fast", "xla"], {}) == ("fast", 7)


def test_if_all_refuse_the_group_carries_every_name_and_reason():
    with pytest.raises(ExceptionGroup, match="my_op: every implementation refused") as caught:
        call(("small", "big"), {})
    reasons = [str(error) for error in caught.value.exceptions]
    assert reasons == ["small: only 64 rows", "big: only 128 columns"]
    assert all(isinstance(error, NotImplementedError) for error in caught.value.exceptions)


@pytest.mark.misuse
@pytest.mark.parametrize("unknown", ["cuda", ("xla", "cuda"), (), 3, (["xla"],)])
def test_an_unknown_or_missing_name_raises_with_the_known_ones(unknown):
    with pytest.raises(ValueError, match=r"my_op: implementation must name one of .*'fast'.*None"):
        call(unknown, {})


@pytest.mark.parametrize("implementation", ["broken", ("broken", "xla")])
def test_an_error_that_is_no_refusal_is_not_swallowed(implementation):
    with pytest.raises(ValueError, match="the input is wrong"):
        call(implementation, {})


@pytest.mark.parametrize(
    ("backends", "preference"),
    [
        (grouped_matmul_api._BACKENDS, grouped_matmul_api._PREFERENCE),
        (index_topk_api._BACKENDS, index_topk_api._PREFERENCE),
        (moe_dispatch_api._GATHER, moe_dispatch_api._PREFERENCE),
        (moe_dispatch_api._SUM, moe_dispatch_api._PREFERENCE),
        (index_topk_api._STEP_BACKENDS, index_topk_api._PREFERENCE),
        (sparse_mla_api._BACKENDS, sparse_mla_api._PREFERENCE),
        (sparse_mla_api._STEP_BACKENDS, sparse_mla_api._PREFERENCE),
        (sefp_api._MATMUL, sefp_api._PREFERENCE),
    ],
)
def test_every_platform_of_every_op_ends_at_xla(backends, preference):
    assert set(preference) == {"cpu", "gpu", "tpu"}
    for names in preference.values():
        assert names[-1] == "xla"
        assert set(names) <= set(backends)


def _ops():
    f32, i32 = jnp.float32, jnp.int32
    ids = jnp.zeros((2, 1), i32)
    stored = pallas_kernels.sefp.encode(jnp.ones((3, 4), f32))
    cached, own = jnp.ones((1, 1, 2, 3), f32), jnp.ones((1, 2, 3), f32)
    return {
        "grouped_matmul": lambda i: pallas_kernels.grouped_matmul(
            jnp.ones((2, 3), f32), jnp.ones((1, 3, 4), f32), jnp.array([2], i32), implementation=i
        ),
        "grouped_matmul_fp8": lambda i: pallas_kernels.grouped_matmul_fp8(
            jnp.ones((2, 3), f32), jnp.ones((1, 3, 4), f32), jnp.array([2], i32), implementation=i
        ),
        "sefp_matmul": lambda i: pallas_kernels.sefp_matmul(
            jnp.ones((2, 3), f32), stored, implementation=i
        ),
        "sefp_truncate": lambda i: pallas_kernels.sefp_truncate(
            jnp.full((3, 4), 0.8125, f32), 3, implementation=i
        ),
        "index_topk_step": lambda i: pallas_kernels.index_topk_step(
            *(jnp.ones((1, 2, 1, 3), f32), cached, 0, own, jnp.ones((1, 2, 1), f32)),
            *(jnp.array([1], i32), 2),
            implementation=i,
        ),
        "sparse_mla_step": lambda i: pallas_kernels.sparse_mla_step(
            *(jnp.ones((1, 2, 1, 3), f32), cached, 0, own, jnp.zeros((1, 2, 1), i32)),
            **dict(scale=1.0, value_dim=2, implementation=i),
        ),
        "dispatch": lambda i: pallas_kernels.dispatch(
            jnp.ones((2, 3), f32), ids, 1, implementation=i
        ),
        "combine": lambda i: pallas_kernels.combine(
            jnp.ones((2, 3), f32), ids, jnp.ones((2, 1), f32), implementation=i
        ),
        "index_topk": lambda i: pallas_kernels.index_topk(
            jnp.ones((1, 2, 1, 3), f32),
            jnp.ones((1, 2, 3), f32),
            jnp.ones((1, 2, 1), f32),
            1,
            implementation=i,
        ),
        "sparse_mla": lambda i: pallas_kernels.sparse_mla(
            jnp.ones((1, 2, 1, 3), f32),
            jnp.ones((1, 2, 3), f32),
            jnp.zeros((1, 2, 1), i32),
            scale=1.0,
            value_dim=2,
            implementation=i,
        ),
    }


@pytest.mark.parametrize("op", list(_ops()))
def test_every_op_runs_with_none_and_with_a_sequence_and_names_itself_on_an_unknown_name(op):
    run = jax.jit(_ops()[op], static_argnums=0)
    jax.tree.map(np.testing.assert_array_equal, run(None), run(("xla",)))
    jax.tree.map(np.testing.assert_array_equal, run(None), _ops()[op](["xla"]))
    # That of 8 bits is a product of rounded operands.
    name = op.removesuffix("_fp8")
    with pytest.raises(ValueError, match=f"{name}: implementation must name one of .*nothing"):
        run("nothing")


def test_every_op_is_tried_above():
    takes = {
        name
        for name in pallas_kernels.__all__
        if "implementation" in getattr(getattr(pallas_kernels, name), "__annotations__", {})
    }
    assert takes == set(_ops())
