"""Models in SEFP on disk: one file of all widths, and native checkpoints that restore onto another mesh."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint import support
from jax.sharding import PartitionSpec

import jaxmoe
import quant
from jaxmoe import checkpoint
from jaxmoe.cli._models import load
from jaxmoe.cli.convert import convert
from jaxmoe.cli.serve import _engine, _weights
from jaxmoe.config import ModelConfig
from jaxmoe.elastic import ClusterOptions
from jaxmoe.engine import EngineOptions
from jaxmoe.errors import CheckpointCorrupt, CheckpointMismatch
from jaxmoe.sharding import Rules, make_mesh, shardings, shardings_of
from jaxmoe.train.dsa import initial_params
from quant import SefpTensor

# Groups and outputs divide by two; inputs of o are two axes.
DENSE = ModelConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
MOE = jaxmoe.presets["tiny"].replace(
    num_hidden_layers=2, num_nextn_predict_layers=0, n_routed_experts=4, n_group=1, topk_group=1
)


@functools.cache
def stored(config):
    params = jaxmoe.init_params(config, jax.random.key(0))
    return quant.quantize_params(params)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_directory_in_sefp_is_a_model_at_every_width(tmp_path):
    path = checkpoint.save_sefp(tmp_path / "model", stored(MOE), MOE)
    assert path.name == "sefp.safetensors" and checkpoint.is_sefp(tmp_path / "model")
    assert checkpoint.locate(tmp_path / "model") == tmp_path / "model"
    assert checkpoint.load_config(tmp_path / "model") == MOE
    for width in (None, 3, 6):
        params, config = checkpoint.load(tmp_path / "model", width=width)
        assert config == MOE
        same(params, stored(MOE) if width is None else quant.at_width(stored(MOE), width))
    params, _ = checkpoint.load(tmp_path / "model", jnp.bfloat16, width=4)
    assert {t.dtype for t in quant.tensors(params)} == {np.dtype(jnp.bfloat16)}
    assert params["norm"]["weight"].dtype == jnp.bfloat16
    assert (
        quant.bits_per_weight(stored(MOE)) < 9.7
    )  # of a toy's many norms and routers; of real models 9.2


def test_what_is_no_such_directory_is_refused_in_one_line(tmp_path):
    plain = jaxmoe.init_params(DENSE, jax.random.key(0))
    with pytest.raises(ValueError, match="params must be in SEFP"):
        checkpoint.save_sefp(tmp_path, plain, DENSE)
    with pytest.raises(ValueError, match="do not fit config"):
        checkpoint.save_sefp(tmp_path, stored(DENSE), MOE)
    quant.save_planes(tmp_path / "sefp.safetensors", stored(DENSE))
    with pytest.raises(CheckpointMismatch, match="holds no config"):
        checkpoint.load(tmp_path)
    quant.save_planes(
        tmp_path / "sefp.safetensors", stored(DENSE), {"config": json.dumps(MOE.to_dict())}
    )
    with pytest.raises(CheckpointMismatch, match="do not fit config"):
        checkpoint.load(tmp_path)
    checkpoint.save_sefp(tmp_path, quant.at_width(stored(DENSE), 4), DENSE)
    assert checkpoint.load(tmp_path)[0]["lm_head"]["weight"].width == 4
    with pytest.raises(ValueError, match="width must be from 3 to 4; got 5. 4 is stored"):
        checkpoint.load(tmp_path, width=5)


def test_damage_to_the_file_is_found_and_the_array_named(tmp_path):
    path = checkpoint.save_sefp(tmp_path, stored(DENSE), DENSE)
    whole = path.read_bytes()
    for at, name in ((-1, "@plane7 does not match"), (100, "header")):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CheckpointCorrupt, match=name) as error:
            checkpoint.load(tmp_path)
        assert str(path) in str(error.value)
    with pytest.raises(CheckpointCorrupt, match="header"):
        checkpoint.load_config(tmp_path)


def test_a_file_is_read_onto_a_mesh_by_parts(tmp_path, devices, monkeypatch):
    """No device gets more of an array than is its own."""
    checkpoint.save_sefp(tmp_path, stored(MOE), MOE)
    mesh = make_mesh(expert=2, devices=devices[:2])
    where = shardings_of(stored(MOE), MOE, mesh)
    monkeypatch.delattr(jax, "device_put")  # of whole arrays
    params, _ = checkpoint.load(tmp_path, mesh=mesh, width=4)
    same(params, quant.at_width(stored(MOE), 4))
    own = params["segments"][1][0]["moe"]["experts"]["down"].stored
    expected = where["segments"][1][0]["moe"]["experts"]["down"].stored
    for array, sharding in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=False):
        assert array.sharding == sharding
        assert {shard.data.shape[1] for shard in array.addressable_shards} == {2}


def test_one_question_tells_which_checkpoints_hold_sefp(tmp_path):
    """Of every kind; and who cannot use that asks it before anything is read."""
    checkpoint.save(tmp_path / "native", stored(DENSE), DENSE, 1)
    checkpoint.save_sefp(tmp_path / "file", stored(DENSE), DENSE)
    checkpoint.save(tmp_path / "run" / "checkpoints", support.numbered_params(DENSE), DENSE, 1)
    assert checkpoint.holds_sefp(tmp_path / "native") and checkpoint.holds_sefp(tmp_path / "file")
    assert not checkpoint.holds_sefp(tmp_path / "run")
    shutil.rmtree(tmp_path / "native" / "1" / "state")  # the arrays
    for source in (tmp_path / "native", tmp_path / "file"):
        with pytest.raises(ValueError, match="SEFP, which are not trained on"):
            initial_params(DENSE, 0, source)
        for to in ("hf", "native"):
            with pytest.raises(ValueError, match="is in SEFP, which is not undone here"):
                convert(source, tmp_path / "target", to)
        weights = _weights(str(source), False, 0, "float32")
        with pytest.raises(ValueError, match="--ranks must be 1 with weights in SEFP"):
            _engine(str(source), weights, EngineOptions(), ClusterOptions(ranks=2))


def test_the_command_line_reads_only_the_planes_that_it_needs(tmp_path):
    checkpoint.save_sefp(tmp_path, stored(MOE), MOE)

    def widths(**given):
        params, _ = load(str(tmp_path), **given)
        return {t.width for t in quant.tensors(params)}

    assert widths() == {8} == widths(module_widths={"lm_head": 4})
    assert widths(widths=(3,)) == {3} and widths(widths=(3, 5)) == {5}
    assert widths(widths=(3,), module_widths={"lm_head": 6}) == {6}
    weights = _weights(str(tmp_path), False, 0, "float32")
    options = EngineOptions(max_running=1, max_length=64, widths=(3, 4))
    with _engine(str(tmp_path), weights, options, ClusterOptions(ranks=1)) as engine:
        assert engine._runner._params[4]["lm_head"]["weight"].width == 4


def test_moments_follow_parameters_in_sefp_onto_a_mesh(tmp_path, devices):
    moments = {"mu": support.numbered_params(DENSE), "count": 3}
    checkpoint.save(tmp_path, stored(DENSE), DENSE, 1, train_state=moments)
    mesh = make_mesh(tensor=2, devices=devices[:2])
    target = jax.eval_shape(lambda: moments["mu"])
    restored = checkpoint.restore(tmp_path, mesh, train_state={"mu": target, "count": 0})
    same(restored.train_state["mu"], moments["mu"])
    where = jax.tree.map(lambda x: x.sharding, restored.train_state["mu"])
    assert where == shardings(DENSE, mesh)
    assert f"{jaxmoe.param_count(DENSE):,} parameters" in repr(restored)


@pytest.mark.parametrize(
    ("config", "saved_on", "restored_on"),
    [(DENSE, {"tensor": 2}, {"tensor": 1}), (MOE, {"expert": 2}, {"expert": 4})],
    ids=["dense", "experts"],
)
def test_a_native_checkpoint_restores_onto_another_mesh(
    config, saved_on, restored_on, tmp_path, devices
):
    mesh = make_mesh(**saved_on, devices=devices[: max(saved_on.values())])
    sharded = jax.device_put(stored(config), shardings_of(stored(config), config, mesh))
    checkpoint.save(tmp_path, sharded, config, 1)
    same(checkpoint.restore(tmp_path).params, stored(config))
    mesh = make_mesh(**restored_on, devices=devices[: max(restored_on.values())])
    restored = checkpoint.restore(tmp_path, mesh, dtype=jnp.bfloat16)
    given = jax.tree.map(lambda x: x, restored.params)
    arrays = [t.stored for t in quant.tensors(given)]
    same(arrays, [t.stored for t in quant.tensors(stored(config))])
    assert {t.dtype for t in quant.tensors(given)} == {np.dtype(jnp.bfloat16)}
    with pytest.raises(CheckpointMismatch, match="in SEFP, of which single experts"):
        checkpoint.restore_experts(tmp_path)


def test_shards_are_whole_groups(devices):
    """Of a contracted axis in two halves each has its own 64s; so half of the product is a product by half of the groups."""
    mesh = make_mesh(tensor=2, devices=devices[:2])
    tree = stored(DENSE)
    where = shardings_of(tree, DENSE, mesh)
    layer = where["segments"][0][0]
    assert layer["attention"]["o"]["weight"].stored.exponent.spec == PartitionSpec(
        None, "tensor", None
    )
    assert layer["mlp"]["down"]["weight"].stored.base.spec == PartitionSpec(None, "tensor", None)
    placed = jax.device_put(tree, where)
    down = placed["segments"][0][0]["mlp"]["down"]["weight"]
    for array in jax.tree.leaves(down):
        assert {s.data.shape for s in array.addressable_shards} == {
            (array.shape[0], array.shape[1] // 2, *array.shape[2:])
        }
    w = down.decode(jnp.float32)
    for i, shard in enumerate(down.stored.exponent.addressable_shards):
        own = jax.tree.map(lambda a, i=i: a.addressable_shards[i].data, down.stored)
        own = SefpTensor(
            type(own)(own.exponent, own.base, own.planes, 64),
            (64,),
            down.outputs,
            down.layout,
            down.dtype,
        )
        rows = shard.index[1]
        np.testing.assert_array_equal(
            own.decode(jnp.float32), np.asarray(w)[:, 64 * (rows.start or 0) :][:, :64]
        )
    tokens = np.arange(6, dtype=np.int32)[None]
    np.testing.assert_allclose(
        jaxmoe.forward(placed, DENSE, tokens),
        jaxmoe.forward(tree, DENSE, tokens),
        rtol=1e-4,
        atol=1e-5,
    )


def test_groups_that_do_not_divide_are_refused_with_both_names(devices):
    config = DENSE.replace(intermediate_size=192)  # three groups
    shapes = jax.eval_shape(quant.quantize_params, jaxmoe.params.abstract_params(config))
    mesh = make_mesh(tensor=2, devices=devices[:2])
    with pytest.raises(
        ValueError, match=r"down/weight: its 3 groups of 64 .* mesh axis 'tensor' of size 2"
    ):
        shardings_of(shapes, config, mesh)
    shardings_of(shapes, config, mesh, Rules(mlp=None))


def test_conversion_rounds_as_it_is_asked_and_only_to_sefp(tmp_path):
    params = jaxmoe.init_params(DENSE, jax.random.key(0))
    checkpoint.save(tmp_path / "run", params, DENSE, 0)
    convert(tmp_path / "run", tmp_path / "nested", to="sefp", rounding="nested")
    same(checkpoint.load(tmp_path / "nested")[0], quant.quantize_params(params, rounding="nested"))
    for source, to in (("run", "hf"), ("nested", "sefp")):
        with pytest.raises(ValueError, match="rounding nested is of weights that become SEFP"):
            convert(tmp_path / source, tmp_path / "x", to=to, rounding="nested")
