"""The file of all widths: what comes back, how large it is, and that a width reads its own bytes only."""

import json
import os
import zlib

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
    header, start = header_of(path)
    pinned = slice(*(start + at for at in header["pinned@plane3"]["data_offsets"]))
    for width in (3, 6):
        data = bytearray(path.read_bytes())
        kept = data[pinned]
        own = start + quant.nbytes(quant.at_width(stored, width))
        data[own:] = b"\xff" * (len(data) - own)
        data[pinned] = kept
        damaged = path.with_name(f"damaged{width}")
        damaged.write_bytes(data)
        same(quant.load_planes(damaged, width), quant.at_width(stored, width))
        with pytest.raises(quant.PlanesCorrupt, match="@plane"):
            quant.load_planes(damaged)


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


def test_a_width_that_there_is_not_is_refused_even_if_every_tensor_has_its_own(stored, tmp_path):
    pinned = quant.pin_widths(stored, {"": 4})
    quant.save_planes(tmp_path / "model", pinned)
    for width in (2, 99):
        with pytest.raises(ValueError, match=f"width must be from 3 to 8; got {width}"):
            quant.load_planes(tmp_path / "model", width)
        with pytest.raises(ValueError, match=f"width must be from 3 to 8; got {width}"):
            quant.at_width(pinned, width)


def test_a_save_that_fails_leaves_the_file_that_was_there(path, tmp_path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        quant.save_planes(path, {"a": jnp.ones(3)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_aligned_arrays_are_used_where_they_are_mapped(tmp_path):
    quant.save_planes(tmp_path / "model", {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 16))})
    assert header_of(tmp_path / "model")[1] % 64 == 0
    loaded = quant.load_planes(tmp_path / "model")
    assert (
        loaded["b"].unsafe_buffer_pointer() % 4096
        == (header_of(tmp_path / "model")[1] + 1024) % 4096
    )


# -- damage ----------------------------------------------------------------------------------------


def header_of(path):
    """(header, where the data begin), read without the code under test."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), 8 + size


def rewrite(path, change, data=None):
    """The file with another header, whose own checksum is right: as another writer might have made it."""
    header, start = header_of(path)
    data = path.read_bytes()[start:] if data is None else data
    change(header)
    header["__metadata__"]["header_crc32"] = "0" * 8
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.replace(b"0" * 8, f"{zlib.crc32(text):08x}".encode(), 1)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_bit_flipped_in_any_array_is_found_and_the_array_named(path, rng):
    header, start = header_of(path)
    whole = path.read_bytes()
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            damaged = bytearray(whole)
            damaged[start + int(rng.integers(begin, end))] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(quant.PlanesCorrupt, match=f"{name} does not match"):
                quant.load_planes(path)


def test_a_bit_flipped_anywhere_in_the_header_is_found(path, rng):
    whole, (_, start) = path.read_bytes(), header_of(path)
    for at in range(start):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(quant.PlanesCorrupt, match=path.name):
            quant.load_planes(path)


OWN = "layers/0/o/weight"


def lose(name):
    """Leaves an array out, and its bytes with it."""

    def change(path):
        header, start = header_of(path)
        begin, end = header[name]["data_offsets"]
        data = path.read_bytes()[start:]

        def without(header):
            del header[name]
            for key, entry in header.items():
                if key != "__metadata__" and entry["data_offsets"][0] >= end:
                    entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]

        rewrite(path, without, data[:begin] + data[end:])

    return change


def set_to(name, **fields):
    return lambda path: rewrite(path, lambda header: header[name].update(fields))


def describe(**fields):
    def change(header):
        about = json.loads(header["__metadata__"]["sefp"])
        about[OWN] |= fields
        header["__metadata__"]["sefp"] = json.dumps(about)

    return lambda path: rewrite(path, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose(f"{OWN}@plane3"), f"{OWN}@plane3 is missing"),
        (lose(f"{OWN}@base"), f"{OWN}@base is missing"),
        (lose(f"{OWN}@exponent"), f"{OWN}@exponent is missing"),
        (set_to(f"{OWN}@plane4", shape=[2, 2, 6, 5]), f"{OWN}@plane4 is U16"),
        (set_to(f"{OWN}@plane4", shape=[2, 2, 4, 6]), f"{OWN}@plane4 must be uint16"),
        (set_to(f"{OWN}@base", dtype="X1"), "damaged header.*X1"),
        (set_to(f"{OWN}@base", dtype="I32"), f"{OWN}@base must be uint32"),
        (set_to("norm", data_offsets=[8, 20]), "norm is BF16"),
        (describe(inner=64), f"{OWN}@exponent must have 2 groups of 6 outputs"),
        (describe(inputs=[300], inner=300), f"{OWN}@exponent must have 5 groups of 6 outputs"),
        (describe(layout={"inputs": 2}), f"{OWN}: Layout"),
        (describe(layout={"width": 2}), f"{OWN}: its description"),
        (lambda path: rewrite(path, lambda h: h["__metadata__"].pop("sefp")), "'sefp'"),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "damaged header"),
    ],
)
def test_a_file_whose_parts_do_not_agree_is_refused(path, damage, message):
    damage(path)
    with pytest.raises(quant.PlanesCorrupt, match=message):
        quant.load_planes(path)


def test_metadata_under_a_name_of_the_format_is_refused(tmp_path):
    params = quant.quantize_params({"proj": {"weight": jnp.ones((64, 2))}})
    with pytest.raises(ValueError, match="metadata must not use the names .*got 'crc32'"):
        quant.save_planes(tmp_path / "x", params, {"crc32": "abc"})
