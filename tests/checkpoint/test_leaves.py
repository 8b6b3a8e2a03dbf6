"""Writing and reading leaves piece by piece."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe import sharding
from jaxmoe.checkpoint import _leaves

SHAPE = (2, 4, 6, 2, 8)  # layers, experts, model, gate and up, hidden
ALL = slice(None)
INDICES = {
    "one half of one expert": [
        (r, e, ALL, h, ALL) for r in range(2) for e in range(4) for h in range(2)
    ],
    "one half of all experts": [(r, ALL, ALL, h, ALL) for r in range(2) for h in range(2)],
    "the whole leaf": [(ALL,) * 5],
}
PARTITIONS = {
    "no sharding": None,
    "replicated": PartitionSpec(),
    "by expert and hidden": PartitionSpec(None, "expert", None, None, "tensor"),
    "by layer and model": PartitionSpec("data", None, "expert"),
}


@pytest.fixture(params=[True, False], ids=["like cpu", "like an accelerator"])
def memory(request, monkeypatch):
    """Whether host memory is device memory; the other path is that of GPUs and TPUs."""
    if not request.param:
        monkeypatch.setattr(_leaves, "_HOST_PLATFORMS", set())


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.usefixtures("memory")
def test_pieces_are_written_to_and_read_from_any_sharding(rng, devices, indices, partition):
    spec = PARTITIONS[partition]
    mesh = sharding.make_mesh(2, 2, 2, devices=devices)
    placed = None if spec is None else NamedSharding(mesh, spec)
    values = rng.standard_normal(SHAPE).astype(np.float32)
    writer = _leaves.LeafWriter(SHAPE, ml_dtypes.bfloat16, placed)
    for index in INDICES[indices]:
        writer.write(index, values[index])
    leaf = writer.finish()
    assert leaf.dtype == ml_dtypes.bfloat16
    assert placed is None or leaf.sharding == placed
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(leaf), expected)
    for index in INDICES[indices]:
        target = np.zeros(_leaves.piece_shape(SHAPE, index), np.float32)
        _leaves.read_into(target, leaf, index)
        np.testing.assert_array_equal(target, expected[index].astype(np.float32))


def test_on_cpu_the_finished_array_is_the_buffer_that_was_written():
    writer = _leaves.LeafWriter((3, 5), np.float32)
    writer.write((ALL, ALL), np.ones((3, 5), np.float32))
    address = writer._buffers[None].ctypes.data
    assert writer.finish().unsafe_buffer_pointer() == address


def test_without_a_sharding_arrays_are_not_bound_to_a_device(devices):
    writer = _leaves.LeafWriter((4,), np.float32)
    writer.write((ALL,), np.arange(4, dtype=np.float32))
    mesh = sharding.make_mesh(8, devices=devices)
    elsewhere = jax.device_put(np.ones(4, np.float32), NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_array_equal(writer.finish() + elsewhere, [1, 2, 3, 4])


@pytest.mark.parametrize("columns", [1, 15, 16, 1001])
def test_large_transposed_tensors_are_copied_exactly(rng, columns):
    source = rng.standard_normal((columns, 2003)).astype(np.float32)
    target = np.zeros((2003, columns), np.float32)
    _leaves.copy_into(target, source.T)
    np.testing.assert_array_equal(target, source.T)
