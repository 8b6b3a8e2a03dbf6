"""Damaged safetensors files raise CheckpointCorrupt, naming the file."""

import json
import struct

import numpy as np
import pytest
from checkpoint.support import SMALLEST, hf_tensors, write_hf, write_safetensors

from jaxmoe.checkpoint import _safetensors, load_hf
from jaxmoe.errors import CheckpointCorrupt, CheckpointMismatch


def _header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _rewrite(path, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "part.safetensors"
    write_safetensors(
        path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.float16)}
    )
    return path


def test_a_sound_file_is_read(path):
    tensors = _safetensors.read_header(path)
    np.testing.assert_array_equal(tensors["a"].read(), np.arange(6).reshape(2, 3))
    assert not tensors["a"].read().flags.writeable


def test_a_file_cut_anywhere_is_corrupt(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointCorrupt, match=r"part\.safetensors"):
            _safetensors.read_header(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [0, 25]}, "span 25 bytes"),
        ({"data_offsets": [1000, 1024]}, "starts at byte|tensors end at"),
        ({"data_offsets": [24, 0]}, "span -24 bytes"),
        ({"data_offsets": [-24, 0]}, "starts at byte"),
        ({"data_offsets": [8, 32]}, "starts at byte"),
        ({"data_offsets": "here"}, "malformed"),
        ({"shape": [2, -3]}, "offsets"),
        ({"shape": [2, 4]}, "span 24 bytes"),
        ({"shape": None}, "malformed"),
        ({"dtype": "F33"}, "unknown dtype 'F33'"),
        ({"dtype": ["F32"]}, "malformed|unknown dtype"),
    ],
)
def test_a_header_that_does_not_add_up_is_corrupt(path, change, message):
    header, body = _header(path)
    _rewrite(path, header | {"a": header["a"] | change}, body)
    with pytest.raises(CheckpointCorrupt, match=message) as error:
        _safetensors.read_header(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe{}", b'{"a": 3}', b"null", b""])
def test_a_header_that_is_not_a_json_object_is_corrupt(path, text):
    _rewrite(path, text, b"")
    with pytest.raises(CheckpointCorrupt, match=r"part\.safetensors"):
        _safetensors.read_header(path)


def test_a_header_length_beyond_the_file_is_corrupt(path):
    data = path.read_bytes()
    for length in (len(data), 2**40, 2**63 + 5):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(CheckpointCorrupt, match="does not fit in a file"):
            _safetensors.read_header(path)


def test_bytes_after_the_last_tensor_are_corrupt(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointCorrupt, match="truncated or altered"):
        _safetensors.read_header(path)


def test_flipped_bits_of_a_header_never_pass_unnoticed_or_crash(path, rng):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    sound = _safetensors.read_header(path)
    for _ in range(300):
        at, bit = int(rng.integers(8 + length)), int(rng.integers(8))
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            found = _safetensors.read_header(path)
        except CheckpointCorrupt as error:
            assert str(path) in str(error)
        else:  # a name, an equal-sized shape or an equal-sized dtype: load_hf compares those
            assert found != sound or flipped[at] in b" \t\n\r" or chr(data[at]) in " \t\n\r"


def test_a_shard_that_is_missing_or_damaged_is_named_by_load_hf(tmp_path, rng):
    directory = write_hf(tmp_path, SMALLEST, hf_tensors(SMALLEST, rng), files=3)
    shard = directory / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(CheckpointCorrupt, match="model-00002-of-00003"):
        load_hf(directory)
    shard.unlink()
    with pytest.raises(CheckpointCorrupt, match="model-00002-of-00003.*cannot be read"):
        load_hf(directory)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}'])
def test_a_damaged_index_is_named(tmp_path, rng, text):
    directory = write_hf(tmp_path, SMALLEST, hf_tensors(SMALLEST, rng), files=3)
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointCorrupt, match=r"index\.json"):
        load_hf(directory)


def test_files_are_filled_in_order_and_no_larger_than_asked():
    plans = [
        _safetensors.Plan(str(i), np.dtype(np.float32), (n,)) for i, n in enumerate([5, 4, 2, 9, 1])
    ]
    files = _safetensors.split(plans, 24)
    assert [[plan.name for plan in file] for file in files] == [["0"], ["1", "2"], ["3"], ["4"]]


def test_a_renamed_tensor_is_a_mismatch(tmp_path, rng):
    tensors = hf_tensors(SMALLEST, rng)
    tensors["model.norm.weighs"] = tensors.pop("model.norm.weight")
    with pytest.raises(CheckpointMismatch, match=r"unexpected model\.norm\.weighs"):
        load_hf(write_hf(tmp_path, SMALLEST, tensors))
