"""Native checkpoints: round trips, meshes, train state, steps."""

import json
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint.support import SMALLEST, assert_trees_equal, numbered_params
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe import checkpoint, presets, sharding
from jaxmoe.errors import CheckpointMismatch
from jaxmoe.params import flatten

CONFIGS = {
    "v32": SMALLEST,
    "glm": SMALLEST.replace(indexer_types=("full", "shared", "full"), indexer_rope_interleave=True),
    "llama": presets["llama3_1b"].replace(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=6, eos_token_id=(1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_restored_bit_by_bit(tmp_path, name):
    config = CONFIGS[name]
    params = numbered_params(config)
    path = checkpoint.save(tmp_path, params, config, 3, extra={"file": 7, "loss": 0.1})
    assert path == tmp_path / "3"
    restored = checkpoint.restore(tmp_path)
    assert_trees_equal(restored.params, params)
    assert restored.config == config and hash(restored.config) == hash(config)
    assert restored.step == 3
    assert restored.extra == {"file": 7, "loss": 0.1}
    assert restored.train_state is None


def test_the_result_unpacks_and_prints_briefly(tmp_path):
    checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 0)
    params, config, *_ = checkpoint.restore(tmp_path)
    assert config == SMALLEST and "embed" in params
    text = repr(checkpoint.restore(tmp_path))
    assert text.startswith("Restored(step=0, deepseek_v32, ") and len(text) < 150


@pytest.mark.parametrize("to", [None, (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 2)])
@pytest.mark.parametrize("origin", [None, (1, 4, 2), (4, 1, 2)])
def test_any_mesh_can_be_restored_onto_any_other(tmp_path, devices, origin, to):
    config = SMALLEST.replace(n_routed_experts=8)

    def mesh(sizes):
        count = sizes[0] * sizes[1] * sizes[2]
        return sharding.make_mesh(*sizes, devices=devices[:count])

    rules = sharding.Rules(embed="data")
    placed = None if origin is None else sharding.shardings(config, mesh(origin), rules)
    params = numbered_params(config, shardings=placed)
    checkpoint.save(tmp_path, params, config, 0)
    target = None if to is None else mesh(to)
    restored = checkpoint.restore(tmp_path, target, rules=rules)
    assert_trees_equal(restored.params, params)
    if target is not None:
        expected = sharding.shardings(config, target, rules)
        assert jax.tree.map(lambda x: x.sharding, restored.params) == expected


def test_without_a_mesh_arrays_are_not_bound_to_a_device(tmp_path, devices):
    checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 0)
    norm = checkpoint.restore(tmp_path).params["norm"]["weight"]
    mesh = sharding.make_mesh(8, devices=devices)
    elsewhere = jax.device_put(np.ones(16, np.float32), NamedSharding(mesh, PartitionSpec()))
    (norm + elsewhere).block_until_ready()  # would raise if norm were committed


def test_dtype_converts_all_but_what_must_stay_float32(tmp_path):
    params = numbered_params(SMALLEST)
    checkpoint.save(tmp_path, params, SMALLEST, 0)
    restored = checkpoint.restore(tmp_path, dtype=jnp.bfloat16).params
    for name, leaf in flatten(restored).items():
        keeps = name.endswith(("router/bias", "head_weights/weight"))
        assert leaf.dtype == (jnp.float32 if keeps else jnp.bfloat16), name
        np.testing.assert_array_equal(leaf, flatten(params)[name].astype(leaf.dtype))


def test_bfloat16_and_numpy_parameters_keep_their_bits(tmp_path):
    params = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), numbered_params(SMALLEST))
    checkpoint.save(tmp_path, params, SMALLEST, 0)
    assert_trees_equal(checkpoint.restore(tmp_path).params, params)


def test_the_metadata_tells_config_topology_and_versions(tmp_path, devices):
    mesh = sharding.make_mesh(1, 4, 2, devices=devices)
    params = numbered_params(SMALLEST, shardings=sharding.shardings(SMALLEST, mesh))
    path = checkpoint.save(tmp_path, params, SMALLEST, 0)
    metadata = json.loads((path / "metadata.json").read_text())
    assert metadata["format_version"] == 1
    assert metadata["topology"] == {
        "mesh": {"data": 1, "expert": 4, "tensor": 2},
        "device_count": 8,
        "process_count": 1,
        "device_kind": "cpu",
    }
    assert metadata["versions"]["jax"] == jax.__version__
    assert metadata["config"]["index_topk"] == SMALLEST.index_topk


