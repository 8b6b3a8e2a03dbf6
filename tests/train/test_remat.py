"""What layers recompute in the backward pass: the same gradients, from more work and less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import presets
from jaxmoe.train import TrainConfig
from jaxmoe.train.loss import loss

CONFIG = presets["tiny"].replace(
    num_hidden_layers=2, num_nextn_predict_layers=0, hidden_size=64, intermediate_size=96
)


def gradient(**options):
    c = TrainConfig(batch_size=2, seq_len=16, **options)
    return lambda params, rows: jax.grad(lambda p: loss(p, CONFIG, c, rows)[0])(params)


def products(jaxpr):
    """Matrix products of a program, those of inner programs once."""
    inner = [
        one
        for equation in jaxpr.eqns
        for value in equation.params.values()
        for one in (value if isinstance(value, tuple | list) else [value])
        if hasattr(one, "jaxpr") or hasattr(one, "eqns")
    ]
    own = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    return own + sum(products(getattr(one, "jaxpr", one)) for one in inner)


@pytest.fixture(scope="module")
def operands():
    rows = np.random.default_rng(0).integers(0, 256, (2, 18)).astype(np.int32)
    return jaxmoe.init_params(CONFIG, jax.random.key(0)), jnp.asarray(rows)


def test_the_less_is_kept_the_more_is_multiplied_again(operands):
    def of(**options):
        return products(jax.make_jaxpr(gradient(**options))(*operands).jaxpr)

    assert of(remat="none") < of(remat="core") < of(remat="full")
    assert of(remat="none") <= of(remat="dots") < of(remat="core")
    # The dense layer keeps all, the one with experts nothing.
    assert of(remat="none") < of(remat="none", remat_moe="full") < of(remat="full")


def test_gradients_are_the_same_whatever_is_recomputed(operands):
    kept = jax.jit(gradient(remat="none"))(*operands)
    again = jax.jit(gradient(remat="dots", remat_moe="full"))(*operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), kept, again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remat": "all"}, "remat must be one of none, full, core, dots; got 'all'"),
        ({"remat_moe": "yes"}, "remat_moe must be one of none, full, core, dots; got 'yes'"),
    ],
)
def test_an_unknown_policy_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
