"""Several JAX processes save and restore one checkpoint together."""

import json
import socket
import subprocess
import sys
import textwrap

from checkpoint.support import REPOSITORY, SMALLEST, assert_trees_equal, numbered_params

from jaxmoe import checkpoint

_SCRIPT = textwrap.dedent("""
    import sys
    sys.path.insert(0, "tests")
    import jax
    import numpy as np

    rank, root, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    from checkpoint.support import REPOSITORY, SMALLEST, numbered_params
    from jaxmoe import checkpoint, sharding

    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    mesh = sharding.make_mesh(1, 4, 1)
    tree = sharding.shardings(SMALLEST, mesh)
    params = jax.tree.map(place, numbered_params(SMALLEST), tree)
    state = {"mu": params, "count": 3}
    checkpoint.save(root, params, SMALLEST, 1, train_state=state)
    restored = checkpoint.restore(root, mesh, train_state=state)
    for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(params), strict=True):
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(x.data, y.data)
    # A rank reads its own experts alone, without the other.
    checkpoint.restore_experts(root, [1], [rank])
    if rank == 1:  # and whoever comes later everything
        own, _ = checkpoint.load(checkpoint.locate(root))
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(numbered_params(SMALLEST)), strict=True):
            np.testing.assert_array_equal(a, b)
    checkpoint.save(root, restored.params, SMALLEST, 2, keep=1, train_state=restored.train_state)
""")


def test_two_processes_save_their_shards_into_one_checkpoint(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(rank), tmp_path, port],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], errors
    assert [p.name for p in tmp_path.iterdir()] == ["2"]
    metadata = json.loads((tmp_path / "2" / "metadata.json").read_text())
    assert metadata["topology"]["process_count"] == 2
    assert metadata["topology"]["device_count"] == 4
    restored = checkpoint.restore(
        tmp_path, train_state={"mu": numbered_params(SMALLEST), "count": 0}
    )
    assert_trees_equal(restored.params, numbered_params(SMALLEST))
    assert_trees_equal(restored.train_state["mu"], numbered_params(SMALLEST))
    assert restored.train_state["count"] == 3
