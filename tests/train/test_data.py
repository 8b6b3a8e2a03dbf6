"""Corpora, the split, and batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.tokenizer import EOS
from jaxmoe.train.data import Corpus, batch, evaluation_windows, gzip_bits_per_byte, load_corpus


@pytest.fixture
def directory(tmp_path):
    """Forty documents, document i made of the byte i alone."""
    for i in range(40):
        file = tmp_path / f"sub{i % 3}" / f"{i}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes([i]) * 50)
    return tmp_path


def test_the_standard_library_is_found_and_leaves_out_what_differs_per_machine():
    corpus = load_corpus()
    assert corpus.train.size > 5_000_000
    assert 0.005 < corpus.validation.size / corpus.train.size < 0.2
    assert corpus.fingerprint == load_corpus().fingerprint


def test_no_document_is_in_both_parts(directory):
    corpus = load_corpus(directory)
    train, held_out = set(corpus.train.tolist()), set(corpus.validation.tolist())
    assert train & held_out == {EOS}
    assert train | held_out == {*range(40), EOS}


def test_a_file_stays_on_its_side_when_others_come(directory):
    before = set(load_corpus(directory).validation.tolist())
    (directory / "new.txt").write_bytes(b"\xff" * 50)
    assert set(load_corpus(directory).validation.tolist()) - {255} == before


def test_hidden_and_empty_files_do_not_count(directory):
    before = load_corpus(directory).fingerprint["sha256"]
    (directory / ".git").mkdir()
    (directory / ".git" / "config").write_text("secret")
    (directory / "empty.txt").write_bytes(b"")
    assert load_corpus(directory).fingerprint["sha256"] == before


def test_the_fingerprint_sees_one_changed_byte(directory):
    before = load_corpus(directory).fingerprint
    (directory / "sub0" / "0.txt").write_bytes(b"\1" + b"\0" * 49)
    after = load_corpus(directory).fingerprint
    assert before["bytes"] == after["bytes"] and before["sha256"] != after["sha256"]


def test_a_single_file_is_split_by_position(tmp_path):
    data = bytes(range(256)) * 4
    (tmp_path / "a").write_bytes(data)
    for path in (tmp_path / "a", tmp_path):
        corpus = load_corpus(path)
        assert corpus.train[:-1].astype(np.uint8).tobytes() == data[: -(1024 // 20)]
        assert corpus.validation[:-1].astype(np.uint8).tobytes() == data[-(1024 // 20) :]


def test_bytes_that_are_not_utf8_are_fine(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe\x80" * 100)
    assert set(load_corpus(tmp_path / "a").train.tolist()) == {0xFF, 0xFE, 0x80, EOS}


@pytest.mark.parametrize("content", [None, b""])
def test_an_empty_corpus_is_one_line_that_says_so(tmp_path, content):
    if content is not None:
        (tmp_path / "empty").write_bytes(content)
    with pytest.raises(ValueError, match="0 bytes") as error:
        load_corpus(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load_corpus(tmp_path / "nowhere")


def test_batches_depend_on_seed_and_step_alone(directory):
    corpus = load_corpus(directory)
    one = batch(corpus, 3, 7, 4, 20)
    assert one.shape == (4, 20) and one.dtype == np.int32
    np.testing.assert_array_equal(one, batch(load_corpus(directory), 3, 7, 4, 20))
    assert not np.array_equal(one, batch(corpus, 3, 8, 4, 20))
    assert not np.array_equal(one, batch(corpus, 4, 7, 4, 20))


def test_neighbouring_steps_share_no_window():
    corpus = load_corpus()
    starts = np.concatenate([batch(corpus, 0, step, 16, 64) for step in range(20)])
    assert len({row.tobytes() for row in starts}) == len(starts)


def test_batches_hold_training_windows_only(directory):
    corpus = load_corpus(directory)
    stream = corpus.train.astype(np.int32)
    windows = {stream[i : i + 9].tobytes() for i in range(stream.size - 8)}
    for step in range(20):
        assert all(row.tobytes() in windows for row in batch(corpus, 0, step, 8, 9))


def test_a_corpus_shorter_than_a_window_names_both_lengths(directory):
    with pytest.raises(ValueError, match=r"\d+ training tokens, fewer than one window of 99999"):
        batch(load_corpus(directory), 0, 0, 1, 99999)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 400))
def test_evaluation_scores_every_token_once_with_half_a_window_of_context(size, length, limit):
    corpus = Corpus(np.zeros(1, np.uint16), np.arange(size, dtype=np.uint16), {}, "test")
    windows, mask = evaluation_windows(corpus, limit, length)
    scored = windows[:, 1:][mask]
    np.testing.assert_array_equal(np.sort(scored), np.arange(1, min(size, limit + 1)))
    context = np.broadcast_to(np.arange(1, length + 1), mask.shape)[mask]
    assert ((context > length - max(1, length // 2)) | (context == scored)).all()


def test_a_probe_is_an_evenly_spread_part_of_the_evaluation(directory):
    corpus = load_corpus(directory)
    windows, mask = evaluation_windows(corpus, 10**6, 16)
    some, some_mask = evaluation_windows(corpus, 10**6, 16, probe_bytes=40)
    assert len(some) == 5 < len(windows)
    np.testing.assert_array_equal(some[[0, -1]], windows[[0, -1]])
    np.testing.assert_array_equal(some_mask[[0, -1]], mask[[0, -1]])


def test_gzip_of_one_repeated_line_is_far_below_one_bit(tmp_path):
    (tmp_path / "a").write_bytes(b"the same line\n" * 10000)
    assert gzip_bits_per_byte(load_corpus(tmp_path / "a"), 10**6) < 0.1
