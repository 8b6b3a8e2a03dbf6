"""SefpTensor, rules and whole trees: the same codes as the exact reference along the axes that a layout names; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import quant
from pallas_kernels.sefp import reference
from quant import Layout, Rule, SefpTensor

# name -> (shape, layout, the axes that are contracted)
LAYOUTS = {
    "matrix": ((130, 6), None, (0,)),
    "vector": ((70,), None, (0,)),
    "batch of matrices": ((2, 70, 3), None, (1,)),
    "two output axes": ((2, 70, 3, 2), Layout(1, 2), (1,)),
    "two input axes": ((2, 5, 16, 3), Layout(2, 1), (1, 2)),
    "embedding": ((5, 70), Layout(outputs_first=True), (1,)),
}


def exact(w, contracted, width):
    """Every group of ``w`` by Python's exact arithmetic; groups of 64 along the contracted axes as one."""
    moved = np.moveaxis(w, contracted, range(len(contracted)))
    flat = moved.reshape(int(np.prod(moved.shape[: len(contracted)])), -1)
    out = np.zeros_like(flat)
    for column in range(flat.shape[1]):
        for start in range(0, len(flat), 64):
            group = flat[start : start + 64, column]
            exponent, q = reference.exact_group(group.tolist(), width)
            out[start : start + 64, column] = np.ldexp(np.array(q, np.float64), exponent - width)
    return np.moveaxis(out.reshape(moved.shape), range(len(contracted)), contracted)


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_lie_along_the_contracted_axes(name, rng):
    shape, layout, contracted = LAYOUTS[name]
    w = rng.standard_normal(shape).astype(np.float32)
    t = SefpTensor.encode(jnp.asarray(w), layout=layout)
    assert (t.shape, t.width, t.size, t.dtype) == (shape, 8, w.size, np.float32)
    fake = jax.jit(quant.fake_quantize_array, static_argnums=2)
    for width in (8, 5, 3):
        expected = exact(w, contracted, width)
        np.testing.assert_array_equal(t.truncate(width).decode(), expected)
        np.testing.assert_array_equal(fake(jnp.asarray(w), jnp.int32(width), t.layout), expected)


def test_bytes_and_buffers_of_a_width():
    t = SefpTensor.encode(jnp.ones((256, 10), jnp.bfloat16), 64, 8)
    assert t.decode().dtype == jnp.bfloat16
    for width in range(3, 9):
        assert t.nbytes(width) == 256 * 10 // 64 * (8 * (width + 1) + 1)
        narrow = t.truncate(width)
        assert sum(a.nbytes for a in jax.tree.leaves(narrow)) == narrow.nbytes()
        assert narrow.stored.base is t.stored.base
    assert t.nbytes(3) / t.nbytes(8) < 0.46


def test_is_mapped_scanned_and_jitted_along_its_batch(rng):
    w = jnp.asarray(rng.standard_normal((3, 64, 2, 2)), jnp.float32)
    t = jax.jit(lambda w: SefpTensor.encode(w, layout=Layout(1, 2)))(w)
    _, scanned = jax.lax.scan(lambda c, layer: (c, layer.decode()), 0, t)
    np.testing.assert_array_equal(scanned, t.decode())
    np.testing.assert_array_equal(jax.vmap(SefpTensor.decode)(t), t.decode())
    each = jax.vmap(lambda w: SefpTensor.encode(w, layout=Layout(1, 2)))(w)
    jax.tree.map(np.testing.assert_array_equal, each, t)


@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
def test_is_split_over_devices_between_groups_without_a_change(spec, devices, rng):
    t = SefpTensor.encode(jnp.asarray(rng.standard_normal((256, 8)), jnp.float32))
    mesh = Mesh(np.array(devices[:4]), "x")
    split = jax.device_put(t, NamedSharding(mesh, PartitionSpec(*spec)))
    decoded = jax.jit(lambda t: t.truncate(4).decode())(split)
    assert decoded.sharding.spec == PartitionSpec(*spec)
    np.testing.assert_array_equal(decoded, t.truncate(4).decode())


store = jax.jit(quant.quantize_params, static_argnames="rules")
rounded = jax.jit(quant.fake_quantize, static_argnames="rules")
PARAMS = {
    "embed": {"weight": jnp.ones((8, 64))},
    "layers": [{"attention": {"o": {"weight": jnp.ones((3, 4, 16, 8))}}, "norm": jnp.ones((3, 8))}],
    "custom": jnp.full((64, 4), 0.8125),
    "step": jnp.zeros((), jnp.int32),
}


