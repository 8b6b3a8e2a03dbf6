"""A corpus: token streams of training and held-out documents."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxmoe import chat
from jaxmoe.tokenizer import ByteTokenizer, Encoded, FileTokenizer, load_tokenizer
from jaxmoe.train.data import token_cache
from jaxmoe.train.data.documents import Document, documents_of, read, stdlib_files, visible_files
from jaxmoe.train.data.stream import Stream

VALIDATION_SHARE = 20  # one document (or, in a single text, one byte) in so many is held out
_AT_ONCE = 256  # documents that a tokenizer gets together
# A run whose rows were made by other rules must not be resumed: count up when the rules change.
_ROWS = 2

Tokenizer = ByteTokenizer | FileTokenizer


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What a model is trained on."""

    data: pathlib.Path | None = None
    """File or directory: text, or .jsonl whose lines have "text" or "messages"; default: the sources of Python's standard library."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json; default: bytes."""
    truncate: bool = False
    """Cut conversations that are longer than seq_len; otherwise one is an error."""

    def __post_init__(self):
        for name in ("data", "tokenizer"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, pathlib.Path(path))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and held-out documents as tokens.

    Attributes:
      train, validation: no document is in both.
      fingerprint: what it was made of and how, to recognise it again: files, bytes, SHA-256, tokenizer.
      name: for people.
      tokenizer: that made the tokens.
      truncate: whether conversations that are too long may be cut.
    """

    train: Stream
    validation: Stream
    fingerprint: dict[str, Any]
    name: str
    tokenizer: Tokenizer = dataclasses.field(default_factory=ByteTokenizer)
    truncate: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether it holds conversations."""
        return self.train.said is not None

    def check(self, vocab_size: int, origin: str | os.PathLike[str] | None = None) -> None:
        """Raises ValueError if a model's vocabulary is too small, or the run it starts from had another tokenizer file."""
        check_tokenizer(self.tokenizer, vocab_size, origin)

    def put_tokenizer(self, directory: str | os.PathLike[str]) -> None:
        """Leaves a tokenizer file in a run's directory, for whoever generates from it."""
        if isinstance(self.tokenizer, FileTokenizer):
            self.tokenizer.copy_to(directory)

    def __repr__(self) -> str:
        return f"Corpus({self.name}: {self.train.size:,} training and {self.validation.size:,} held-out tokens)"


def make_tokenizer(path: str | os.PathLike[str] | None) -> Tokenizer:
    """Bytes, or what a ``tokenizer.json`` says.

    Raises:
      ValueError: if the file cannot be read.
    """
    return ByteTokenizer() if path is None else FileTokenizer(path)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if a model's vocabulary does not hold a tokenizer's ids."""
    if isinstance(tokenizer, ByteTokenizer):
        if vocab_size < ByteTokenizer.pad + 1:
            raise ValueError(
                f"vocab_size ({vocab_size}) must be >= {ByteTokenizer.pad + 1}, the ids of bytes and special "
                f"tokens; use a config with vocab_size={ByteTokenizer.vocab_size}."
            )
    elif vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be >= {tokenizer.vocab_size}, the tokens of {tokenizer.path}; pass "
            f"--vocab-size {tokenizer.vocab_size}, or another tokenizer."
        )


def check_tokenizer(
    tokenizer: Tokenizer, vocab_size: int, origin: str | os.PathLike[str] | None
) -> None:
    """``Corpus.check`` before there is a corpus."""
    check_vocabulary(tokenizer, vocab_size)
    theirs = load_tokenizer(origin)
    if not isinstance(theirs, FileTokenizer):
        return
    if not isinstance(tokenizer, FileTokenizer):
        raise ValueError(
            f"{origin} was trained on the tokens of {theirs.path}, not on bytes; pass --tokenizer {theirs.path}."
        )
    if tokenizer.path.read_bytes() != theirs.path.read_bytes():
        raise ValueError(
            f"{origin} was trained on the tokens of {theirs.path}, not on those of {tokenizer.path}; pass --tokenizer {theirs.path}."
        )


# -- documents to tokens -----------------------------------------------------------------------------


@dataclasses.dataclass
class _Tokens:
    """One document's, in the making."""

    ids: np.ndarray
    sizes: np.ndarray | None
    said: np.ndarray | None = None


def _between(begin: list[int], encoded: Encoded, end: list[int]) -> np.ndarray:
    return np.concatenate([np.asarray(begin, np.int64), encoded.ids, np.asarray(end, np.int64)])


def _encode_text(text: str, encoded: Encoded, begin: list[int], end: list[int]) -> _Tokens:
    sizes = np.diff(encoded.ends, prepend=0)
    if sizes.size:  # a tokenizer may leave out spaces at the end
        sizes[-1] += len(text.encode()) - encoded.ends[-1]
    sizes = np.concatenate([np.zeros(len(begin), np.int64), sizes, np.zeros(len(end), np.int64)])
    return _Tokens(_between(begin, encoded, end), sizes)


