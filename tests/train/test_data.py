"""Corpora, the split, rows, batches, and what is scored."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe import chat
from jaxmoe.sharding import make_mesh
from jaxmoe.tokenizer import BOS, EOS, PAD, ByteTokenizer, FileTokenizer
from jaxmoe.train.data import (
    Batch,
    Corpus,
    DataOptions,
    Loader,
    Stream,
    evaluation_rows,
    gzip_bits_per_byte,
    load_corpus,
)
from jaxmoe.train.step import read_batch


@pytest.fixture
def directory(tmp_path):
    """Forty documents, document i made of the byte i alone."""
    for i in range(40):
        file = tmp_path / f"sub{i % 3}" / f"{i}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes([i]) * 50)
    return tmp_path


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    """A byte-level tokenizer file that merges "ab", with V3.2's tokens: its path."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "ab"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(chat.SPECIAL_TOKENS))
    tokenizer.enable_truncation(3)  # as some files ask for; training text stays whole
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def stream_of(*lengths):
    """Documents of so many distinct tokens."""
    size = sum(lengths)
    begins = np.cumsum([0, *lengths[:-1]])
    return Stream(np.arange(size, dtype=np.uint16), begins, np.ones(size, np.uint32))


def targets(batch: Batch) -> np.ndarray:
    """Tokens that some query of the same document is asked for: the rule of the loss, without multi-token prediction."""
    length = batch.tokens.shape[1] - 2
    index = np.arange(1, length + 1)
    counts = (batch.weights[:, 1:-1] > 0) & (batch.starts[:, 1:-1] < index)
    return batch.tokens[:, 1:-1][counts]


