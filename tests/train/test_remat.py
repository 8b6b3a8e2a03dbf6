"""What layers recompute in the backward pass: the same gradients, from more work and less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import presets
from jaxmoe.model import PassOptions, run
from jaxmoe.train import TrainConfig
from jaxmoe.train.config import trajectory_of
from jaxmoe.train.loop import same_run
from jaxmoe.train.loss import loss
from pallas_kernels import native

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


def native_products(jaxpr):
    """Products by experts in C++ of a program, as ``products`` counts."""

    def count(eqns):
        found = 0
        for equation in eqns:
            name = str(equation.params.get("target_name", equation.params.get("name", "")))
            found += equation.primitive.name == "ffi_call" and "grouped" in name
            for value in equation.params.values():
                for one in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(one, "jaxpr", one)
                    found += count(inner.eqns) if hasattr(inner, "eqns") else 0
        return found

    return count(jaxpr.eqns)


@pytest.mark.skipif(not native.available(), reason="loops stand for the C++ products")
def test_products_with_experts_are_kept_with_the_others(operands):
    def of(**options):
        return native_products(jax.make_jaxpr(gradient(**options))(*operands).jaxpr)

    assert 0 < of(remat="none") == of(remat="dots") < of(remat="core")


def test_products_by_head_are_kept_with_the_others(operands):
    """Of attention by row, whose queries are multiplied by a matrix per head."""
    params, rows = operands
    config = CONFIG.replace(index_topk=4)  # of 18: there is something to choose

    def of(remat):
        options = PassOptions(core="gathered", remat=remat)
        hidden = lambda p: run(p, config, rows, options=options).hidden.sum()  # noqa: E731
        return products(jax.make_jaxpr(jax.grad(hidden))(params).jaxpr)

    assert of("none") == of("dots") < of("core")


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


@pytest.mark.misuse
@pytest.mark.parametrize("options", [{"remat": True}, {"remat_moe": "all"}])
def test_a_pass_with_an_unknown_policy_is_refused(operands, options):
    with pytest.raises(
        ValueError, match=rf"options\.{next(iter(options))} must be one of .*'core'"
    ):
        jaxmoe.forward(operands[0], CONFIG, operands[1], options=PassOptions(**options))


def test_a_run_from_when_remat_was_true_or_false_goes_on(tmp_path):
    for then, now in ((True, "core"), (False, "none")):
        ours = TrainConfig(remat=now).trajectory()
        before = {k: v for k, v in ours.items() if k != "remat_moe"} | {"remat": then}
        rest = {"corpus": {}, "model config": {}, "initial parameters": {}}
        same_run({"training options": before}, {"training options": ours} | rest, tmp_path)
        other = {"training options": TrainConfig(remat="full").trajectory()} | rest
        with pytest.raises(ValueError, match=f"remat: '{now}' -> 'full'"):
            same_run({"training options": before}, other, tmp_path)
    assert trajectory_of({"steps": 3}) == {"steps": 3}
