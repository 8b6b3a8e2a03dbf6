"""One training step: what each loss reaches, the optimiser, the balance of experts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train.support import MODEL, RUN, with_options

import jaxmoe
from jaxmoe.moe.balance import update_bias
from jaxmoe.moe.route import expert_load, route
from jaxmoe.params import flatten
from jaxmoe.sharding import make_mesh
from jaxmoe.train.data import Batch
from jaxmoe.train.loss import cross_entropy, loss
from jaxmoe.train.step import (
    group_norms,
    init_state,
    learning_rate,
    make_optimizer,
    place_batch,
    state_shardings,
    train_step,
)


def tokens(seed=0, batch=4, length=34):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (batch, length)), jnp.int32)


@functools.cache
def compiled_gradient():
    @jax.jit
    def gradient(params, lm_weight, index_weight):
        def total(params):
            value, aux = loss(params, MODEL, RUN, tokens())
            return lm_weight * (value - aux["index_loss"]) + index_weight * aux["index_loss"]

        return jax.grad(total)(params)

    return gradient


@functools.cache
def gradients(lm_weight, index_weight):
    """Gradient by parameter name of the weighted sum of all losses of the model, and of the indexer's."""
    params = jaxmoe.init_params(MODEL, jax.random.key(0))
    grads = compiled_gradient()(params, jnp.float32(lm_weight), jnp.float32(index_weight))
    return {name: np.asarray(g) for name, g in flatten(grads).items()}


def test_the_language_model_losses_do_not_reach_the_indexer():
    for name, g in gradients(1, 0).items():
        if "/indexer/" in name:
            assert not g.any(), name


def test_the_indexers_loss_reaches_nothing_else():
    for name, g in gradients(0, 1).items():
        assert g.any() == ("/indexer/" in name), name


def test_the_two_gradients_add_up_unmixed():
    both, model, index = gradients(1, 1), gradients(1, 0), gradients(0, 1)
    for name in both:
        expected = index[name] if "/indexer/" in name else model[name]
        np.testing.assert_array_equal(both[name], expected, err_msg=name)


def test_no_gradient_reaches_the_correction_bias():
    for name, g in gradients(1, 1).items():
        if name.endswith("router/bias"):
            assert not g.any(), name


def test_every_other_parameter_learns():
    for name, g in gradients(1, 1).items():
        assert g.any() or name.endswith("router/bias"), name


def test_a_step_moves_the_bias_by_the_load_and_by_nothing_else():
    options = with_options(bias_update_speed=0.25)
    state = init_state(MODEL, options)
    before = jax.device_get(state.params)
    state, metrics = train_step(state, tokens(), MODEL, options)
    layers = [
        (before["segments"][1][0], state.params["segments"][1][0], metrics["load"][0]),
        (before["mtp"][0]["layer"], state.params["mtp"][0]["layer"], metrics["load"][1]),
    ]
    for old, new, load in layers:
        load = np.asarray(load, np.float32)
        expected = old["moe"]["router"]["bias"] + 0.25 * np.sign(load.mean() - load)
        np.testing.assert_array_equal(new["moe"]["router"]["bias"], expected)
    assert metrics["load"].shape == (2, MODEL.n_routed_experts)
    assert (metrics["load"].sum(1) == 4 * 32 * MODEL.num_experts_per_tok).all()


def test_an_imbalanced_router_becomes_balanced():
    config = MODEL.replace(n_group=1, topk_group=1)
    key_x, key_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (512, config.hidden_size), jnp.float32)
    weight = jax.random.normal(key_w, (config.hidden_size, 8), jnp.float32) * 0.05
    # Experts 0 and 1 are everyone's first choice.
    bias = jnp.zeros(8, jnp.float32).at[:2].set(0.3)
    load = functools.partial(expert_load, num_experts=8)

    @jax.jit
    def step(bias):
        chosen = load(route({"weight": weight, "bias": bias}, config, x).expert_ids)
        return update_bias(bias, chosen, 0.01), chosen

    bias, first = jax.device_get(step(bias))
    for _ in range(60):
        bias, last = jax.device_get(step(bias))
    assert first.max() / first.mean() > 3.9
    assert last.max() / last.mean() < 1.3


def update_of(options, grads, params):
    """Updates and optimiser state after one step; compiled as a whole, which is much faster than op by op."""
    optimizer = make_optimizer(MODEL, options)

    @jax.jit
    def step(grads, params):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, optimizer.init(params), params)

    return step(grads, params)


def test_only_matrices_decay():
    options = with_options(weight_decay=0.5, learning_rate=1.0, warmup_steps=0)
    params = jaxmoe.init_params(MODEL, jax.random.key(0))
    updates, _ = update_of(options, jax.tree.map(np.zeros_like, params), params)
    for name, update in flatten(updates).items():
        kept = "norm" in name or name.endswith("bias")
        assert bool(np.any(update)) != kept, name


