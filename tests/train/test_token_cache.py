"""Tokens of a tokenizer file that are kept: found again, of this text and tokenizer and no other, and never damaged."""

import dataclasses
import json
import logging
import mmap
import os

import jax
import numpy as np
import pytest
from train.support import MODEL, RUN

from jaxmoe import checkpoint
from jaxmoe.params import init_params
from jaxmoe.tokenizer import FileTokenizer
from jaxmoe.train import train
from jaxmoe.train.data import DataOptions, load_corpus, token_cache


def save_tokenizer(path, merge="ab"):
    """A byte-level tokenizer file that merges two letters."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, merge])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [tuple(merge)]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<｜User｜>", "<｜Assistant｜>"])
    tokenizer.save(str(path))
    return path


class Kept:
    """A text, a tokenizer, a folder of kept tokens, and how often texts are tokenised."""

    def __init__(self, root, monkeypatch):
        self.text, self.folder = root / "text.txt", root / "run" / "tokens"
        self.tokenizer = save_tokenizer(root / "tokenizer.json")
        self.text.write_text("abcab " * 200)
        self.calls = 0
        original = FileTokenizer.encode_all

        def counted(tokenizer, texts, *, ends=True):
            self.calls += 1
            return original(tokenizer, texts, ends=ends)

        monkeypatch.setattr(FileTokenizer, "encode_all", counted)

    def load(self, **changes):
        options = DataOptions(self.text, self.tokenizer)
        return load_corpus(dataclasses.replace(options, **changes), self.folder)

    @property
    def files(self):
        return sorted(self.folder.iterdir())


@pytest.fixture
def kept(tmp_path, monkeypatch):
    return Kept(tmp_path, monkeypatch)


def assert_equal(one, other):
    assert one.fingerprint == other.fingerprint
    for part in ("train", "validation"):
        ours, theirs = getattr(one, part), getattr(other, part)
        for name in ("ids", "documents", "sizes", "said"):
            a, b = getattr(ours, name), getattr(theirs, name)
            np.testing.assert_array_equal(a, b)
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None), name
        assert ours.labels == theirs.labels


def mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, memoryview | mmap.mmap)


def test_the_second_start_tokenises_nothing_and_maps_what_the_first_has_kept(kept):
    fresh = load_corpus(DataOptions(kept.text, kept.tokenizer))
    first = kept.load()
    calls = kept.calls
    second = kept.load()
    assert kept.calls == calls == 4  # twice training and held-out text
    assert_equal(first, fresh), assert_equal(second, fresh)
    assert mapped(second.train.ids) and mapped(second.validation.sizes)
    assert [path.suffix for path in kept.files] == [".tokens"]


def test_conversations_keep_who_says_what_and_where_they_are_from(kept):
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cab"}]
    path = kept.text.with_name("talks.jsonl")
    path.write_text("".join(json.dumps({"messages": messages, "n": n}) + "\n" for n in range(30)))
    first, calls = kept.load(data=path), kept.calls
    second = kept.load(data=path)
    assert kept.calls == calls
    assert_equal(first, second)
    assert second.is_chat and second.train.labels[0].startswith("talks.jsonl, line ")


def test_another_text_or_tokenizer_gets_tokens_of_its_own(kept):
    kept.load()
    loads = [lambda: kept.load(data=other_text), lambda: kept.load(tokenizer=other_tokenizer)]
    other_text = kept.text.with_name("other.txt")
    other_text.write_text("abcab " * 199 + "abcac ")
    other_tokenizer = save_tokenizer(kept.text.with_name("other.json"), "ca")
    for number, load in enumerate(loads, 2):
        before = kept.calls
        load()
        assert kept.calls == before + 2 and len(kept.files) == number
    # The same bytes in a file of another kind are other documents.
    lines = kept.text.with_name("lines.txt")
    lines.write_text('{"text": "abc"}\n{"text": "cab"}\n{"text": "bca"}\n')
    as_text = kept.load(data=lines)
    as_documents = kept.load(data=lines.rename(lines.with_suffix(".jsonl")))
    assert as_text.train.documents.size == 1 and as_documents.train.documents.size == 2


def test_other_code_makes_other_tokens(kept, monkeypatch):
    copies = []
    for number, source in enumerate(token_cache._sources()):
        copies.append(kept.text.with_name(f"{number}.py"))
        copies[-1].write_bytes(source.read_bytes())
    for changed in (None, *copies):
        if changed is not None:
            changed.write_bytes(changed.read_bytes() + b"\n")
        token_cache._code.cache_clear()
        monkeypatch.setattr(token_cache, "_sources", lambda: tuple(copies))
        before = kept.calls
        kept.load()
        assert kept.calls == before + 2


def test_the_code_is_that_of_tokenizer_documents_streams_and_chat():
    names = {path.name for path in token_cache._sources()}
    assert {"tokenizer.py", "documents.py", "corpus.py", "stream.py", "_messages.py"} <= names


def test_without_its_sources_tokens_are_made_and_not_kept(kept, monkeypatch, caplog):
    monkeypatch.setattr(token_cache, "_sources", lambda: (kept.text.with_name("missing.py"),))
    assert kept.load().train.size > 0 and "kept=no" in caplog.text
    assert not kept.folder.exists()


def test_of_two_writers_the_second_keeps_the_file_of_the_first(kept, monkeypatch):
    """Both have found none; others may have mapped the first's."""
    first = kept.load()
    (path,) = kept.files
    before, finds, read = path.stat(), iter([None]), token_cache._read
    monkeypatch.setattr(token_cache, "_read", lambda path: next(finds, read(path)))
    second = kept.load()
    assert kept.calls == 4
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert kept.files == [path] and mapped(second.train.ids)
    assert_equal(first, second)


