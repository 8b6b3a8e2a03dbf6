"""Widths of single modules, and the width that fits a size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant


@pytest.fixture(scope="module")
def stored():
    rng = np.random.default_rng(0)
    shapes = {"proj": (128, 4), "lm_head": (64, 6), "down": (70, 6)}
    params = {
        n: {"weight": jnp.asarray(rng.normal(size=s), jnp.float32)} for n, s in shapes.items()
    }
    return quant.quantize_params(params | {"norm": jnp.ones(4)})


def test_pinned_modules_keep_their_width_and_share_their_arrays(stored):
    pinned = quant.pin_widths(stored, {"head": 6, "weight": 4})
    widths = {n: quant.at_width(pinned, 3)[n]["weight"].width for n in ("proj", "lm_head", "down")}
    assert widths == {"proj": 4, "lm_head": 6, "down": 4}
    every = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(stored)}
    assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(pinned)} <= every
    same = quant.pin_widths(stored, {"lm_head": 6, "lm_head/weight": 4, "weight": 4})
    assert same["lm_head"]["weight"].width == 6  # the first that matches; the second does match
    one = quant.at_width(quant.pin_widths(stored, {"lm_head": 8}), 3)
    assert quant.nbytes(one) == quant.nbytes(stored, 3) + 64 * 6 * 5 // 8


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"attention": 8}, "'attention' matches no parameter in SEFP"),
        ({"norm": 8}, "'norm' matches no parameter in SEFP"),
        ({"[": 8}, r"'\[' is not a regular expression"),
        ({"lm_head": 9}, "lm_head/weight: Sefp: width must be from 3 to 8; got 9. 8 is stored"),
    ],
)
def test_a_module_width_that_cannot_be_is_refused(stored, widths, message):
    with pytest.raises(ValueError, match=message):
        quant.pin_widths(stored, widths)


def test_the_widest_width_that_fits_is_found(stored):
    for width in range(3, 9):
        size = quant.nbytes(stored, width)
        assert quant.width_for_bytes(stored, size) == width
        if width > 3:
            assert quant.width_for_bytes(stored, size - 1) == width - 1
    least = quant.nbytes(stored, 3)
    with pytest.raises(
        ValueError, match=f"size_bytes must be at least {least}, .* got {least - 1}"
    ):
        quant.width_for_bytes(stored, least - 1)
    with pytest.raises(ValueError, match="needs SEFP weights"):
        quant.width_for_bytes({"w": jnp.ones((64, 2))}, 10**9)
    assert quant.width_for_bytes(jax.eval_shape(lambda: stored), least) == 3
    pinned = quant.pin_widths(stored, {"proj": 8})  # which doesn't get smaller
    assert quant.nbytes(pinned, 4) > quant.nbytes(stored, 4)
    assert quant.width_for_bytes(pinned, quant.nbytes(pinned, 4)) == 4
