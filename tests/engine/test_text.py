"""Text of tokens that come one by one: nothing lost, nothing twice, and a stop text ends it wherever it begins."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.text import StoppableText
from jaxmoe.presets import BYTE_VOCAB_SIZE
from jaxmoe.tokenizer import ByteTokenizer, FileTokenizer, TextStream

BYTES = ByteTokenizer()
# Bytes of characters of one to four bytes, continuation bytes, bytes that are never valid, letters and specials.
_TRICKY = [*"aé€😀".encode(), 0x80, 0xBF, 0xC0, 0xFF, 0xED, 0xA0, *b"ab ", 0, 256, 257, 300]
TOKENS = st.lists(st.one_of(st.sampled_from(_TRICKY), st.integers(0, BYTE_VOCAB_SIZE - 1)))


def _streamed(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*map(stream.step, tokens), stream.end()]


@given(TOKENS)
def test_byte_pieces_join_to_the_decoding_of_all(tokens):
    assert "".join(_streamed(BYTES.stream(), tokens)) == BYTES.decode(tokens)


@given(st.text())
def test_a_character_appears_with_its_last_byte_and_not_before(text):
    stream, shown = BYTES.stream(), ""
    for character in text:
        *first, last = character.encode()
        assert all(stream.step(byte) == "" for byte in first)
        shown += stream.step(last)
        assert shown == text[: len(shown)] and shown.endswith(character)
    assert stream.end() == ""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A byte-level BPE with merges, some of which cut characters, and a special token."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    of_byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    euro = of_byte.pre_tokenize_str("€")[0][0]  # a letter for each of its three bytes
    merges = [("a", "b"), ("ab", "a"), (euro[0], euro[1]), (euro[2], "a")]
    pieces = [*letters, *("".join(pair) for pair in merges)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    )
    tokenizer.pre_tokenizer = of_byte
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    path = tmp_path_factory.mktemp("merges") / "tokenizer.json"
    tokenizer.save(str(path))
    return FileTokenizer(path)


@settings(max_examples=200)
@given(data=st.data())
def test_file_pieces_join_to_the_decoding_of_all_even_if_it_is_no_text(file, data):
    tokens = data.draw(st.lists(st.integers(0, file.vocab_size - 1)))
    assert "".join(_streamed(file.stream(), tokens)) == file.decode(tokens)


_WORDS = ["▁hello", "▁world", "ing", "é", "日", "▁"]


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    """Words, and bytes for what they lack, decoded like Llama 2: ids 1 to 256 are the bytes, 257 on the words."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(vocabulary)},
            [],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    tokenizer.save(str(path))
    return FileTokenizer(path)


def _bytes_shown(text: str) -> list[int | None]:
    """Bytes that ``text`` stands for; None for each that is shown as U+FFFD."""
    return [
        byte
        for character in text
        for byte in ([None] if character == "\ufffd" else character.encode())
    ]


# No space, which the decoder strips at the beginning, and not the first byte of U+FFFD itself.
_BYTES = sorted({*range(256)} - {0x20, 0xEF})
_SPECIAL = 257 + len(_WORDS)


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([1 + byte for byte in [*"aé日😀".encode(), 0x80, 0xFF]]),
            st.sampled_from([1 + byte for byte in _BYTES]),
            st.integers(257, _SPECIAL + 1),  # the last one is no token
        ),
        max_size=60,
    )
)
def test_with_byte_fallback_no_byte_is_lost_or_shown_twice_or_worse_than_in_the_decoding(
    fallback, tokens
):
    given_bytes = b"".join(
        bytes([token - 1]) if token < 257 else _WORDS[token - 257].replace("▁", " ").encode()
        for token in tokens
        if token < _SPECIAL
    ).removeprefix(b" ")
    decoded = fallback.decode(tokens)
    text = "".join(_streamed(fallback.stream(), tokens))
    assert len(_bytes_shown(text)) == len(given_bytes)
    for shown, byte, whole in zip(
        _bytes_shown(text), given_bytes, _bytes_shown(decoded), strict=True
    ):
        assert shown == byte or shown is whole is None
    assert text == decoded or "\ufffd" in text


def test_a_character_that_was_shown_stays_when_a_later_byte_of_its_run_is_invalid(fallback):
    hello = 257
    stream = fallback.stream()
    tokens = [hello, *(1 + byte for byte in "日a".encode()), 1 + 0xFF, hello]
    assert [stream.step(token) for token in tokens] == [
        "hello",
        "",
        "",
        "日",
        "a",
        "",
        "\ufffd hello",
    ]
    assert stream.end() == ""


@given(text=st.text(st.sampled_from("ab€é😀 ")))
def test_file_pieces_of_a_text_join_to_it_and_are_never_half_a_character(file, text):
    pieces = _streamed(file.stream(), file.encode(text, bos=False))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces[:-1])


def test_two_streams_of_a_tokenizer_do_not_know_of_each_other(file):
    for tokenizer in (BYTES, file):
        first, second = tokenizer.stream(), tokenizer.stream()
        begun, *rest = tokenizer.encode("€", bos=False)
        first.step(begun)
        assert second.step(tokenizer.encode("b", bos=False)[0]) == "b"
        assert "".join([*map(first.step, rest), first.end()]) == "€"


# -- stop texts --------------------------------------------------------------------------------------


def _stopped(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """Text before the first stop text that is complete after the fewest pieces."""
    text = ""
    for piece in pieces:
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], True
    return text, False


_STOPS = st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3)


@given(
    tokens=st.lists(st.sampled_from([*"ab€".encode(), 255, 256]), max_size=40),
    stops=st.one_of(_STOPS, _STOPS.map(lambda stops: [*stops, "\ufffd"])),
)
def test_text_ends_before_the_first_stop_text_however_tokens_cut_it(tokens, stops):
    text = StoppableText(BYTES.stream(), stops)
    expected, stopped = _stopped(_streamed(BYTES.stream(), tokens), stops)
    shown = ""
    for token in tokens:
        shown += text.push(token)
        assert expected.startswith(shown), "text was shown that a stop text takes back"
        if text.stopped:
            break
    shown += text.end()
    assert (shown, text.stopped) == (expected, stopped)
    assert text.end() == ""


@given(st.text("abc", max_size=30), _STOPS)
def test_no_more_text_is_held_back_than_a_stop_text_could_need(characters, stops):
    text = StoppableText(BYTES.stream(), stops)
    shown = ""
    for i, character in enumerate(characters.encode(), start=1):
        shown += text.push(character)
        if text.stopped:
            return
        held = characters[len(shown) : i]
        assert not held or any(len(held) < len(s) and s.startswith(held) for s in stops)


def test_without_stop_texts_every_character_is_shown_at_once():
    text = StoppableText(BYTES.stream(), ())
    assert [text.push(byte) for byte in "aé".encode()] == ["a", "", "é"]
    assert text.end() == "" and not text.stopped


def test_nothing_is_shown_after_a_stop_text():
    text = StoppableText(BYTES.stream(), ("bc",))
    assert [text.push(byte) for byte in b"abcd"] == ["a", "", "", ""]
    assert text.stopped and text.end() == ""