def test_model_and_indexer_are_clipped_by_their_own_norms():
    params = jaxmoe.init_params(MODEL, jax.random.key(0))
    grads = jax.tree.map(np.zeros_like, jax.device_get(params))
    grads["norm"]["weight"][0] = 0.5
    grads["segments"][0][0]["indexer"]["k_norm"]["weight"][0, 0] = 100.0
    assert {k: float(v) for k, v in group_norms(grads).items()} == {"model": 0.5, "index": 100.0}
    # By one common norm the model's part would shrink to 0.005. Adam divides that out; its mean shows it.
    _, state = update_of(with_options(clip_norm=1.0), grads, params)
    mean = flatten(state[1][0].mu)
    np.testing.assert_allclose(mean["norm/weight"][0], 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(mean["segments/0/0/indexer/k_norm/weight"][0, 0], 0.1, rtol=1e-6)


def test_the_schedule_rises_then_falls_to_its_ratio():
    options = with_options(
        steps=100, learning_rate=2.0, warmup_steps=9, final_learning_rate_ratio=0.1
    )
    rates = np.asarray(jax.vmap(learning_rate(options))(jnp.arange(100)))
    np.testing.assert_allclose(rates[[0, 9, 99]], [0.2, 2.0, 0.2], rtol=1e-5)
    assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[9:]) < 0).all()


def test_cross_entropy_is_the_log_of_the_softmax():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7), jnp.float32)
    targets = jnp.asarray([[0, 6, 2], [3, 3, 1]], jnp.int32)
    probabilities = jax.nn.softmax(logits)
    expected = -np.log(
        np.take_along_axis(np.asarray(probabilities), np.asarray(targets)[..., None], -1)
    )
    np.testing.assert_allclose(cross_entropy(logits, targets), expected[..., 0], rtol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "expert": 2, "tensor": 2},
        pytest.param({"data": 3}, marks=pytest.mark.slow),  # 3 do not divide 4
    ],
)
def test_a_mesh_gives_the_losses_of_one_device(devices, shape):
    options = with_options(steps=3)
    mesh = make_mesh(**shape, devices=devices[: math.prod(shape.values())])
    alone, spread = init_state(MODEL, options), init_state(MODEL, options, mesh)
    wanted = state_shardings(MODEL, options, mesh)
    for step in range(3):
        batch = tokens(step)
        alone, expected = train_step(alone, batch, MODEL, options)
        placed = place_batch(mesh, np.asarray(batch))
        spread, metrics = train_step(spread, placed, MODEL, options, mesh)
        for name in ("loss", "mtp_loss", "index_loss", "balance_loss", "grad_norm"):
            # Sums in another order, then three Adam steps.
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, err_msg=name)
        np.testing.assert_array_equal(metrics["load"], expected["load"])
    for leaf, sharding in zip(jax.tree.leaves(spread), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_passes_over_parts_of_a_batch_add_up_to_its_step():
    """Rows count by their weights, so that the parts' means would differ from the whole's."""
    model = MODEL.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    rows = np.array(tokens(0))
    starts, weights = np.zeros_like(rows), np.ones(rows.shape, np.float32)
    weights[0], weights[1, 5:], starts[2, 7:] = 0.0, 0.0, 7
    starts[1, 5:] = np.arange(5, rows.shape[1])  # padding: 5 of the row's tokens are real
    batch = Batch(rows, starts, weights)
    results = []
    for options in (with_options(steps=3), with_options(steps=3, accumulate=2)):
        state = init_state(model, options)
        for _ in range(2):
            state, metrics = train_step(state, batch, model, options)
        results.append(metrics)
    whole, parts = results
    for name in ("total_loss", "loss", "index_loss", "balance_loss", "grad_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=2e-5, err_msg=name)
    np.testing.assert_array_equal(parts["load"], whole["load"])
    real = 5 + (len(rows) - 2) * (rows.shape[1] - 2)
    np.testing.assert_array_equal(whole["load"].sum(1), real * model.num_experts_per_tok)


def test_a_step_that_is_not_finite_changes_nothing_but_its_number():
    options = with_options(steps=3)
    state = init_state(MODEL, options)
    ruined = jax.tree.map(lambda x: x * jnp.inf, state.params["norm"])
    state = state.replace(params={**state.params, "norm": ruined})
    before = jax.device_get(state)
    after, metrics = train_step(state, tokens(0), MODEL, options)
    assert metrics["skipped"] == 1.0 and not np.isfinite(metrics["total_loss"])
    assert after.step == before.step + 1
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_keeps_float32_weights():
    results = {}
    for dtype in ("float32", "bfloat16"):
        options = with_options(steps=3, compute_dtype=dtype)
        state, metrics = train_step(init_state(MODEL, options), tokens(0), MODEL, options)
        assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
        results[dtype] = metrics
    for name in ("loss", "mtp_loss"):
        np.testing.assert_allclose(results["bfloat16"][name], results["float32"][name], rtol=2e-3)
    assert results["bfloat16"]["loss"] != results["float32"]["loss"]
