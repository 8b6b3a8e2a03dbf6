"""Tokenizers: bytes, or a checkpoint's own ``tokenizer.json``."""

import codecs
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxmoe.presets import BYTE_VOCAB_SIZE

BOS, EOS, PAD = 256, 257, 258
# What public tokenizers call the tokens around a document; the first that one has is meant.
_BEGIN_NAMES = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<bos>", "<s>", "[BOS]")
_END_NAMES = (
    "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "</s>", "[EOS]",
)  # fmt: skip


class Encoded(NamedTuple):
    """A text's tokens.

    Attributes:
      ids: int64 [N], without special tokens but those that the text spells.
      ends: int64 [N], how many of the text's UTF-8 bytes lie before the end of each token. A character in several
        tokens ends in the first of them.
    """

    ids: np.ndarray
    ends: np.ndarray


class TextStream(NamedTuple):
    """Text of tokens that come one by one: the pieces, then ``end``'s, join to ``decode`` of all that is text.

    Attributes:
      step: takes a token, returns the text that is now certain; unfinished characters wait.
      end: returns what still waits.
    """

    step: Callable[[int], str]
    end: Callable[[], str]


class ByteTokenizer:
    """Token ids are bytes; 256 begins a document, 257 ends it, 258 pads."""

    vocab_size = BYTE_VOCAB_SIZE
    bos, eos, pad = BOS, EOS, PAD

    def encode(self, text: str | bytes, *, bos: bool = False) -> list[int]:
        """Ids of ``text`` (UTF-8 if a string), optionally after the beginning-of-document token."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        return [BOS] * bos + list(data)

    def encode_all(self, texts: Sequence[str], *, ends: bool = True) -> list[Encoded]:
        """Texts as they are trained on."""
        del ends  # they cost nothing
        data = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        return [Encoded(ids, np.arange(1, ids.size + 1)) for ids in data]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``: special tokens are skipped, invalid UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def stream(self) -> "TextStream":
        """A decoder for tokens that come one by one."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return TextStream(
            lambda token: decoder.decode(bytes([token]) if 0 <= token < 256 else b""),
            lambda: decoder.decode(b"", True),
        )

    def __repr__(self) -> str:
        return f"ByteTokenizer(vocab_size={self.vocab_size})"


class FileTokenizer:
    """A ``tokenizer.json`` read with the ``tokenizers`` package."""

    def __init__(self, path: str | os.PathLike[str]):
        import tokenizers

        self.path = pathlib.Path(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"{path} is no tokenizer.json that tokenizers can read ({error}); get it again."
            ) from error
        # A file may ask for both; a text is whole or an error, never shorter than it was.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def _special(self, field: str, names: tuple[str, ...]) -> int | None:
        """The id of the token that ``tokenizer_config.json`` beside the file, or else custom, names."""
        settings = self.path.with_name("tokenizer_config.json")
        if settings.is_file():
            try:
                given = json.loads(settings.read_bytes()).get(field)
            except (ValueError, AttributeError) as error:
                raise ValueError(
                    f"{settings} is no JSON object ({error}); get it again."
                ) from error
            given = given.get("content") if isinstance(given, dict) else given
            if given is not None:
                names = (given,)
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), None)

    @property
    def bos(self) -> int | None:
        """The id that begins a document, if there is one."""
        return self._special("bos_token", _BEGIN_NAMES)

    @property
    def eos(self) -> int:
        """The id that ends a document.

        Raises:
          ValueError: if there is none.
        """
        found = self._special("eos_token", _END_NAMES)
        if found is None:
            raise ValueError(
                f"{self.path} has no token that ends a document (none of {', '.join(_END_NAMES)}); name it as eos_token "
                "in a tokenizer_config.json beside it."
            )
        return found

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str | bytes, *, bos: bool = True) -> list[int]:
        """Ids of ``text``, with the special tokens that the file's template adds if ``bos``."""
        text = text if isinstance(text, str) else text.decode()
        return self._tokenizer.encode(text, add_special_tokens=bos).ids

    def encode_all(self, texts: Sequence[str], *, ends: bool = True) -> list[Encoded]:
        """Texts as they are trained on, in parallel; without ``ends``, which then are empty, in about half the time."""
        if not ends:
            fast = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [Encoded(np.asarray(e.ids, np.int64), np.zeros(0, np.int64)) for e in fast]
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            Encoded(np.asarray(e.ids, np.int64), _byte_ends(text, e.offsets))
            for text, e in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens skipped."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """A decoder for tokens that come one by one.

        With byte fallback ``decode`` takes all of a run of bytes for invalid if one of them is; characters of
        the run that have been returned by then stay, and only the rest of it becomes U+FFFD.
        """
        # The tokens of the last piece, because text depends on its neighbours, then those that wait.
        window: list[int] = []
        shown, waiting = "", 0  # the text of the former, and where the latter begin

        def take(*, last: bool) -> str:
            nonlocal shown, waiting
            text = self.decode(window)
            if text.endswith("\ufffd") and not last:  # perhaps the beginning of a character
                return ""
            begins_alike = text.startswith(shown)
            piece = text[len(shown) :] if begins_alike else self.decode(window[waiting:])
            if piece:
                del window[:waiting]
                shown, waiting = self.decode(window), len(window)
            return piece

        def step(token: int) -> str:
            window.append(token)
            return take(last=False)

        return TextStream(step, lambda: take(last=True))

    def copy_to(self, directory: str | os.PathLike[str]) -> None:
        """Puts the file, and what lies beside it, where ``load_tokenizer`` finds it."""
        for name in (self.path.name, "tokenizer_config.json"):
            source = self.path.with_name(name)
            target = pathlib.Path(directory) / (
                "tokenizer.json" if name == self.path.name else name
            )
            if source.is_file() and not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)

    def __repr__(self) -> str:
        return f"FileTokenizer({self.path.name}, vocab_size={self.vocab_size})"


def _byte_ends(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """``Encoded.ends`` from the spans of characters."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + sum((points >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
    until = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    ends = np.asarray([end for _, end in offsets], np.int64)
    return np.maximum.accumulate(until[ends])


def load_tokenizer(
    directory: str | os.PathLike[str] | None = None,
) -> ByteTokenizer | FileTokenizer:
    """The tokenizer that lies in a checkpoint directory, or in the run that it belongs to; bytes if there is none."""
    if directory is None:
        return ByteTokenizer()
    place = pathlib.Path(directory).absolute()
    places = [place]
    while place.name.isdecimal() or place.name == "checkpoints":  # RUN/checkpoints/STEP
        place = place.parent
        places.append(place)
    for found in (p / "tokenizer.json" for p in places):
        if found.is_file():
            return FileTokenizer(found)
    return ByteTokenizer()
