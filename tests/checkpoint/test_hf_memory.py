"""Host memory of loading and saving, measured in a process of its own."""

import json
import pathlib
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
from checkpoint.support import REPOSITORY, SMALLEST, hf_tensors, write_hf

# Nine tenths of the bytes are in one leaf, the experts of all layers: a copy of it would be seen.
BIG = SMALLEST.replace(
    hidden_size=512, num_hidden_layers=5, n_routed_experts=16, moe_intermediate_size=384
)
_SCRIPT = textwrap.dedent("""
    import json, pathlib, sys
    import jax, jax.numpy as jnp
    from jaxmoe import checkpoint

    def kib(field):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    def peak_bytes(function):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
        before = kib("VmRSS:")
        result = function()
        return result, 1024 * (kib("VmHWM:") - before)

    small, big = sys.argv[1:3]
    checkpoint.load_hf(small)  # first uses allocate once and for all
    load = lambda: checkpoint.load_hf(big, jnp.float32)
    (params, config), load_peak = peak_bytes(load)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(params))
    save = lambda: checkpoint.save_hf(small, params, config, max_shard_bytes=16_000_000)
    _, save_peak = peak_bytes(save)
    print(json.dumps({"params": nbytes, "load": load_peak - nbytes, "save": save_peak}))
""")


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)
@pytest.mark.parametrize("stored", ["bfloat16", "float8_e4m3fn"])
def test_beside_the_parameters_less_than_one_shard_is_held(tmp_path, rng, stored):
    tensors = hf_tensors(BIG, rng)
    if stored == "bfloat16":
        tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
        fields = {}
    else:
        stored_as_fp8 = [n for n, x in tensors.items() if ".experts." in n]
        for name in stored_as_fp8:
            x = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            scale = np.ones([-(-n // 128) for n in x.shape], np.float32)
            tensors |= {name: x, name + "_scale_inv": scale}
        tensors = dict(sorted(tensors.items()))
        fields = {"quantization_config": {"weight_block_size": [128, 128]}}
    big = write_hf(tmp_path / "big", BIG, tensors, files=6, **fields)
    small = write_hf(tmp_path / "small", SMALLEST, hf_tensors(SMALLEST, rng))
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, small, big],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    largest_shard = max(path.stat().st_size for path in big.glob("*.safetensors"))
    assert peak["params"] > 5 * largest_shard
    assert peak["load"] < 1.3 * largest_shard, (peak, largest_shard)
    assert peak["save"] < 1.3 * 16_000_000, peak