def test_rules_say_what_is_quantised_and_how():
    q = store(PARAMS)
    assert q["embed"]["weight"].layout.outputs_first
    o = q["layers"][0]["attention"]["o"]["weight"]
    assert (o.shape, o.stored.shape) == ((3, 4, 16, 8), (3, 64, 8))
    np.testing.assert_array_equal(q["layers"][0]["norm"], PARAMS["layers"][0]["norm"])
    assert len(quant.tensors(q)) == 3
    assert quant.quantize_params(q)["custom"] is q["custom"]  # nothing is quantised twice
    only = quant.quantize_params(PARAMS, rules=(Rule("custom", Layout()),))
    assert [t.shape for t in quant.tensors(only)] == [(64, 4)]
    assert only["embed"] is not q["embed"] and only["step"] is PARAMS["step"]


def test_a_pinned_width_is_its_own_whatever_the_others_is():
    rules = (Rule("custom", Layout(), width=7), *quant.DEFAULT_RULES)
    q = store(PARAMS, rules=rules)
    narrow = quant.at_width(q, 3)
    assert (narrow["custom"].width, narrow["embed"]["weight"].width) == (7, 3)
    pinned = q["custom"].nbytes()
    plain = sum(x.nbytes for x in (PARAMS["layers"][0]["norm"], PARAMS["step"]))
    others = (8 * 64 + 3 * 64 * 8) // 64 * (8 * 4 + 1)
    assert quant.nbytes(q, 3) == quant.nbytes(narrow) == pinned + plain + others
    fake = rounded(PARAMS, jnp.int32(3), rules=rules)
    decoded = jax.jit(quant.decode_params)(narrow)
    jax.tree.map(np.testing.assert_array_equal, fake, decoded)
    assert fake["custom"][0, 0] == 0.8125
    assert rounded(PARAMS, jnp.int32(3))["custom"][0, 0] == 0.75


def test_bits_per_weight_of_a_tree_count_everything():
    q = jax.eval_shape(quant.quantize_params, {"w": jnp.ones((128, 64)), "norm": jnp.ones(64)})
    assert quant.bits_per_weight(q) == pytest.approx((9.125 * 8192 + 32 * 64) / 8256)
    assert quant.bits_per_weight(q, 3) == pytest.approx((4.125 * 8192 + 32 * 64) / 8256)


@pytest.mark.misuse
def test_what_does_not_fit_is_refused_in_one_line():
    w = jnp.ones((64, 4))
    cases = [
        (lambda: SefpTensor.encode(w, group=32), ValueError, "group must be 64"),
        (lambda: SefpTensor.encode(w, width=9), ValueError, "width must be"),
        (lambda: SefpTensor.encode(w, width=2), ValueError, "width must be"),
        (lambda: SefpTensor.encode(w, rounding="up"), ValueError, "rounding must be"),
        (lambda: SefpTensor.encode(w, width=4).truncate(5), ValueError, "got 5"),
        (lambda: SefpTensor.encode(w, layout=Layout(2, 1)), ValueError, "lacks axes"),
        (lambda: SefpTensor.encode(w.astype(jnp.int32)), TypeError, "got int32"),
        (lambda: SefpTensor.encode(w.at[0, 0].set(jnp.nan)), ValueError, "NaN"),
        (lambda: quant.quantize_params({"a": {"w": w.at[3, 0].set(jnp.inf)}}), ValueError, "a/w"),
        (lambda: quant.at_width({"w": w}, 3), ValueError, "needs SEFP weights"),
        (lambda: quant.fake_quantize({"w": w}, 9), ValueError, "width must be"),
        (lambda: quant.fake_quantize({"w": w}, 0), ValueError, "width must be"),
        (lambda: Rule("("), ValueError, "regular expression"),
        (lambda: Rule("x", Layout(), width=9), ValueError, "got 9"),
        (lambda: Rule("x", width=3), ValueError, "no layout"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


def test_zeros_subnormals_and_a_traced_nan_are_defined():
    tiny = SefpTensor.encode(jnp.full((64, 2), 1e-40))
    assert not np.asarray(tiny.decode()).any()
    bad = jax.jit(SefpTensor.encode)(jnp.ones((64, 1)).at[0, 0].set(jnp.nan).at[1, 0].set(jnp.inf))
    decoded = np.asarray(bad.decode())[:, 0]
    assert decoded[0] == 0 and 65000 < decoded[1] <= 65504 and np.isfinite(decoded).all()


def test_the_gradient_passes_straight_through_every_width_and_rule():
    c = jax.tree.map(lambda x: jnp.full(x.shape, 0.25), {k: PARAMS[k] for k in ("embed", "custom")})
    params = {k: PARAMS[k] for k in ("embed", "custom")}

    def loss(params, width):
        q = quant.fake_quantize(params, width)
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), q, c)))

    gradient = jax.jit(jax.grad(loss))
    for width in range(1, 9):
        jax.tree.map(np.testing.assert_array_equal, gradient(params, jnp.int32(width)), c)
    assert gradient._cache_size() == 1
