"""Tokenizers: bytes, and a file of merges."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.presets import BYTE_VOCAB_SIZE
from jaxmoe.tokenizer import BOS, EOS, PAD, ByteTokenizer, FileTokenizer, load_tokenizer

BYTES = ByteTokenizer()


@given(st.text())
def test_bytes_bring_any_text_back(text):
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@given(st.lists(st.integers(0, BYTE_VOCAB_SIZE - 1)))
def test_any_ids_decode_and_special_ones_leave_no_trace(ids):
    text = BYTES.decode(ids)
    assert text == bytes(i for i in ids if i < 256).decode(errors="replace")


def test_bytes_are_taken_as_they_are_even_if_they_are_no_text():
    assert BYTES.encode(b"\xff\x00a") == [255, 0, 97]
    assert BYTES.decode([255, 97]) == "\ufffda"


def test_a_document_begins_with_its_token_only_if_asked():
    assert BYTES.encode("a", bos=True) == [BOS, 97]
    assert BYTES.encode("", bos=True) == [BOS]
    assert BYTES.encode("") == []


def test_special_tokens_are_distinct_no_bytes_and_inside_the_vocabulary():
    special = {BOS, EOS, PAD}
    assert len(special) == 3
    assert all(256 <= token < BYTES.vocab_size for token in special)
    assert (BYTES.bos, BYTES.eos, BYTES.pad) == (BOS, EOS, PAD)


@pytest.fixture
def file(tmp_path):
    """A byte-level BPE with two merges whose template begins a text with <s>."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"ab": 256, "abc": 257}
    model = tokenizers.models.BPE(vocabulary, [("a", "b"), ("ab", "c")])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 258)]
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_file_merges_and_adds_its_special_tokens_only_if_asked(file):
    tokenizer = FileTokenizer(file)
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("abcab") == [258, 257, 256]
    assert tokenizer.encode("abcab", bos=False) == [257, 256]
    assert tokenizer.encode(b"abcab", bos=False) == [257, 256]
    assert repr(tokenizer) == "FileTokenizer(tokenizer.json, vocab_size=259)"


@given(text=st.text(st.characters(codec="utf-8")))
def test_a_byte_level_file_brings_any_text_back(tokenizer_of_bytes, text):
    assert tokenizer_of_bytes.decode(tokenizer_of_bytes.encode(text)) == text


@pytest.fixture(scope="module")
def tokenizer_of_bytes(tmp_path_factory):
    """A byte-level file without merges."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    tokenizer.save(str(path))
    return FileTokenizer(path)


def test_a_checkpoints_own_file_is_preferred_to_bytes(file, tmp_path):
    assert isinstance(load_tokenizer(file.parent), FileTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "elsewhere"), ByteTokenizer)
    assert isinstance(load_tokenizer(), ByteTokenizer)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", json.dumps([1]).encode()])
def test_an_unreadable_file_is_named(content, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json.*get it again"):
        load_tokenizer(tmp_path)


def test_an_absent_file_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="nowhere.json"):
        FileTokenizer(tmp_path / "nowhere.json")
