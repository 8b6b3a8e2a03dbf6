"""Data sets: parts that share nothing, a proxy set without labels, and files of the usual formats."""

import dataclasses
import gzip
import pathlib
import struct

import fed_support as support
import numpy as np
import pytest

import fed
from fed import data
from fed.data import check_disjoint

SPEECH = "ROMEO:\nBut soft, what light\n\nJULIET:\nO Romeo!\n\nROMEO:\nthrough yonder window\n"


def test_parts_share_no_example_and_lose_none():
    cut = support.splits(200)
    joined = np.sort(np.concatenate(list(cut.indices.values())))
    assert np.array_equal(joined, np.arange(200))
    assert len(cut.train) == 20 and len(cut.proxy) == 80


def test_parts_that_share_an_example_are_refused_by_name():
    with pytest.raises(ValueError, match="example 3 is in proxy and test"):
        check_disjoint({"proxy": np.array([1, 3]), "test": np.array([3, 4])})


def test_a_proxy_set_has_nowhere_to_keep_labels():
    proxy = support.splits().proxy
    assert [f.name for f in dataclasses.fields(proxy)] == ["inputs", "name"]
    assert not hasattr(proxy, "labels")


@pytest.mark.misuse
def test_a_labelled_set_is_no_proxy_set():
    with pytest.raises(TypeError, match=r"array of inputs; got Dataset; .* dataset\.unlabelled"):
        fed.Unlabelled(support.blobs(5))


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"labels must lie in \[0, classes=2\); got 0 to 3"):
        fed.Dataset(np.zeros((2, 3), np.float32), np.array([0, 3], np.int32), 2)


def test_a_split_must_leave_examples_for_clients():
    with pytest.raises(ValueError, match="test must leave examples for the clients"):
        fed.split(support.blobs(50), proxy=20, validation=20, test=10)


def test_digits_need_no_file():
    pytest.importorskip("sklearn")
    found = data.digits()
    assert found.inputs.shape == (1797, 8, 8) and found.inputs.max() == 1.0
    assert np.bincount(found.labels).min() > 170


@pytest.fixture(scope="module")
def pixels():
    generator = np.random.default_rng(0)
    return {
        name: (
            generator.integers(0, 256, (count, 28, 28)).astype(np.uint8),
            np.arange(count, dtype=np.uint8) % 10,
        )
        for name, count in (("train", 30), ("t10k", 10))
    }


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_and_npz_hold_the_same_images(pixels, tmp_path, packed):
    for name, (x, y) in pixels.items():
        for kind, array, code in (("images-idx3", x, 3), ("labels-idx1", y, 1)):
            raw = struct.pack(f">HBB{code}I", 0, 8, code, *array.shape) + array.tobytes()
            path = tmp_path / f"{name}-{kind}-ubyte"
            if packed:
                path = path.with_suffix(".gz")
            path.write_bytes(gzip.compress(raw) if packed else raw)
    (train_x, train_y), (test_x, test_y) = pixels["train"], pixels["t10k"]
    np.savez(tmp_path / "m.npz", train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)
    for a, b in zip(data.mnist(tmp_path), data.mnist(tmp_path / "m.npz"), strict=True):
        assert np.array_equal(a.inputs, b.inputs) and np.array_equal(a.labels, b.labels)
    assert data.mnist(tmp_path)[0].inputs.dtype == np.float32


def test_a_folder_without_idx_files_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="must hold train-images-idx3-ubyte"):
        data.mnist(tmp_path)


def test_cifar_batches_are_channels_last(tmp_path):
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (4, 3073)).astype(np.uint8)
    rows[:, 0] = [0, 9, 1, 2]
    for name, part in (("data_batch_1.bin", rows[:3]), ("test_batch.bin", rows[3:])):
        (tmp_path / name).write_bytes(part.tobytes())
    train, test = data.cifar10(tmp_path)
    assert train.inputs.shape == (3, 32, 32, 3) and test.labels.tolist() == [2]
    assert train.inputs[0, 0, 1, 2] == np.float32(rows[0, 1 + 2 * 1024 + 1]) / np.float32(255)
    assert train.classes == test.classes == 10
    (tmp_path / "test_batch.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"test_batch\.bin must be rows of 3,073 bytes"):
        data.cifar10(tmp_path)


def test_a_test_part_that_lacks_a_class_keeps_the_numbers_of_the_others(tmp_path, pixels):
    image = pytest.importorskip("PIL.Image")
    for name in ("train/ant", "train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / name).mkdir(parents=True)
        image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name / "0.png")
    train, test = data.cifar10(tmp_path)
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [1, 2]
    assert train.classes == test.classes == 3
    (tmp_path / "test" / "emu").mkdir()
    with pytest.raises(ValueError, match="classes ant, cat, dog only; it has emu"):
        data.cifar10(tmp_path)
    x, y = pixels["t10k"]
    np.savez(tmp_path / "m.npz", train_x=x, train_y=y, test_x=x[:3], test_y=y[:3])
    assert [part.classes for part in data.mnist(tmp_path / "m.npz")] == [10, 10]


def test_image_folders_are_classes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        image.fromarray(np.full((4, 4), 100 * i, np.uint8)).save(tmp_path / name / "0.png")
    found = data.image_folder(tmp_path)
    assert found.labels.tolist() == [0, 1] and found.inputs.shape == (2, 4, 4)
    image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"one size, \(4, 4\); .*1\.png has \(5, 4\)"):
        data.image_folder(tmp_path)


def test_speakers_are_owners_and_labels_are_the_next_bytes(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text(SPEECH)
    found = data.speakers(path, 8, minimum=1)
    assert found.owner_names == ("ROMEO",) or found.owner_names == ("ROMEO", "JULIET")
    assert np.array_equal(found.inputs[0, 1:], found.labels[0, :-1])
    assert bytes(found.inputs[0].astype(np.uint8)) == b"But soft"


def test_texts_by_file_skip_what_is_too_short(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 3)
    (tmp_path / "b.txt").write_text("ab")
    found = data.text_folder(tmp_path, 5)
    assert found.owner_names == ("a.txt",) and len(found) == 5


def test_a_data_set_that_needs_a_path_says_so():
    with pytest.raises(ValueError, match="mnist needs the path of its files"):
        data.load("mnist")


def test_the_whole_of_mnist_is_there_where_it_lies():
    path = pathlib.Path(__file__).parents[3] / "shared" / "data" / "mnist.npz"
    if not path.exists():
        pytest.skip("needs ../shared/data/mnist.npz")
    train, test = data.mnist(path)
    assert (len(train), len(test)) == (60000, 10000)
