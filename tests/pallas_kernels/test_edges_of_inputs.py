"""What the public functions do with nothing, at the ends of their ranges, and with arguments that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import fp8, sefp
from pallas_kernels.moe_dispatch.payload import FP8

f32, i32 = jnp.float32, jnp.int32


def zeros(*shape, dtype=f32):
    return jnp.zeros(shape, dtype)


def nowhere(*shape):
    return jnp.full(shape, -1, i32)


def check_zero(x):
    assert all(not leaf.astype(f32).any() for leaf in jax.tree.leaves(x))


@pytest.mark.parametrize("payload", [FP8, pk.sefp_payload(4)], ids=["fp8", "sefp"])
@pytest.mark.parametrize(("tokens", "active"), [(0, 2), (2, 0)])
def test_a_dispatch_of_no_pairs_has_no_rows_in_any_payload(payload, tokens, active):
    ids = zeros(tokens, active, dtype=i32)
    rows = pk.dispatch(zeros(tokens, 128), ids, 2, dtype=payload).rows
    assert rows.scales.shape == (0, 128 // payload.tile)
    assert pk.decode_rows(rows, payload).shape == (0, 128)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize(("tokens", "active", "rows"), [(0, 2, 3), (2, 0, 3), (2, 0, 0), (2, 2, 0)])
def test_combining_nothing_gives_zeros_and_zero_gradients(implementation, tokens, active, rows):
    def total(rows, weights):
        position = nowhere(tokens, active)
        return pk.combine(rows, position, weights, implementation=implementation).sum()

    y, gradients = jax.value_and_grad(total, (0, 1))(
        jnp.ones((rows, 8)), jnp.ones((tokens, active))
    )
    assert y == 0 and gradients[0].shape == (rows, 8) and gradients[1].shape == (tokens, active)
    check_zero(gradients)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 4), (0, 0)])
def test_weights_of_no_numbers_are_stored_and_come_back(shape):
    for module in (fp8, sefp):
        stored = module.encode(zeros(*shape))
        assert stored.shape == shape and module.decode(stored).shape == shape
    assert pk.sefp_truncate(zeros(*shape), 3).shape == shape


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(0, 64, 8), (2, 0, 8), (2, 64, 0)])
def test_a_product_in_sefp_of_nothing_is_zeros_with_zero_gradients(
    implementation, rows, inner, columns
):
    s = sefp.encode(jnp.ones((inner, columns)))
    product = lambda x: pk.sefp_matmul(x, s, implementation=implementation)  # noqa: E731
    y, pullback = jax.vjp(product, jnp.ones((3, rows, inner)))
    assert y.shape == (3, rows, columns) and pullback(y)[0].shape == (3, rows, inner)
    check_zero(y)


@pytest.mark.parametrize(("inner", "columns", "groups"), [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_a_product_of_8_bits_of_nothing_is_zeros_with_zero_gradients(inner, columns, groups):
    def total(x, w):
        return pk.grouped_matmul_fp8(x, w, zeros(groups, dtype=i32)).sum()

    y, gradients = jax.value_and_grad(total, (0, 1))(
        jnp.ones((4, inner)), jnp.ones((groups, inner, columns))
    )
    assert y == 0
    check_zero(gradients)


SIZES = {"B": (0, 2, 2, 3), "T": (1, 0, 2, 3), "H": (1, 2, 0, 3), "S": (1, 2, 2, 0)}


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("size", SIZES)
def test_attention_to_nothing_gives_zeros_minus_infinity_and_zero_gradients(implementation, size):
    batch, tokens, heads, rows = SIZES[size]

    def attend(q, kv):
        none = nowhere(batch, tokens, 2)
        return pk.sparse_mla(q, kv, none, scale=1.0, value_dim=3, implementation=implementation)

    q, kv = jnp.ones((batch, tokens, heads, 4)), jnp.ones((batch, rows, 4))
    (out, lse), pullback = jax.vjp(attend, q, kv)
    assert out.shape == (batch, tokens, heads, 3) and (lse == -jnp.inf).all()
    check_zero((out, pullback((jnp.ones_like(out), jnp.ones_like(lse)))))


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize(("page", "width", "own"), [(0, None, 3), (4, 0, 3), (0, None, 0)])
def test_a_step_without_a_cache_attends_to_its_own_rows(rng, implementation, page, width, own):
    q, rows = (jnp.asarray(rng.standard_normal(s), f32) for s in ((2, 2, 3, 4), (2, own, 4)))
    numbers = jnp.asarray([[[0, -1], [2, 1]]] * 2 if own else [[[-1, -1]] * 2] * 2, i32)
    pages = None if width is None else zeros(2, width, dtype=i32)

    def step(q, rows):
        return pk.sparse_mla_step(
            *(q, jnp.ones((1, 2, page, 4)), 0, rows, numbers),
            **dict(scale=0.5, value_dim=3, pages=pages, implementation=implementation),
        )

    def whole(q, rows):
        return pk.sparse_mla(q, rows, numbers, scale=0.5, value_dim=3, implementation="xla")

    (got, pullback), (wanted, expected) = jax.vjp(step, q, rows), jax.vjp(whole, q, rows)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    for mine, theirs in zip(pullback(got), expected(got), strict=True):
        # Sums of a few products, in another order.
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


NOTHING = {
    "dispatch": lambda i: pk.dispatch(zeros(0, 128), zeros(0, 2, dtype=i32), 2, implementation=i),
    "dispatch, no columns": lambda i: pk.dispatch(
        zeros(2, 0), zeros(2, 2, dtype=i32), 2, implementation=i
    ),
    "combine": lambda i: pk.combine(zeros(0, 128), nowhere(2, 2), zeros(2, 2), implementation=i),
    "combine, no columns": lambda i: pk.combine(
        zeros(4, 0), nowhere(2, 2), zeros(2, 2), implementation=i
    ),
    "sefp_matmul": lambda i: pk.sefp_matmul(
        zeros(0, 64, dtype=jnp.bfloat16), sefp.encode(zeros(64, 128)), implementation=i
    ),
    "sefp_truncate": lambda i: pk.sefp_truncate(zeros(0, 128), 3, implementation=i),
    "sparse_mla": lambda i: pk.sparse_mla(
        *(zeros(0, 2, 1, 4), zeros(0, 3, 4), zeros(0, 2, 1, dtype=i32)),
        **dict(scale=1.0, value_dim=2, implementation=i),
    ),
}


@pytest.mark.parametrize("op", NOTHING)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_a_named_kernel_refuses_nothing_to_do_and_a_sequence_goes_on(op, implementation):
    if jax.default_backend() != "cpu":
        pytest.skip("elsewhere one of the two refuses because of the platform")
    with pytest.raises(NotImplementedError, match="nothing to do; got"):
        NOTHING[op](implementation)
    NOTHING[op]((implementation, "xla"))


@pytest.mark.misuse
@pytest.mark.parametrize("unknown", ["cuda", 3])
def test_an_unknown_implementation_is_named_even_where_nothing_is_to_do(unknown):
    s = sefp.encode(jnp.ones((64, 2)))
    for op in (*NOTHING.values(), lambda i: pk.sefp_truncate(s, 3, implementation=i)):
        with pytest.raises(ValueError, match=f"must name one of .*; got {unknown!r}"):
            op(unknown)


def test_planes_are_dropped_without_a_kernel():
    s = sefp.encode(jnp.ones((64, 2)))
    assert pk.sefp_truncate(s, 4, implementation=["mosaic_gpu", "xla"]).width == 4
    with pytest.raises(NotImplementedError, match="without a kernel"):
        pk.sefp_truncate(s, 4, implementation="mosaic_gpu")


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu", "mosaic_tpu"])
def test_an_expert_that_there_is_not_is_no_expert(implementation):
    x = jnp.arange(3 * 128, dtype=f32).reshape(3, 128)
    got, expected = (
        pk.dispatch(x, jnp.array(ids, i32), 2, implementation=implementation)
        for ids in ([[1, 2], [0, 7], [-1, 1]], [[1, -1], [0, -1], [-1, 1]])
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert got.position.tolist() == [[1, -1], [0, -1], [-1, 2]]


def test_a_traced_scale_is_left_to_xla():
    q, kv, rows = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 3, 4)), zeros(1, 2, 1, dtype=i32)
    none = zeros(1, 0, 4)

    def attend(scale, implementation, step):
        operands = (q, kv[None], 0, none, rows) if step else (q, kv, rows)
        op = pk.sparse_mla_step if step else pk.sparse_mla
        return op(*operands, scale=scale, value_dim=2, implementation=implementation)

    traced = jax.jit(attend, static_argnums=(1, 2))
    for step in (False, True):
        for implementation in ("native", "mosaic_gpu", "mosaic_tpu"):
            with pytest.raises(NotImplementedError, match="scale is compiled into the kernel"):
                traced(0.5, implementation, step)
        expected = attend(0.5, "xla", step)
        jax.tree.map(np.testing.assert_array_equal, traced(0.5, None, step), expected)


@pytest.mark.parametrize("step", [False, True])
def test_a_traced_scale_and_the_queries_have_gradients(step):
    kv, rows = jnp.arange(12, dtype=f32).reshape(1, 3, 4) / 8, jnp.array([[[0, 2]]], i32)
    q = jnp.arange(8, dtype=f32).reshape(1, 1, 2, 4) / 8

    def loss(q, scale):
        operands = (q, kv[None], 0, zeros(1, 0, 4), rows) if step else (q, kv, rows)
        op = pk.sparse_mla_step if step else pk.sparse_mla
        return (op(*operands, scale=scale, value_dim=2)[0] ** 2).sum()

    dq, d_scale = jax.grad(jax.jit(loss), (0, 1))(q, 0.5)
    np.testing.assert_allclose(dq, jax.grad(loss)(q, 0.5), rtol=1e-5, atol=1e-6)
    # Logits are products times the scale: a step of the scale is one of all queries.
    np.testing.assert_allclose(d_scale, (dq * q).sum() / 0.5, rtol=1e-5, atol=1e-6)


# An integer result has no gradient; but without stop_gradient the kernels' calls fail in JAX when one is taken.
@pytest.mark.parametrize("implementation", [None, "mosaic_tpu"])
def test_no_gradient_passes_through_a_selection(implementation):
    def loss(q, k, weights):
        chosen = pk.index_topk(q, k, weights, 2, implementation=implementation)
        return (k[0, chosen[0, -1]] * 3).sum()

    k = jnp.arange(12, dtype=f32).reshape(1, 3, 4)
    dq, dk, dw = jax.grad(loss, (0, 1, 2))(jnp.ones((1, 3, 2, 4)), k, jnp.ones((1, 3, 2)))
    check_zero((dq, dw))
    assert dk[0, :, 0].tolist() == [0, 3, 3]


def test_no_gradient_passes_through_a_selection_of_a_step():
    def loss(q, cached, own, weights):
        n = jnp.array([2], i32)
        chosen = pk.index_topk_step(*(q, cached, 0, own, weights, n, 2))
        return chosen.astype(f32).sum() + q.sum()

    operands = (
        jnp.ones((1, 1, 2, 4)),
        jnp.ones((1, 1, 3, 4)),
        jnp.ones((1, 1, 4)),
        jnp.ones((1, 1, 2)),
    )
    dq, *others = jax.grad(loss, (0, 1, 2, 3))(*operands)
    assert (dq == 1).all()
    check_zero(others)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("op", [pk.grouped_matmul, pk.grouped_matmul_fp8])
def test_a_second_derivative_is_refused_with_a_way_out(op, implementation):
    w, sizes = jnp.ones((1, 3, 3)), jnp.array([2], i32)

    def slope(x, w, implementation):
        y = lambda x, w: (op(x, w, sizes, implementation=implementation) ** 2).sum()  # noqa: E731
        return sum(d.sum() for d in jax.grad(y, (0, 1))(x, w))

    for operand in (0, 1):
        with pytest.raises(NotImplementedError, match="no second derivative. Name .*reference"):
            jax.grad(slope, operand)(jnp.ones((2, 3)), w, implementation)
        assert jax.grad(slope, operand)(jnp.ones((2, 3)), w, "reference").any()


X, W, IDS, KV = zeros(2, 128), zeros(2, 128, 4), zeros(2, 2, dtype=i32), zeros(1, 3, 4)
Q, Q3, ROWS = zeros(1, 2, 1, 4), zeros(1, 2, 1), zeros(1, 2, 1, dtype=i32)
S, SIZE = sefp.encode(zeros(64, 8)), zeros(2, dtype=i32)
BLOCKS = fp8.encode(W)


def gmm(x=X, w=W, sizes=SIZE, offset=0, op=pk.grouped_matmul, implementation=None):
    return op(x, w, sizes, group_offset=offset, implementation=implementation)


def topk(q=Q, k=KV, weights=Q3, number=1, visible=None):
    return pk.index_topk(q, k, weights, number, visible=visible)


def topk_step(q=Q, cached=KV[None], layer=0, own=KV[:, :2], n=SIZE[:1], number=1, **o):
    return pk.index_topk_step(q, cached, layer, own, Q3, n, number, **o)


def mla(q=Q, kv=KV, indices=ROWS, value_dim=2):
    return pk.sparse_mla(q, kv, indices, scale=1.0, value_dim=value_dim)


def mla_step(q=Q, cached=KV[None], layer=0, rows=ROWS, value_dim=2, pages=None, own=KV):
    return pk.sparse_mla_step(
        q, cached, layer, own, rows, scale=1.0, value_dim=value_dim, pages=pages
    )


def dispatch(x=X, ids=IDS, experts=2, dtype=None):
    return pk.dispatch(x, ids, experts, dtype=dtype)


def coded(payload=FP8):
    return dispatch(dtype=payload).rows


INT_OR_SCALAR = r"must be an int or an integer array of shape \(\); got "
ARRAY = "must be an array; got list. Use jnp.asarray"
MISUSE = {
    "truncate 9.5": (lambda: pk.sefp_truncate(X, 9.5), TypeError, INT_OR_SCALAR + "9.5"),
    "truncate -3.0": (lambda: pk.sefp_truncate(X, -3.0), TypeError, INT_OR_SCALAR + "-3.0"),
    "truncate '3'": (lambda: pk.sefp_truncate(X, "3"), TypeError, INT_OR_SCALAR + "'3'"),
    "truncate [3]": (lambda: pk.sefp_truncate(X, [3, 4]), TypeError, INT_OR_SCALAR + r"\[3, 4\]"),
    "truncate array": (lambda: pk.sefp_truncate(X, SIZE), TypeError, r"got int32\(2,\)"),
    "truncate known": (lambda: pk.sefp_truncate(X, jnp.int32(9)), ValueError, "from 1 to 8; got 9"),
    "truncate Sefp": (lambda: pk.sefp_truncate(S, 3.0), TypeError, "Python int.*got 3.0"),
    "matmul width": (lambda: pk.sefp_matmul(X[:, :64], S, width=3.0), TypeError, "Python int"),
    "matmul array": (
        lambda: pk.sefp_matmul(X, W[0]),
        TypeError,
        "must be a Sefp; got .*sefp.encode",
    ),
    "matmul list": (lambda: pk.sefp_matmul([1.0], S), TypeError, "x " + ARRAY),
    "encode int": (lambda: sefp.encode(IDS), TypeError, "encode: w must be of a floating type"),
    "encode complex": (
        lambda: sefp.encode(IDS.astype(jnp.complex64)),
        TypeError,
        "got complex64. Cast it",
    ),
    "encode width": (lambda: sefp.encode(X, width=4.0), TypeError, "Python int"),
    "fp8 int": (lambda: fp8.encode(IDS), TypeError, "encode: w must be of a floating type"),
    "fp8 values": (
        lambda: gmm(w=pk.Fp8Block(W.astype(jnp.int8), BLOCKS.scales)),
        TypeError,
        "int8",
    ),
    "fp8 scales": (lambda: gmm(w=pk.Fp8Block(BLOCKS.values, W)), ValueError, r"here \(2, 1, 1\)"),
    "fp8 decode": (lambda: fp8.decode(pk.Fp8Block(BLOCKS.values, W)), ValueError, "decode: an Fp8"),
    "experts 0": (lambda: dispatch(experts=0), ValueError, "num_experts must be at least 1; got 0"),
    "experts 2.0": (lambda: dispatch(experts=2.0), TypeError, "num_experts must be a Python int"),
    "ids": (lambda: dispatch(ids=IDS.astype(f32)), TypeError, "expert_ids must be integers"),
    "ids list": (lambda: dispatch(ids=[[0], [1]]), TypeError, "expert_ids " + ARRAY),
    "dtype": (
        lambda: dispatch(dtype="bf8"),
        ValueError,
        "dtype must be None, .*got 'bf8'. For SEFP",
    ),
    "tiles": (
        lambda: dispatch(zeros(2, 100), dtype=pk.sefp_payload(3)),
        ValueError,
        "multiple of its tile, 64; got 100. Pad",
    ),
    "payload '4'": (lambda: pk.sefp_payload("4"), TypeError, "sefp_payload: width .*'4'"),
    "payload 9": (lambda: pk.sefp_payload(9), ValueError, "sefp_payload: width .*3 to 8; got 9"),
    "payload 3.0": (lambda: (pk.sefp_payload(3), pk.sefp_payload(3.0)), TypeError, "Python int"),
    "combine Encoded": (lambda: pk.combine(coded(), IDS, X[:, :2]), TypeError, "decode_rows first"),
    "position": (lambda: pk.combine(X, X[:, :2], X[:, :2]), TypeError, "position must be integers"),
    "decode array": (lambda: pk.decode_rows(X, FP8), TypeError, "rows must be Encoded"),
    "decode other": (
        lambda: pk.decode_rows(coded(), pk.sefp_payload(3)),
        ValueError,
        "Give the one",
    ),
    "decode width": (
        lambda: pk.decode_rows(coded(pk.sefp_payload(4)), pk.sefp_payload(3)),
        ValueError,
        "32 values of uint8 .*Give the one",
    ),
    "sizes list": (lambda: gmm(sizes=[1, 1]), TypeError, "group_sizes " + ARRAY),
    "offset 1.0": (lambda: gmm(offset=1.0), TypeError, "group_offset " + INT_OR_SCALAR + "1.0"),
    "offset shape": (lambda: gmm(offset=SIZE[:1]), TypeError, r"got int32\(1,\)"),
    "offset numpy": (lambda: gmm(offset=np.int32(1)), ValueError, "from 0 to 0; got 1. From there"),
    "offset array": (lambda: gmm(offset=jnp.int32(-1)), ValueError, "from 0 to 0; got -1"),
    "fp8 w": (lambda: gmm(w=BLOCKS, op=pk.grouped_matmul_fp8), TypeError, "array.*got Fp8Block"),
    "fp8 1-D": (
        lambda: gmm(w=X[0], op=pk.grouped_matmul_fp8),
        ValueError,
        r"matmul_fp8: .*\(128,\)",
    ),
    "fp8 offset": (
        lambda: gmm(offset=1, op=pk.grouped_matmul_fp8),
        ValueError,
        "grouped_matmul_fp8: group_offset must be from 0 to 0; got 1",
    ),
    "implementation": (lambda: gmm(implementation=3), ValueError, "must name one of .*; got 3"),
    "visible": (
        lambda: topk(visible=Q3[..., 0]),
        TypeError,
        "visible must be integers; got float32",
    ),
    "visible list": (lambda: topk(visible=[[1, 1]]), TypeError, "visible " + ARRAY),
    "topk q": (lambda: topk(q=Q.astype(i32)), TypeError, "q must be of a floating type; got int32"),
    "topk 2.0": (lambda: topk(number=2.0), TypeError, "topk must be a Python int.*got 2.0"),
    "step topk": (lambda: topk_step(number=6), ValueError, "topk must be from 1 to 5; got 6"),
    "lengths": (lambda: topk_step(n=zeros(1)), TypeError, "lengths must be integers"),
    "spans": (lambda: topk_step(spans=zeros(1, 2, 2)), TypeError, "spans must be integers"),
    "pages": (lambda: topk_step(pages=zeros(1, 1)), TypeError, "pages must be integers"),
    "pages list": (lambda: mla_step(pages=[[0]]), TypeError, "pages " + ARRAY),
    "layer": (lambda: topk_step(layer=9), ValueError, "layer must be from 0 to 0; got 9"),
    "layer 0.0": (lambda: mla_step(layer=0.0), TypeError, "layer " + INT_OR_SCALAR + "0.0"),
    "layer array": (lambda: mla_step(layer=jnp.int32(-1)), ValueError, "from 0 to 0; got -1"),
    "cached": (
        lambda: mla_step(cached=KV[None].astype(jnp.int8), own=KV.astype(jnp.int8)),
        TypeError,
        "cached must be stored in float32, bfloat16, fp8 .*; got int8",
    ),
    "rows": (lambda: mla_step(rows=Q3), TypeError, "rows must be integers"),
    "step q": (lambda: mla_step(q=Q.astype(i32)), TypeError, "q must be of a floating type"),
    "value_dim": (lambda: mla_step(value_dim=2.0), TypeError, "value_dim must be a Python int"),
    "indices": (lambda: mla(indices=Q3), TypeError, "indices must be integers"),
    "indices list": (lambda: mla(indices=[[[0], [0]]]), TypeError, "indices " + ARRAY),
    "mla value_dim": (lambda: mla(value_dim=2.0), TypeError, "value_dim must be a Python int"),
    "mla stored": (lambda: mla(kv=zeros(1, 3, 656, dtype=jnp.uint8)), TypeError, "cache_rows"),
    "merge": (lambda: pk.merge_partials([]), ValueError, "at least one"),
}


@pytest.mark.misuse
@pytest.mark.parametrize("case", MISUSE)
def test_an_argument_that_does_not_fit_is_named_with_its_rule_and_value(case):
    run, error, message = MISUSE[case]
    with pytest.raises(error, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_numbers_that_are_known_only_when_the_program_runs_pass():
    x, sizes = jnp.ones((2, 128)), jnp.array([2], i32)

    @jax.jit
    def run(number, width):
        y = gmm(x, jnp.ones((2, 128, 4)), sizes, number)
        return y, pk.sefp_truncate(0.8125 * x, width), mla_step(layer=number - 1)

    y, truncated, _ = run(jnp.int32(1), jnp.int32(3))
    assert (y == 128).all() and (truncated == 0.75).all()
