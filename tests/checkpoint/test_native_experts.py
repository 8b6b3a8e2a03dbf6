"""Partial restore of named experts."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.support import SMALLEST, layer_of, numbered_params

from jaxmoe import checkpoint, sharding
from jaxmoe.errors import CheckpointCorrupt

# Two kinds of MoE layers, so that layers and positions in the stacks differ.
CONFIG = SMALLEST.replace(
    num_hidden_layers=6, indexer_types=("full", "full", "shared", "full", "shared", "full"), n_routed_experts=8
)  # fmt: skip


@pytest.mark.parametrize("sizes", [None, (1, 4, 2), (4, 1, 2)])
def test_experts_of_any_layer_are_read_whatever_the_mesh_they_were_saved_from(
    tmp_path, devices, sizes
):
    placed = None
    if sizes is not None:
        mesh = sharding.make_mesh(*sizes, devices=devices)
        placed = sharding.shardings(CONFIG, mesh, sharding.Rules(embed="data"))
    params = numbered_params(CONFIG, shardings=placed)
    checkpoint.save(tmp_path, params, CONFIG, 0)
    experts = checkpoint.restore_experts(tmp_path)
    assert list(experts) == [1, 2, 3, 4, 5, 6]  # 0 is dense, 6 is the MTP layer
    for layer, of_layer in experts.items():
        expected = layer_of(params, CONFIG, layer)["moe"]["experts"]
        assert list(of_layer) == list(range(8))
        for expert, weights in of_layer.items():
            np.testing.assert_array_equal(weights["gate_up"], expected["gate_up"][expert])
            np.testing.assert_array_equal(weights["down"], expected["down"][expert])


def test_only_the_named_ones_are_returned_in_the_asked_dtype(tmp_path):
    params = numbered_params(CONFIG)
    checkpoint.save(tmp_path, params, CONFIG, 4)
    checkpoint.save(tmp_path, numbered_params(CONFIG, offset=1.0), CONFIG, 5)
    experts = checkpoint.restore_experts(tmp_path, [6, 2], [3], step=4, dtype=jnp.bfloat16)
    assert {layer: list(e) for layer, e in experts.items()} == {6: [3], 2: [3]}
    down = experts[2][3]["down"]
    assert isinstance(down, np.ndarray) and down.dtype == jnp.bfloat16
    expected = layer_of(params, CONFIG, 2)["moe"]["experts"]["down"][3]
    np.testing.assert_array_equal(down, expected.astype(jnp.bfloat16))


def test_layers_and_experts_that_do_not_exist_are_named(tmp_path):
    checkpoint.save(tmp_path, numbered_params(CONFIG), CONFIG, 0)
    with pytest.raises(
        ValueError, match=r"layers \[0, 9\] do not exist; layers with experts are \[1, 2"
    ):
        checkpoint.restore_experts(tmp_path, [0, 1, 9])
    with pytest.raises(ValueError, match=r"experts \[8\] do not exist"):
        checkpoint.restore_experts(tmp_path, [1], [8])


def _bytes_read():
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


@pytest.mark.skipif(not pathlib.Path("/proc/self/io").exists(), reason="needs Linux's /proc")
def test_only_the_bytes_of_these_experts_are_read(tmp_path):
    config = SMALLEST.replace(
        hidden_size=128, moe_intermediate_size=128, n_routed_experts=16, num_nextn_predict_layers=0
    )
    params = numbered_params(config)
    path = checkpoint.save(tmp_path, params, config, 0, train_state={"mu": params})
    total = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    checkpoint.restore_experts(tmp_path, [1], [0])  # imports and the like
    before = _bytes_read()
    experts = checkpoint.restore_experts(tmp_path, [1, 2], [3, 7, 11])
    read = _bytes_read() - before
    wanted = sum(x.nbytes for e in experts.values() for w in e.values() for x in w.values())
    assert wanted == 2 * 3 * 3 * 128 * 128 * 4
    catalogue = sum((path / name).stat().st_size for name in ("MANIFEST", "metadata.json"))
    assert wanted + catalogue <= read < wanted + catalogue + 2000  # array headers, directory reads
    assert wanted + catalogue < total / 8


def test_one_expert_of_one_layer_is_one_file(tmp_path):
    path = checkpoint.save(tmp_path, numbered_params(CONFIG), CONFIG, 0)
    chunks = list((path / "state").glob("params.*.experts.*/[0-9]*"))
    assert len(chunks) == 6 * 8 * 2  # layers, experts, leaves
    assert {p.stat().st_size for p in chunks} == {16 * 2 * 8 * 4, 8 * 16 * 4}


def test_damage_to_a_file_that_is_read_is_found_and_elsewhere_ignored(tmp_path):
    path = checkpoint.save(tmp_path, numbered_params(CONFIG), CONFIG, 0)
    damaged = path / "state" / "params.mtp.0.layer.moe.experts.down" / "5.0.0"
    data = bytearray(damaged.read_bytes())
    data[17] ^= 4
    damaged.write_bytes(data)
    checkpoint.restore_experts(tmp_path, [1, 2, 3, 4, 5])
    checkpoint.restore_experts(tmp_path, [6], [4, 6])
    with pytest.raises(
        CheckpointCorrupt, match=r"params\.mtp\.0\.layer\.moe\.experts\.down/5\.0\.0"
    ):
        checkpoint.restore_experts(tmp_path, [6], [4, 5])
    checkpoint.restore_experts(tmp_path, [6], [5], verify=False)
    damaged.write_bytes(data[:-1])
    with pytest.raises(CheckpointCorrupt, match="has 511 bytes, expected 512"):
        checkpoint.restore_experts(tmp_path, [6], [5], verify=False)
    damaged.unlink()
    with pytest.raises(CheckpointCorrupt, match="cannot be read"):
        checkpoint.restore_experts(tmp_path, [6], [5])