# -- train state -----------------------------------------------------------------------------------


def _train_state(params):
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(learning_rate=0.1)
    )
    return {
        "optimizer": optimizer.init(params),
        "key": jax.random.key_data(jax.random.key(3)),
        "typed_key": jax.random.split(jax.random.key(4), 3),
        "tokens_seen": 2**40,
        "loss": 1.25,
        "name": "run",
        "done": False,
        "nothing": None,
        "order": np.arange(5, dtype=np.int64),
        "position": np.int64(2**40),
    }


def _assert_states_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array) if isinstance(b, jax.Array) else type(a) is type(b)
        if hasattr(b, "dtype") and jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        np.testing.assert_array_equal(a, b)


def test_optimizer_state_keys_and_counters_come_back_in_their_own_types(tmp_path):
    params = numbered_params(SMALLEST)
    state = _train_state(params)
    checkpoint.save(tmp_path, params, SMALLEST, 0, train_state=state)
    restored = checkpoint.restore(tmp_path, train_state=state)
    _assert_states_equal(restored.train_state, state)
    abstract = {
        k: jax.eval_shape(lambda x=x: x) for k, x in state.items() if k in ("optimizer", "key")
    }
    restored = checkpoint.restore(tmp_path, train_state=state | abstract)
    _assert_states_equal(restored.train_state, state)


def test_moments_are_sharded_like_their_parameters_and_the_rest_is_replicated(tmp_path, devices):
    params = numbered_params(SMALLEST)
    state = _train_state(params)
    checkpoint.save(tmp_path, params, SMALLEST, 0, train_state=state)
    mesh = sharding.make_mesh(1, 4, 2, devices=devices)
    restored = checkpoint.restore(tmp_path, mesh, train_state=state)
    _assert_states_equal(restored.train_state, state)
    expected = sharding.shardings(SMALLEST, mesh)
    adam = restored.train_state["optimizer"][1].inner_state[0]
    assert jax.tree.map(lambda x: x.sharding, adam.mu) == expected
    assert jax.tree.map(lambda x: x.sharding, adam.nu) == expected
    assert adam.count.sharding == NamedSharding(mesh, PartitionSpec())
    assert isinstance(restored.train_state["order"], np.ndarray)


def test_a_sharding_in_the_target_is_honoured(tmp_path, devices):
    params = numbered_params(SMALLEST)
    state = {"x": np.arange(16, dtype=np.float32)}
    checkpoint.save(tmp_path, params, SMALLEST, 0, train_state=state)
    mesh = sharding.make_mesh(8, devices=devices)
    placed = NamedSharding(mesh, PartitionSpec("data"))
    target = {"x": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=placed)}
    restored = checkpoint.restore(tmp_path, mesh, train_state=target).train_state["x"]
    assert restored.sharding == placed
    np.testing.assert_array_equal(restored, state["x"])


def test_a_target_that_does_not_fit_is_refused_leaf_by_leaf(tmp_path):
    params = numbered_params(SMALLEST)
    saved = {
        "a": jnp.zeros(3),
        "b": jnp.zeros(3),
        "c": 1,
        "d": jax.random.key(0),
        "e": jnp.zeros(2),
    }
    checkpoint.save(tmp_path, params, SMALLEST, 0, train_state=saved)
    target = {"a": jnp.zeros(4), "b": jnp.zeros(3, jnp.bfloat16), "c": 1, "d": jnp.zeros(2), "f": 0}
    with pytest.raises(CheckpointMismatch) as error:
        checkpoint.restore(tmp_path, train_state=target)
    message = str(error.value)
    assert "5 problems" in message
    assert "a: expected float32 (4,), found float32 (3,)" in message
    assert "b: expected bfloat16 (3,), found float32 (3,)" in message
    assert "d: one of target and checkpoint is a typed PRNG key" in message
    assert "missing f: not in the checkpoint" in message
    assert "unexpected e: not in the target" in message


def test_a_train_state_that_was_not_saved_cannot_be_restored(tmp_path):
    checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 0)
    with pytest.raises(CheckpointMismatch, match="holds no train_state"):
        checkpoint.restore(tmp_path, train_state={"x": 0})