def _encode_bytes(data: bytes) -> _Tokens:
    middle = np.frombuffer(data, np.uint8)
    ids = np.empty(middle.size + 2, np.uint16)
    ids[0], ids[1:-1], ids[-1] = ByteTokenizer.bos, middle, ByteTokenizer.eos
    return _Tokens(ids, (ids < 256).astype(np.uint32))


def _text(document: Document) -> str:
    try:
        return document.content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{document.label} is not UTF-8 (byte {error.start} is {document.content[error.start]:#04x}), which a tokenizer "
            "file needs; convert it, or train on bytes, without --tokenizer."
        ) from None


def _texts(
    documents: Sequence[Document], tokenizer: Tokenizer, *, sized: bool
) -> Iterable[_Tokens]:
    if isinstance(tokenizer, ByteTokenizer):
        yield from (_encode_bytes(document.content) for document in documents)
        return
    # Without a token of its own for the beginning, as with GPT-2: that for the end.
    end, bos = tokenizer.eos, tokenizer.bos
    begin = end if bos is None else bos
    for i in range(0, len(documents), _AT_ONCE):
        texts = [_text(document) for document in documents[i : i + _AT_ONCE]]
        for text, encoded in zip(texts, tokenizer.encode_all(texts, ends=sized), strict=True):
            if sized:
                yield _encode_text(text, encoded, [begin], [end])
            else:
                yield _Tokens(_between([begin], encoded, [end]), None)


def _pieces(document: Document, *, begins: bool) -> list[chat.Piece]:
    """A conversation's text; thinking, if any message has reasoning."""
    example = document.content
    messages = example["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{document.label}: "messages" must be a list with at least one message.')
    thinking = any(isinstance(m, dict) and m.get("reasoning_content") for m in messages)
    try:
        pieces = chat.encode_pieces(
            messages,
            tools=example.get("tools"),
            thinking=thinking,
            add_generation_prompt=False,
            add_bos=begins,
        )
    except ValueError as error:
        raise ValueError(f"{document.label}: {error}") from None
    if not any(piece.said for piece in pieces):
        raise ValueError(
            f"{document.label} has no assistant message, so nothing to train on; add one, or remove the line."
        )
    return pieces


def _conversations(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterable[_Tokens]:
    """As the server encodes them: with the begin token once, for which bytes have an id and no name."""
    in_bytes = isinstance(tokenizer, ByteTokenizer)
    for i in range(0, len(documents), _AT_ONCE):
        pieces = [_pieces(d, begins=not in_bytes) for d in documents[i : i + _AT_ONCE]]
        texts = ["".join(piece.text for piece in conversation) for conversation in pieces]
        for text, encoded, parts in zip(texts, tokenizer.encode_all(texts), pieces, strict=True):
            tokens = _encode_text(text, encoded, [ByteTokenizer.bos] if in_bytes else [], [])
            lengths = np.cumsum([len(piece.text.encode()) for piece in parts])
            # The piece in which a token ends is the one that it is said in.
            piece = np.searchsorted(lengths, np.cumsum(tokens.sizes), side="left")
            tokens.said = np.asarray([p.said for p in parts])[piece.clip(max=len(parts) - 1)]
            yield tokens


def _stream(
    documents: Sequence[Document], tokenizer: Tokenizer, *, conversations: bool, sized: bool
) -> Stream:
    if conversations:
        tokens = list(_conversations(documents, tokenizer))
    else:
        tokens = list(_texts(documents, tokenizer, sized=sized))
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    lengths = np.cumsum([0, *(t.ids.size for t in tokens)])
    return Stream(
        np.concatenate([t.ids.astype(dtype) for t in tokens]),
        lengths[:-1].astype(np.int64),
        np.concatenate([t.sizes.astype(np.uint32) for t in tokens]) if sized else None,
        np.concatenate([t.said for t in tokens]) if conversations else None,
        tuple(d.label for d in documents) if conversations else None,
    )


# -- splitting ---------------------------------------------------------------------------------------


def _cut(document: Document, tokenizer: Tokenizer) -> tuple[list[Document], list[Document]]:
    """An only text's first part, and its last twentieth."""
    data = document.content
    cut = len(data) - len(data) // VALIDATION_SHARE
    if not isinstance(tokenizer, ByteTokenizer):
        while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:  # not inside a character
            cut -= 1
    parts = (document._replace(content=data[:cut]), document._replace(content=data[cut:]))
    return [parts[0]] if parts[0].content else [], [parts[1]] if parts[1].content else []


def _split(
    documents: list[Document], tokenizer: Tokenizer
) -> tuple[list[Document], list[Document]]:
    """(training documents, held-out documents)."""
    if len(documents) == 1 and isinstance(documents[0].content, bytes):
        return _cut(documents[0], tokenizer)
    # A hash of the key alone: documents that come or go leave the others where they are.
    crc = {document.key: zlib.crc32(document.key) for document in documents}
    held_out = {key for key in crc if crc[key] % VALIDATION_SHARE == 0}
    held_out = held_out or {documents[-1].key}
    if len(held_out) == len(crc):
        held_out = set(sorted(held_out)[1:])
    return (
        [document for document in documents if document.key not in held_out],
        [document for document in documents if document.key in held_out],
    )


# -- loading -----------------------------------------------------------------------------------------


def _files(path: pathlib.Path | None) -> tuple[str, dict[str, bytes], int]:
    """(name, contents that are not empty by relative name, number of files)."""
    if path is None:
        root, files = stdlib_files()
        name = "Python standard library"
    else:
        root, name = path, path.name
        if not root.exists():
            raise ValueError(f"--data {root} does not exist; pass a file or a directory of text.")
        files = [root] if root.is_file() else visible_files(root)
    named = sorted((p.relative_to(root).as_posix(), p) for p in files)
    if path is not None and path.is_file():
        named = [(path.name, path)]  # relative to itself it is "."
    contents = {relative: read(p) for relative, p in named}
    return name, {relative: data for relative, data in contents.items() if data}, len(files)


def _of_one_kind(documents: list[Document]) -> bool:
    """Whether they are conversations.

    Raises:
      ValueError: if only some are.
    """
    first: dict[bool, Document] = {}
    for document in documents:
        first.setdefault(isinstance(document.content, dict), document)
    if len(first) == 2:
        raise ValueError(
            f"--data must hold either texts or conversations; {first[False].label} is a text and {first[True].label} has "
            "messages. Train on one after the other."
        )
    return True in first


def _fingerprint(
    contents: dict[str, bytes], files: int, tokenizer: Tokenizer, *, truncate: bool
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for relative, data in contents.items():
        relative = relative if len(contents) > 1 else "."  # an only file may be renamed
        digest.update(f"{relative}\0{len(data)}\0".encode(errors="surrogateescape") + data)
    tokens = "bytes"
    if isinstance(tokenizer, FileTokenizer):
        ids = f"{tokenizer.bos} {tokenizer.eos}".encode()
        tokens = hashlib.sha256(tokenizer.path.read_bytes() + ids).hexdigest()
    return {
        "files": files,
        "bytes": sum(map(len, contents.values())),
        "sha256": digest.hexdigest(),
        "tokenizer": tokens,
        "truncate": truncate,
        "rows": _ROWS,
    }


def _streams(
    name: str, contents: dict[str, bytes], files: int, tokenizer: Tokenizer
) -> tuple[Stream, Stream]:
    """(training, held-out) streams of files."""
    documents = [d for relative, data in contents.items() for d in documents_of(relative, data)]
    documents = [d for d in documents if d.content]
    conversations = _of_one_kind(documents)
    train, validation = _split(documents, tokenizer) if documents else ([], [])
    if not (train and validation):
        total = sum(map(len, contents.values()))
        raise ValueError(
            f"{name} holds {total} bytes in {files} files and {len(documents)} documents, too little to split; pass at "
            "least two documents, or a text of 20 bytes."
        )
    return (
        _stream(train, tokenizer, conversations=conversations, sized=False),
        _stream(validation, tokenizer, conversations=conversations, sized=True),
    )


def load_corpus(
    source: DataOptions | str | os.PathLike[str] | None = None,
    keep_in: str | os.PathLike[str] | None = None,
    check: Callable[[Tokenizer, dict[str, Any]], None] | None = None,
) -> Corpus:
    """The user's documents, or by default the sources of Python's standard library.

    A file is a document, of any bytes; a line of a ``.jsonl`` is one too, with "text" or with OpenAI-style "messages" (and "tools"),
    rendered by ``jaxmoe.chat``, of which only what the assistant says counts as a target. Of a directory hidden files are
    left out. A document is held out if the CRC-32 of its relative path, or of its line, is divisible by 20 (if that picks
    none, the last one is). Of an only text the last twentieth is held out.

    Args:
      source: options, or just a path or None.
      keep_in: folder in which the tokens of a tokenizer file are kept (``token_cache``), and found the next time.
      check: gets the tokenizer and the fingerprint before there are tokens, and raises an error if they are not wanted.

    Raises:
      ValueError: if there is no such path, too little text, or a document cannot be read: names file and line.
    """
    options = source if isinstance(source, DataOptions) else DataOptions(source)
    tokenizer = make_tokenizer(options.tokenizer)
    name, contents, files = _files(options.data)
    fingerprint = _fingerprint(contents, files, tokenizer, truncate=options.truncate)
    if check is not None:
        check(tokenizer, fingerprint)
    make = functools.partial(_streams, name, contents, files, tokenizer)
    if keep_in is None or isinstance(tokenizer, ByteTokenizer):  # bytes are made as fast as read
        train, validation = make()
    else:
        train, validation = token_cache.keep(keep_in, fingerprint, contents, make)
    return Corpus(train, validation, fingerprint, name, tokenizer, options.truncate)
