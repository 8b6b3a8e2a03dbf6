"""Meshes, rules, and parameters on eight devices."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe
from jaxmoe.params import Spec, flatten, init_params, spec
from jaxmoe.sharding import MESH_AXES, Rules, make_mesh, partition_spec, shardings


@pytest.fixture(scope="module")
def mesh(devices):
    return make_mesh(data=2, expert=2, tensor=2, devices=devices)


def test_a_mesh_has_the_three_axes_in_order_and_all_devices(mesh, devices):
    assert mesh.axis_names == MESH_AXES == ("data", "expert", "tensor")
    assert dict(mesh.shape) == {"data": 2, "expert": 2, "tensor": 2}
    assert mesh.devices.ravel().tolist() == list(devices)


def test_a_mesh_over_some_devices_uses_only_those(devices):
    some = make_mesh(expert=3, devices=devices[2:5])
    assert some.devices.ravel().tolist() == devices[2:5]


def test_a_mesh_of_the_wrong_size_names_sizes_devices_and_the_way_out(devices):
    with pytest.raises(
        ValueError, match=r"expert=3 x tensor=1 needs 3 devices; got 8.*device_count=3"
    ):
        make_mesh(expert=3, devices=devices)


def test_logical_axes_go_where_the_rules_say(mesh):
    s = Spec((4, 6, 2, 8), ("expert", "embed", None, "expert_mlp"))
    assert partition_spec(s, mesh, Rules()) == PartitionSpec("expert", None, None, "tensor")
    assert partition_spec(s, mesh, Rules(expert_mlp=None)) == PartitionSpec("expert")
    assert partition_spec(s, mesh, Rules(embed="data")) == PartitionSpec(
        "expert", "data", None, "tensor"
    )


def test_a_mesh_without_the_axis_replicates(devices):
    rows = jax.sharding.Mesh(np.asarray(devices), ("rows",))
    assert partition_spec(Spec((4, 8), ("expert", "mlp")), rows, Rules()) == PartitionSpec()


def test_a_size_that_does_not_divide_names_both_axes_and_the_way_out(mesh):
    with pytest.raises(ValueError) as caught:
        partition_spec(Spec((4, 7), ("embed", "mlp")), mesh, Rules(), "layer/down")
    for fragment in ("layer/down", "'mlp' of size 7", "'tensor' of size 2", "Rules(mlp=None)"):
        assert fragment in str(caught.value)


def test_two_dimensions_on_one_mesh_axis_name_the_axes_and_the_way_out(mesh):
    with pytest.raises(ValueError) as caught:
        partition_spec(Spec((4, 8), ("expert", "mlp")), mesh, Rules(expert="tensor"), "layer/w")
    for fragment in ("layer/w", "('expert', 'mlp')", "'tensor'", "change Rules"):
        assert fragment in str(caught.value)


@pytest.mark.parametrize("name", list(jaxmoe.presets))
def test_every_preset_shards_over_expert_and_tensor(name, mesh):
    tree = shardings(jaxmoe.presets[name], mesh)
    specs = spec(jaxmoe.presets[name])
    assert jax.tree.structure(tree) == jax.tree.structure(specs)
    for path, s in flatten(specs).items():
        flatten(tree)[path].shard_shape(s.shape)  # raises if a dimension does not divide


def test_parameters_land_on_the_mesh_with_the_values_of_a_single_device(
    tiny_config, tiny_params, mesh
):
    tree = shardings(tiny_config, mesh)
    sharded = init_params(tiny_config, jax.random.key(0), shardings=tree)
    for path, leaf in flatten(sharded).items():
        expected = flatten(tree)[path]
        assert isinstance(leaf.sharding, NamedSharding)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), path
        assert {s.data.shape for s in leaf.addressable_shards} == {expected.shard_shape(leaf.shape)}
        np.testing.assert_array_equal(leaf, flatten(tiny_params)[path], err_msg=path)
    experts = sharded["segments"][1][0]["moe"]["experts"]["gate_up"]
    assert math.prod(experts.addressable_shards[0].data.shape) == experts.size // 4


def test_a_forward_pass_over_sharded_parameters_gives_the_same_logits(
    tiny_config, tiny_params, mesh
):
    sharded = jax.device_put(tiny_params, shardings(tiny_config, mesh))
    tokens = np.arange(96, dtype=np.int32).reshape(2, 48)
    expected = jaxmoe.forward(tiny_params, tiny_config, tokens)
    # Sums over tensor-parallel halves are in another order; logits are of size 1.
    np.testing.assert_allclose(jaxmoe.forward(sharded, tiny_config, tokens), expected, atol=2e-5)