@pytest.mark.parametrize("state", [{"x": object()}, {"x": b"bytes"}])
def test_a_train_state_leaf_of_unknown_type_is_refused(tmp_path, state):
    with pytest.raises(TypeError, match="train_state leaf 'x' must be an array or a Python scalar"):
        checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 0, train_state=state)
    assert checkpoint.latest_step(tmp_path) is None


# -- steps -----------------------------------------------------------------------------------------


def test_steps_are_ordered_as_numbers_and_any_can_be_restored(tmp_path):
    assert checkpoint.latest_step(tmp_path / "nowhere") is None
    for step in (9, 10, 2):
        checkpoint.save(tmp_path, numbered_params(SMALLEST, offset=step), SMALLEST, step)
    assert checkpoint.latest_step(tmp_path) == 10
    assert_trees_equal(checkpoint.restore(tmp_path).params, numbered_params(SMALLEST, offset=10))
    restored = checkpoint.restore(tmp_path, step=2)
    assert restored.step == 2
    assert_trees_equal(restored.params, numbered_params(SMALLEST, offset=2))
    with pytest.raises(ValueError, match=r"no step 3 in .*; it has steps \[2, 9, 10\]"):
        checkpoint.restore(tmp_path, step=3)
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoint.restore(tmp_path / "nowhere")


def test_only_the_newest_steps_are_kept_if_asked(tmp_path):
    params = numbered_params(SMALLEST)
    for step in range(5):
        checkpoint.save(tmp_path, params, SMALLEST, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
    checkpoint.save(
        tmp_path, params, SMALLEST, 1, keep=2
    )  # older than both: kept, being the one saved
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3", "4"]


def test_an_existing_step_is_replaced_only_if_asked(tmp_path):
    checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 5)
    new = numbered_params(SMALLEST, offset=1.0)
    with pytest.raises(ValueError, match="step 5 already exists in .*; pass overwrite=True"):
        checkpoint.save(tmp_path, new, SMALLEST, 5)
    checkpoint.save(tmp_path, new, SMALLEST, 5, overwrite=True)
    assert_trees_equal(checkpoint.restore(tmp_path).params, new)
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


@pytest.mark.misuse
def test_impossible_arguments_are_refused_before_anything_is_written(tmp_path):
    params = numbered_params(SMALLEST)
    with pytest.raises(ValueError, match="step must be >= 0; got -1"):
        checkpoint.save(tmp_path, params, SMALLEST, -1)
    with pytest.raises(TypeError, match="step must be an integer; got 1.5"):
        checkpoint.save(tmp_path, params, SMALLEST, 1.5)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        checkpoint.save(tmp_path, params, SMALLEST, 1, keep=0)
    with pytest.raises(ValueError, match="params do not fit config"):
        checkpoint.save(tmp_path, params, SMALLEST.replace(vocab_size=25), 1)
    with pytest.raises(TypeError, match="extra must be JSON-serialisable"):
        checkpoint.save(tmp_path, params, SMALLEST, 1, extra={"x": np.zeros(2)})
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path, params, SMALLEST, np.int64(1))
    assert checkpoint.latest_step(tmp_path) == 1


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmoe.checkpoint.native.FORMAT_VERSION", 2)
    checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 0)
    monkeypatch.undo()
    with pytest.raises(CheckpointMismatch, match="format version 2; this jaxmoe reads version 1"):
        checkpoint.restore(tmp_path)
    with pytest.raises(CheckpointMismatch, match="format version 2"):
        checkpoint.restore_experts(tmp_path)


def test_a_mesh_that_sizes_are_not_divisible_by_is_refused(tmp_path, devices):
    checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 0)
    with pytest.raises(ValueError, match="not divisible by mesh axis 'expert' of size 8"):
        checkpoint.restore(tmp_path, sharding.make_mesh(1, 8, 1, devices=devices))


def test_saving_and_restoring_say_nothing(tmp_path, capfd, caplog):
    caplog.set_level(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 0)
        checkpoint.restore(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_notebooks_running_event_loop_is_no_obstacle(tmp_path):
    import asyncio

    async def cell():
        checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 0)
        return checkpoint.restore(tmp_path)

    assert asyncio.run(cell()).step == 0
