"""The stages from a dense to a sparse model: what each trains, on which losses, over which documents."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train.support import MODEL, with_options

import jaxmoe
from jaxmoe import checkpoint, sharding
from jaxmoe.layers import sparse_attention
from jaxmoe.model import PassOptions, run
from jaxmoe.params import flatten
from jaxmoe.train import TrainConfig
from jaxmoe.train.data import Batch
from jaxmoe.train.dsa import index_recall, initial_params, origin_of
from jaxmoe.train.loss import counts_of, loss
from jaxmoe.train.step import init_state, place_batch, train_step

# Long against topk: the sparse stage attends by row, in the layers and in the MTP module.
SPARSE = MODEL.replace(index_topk=2, index_n_heads=16, indexer_types=("full", "shared"))
LENGTH = 32
STAGES = {"dsa_warmup": MODEL, "dsa_sparse": SPARSE}


def tokens(seed=0, rows=4):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 256, (rows, LENGTH + 2)), jnp.int32)


@functools.cache
def gradient_of(stage):
    config, options = STAGES[stage], with_options(stage=stage, seq_len=LENGTH)

    @jax.jit
    def gradient(params, lm_weight, index_weight):
        def total(params):
            _, aux = loss(params, config, options, tokens())
            model = aux["loss"] + aux["mtp_loss"] + aux["balance_loss"]
            return lm_weight * model + index_weight * aux["index_loss"]

        return jax.grad(total)(params)

    return gradient


@functools.cache
def gradients(stage, lm_weight, index_weight):
    """Gradient by parameter name of the weighted sum of the model's losses, and of the indexers'."""
    params = jaxmoe.init_params(STAGES[stage], jax.random.key(0))
    grads = gradient_of(stage)(params, jnp.float32(lm_weight), jnp.float32(index_weight))
    return {name: np.asarray(g) for name, g in flatten(grads).items()}


def test_in_the_sparse_stage_the_models_losses_do_not_reach_the_indexer():
    for name, g in gradients("dsa_sparse", 1, 0).items():
        assert g.any() != ("/indexer/" in name or name.endswith("router/bias")), name


def test_in_the_sparse_stage_the_indexers_loss_reaches_nothing_else():
    for name, g in gradients("dsa_sparse", 0, 1).items():
        assert g.any() == ("/indexer/" in name), name


@pytest.mark.slow
def test_in_the_sparse_stage_the_two_gradients_add_up_unmixed():
    both = gradients("dsa_sparse", 1, 1)
    model, index = gradients("dsa_sparse", 1, 0), gradients("dsa_sparse", 0, 1)
    for name in both:
        expected = index[name] if "/indexer/" in name else model[name]
        np.testing.assert_array_equal(both[name], expected, err_msg=name)


def losses_and_gradients(config, mesh=None):
    """Of the sparse stage, on a mesh or on one device: losses and loads, and the gradient of all losses by name."""
    options = with_options(stage="dsa_sparse", seq_len=LENGTH)
    where = None if mesh is None else sharding.shardings(config, mesh)
    params = jaxmoe.init_params(config, jax.random.key(0), shardings=where)
    rows = tokens() if mesh is None else place_batch(mesh, np.asarray(tokens()))

    @jax.jit
    def compute(params, rows):
        of = functools.partial(loss, config=config, train_config=options, rows=rows, mesh=mesh)
        (total, aux), grads = jax.value_and_grad(of, has_aux=True)(params)
        return aux | {"total_loss": total}, grads

    values, grads = jax.device_get(compute(params, rows))
    return values, flatten(grads)


on_one_device = functools.cache(losses_and_gradients)
ONE_LAYER = SPARSE.replace(
    num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, indexer_types=None
)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (ONE_LAYER, {"data": 2, "expert": 2, "tensor": 2}),
        pytest.param(SPARSE, {"data": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(SPARSE, {"expert": 4}, marks=pytest.mark.slow),
    ],
    ids=["one layer, 2x2x2", "2x2x2", "experts only"],
)
def test_the_sparse_stage_on_a_mesh_has_the_losses_and_gradients_of_one_device(
    devices, config, shape
):
    mesh = sharding.make_mesh(**shape, devices=devices[: math.prod(shape.values())])
    values, grads = losses_and_gradients(config, mesh)
    expected, gradients = on_one_device(config)
    jax.tree.map(np.testing.assert_array_equal, values.pop("load"), expected["load"])
    for name, value in values.items():  # sums in another order
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, err_msg=name)
    for name, g in gradients.items():
        atol = 1e-4 * np.abs(g).max()
        np.testing.assert_allclose(grads[name], g, rtol=1e-4, atol=atol, err_msg=name)


@functools.cache
def after_a_step(stage):
    """Parameters before and after a step with everything that could move them, the metrics, and the state."""
    options = with_options(stage=stage, seq_len=LENGTH, weight_decay=0.5, bias_update_speed=0.25)
    state = init_state(STAGES[stage], options)
    before = flatten(jax.device_get(state.params))
    state, metrics = train_step(state, tokens(), STAGES[stage], options)
    return before, flatten(jax.device_get(state.params)), metrics, state


def test_the_warmup_moves_every_parameter_of_the_indexers_and_no_other():
    before, after, metrics, state = after_a_step("dsa_warmup")
    assert metrics["grad_norm"] == 0 and metrics["index_grad_norm"] > 0
    np.testing.assert_array_equal(metrics["total_loss"], metrics["index_loss"])
    for name in before:
        assert (before[name] != after[name]).any() == ("/indexer/" in name), name
    assert all("/indexer/" in name for name in flatten(state.opt_state[1][0].mu))


@pytest.mark.slow
def test_the_sparse_stage_moves_every_parameter():
    before, after, _, _ = after_a_step("dsa_sparse")
    for name in before:
        assert (before[name] != after[name]).any(), name


def test_a_checkpoint_gives_its_parameters_and_lacks_at_most_indexers(tmp_path):
    dense = MODEL.replace(
        index_topk=None, index_n_heads=None, index_head_dim=None, num_nextn_predict_layers=0
    )
    sparse = MODEL.replace(num_nextn_predict_layers=0, index_topk=4)
    given = jaxmoe.init_params(dense, jax.random.key(5))
    checkpoint.save(tmp_path / "run" / "checkpoints", given, dense, 7)
    params = initial_params(sparse, 0, tmp_path / "run")
    fresh = flatten(jaxmoe.init_params(sparse, jax.random.key(0)))
    for name, leaf in flatten(params).items():
        expected = fresh[name] if "/indexer/" in name else flatten(given)[name]
        np.testing.assert_array_equal(leaf, expected, err_msg=name)
    assert origin_of(tmp_path / "run") == {"name": "run", "step": 7}
    with pytest.raises(ValueError, match=r"embed/weight has shape \(320, 32\), not \(330, 32\)"):
        initial_params(sparse.replace(vocab_size=330), 0, tmp_path / "run")
    with pytest.raises(ValueError, match="mtp/0/.* is missing"):
        initial_params(sparse.replace(num_nextn_predict_layers=1), 0, tmp_path / "run")


def test_parameters_of_a_checkpoint_lie_split_over_the_mesh_that_reads_them(tmp_path, devices):
    config = MODEL.replace(num_nextn_predict_layers=0)
    given = jaxmoe.init_params(config, jax.random.key(5))
    checkpoint.save(tmp_path / "native", given, config, 7)
    checkpoint.save_hf(tmp_path / "hf", given, config)
    mesh = sharding.make_mesh(data=1, expert=2, tensor=2, devices=devices[:4])
    for source in ("native", "hf"):
        loaded, _ = checkpoint.load(tmp_path / source, mesh=mesh)
        ours = initial_params(config, 0, tmp_path / source, mesh)
        for params in (loaded, ours):
            experts = flatten(params)["segments/1/0/moe/experts/down"]
            assert experts.sharding.mesh.shape == {"data": 1, "expert": 2, "tensor": 2}
            assert experts.addressable_shards[0].data.size * 4 == experts.size
            np.testing.assert_array_equal(experts, flatten(given)["segments/1/0/moe/experts/down"])


@pytest.mark.slow
def test_attention_by_row_and_masked_train_alike_over_packed_documents(monkeypatch):
    config = MODEL.replace(num_hidden_layers=3, index_topk=4)
    options = with_options(stage="dsa_sparse", seq_len=LENGTH)
    ids = tokens(seed=3)
    starts = jnp.where(jnp.arange(LENGTH + 2) < 13, 0, 13).astype(jnp.int32)
    batch = Batch(ids, jnp.broadcast_to(starts, ids.shape), jnp.ones(ids.shape, jnp.float32))
    found = {}
    for form, factor in (("masked", 10**9), ("gathered", 3)):
        monkeypatch.setattr(sparse_attention, "GATHER_FACTOR", factor)
        of = jax.jit(lambda p: jax.value_and_grad(lambda q: loss(q, config, options, batch)[0])(p))
        found[form] = [of(jaxmoe.init_params(config, jax.random.key(seed))) for seed in range(3)]
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
        theirs = flatten(other[1])
        for name, g in flatten(one[1]).items():
            np.testing.assert_allclose(
                g, theirs[name], rtol=1e-4, atol=1e-5 * np.abs(g).max(), err_msg=name
            )


def test_recall_is_below_what_any_choice_could_keep_and_counts_only_who_has_to_choose():
    config = MODEL.replace(num_nextn_predict_layers=0, index_topk=4)
    params = jaxmoe.init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (2, LENGTH + 1)).astype(np.int32)
    starts = np.zeros_like(ids)
    ones = np.ones(ids.shape, np.float32)
    recall = index_recall(params, config, Batch(ids, starts, ones), 2)
    assert len(recall) == 2 and all(0 < kept < most < 1 for kept, most in recall)
    # In documents of four tokens nobody has to choose.
    starts[:] = np.arange(LENGTH + 1) // 4 * 4
    assert index_recall(params, config, Batch(ids, starts, ones), 2) == []


@pytest.mark.parametrize(
    "options",
    [
        PassOptions(core="gathered"),
        pytest.param(PassOptions(core="masked"), marks=pytest.mark.slow),
        pytest.param(PassOptions("dense"), marks=pytest.mark.slow),
    ],
    ids=["gathered", "masked", "dense"],
)
def test_a_packed_document_sees_nothing_of_its_neighbours(options):
    config, cut = SPARSE, 20
    params = jaxmoe.init_params(config, jax.random.key(0))
    rows = np.asarray(tokens(rows=1))[:, :LENGTH]
    starts = np.where(np.arange(LENGTH) < cut, 0, cut)[None].astype(np.int32)

    @jax.jit
    def hidden(tokens, starts):
        return run(params, config, tokens, starts=starts, options=options).hidden

    packed = hidden(rows, starts)
    other = np.concatenate([(rows[:, :cut] + 1) % 256, rows[:, cut:]], 1)
    np.testing.assert_array_equal(packed[:, cut:], hidden(other, starts)[:, cut:])
    # Positions restart: the same document at the beginning of a row.
    moved = hidden(np.roll(rows, -cut, 1), np.zeros_like(starts))[:, : LENGTH - cut]
    np.testing.assert_allclose(packed[:, cut:], moved, rtol=1e-4, atol=1e-4)


def test_targets_count_by_their_weight_and_only_in_their_document():
    weights = np.ones((1, 6), np.float32)
    weights[0, 2] = 0.5
    starts = np.asarray([[0, 0, 0, 3, 3, 3]], np.int32)
    counts = counts_of(Batch(jnp.zeros((1, 6), jnp.int32), jnp.asarray(starts), weights))
    # Queries 0..3: next tokens 1, 2 (half), 3 (another document), 4; two on 2 (half), 3 and 4 (another document), 5.
    assert (counts.tokens, counts.tokens_mtp, counts.sequences) == (2.5, 1.5, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "warmup"}, "stage must be one of pretrain, dsa_warmup, dsa_sparse, sft"),
        ({"stage": "dsa_warmup", "index_weight": 0.0}, "index_weight must be positive"),
    ],
)
def test_an_unfit_stage_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        with_options(**options)


def test_a_model_without_indexers_cannot_be_made_sparse():
    dense = MODEL.replace(index_topk=None, index_n_heads=None, index_head_dim=None)
    with pytest.raises(ValueError, match="the model has none"):
        with_options(stage="dsa_sparse").check(dense)


def test_the_rate_is_the_stages_unless_given():
    assert TrainConfig(stage="dsa_sparse").peak_learning_rate == 3e-4
    assert TrainConfig(stage="dsa_sparse", learning_rate=0.5).peak_learning_rate == 0.5