def test_who_may_read_what_is_kept_follows_the_umask(kept):
    before = os.umask(0o027)
    try:
        kept.load()
    finally:
        os.umask(before)
    assert kept.files[0].stat().st_mode & 0o777 == 0o640


def test_a_disk_without_links_keeps_them_too(kept, monkeypatch):
    def link(source, target):
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    assert mapped(kept.load().train.ids)
    assert [path.suffix for path in kept.files] == [".tokens"]


def test_a_command_that_is_refused_makes_no_tokens(kept):
    run = kept.folder.parent
    options = DataOptions(kept.text, kept.tokenizer)
    with pytest.raises(ValueError, match="vocab_size"):
        train(MODEL.replace(vocab_size=100), RUN, run, data=options)
    checkpoint.save(
        run / "checkpoints", init_params(MODEL, jax.random.key(0)), MODEL, 1, extra={"corpus": {}}
    )
    with pytest.raises(ValueError, match="already holds a run"):
        train(MODEL, RUN, run, data=options, resume=False)
    with pytest.raises(ValueError, match="another corpus"):
        train(MODEL, RUN, run, data=options)
    assert kept.calls == 0 and not kept.folder.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    ],
    ids=["half", "a byte short", "ten bytes", "empty", "a bit flipped"],
)
def test_a_damaged_file_is_refused_and_made_again(kept, damage, caplog):
    first = kept.load()
    (path,) = kept.files
    whole = path.read_bytes()
    # As a disk does, not under the maps of who has read it.
    path.unlink()
    path.write_bytes(damage(whole))
    before = kept.calls
    with caplog.at_level(logging.WARNING):
        again = kept.load()
    assert kept.calls == before + 2 and f"tokens={path}" in caplog.text
    assert_equal(again, first)
    assert path.read_bytes() == whole


def test_the_file_of_another_corpus_in_its_place_is_refused(kept):
    kept.load()
    other = kept.text.with_name("other.txt")
    other.write_text("cab " * 300)
    (path,) = kept.files
    kept.load(data=other)
    (second,) = (file for file in kept.files if file != path)
    expected = second.read_bytes()
    path.replace(second)
    before = kept.calls
    kept.load(data=other)
    assert kept.calls == before + 2 and second.read_bytes() == expected


def test_tokens_that_cannot_be_kept_are_used_all_the_same(kept, caplog):
    kept.folder.parent.mkdir()
    kept.folder.write_text("in the way")
    corpus = kept.load()
    assert corpus.train.size > 0 and "kept=no" in caplog.text


def test_bytes_are_not_kept(kept):
    kept.load(tokenizer=None)
    assert not kept.folder.exists()
