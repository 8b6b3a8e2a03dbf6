"""Any damage to any file of a native checkpoint is found, and the file named."""

import numpy as np
import pytest
from checkpoint.support import SMALLEST, assert_trees_equal, numbered_params

from jaxmoe import checkpoint
from jaxmoe.errors import CheckpointCorrupt

CONFIG = SMALLEST.replace(num_hidden_layers=2, n_routed_experts=2, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("native")
    state = {"count": 3, "key": np.arange(2, dtype=np.uint32)}
    path = checkpoint.save(root, numbered_params(CONFIG), CONFIG, 1, train_state=state)
    return root, path


def _files(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def _assert_named(root, path):
    with pytest.raises(CheckpointCorrupt) as error:
        checkpoint.restore(root)
    assert str(path) in str(error.value)


def test_a_bit_flipped_anywhere_in_any_file_is_found(saved, rng):
    root, path = saved
    for file in _files(path):
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        _assert_named(root, file)
        file.write_bytes(data)
    checkpoint.restore(root)


def test_a_file_cut_or_extended_is_found_even_without_checksums(saved, rng):
    root, path = saved
    for file in _files(path):
        data = file.read_bytes()
        for damaged in (data[: rng.integers(len(data))], data + b"\0"):
            file.write_bytes(damaged)
            with pytest.raises(CheckpointCorrupt) as error:
                checkpoint.restore(root, verify=False)
            assert str(file) in str(error.value)
        file.write_bytes(data)
    checkpoint.restore(root, verify=False)


def test_a_missing_file_is_found(saved):
    root, path = saved
    for file in _files(path):
        moved = file.rename(root / "moved")
        _assert_named(root, file)
        moved.rename(file)
    checkpoint.restore(root)


def test_all_damaged_files_are_named_at_once(saved):
    root, path = saved
    embed = path / "state" / "params.embed.weight" / "0.0"
    norm = path / "state" / "params.norm.weight" / "0"
    kept = {file: file.read_bytes() for file in (embed, norm)}
    for file in kept:
        file.write_bytes(b"")
    with pytest.raises(CheckpointCorrupt) as error:
        checkpoint.restore(root)
    assert str(embed) in str(error.value) and str(norm) in str(error.value)
    assert "2 problems" in str(error.value)
    for file, data in kept.items():
        file.write_bytes(data)


def test_damage_to_the_newest_step_does_not_silently_fall_back_to_an_older_one(tmp_path):
    old = numbered_params(CONFIG)
    checkpoint.save(tmp_path, old, CONFIG, 1)
    path = checkpoint.save(tmp_path, numbered_params(CONFIG, offset=1.0), CONFIG, 2)
    (path / "MANIFEST").unlink()
    _assert_named(tmp_path, path / "MANIFEST")
    assert_trees_equal(checkpoint.restore(tmp_path, step=1).params, old)
