"""Tokenizers: bytes, or a checkpoint's own ``tokenizer.json``."""

import codecs
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxmoe.presets import BYTE_VOCAB_SIZE

BOS, EOS, PAD = 256, 257, 258


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

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str | bytes, *, bos: bool = True) -> list[int]:
        """Ids of ``text``, with the special tokens that the file's template adds if ``bos``."""
        text = text if isinstance(text, str) else text.decode()
        return self._tokenizer.encode(text, add_special_tokens=bos).ids

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

    def __repr__(self) -> str:
        return f"FileTokenizer({self.path.name}, vocab_size={self.vocab_size})"


def load_tokenizer(
    directory: str | os.PathLike[str] | None = None,
) -> ByteTokenizer | FileTokenizer:
    """The tokenizer that lies in a checkpoint directory; bytes if there is none."""
    if directory is not None:
        path = pathlib.Path(directory) / "tokenizer.json"
        if path.is_file():
            return FileTokenizer(path)
    return ByteTokenizer()
