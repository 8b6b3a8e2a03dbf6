"""The file of all widths: what comes back, how large it is, and that a width reads its own bytes only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import quant
from quant import Layout, Rule

RULES = (Rule("pinned", Layout(), width=4), *quant.DEFAULT_RULES)


@pytest.fixture(scope="module")
def stored():
    rng = np.random.default_rng(0)
    params = {
        "layers": [{"o": {"weight": rng.standard_normal((2, 70, 6)).astype(np.float32)}}] * 2,
        "pinned": jnp.asarray(rng.standard_normal((70, 6)), jnp.bfloat16),
        "norm": jnp.ones(6, jnp.bfloat16),
        "step": jnp.int32(3),
    }
    return jax.jit(lambda p: quant.quantize_params(p, rules=RULES))(params)


@pytest.fixture
def path(stored, tmp_path):
    quant.save_planes(tmp_path / "model.safetensors", stored)
    return tmp_path / "model.safetensors"


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("width", [8, 5, 3])
def test_every_width_comes_back_from_one_file(stored, path, width):
    same(quant.load_planes(path, width), quant.at_width(stored, width))


def test_the_file_is_as_large_as_its_arrays_and_is_safetensors(stored, path):
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + quant.nbytes(stored)
    with safe_open(path, "np") as file:
        np.testing.assert_array_equal(
            file.get_tensor("layers/0/o/weight@base"),
            stored["layers"][0]["o"]["weight"].stored.base,
        )
        assert "layers/0/o/weight@plane7" in file.keys()  # noqa: SIM118


def test_a_width_reads_nothing_beyond_its_own_bytes(stored, path):
    """Whatever lies behind them may be damaged; but for the pinned parameter, whose plane has its own place."""
    for width in (3, 6):
        data = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        own = header + quant.nbytes(quant.at_width(stored, width))
        data[own:] = b"\xff" * (len(data) - own)
        damaged = path.with_name(f"damaged{width}")
        damaged.write_bytes(data)
        unpinned = {k: v for k, v in quant.load_planes(damaged, width).items() if k != "pinned"}
        expected = quant.at_width(stored, width)
        same(unpinned, {k: v for k, v in expected.items() if k != "pinned"})


def test_what_cannot_be_stored_or_read_is_refused(stored, path, tmp_path):
    for width in (9, 2):
        with pytest.raises(ValueError, match=f"got {width}"):
            quant.load_planes(path, width)
    cut = tmp_path / "cut"
    cut.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="was cut"):
        quant.load_planes(cut)
    (tmp_path / "text").write_text("not a model at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        quant.load_planes(tmp_path / "text")
    with pytest.raises(ValueError, match="cannot be stored"):
        quant.save_planes(tmp_path / "x", {"a/b": jnp.ones(3)})
    with pytest.raises(TypeError, match="cast it"):
        quant.save_planes(tmp_path / "x", {"a": jnp.ones(3, jnp.complex64)})
    assert not (tmp_path / "x").exists()
