"""The model on parameters in SEFP: what the decoded weights give, at every width, in every path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train.support import MODEL

import jaxmoe
import quant
from jaxmoe import presets
from jaxmoe.config import ModelConfig
from jaxmoe.generate import _decode
from jaxmoe.layers.linear import linear, per_head, whole
from jaxmoe.moe import Experts, MoeOptions, apply_experts
from jaxmoe.sharding import make_mesh

# Dense attention with key/value groups, and a tied head.
LLAMA = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
    initializer_range=0.1,
)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
EXACT = {"rtol": 2e-5, "atol": 2e-6}  # float32 sums in another order


rounded = jax.jit(quant.fake_quantize)
store = jax.jit(quant.quantize_params)


@functools.cache
def params_of(config):
    params = jaxmoe.init_params(config, jax.random.key(0))
    return params, store(params)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "width"), [(MODEL, 3), (LLAMA, 8)], ids=["v32", "llama"])
def test_logits_and_tokens_are_those_of_the_rounded_weights(config, width):
    params, stored = params_of(config)
    decoded = rounded(params, jnp.int32(width))
    expected = jaxmoe.forward(decoded, config, TOKENS)
    given = jaxmoe.forward(quant.at_width(stored, width), config, TOKENS)
    np.testing.assert_allclose(given, expected, **EXACT)
    assert float(jnp.abs(expected - jaxmoe.forward(params, config, TOKENS)).max()) > 1e-4
    np.testing.assert_array_equal(
        jaxmoe.generate(stored, config, TOKENS, 5, width=width),
        jaxmoe.generate(decoded, config, TOKENS, 5),
    )


@pytest.mark.slow
def test_latent_attention_and_experts_in_sefp_give_what_the_rounded_weights_give():
    config = MODEL.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    params, stored = params_of(config)
    np.testing.assert_allclose(
        jaxmoe.forward(quant.at_width(stored, 3), config, TOKENS),
        jaxmoe.forward(rounded(params, jnp.int32(3)), config, TOKENS),
        **EXACT,
    )


def test_going_back_to_a_width_compiles_nothing():
    _, stored = params_of(LLAMA)
    jaxmoe.generate(stored, LLAMA, TOKENS, 5, width=8)
    jaxmoe.generate(stored, LLAMA, TOKENS, 5, width=4)
    programs = _decode._cache_size()
    for width in (8, 4):
        jaxmoe.generate(stored, LLAMA, TOKENS, 5, width=width)
    assert _decode._cache_size() == programs


def test_a_width_that_is_not_stored_is_refused():
    params, stored = params_of(LLAMA)
    for tree, width in ((quant.at_width(stored, 4), 5), (stored, 9), (stored, 2), (params, 8)):
        with pytest.raises(ValueError, match="got|needs SEFP") as error:
            jaxmoe.generate(tree, LLAMA, TOKENS, 2, width=width)
        assert str(width) in str(error.value)


@pytest.mark.parametrize(
    "path", ["local", "dense", pytest.param("all_to_all", marks=pytest.mark.slow)]
)
def test_every_path_of_the_experts_takes_them(path, devices, rng):
    gate_up, down = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 8, 2, 6), (4, 6, 8))
    )
    stored = (
        quant.SefpTensor.encode(gate_up, layout=quant.Layout(1, 2)),
        quant.SefpTensor.encode(down),
    )
    x = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
    ids = np.stack([rng.permutation(4)[:2] for _ in range(16)]).astype(np.int32)
    routing = (x, jnp.asarray(ids), jnp.full((16, 2), 0.5, jnp.float32))
    mesh = make_mesh(expert=2, devices=devices[:2]) if path == "all_to_all" else None
    options = MoeOptions(path, mesh)
    given = apply_experts(*routing, Experts(*stored, 4), options=options)
    decoded = Experts(*(t.decode() for t in stored), 4)
    np.testing.assert_allclose(given, apply_experts(*routing, decoded), rtol=1e-5, atol=1e-5)


def test_stacked_and_unstacked_layers_agree(rng):
    w = jnp.asarray(rng.standard_normal((3, 70, 2, 5)), jnp.float32)
    stored = quant.SefpTensor.encode(w, layout=quant.Layout(1, 2))
    x = jnp.asarray(rng.standard_normal((4, 70)), jnp.float32)
    for layer in range(3):
        one = jax.tree.map(lambda a, layer=layer: a[layer], stored)
        expected = linear(x, {"weight": one.decode()})
        for form in (one, whole(one)):
            np.testing.assert_allclose(linear(x, {"weight": form}), expected, rtol=1e-5, atol=1e-5)
    heads = quant.SefpTensor.encode(w[..., 0, :])
    x = jnp.asarray(rng.standard_normal((1, 2, 3, 70)), jnp.float32)
    np.testing.assert_allclose(
        per_head(x, whole(heads)), per_head(x, heads.decode()), rtol=2e-5, atol=5e-6
    )


def test_presets_weigh_what_the_format_promises():
    """Padding, routers and norms included, one tree of all widths at the size of a real model."""
    abstract = jaxmoe.params.abstract_params(presets["deepseek_v32"], jnp.bfloat16)
    stored = jax.eval_shape(quant.quantize_params, abstract)
    assert 9.125 < quant.bits_per_weight(stored) < 9.2
    assert quant.nbytes(stored, 3) < 0.46 * quant.nbytes(stored)