def write_jsonl(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def talk(question, *answers):
    messages = []
    for answer in answers:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return {"messages": messages}


# -- sources and the split ---------------------------------------------------------------------------


def test_the_standard_library_is_found_and_leaves_out_what_differs_per_machine():
    corpus = load_corpus()
    assert corpus.train.size > 5_000_000
    assert 0.005 < corpus.validation.size / corpus.train.size < 0.2
    assert corpus.fingerprint == load_corpus().fingerprint


def test_no_document_is_in_both_parts(directory):
    corpus = load_corpus(directory)
    train, held_out = set(corpus.train.ids.tolist()), set(corpus.validation.ids.tolist())
    assert train & held_out == {BOS, EOS}
    assert train | held_out == {*range(40), BOS, EOS}


def test_a_file_stays_on_its_side_when_others_come(directory):
    before = set(load_corpus(directory).validation.ids.tolist())
    (directory / "new.txt").write_bytes(b"\xff" * 50)
    assert set(load_corpus(directory).validation.ids.tolist()) - {255} == before


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
        assert corpus.train.ids[1:-1].astype(np.uint8).tobytes() == data[: -(1024 // 20)]
        assert corpus.validation.ids[1:-1].astype(np.uint8).tobytes() == data[-(1024 // 20) :]


def test_bytes_that_are_not_utf8_are_fine(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe\x80" * 100)
    assert set(load_corpus(tmp_path / "a").train.ids.tolist()) == {0xFF, 0xFE, 0x80, BOS, EOS}


def test_a_line_of_json_is_a_document_wherever_it_stands(tmp_path):
    texts = [{"text": f"text {i}"} for i in range(60)]
    one = load_corpus(write_jsonl(tmp_path / "a.jsonl", *texts))
    other = load_corpus(write_jsonl(tmp_path / "b.jsonl", *reversed(texts), texts[0]))
    assert one.train.documents.size + one.validation.documents.size == 60
    decode = ByteTokenizer().decode
    assert decode(one.train.ids[:6].tolist()).startswith("text")

    def held_out(corpus):
        ids, begins = corpus.validation.ids, corpus.validation.documents[1:]
        return {decode(part.tolist()) for part in np.split(ids, begins)}

    assert held_out(one) == held_out(other)


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


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a"', "line 2 is not JSON"),
        (b'{"text": "\xff"}', "line 2 is not JSON"),
        ('["text"]', "line 2 must be an object"),
        ('{"txt": "a"}', 'line 2 must be an object.*"text" or "messages"'),
        ('{"text": 3}', "line 2.*must be a string; got 3"),
        ('{"text": "\\ud800"}', "line 2.*UTF-8"),
        ('{"messages": [{"content": "hi"}]}', r"line 2: messages\[0\].*role"),
        ('{"messages": [{"role": "user"}]}', r"line 2: messages\[0\].content.*got None"),
        ('{"messages": []}', "line 2.*at least one message"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "line 2 has no assistant message"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, says):
    line = line if isinstance(line, bytes) else line.encode()
    good = talk("a", "b") if b"messages" in line else {"text": "a"}
    lines = json.dumps(good).encode() + b"\n" + line + b"\n" + json.dumps(good).encode()
    (tmp_path / "data.jsonl").write_bytes(lines)
    with pytest.raises(ValueError, match=f"^data.jsonl, {says}") as error:
        load_corpus(tmp_path / "data.jsonl")
    assert "\n" not in str(error.value)


def test_texts_beside_conversations_are_refused_with_both_names(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, talk("q", "a"))
    with pytest.raises(ValueError, match="line 1 is a text and a.jsonl, line 2 has messages"):
        load_corpus(path)


# -- tokenizer files ---------------------------------------------------------------------------------


def test_a_tokenizer_file_gives_whole_documents_and_their_bytes(tmp_path, merges):
    texts = ["abäb€ab", "", "ab" * 50, "\U0001f600 x"] * 100
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": f"{i}{t}"} for i, t in enumerate(texts)))
    corpus = load_corpus(DataOptions(path, merges))
    tokenizer = FileTokenizer(merges)
    streams = (corpus.train, corpus.validation)
    said = "".join(tokenizer.decode(s.ids.tolist()) for s in streams)
    assert sorted(said) == sorted("".join(f"{i}{t}" for i, t in enumerate(texts)))
    held_out = corpus.validation
    assert held_out.sizes.sum() == len(tokenizer.decode(held_out.ids.tolist()).encode()) > 50
    for s in streams:
        assert (s.ids[s.documents] == tokenizer.bos).all() and s.ids[-1] == tokenizer.eos
    assert corpus.train.ids.dtype == np.uint16
    assert load_corpus(path).fingerprint["tokenizer"] != corpus.fingerprint["tokenizer"]


def test_a_vocabulary_that_is_too_large_names_both_numbers(tmp_path, merges):
    (tmp_path / "a.txt").write_text("ab" * 100)
    corpus = load_corpus(DataOptions(tmp_path / "a.txt", merges))
    with pytest.raises(ValueError, match=r"vocab_size \(263\) must be >= 264.*tokenizer.json"):
        corpus.check(263)
    corpus.check(264)


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/40"])
def test_a_run_goes_on_with_its_own_tokens_only(tmp_path, merges, inside):
    text = tmp_path / "a.txt"
    text.write_text("ab" * 200)
    run = tmp_path / "run"
    (run / inside).mkdir(parents=True)
    ours = load_corpus(DataOptions(text, merges))
    ours.put_tokenizer(run)
    ours.check(512, run / inside)
    with pytest.raises(ValueError, match="not on bytes; pass --tokenizer"):
        load_corpus(text).check(512, run / inside)
    other = tmp_path / "other.json"
    other.write_text(merges.read_text() + " ")
    with pytest.raises(ValueError, match="not on those of .*other.json"):
        load_corpus(DataOptions(text, other)).check(512, run / inside)


def test_text_that_is_not_utf8_is_named_with_a_tokenizer_file(tmp_path, merges):
    (tmp_path / "a.txt").write_bytes(b"abc\xff" * 20)
    with pytest.raises(ValueError, match="a.txt is not UTF-8 .byte 3 is 0xff.*--tokenizer"):
        load_corpus(DataOptions(tmp_path / "a.txt", merges))


def test_an_only_file_is_not_cut_inside_a_character(tmp_path, merges):
    (tmp_path / "a.txt").write_text("€" * 101)
    assert load_corpus(DataOptions(tmp_path / "a.txt", merges)).validation.sizes.sum() % 3 == 0


# -- rows --------------------------------------------------------------------------------------------


def corpus_of(train, validation=None):
    return Corpus(train, validation or train, {}, "test")


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    length=st.integers(1, 24),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_an_epoch_asks_for_every_token_once_that_something_comes_before(lengths, length, seed):
    loader = Loader(corpus_of(stream_of(*lengths)), seed, 1, length)
    rows = [loader(step) for step in range(len(loader.rows))]
    asked = np.concatenate([targets(row) for row in rows])
    firsts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    # A document whose first token is a row's last is cut between the two: the next row has its context.
    assert sorted(asked.tolist()) == sorted(set(range(sum(lengths))) - firsts)


def test_a_row_says_where_each_tokens_document_starts_and_pads_at_the_end():
    loader = Loader(corpus_of(stream_of(3, 9, 2)), 0, 3, 6)
    first, second, last = sorted(zip(*loader(0), strict=True), key=lambda row: row[0][0])
    np.testing.assert_array_equal(first[0], range(8))
    np.testing.assert_array_equal(first[1], [0, 0, 0, 3, 3, 3, 3, 3])
    np.testing.assert_array_equal(second[0], range(6, 14))
    np.testing.assert_array_equal(second[1], [0, 0, 0, 0, 0, 0, 6, 6])
    np.testing.assert_array_equal(last[0], [12, 13, PAD, PAD, PAD, PAD, PAD, PAD])
    np.testing.assert_array_equal(last[1], [0, 0, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(last[2], [1, 1, 0, 0, 0, 0, 0, 0])


def test_batches_depend_on_seed_and_step_alone(directory):
    one = Loader(load_corpus(directory), 3, 4, 20)(7)
    assert one.tokens.shape == (4, 22) and one.tokens.dtype == np.int32
    assert one.starts.dtype == np.int32 and one.weights.dtype == np.float32
    again = Loader(load_corpus(directory), 3, 4, 20)
    for step in (50, 2, 7):  # in any order
        batch = again(step)
    for a, b in zip(one, batch, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.tokens, again(8).tokens)
    assert not np.array_equal(one.tokens, Loader(load_corpus(directory), 4, 4, 20)(7).tokens)


def test_epochs_have_orders_of_their_own_and_the_same_rows(directory):
    loader = Loader(load_corpus(directory), 0, 1, 20)
    n = len(loader.rows)
    orders = [[loader(e * n + i).tokens.tobytes() for i in range(n)] for e in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_that_read_only_their_rows_have_the_global_batch_together(directory, processes):
    corpus = load_corpus(directory)
    whole, share = Loader(corpus, 0, 8, 20)(5), 8 // processes
    loaders = [Loader(corpus, 0, 8, 20) for _ in range(processes)]
    parts = [loader(5, slice(p * share, (p + 1) * share)) for p, loader in enumerate(loaders)]
    assert all(len(part.tokens) == share for part in parts)
    for a, *b in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(a, np.concatenate(b))


def test_a_mesh_gets_the_batch_and_padding_where_it_does_not_divide(directory, devices):
    loader = Loader(load_corpus(directory), 0, 6, 20)
    one = read_batch(None, functools.partial(loader, 3), 6)
    mesh = make_mesh(data=2, expert=2, devices=devices[:4])
    several = read_batch(mesh, functools.partial(loader, 3), 6)
    for whole, a, b in zip(loader(3), one, several, strict=True):
        np.testing.assert_array_equal(a, whole)
        np.testing.assert_array_equal(b, np.pad(whole, ((0, 2), (0, 0))))
    assert len(several.tokens.sharding.device_set) == 4


# -- conversations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_bytes", [True, False])
def test_only_what_the_assistant_says_counts_with_the_end_of_its_turn(tmp_path, merges, in_bytes):
    one = talk("a question €", "abé", "ab?")
    path = write_jsonl(tmp_path / "a.jsonl", one, one, talk("x", "y"))
    corpus = load_corpus(DataOptions(path, None if in_bytes else merges))
    stream = max(corpus.train, corpus.validation, key=lambda s: s.size)
    tokenizer = corpus.tokenizer
    ids = stream.ids[: stream.documents[1]]
    said = stream.said[: stream.documents[1]]
    end = chat.SPECIAL_TOKENS[1]

    edges = np.flatnonzero(np.diff(said, prepend=not said[0]))
    runs = [r.tolist() for r, at in zip(np.split(ids, edges[1:]), edges, strict=True) if said[at]]
    if in_bytes:
        assert [tokenizer.decode(run) for run in runs] == [f"abé{end}", f"ab?{end}"]
        assert ids[0] == BOS
    else:
        texts = [[*tokenizer.encode(text, bos=False), tokenizer.eos] for text in ("abé", "ab?")]
        assert runs == texts
        assert ids[0] == tokenizer.bos and (ids == tokenizer.bos).sum() == 1
    prompt = chat.encode(one["messages"][:3], add_bos=not in_bytes)
    expected = tokenizer.encode(prompt, bos=in_bytes)
    np.testing.assert_array_equal(ids[: len(expected)], expected)


def test_reasoning_and_calls_count_and_results_do_not():
    pieces = chat.encode_pieces(
        [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "reasoning_content": "hm",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "secret"},
            {"role": "assistant", "reasoning_content": "so", "content": "done"},
        ],
        thinking=True,
    )
    said = [piece.text for piece in pieces if piece.said]
    assert (
        said[0].startswith("hm</think>") and "invoke" in said[0] and "secret" not in "".join(said)
    )
    assert said[1] == "so</think>done" + chat.SPECIAL_TOKENS[1]


@pytest.fixture
def conversations(tmp_path):
    """Sixty conversations, of many lengths: their file."""
    return write_jsonl(
        tmp_path / "a.jsonl", *(talk(f"q{i}", "y" * (i % 23 + 1)) for i in range(60))
    )


def test_conversations_are_whole_in_a_row_and_each_comes_once(conversations):
    corpus = load_corpus(conversations)
    loader = Loader(corpus, 0, 1, 200)
    rows = [loader(step) for step in range(len(loader.rows))]
    asked = sum(int((targets(row) >= 0).sum()) for row in rows)
    assert asked == corpus.train.said.sum()
    begun = sum(int((row.tokens == BOS).sum()) for row in rows)
    assert begun == corpus.train.documents.size > len(rows)  # several share a row
    for row in rows:
        real = row.tokens != PAD
        assert row.tokens[0, 0] == BOS and row.weights[0, -1] == 0
        begins = np.flatnonzero(row.tokens[0] == BOS)
        np.testing.assert_array_equal(np.unique(row.starts[real]), begins)


def test_a_conversation_that_is_too_long_is_an_error_or_cut_and_counted(conversations, caplog):
    corpus = load_corpus(conversations)
    longest = int(np.diff(corpus.train.documents, append=corpus.train.size).max())
    with pytest.raises(ValueError, match=rf"line \d+ has {longest} tokens.*seq_len \+ 1 = 81"):
        Loader(corpus, 0, 1, 80)
    cut = load_corpus(DataOptions(conversations, truncate=True))
    loader = Loader(cut, 0, 1, 80)
    assert "truncated=" in caplog.text and f"longest={longest}" not in caplog.text
    lengths = np.minimum(np.diff(cut.train.documents, append=cut.train.size), 81)
    assert (
        sum(int((loader(i).tokens != PAD).sum()) for i in range(len(loader.rows))) == lengths.sum()
    )
    with pytest.raises(ValueError, match=r"none of \d+ conversations.*= 21"):
        Loader(cut, 0, 1, 20)


# -- evaluation --------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    length=st.integers(1, 40),
    limit=st.integers(1, 400),
)
def test_evaluation_scores_every_token_once_with_half_a_window_of_context(lengths, length, limit):
    batch, n_bytes = evaluation_rows(corpus_of(stream_of(*lengths)), limit, length)
    scored = batch.tokens[batch.weights > 0]
    firsts = np.cumsum([0, *lengths[:-1]])
    size = min(sum(lengths), limit)
    expected = sorted(set(range(size)) - set(firsts.tolist()))
    assert sorted(scored.tolist()) == expected and n_bytes == len(expected)
    row, index = np.nonzero(batch.weights)
    context = index - batch.starts[row, index]
    in_document = scored - firsts[np.searchsorted(firsts, scored, side="right") - 1]
    assert (context >= np.minimum(in_document, length - max(1, length // 2) + 1)).all()


def test_a_probe_is_an_evenly_spread_part_of_the_evaluation(directory):
    corpus = load_corpus(directory)
    whole, n_bytes = evaluation_rows(corpus, 10**6, 16)
    some, some_bytes = evaluation_rows(corpus, 10**6, 16, probe_bytes=40)
    assert 0 < some_bytes < n_bytes and len(some.tokens) == 5 < len(whole.tokens)
    for a, b in zip(whole, some, strict=True):
        np.testing.assert_array_equal(a[[0, -1]], b[[0, -1]])


def test_bytes_are_those_of_the_text_that_is_scored(directory, merges):
    corpus = load_corpus(directory)
    batch, n_bytes = evaluation_rows(corpus, 10**6, 16)
    assert n_bytes == corpus.validation.size - 2 * corpus.validation.documents.size
    assert batch.weights.sum() == n_bytes + corpus.validation.documents.size
    in_tokens = load_corpus(DataOptions(directory, merges))
    assert evaluation_rows(in_tokens, 10**6, 16)[1] == n_bytes


def test_of_conversations_only_what_is_said_is_scored(conversations):
    corpus = load_corpus(conversations)
    batch, n_bytes = evaluation_rows(corpus, 10**6, 120)
    assert batch.tokens.shape[1] == 121
    assert batch.weights.sum() == n_bytes == corpus.validation.said.sum()


def test_gzip_of_one_repeated_line_is_far_below_one_bit(tmp_path, merges):
    (tmp_path / "a").write_bytes(b"the same line\n" * 10000)
    for tokenizer in (None, merges):
        corpus = load_corpus(DataOptions(tmp_path / "a", tokenizer))
        assert gzip_bits_per_byte(corpus, 10**6) < 0.1
