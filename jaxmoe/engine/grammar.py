"""Output that must satisfy a JSON schema: which tokens may come next, by the llguidance library."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.tokenizer import ByteTokenizer, FileTokenizer


def _library() -> Any:
    try:
        import llguidance.numpy
    except ImportError as error:
        raise ValueError(
            "json_schema needs the extra 'serve': pip install 'jaxmoe[serve]'."
        ) from error
    return llguidance


class _ByteVocabulary:
    """The byte tokenizer as llguidance wants to see it."""

    def __init__(self, size: int, eos: int):
        self.eos_token_id, self.bos_token_id = eos, None
        special = range(256, size)
        self.tokens = [bytes([i]) for i in range(256)] + [b"<%d>" % i for i in special]
        self.special_token_ids = list(special)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@functools.lru_cache(maxsize=8)
def _vocabulary(path: str | None, size: int, eos: tuple[int, ...]) -> Any:
    """llguidance's view of a tokenizer; costly for large vocabularies, so made once."""
    library = _library()
    if path is None:
        return library.LLTokenizer(library.TokenizerWrapper(_ByteVocabulary(size, eos[0])))
    return library.LLTokenizer(path, n_vocab=size, eos_token=list(eos))


class Grammar:
    """Where one request's output stands in its grammar."""

    def __init__(self, schema: str, vocabulary: Any):
        library = _library()
        # No free white space: a model could go on with it for ever.
        grammar = library.LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": False}
        )
        self._matcher = library.LLMatcher(vocabulary, grammar)
        if self._matcher.is_error():
            raise ValueError(
                f"json_schema cannot be enforced: {self._matcher.get_error()}; simplify the schema."
            )
        self._mask = library.numpy.allocate_token_bitmask(1, vocabulary.vocab_size)
        self._fill = library.numpy.fill_next_token_bitmask

    @property
    def complete(self) -> bool:
        """Whether nothing more may come."""
        return self._matcher.is_stopped()

    def forbid(self, bias: np.ndarray, after: Sequence[int] = ()) -> None:
        """Sets ``bias`` [V] to -inf for every token that may not come next, in place.

        Args:
          bias: changed.
          after: guessed tokens that are taken for granted. Behind one that may not come the result means nothing.
        """
        guessed = self._matcher.try_consume_tokens(list(after)) if after else 0
        self._fill(self._matcher, self._mask, 0)
        if guessed:
            self._matcher.rollback(guessed)
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little").astype(bool)
        size = min(len(bias), len(allowed))
        bias[:size][~allowed[:size]] = -np.inf
        bias[size:] = -np.inf

    def take(self, token: int) -> None:
        """Notes the token that came."""
        self._matcher.consume_token(token)


def start(
    schema: str | None,
    tokenizer: ByteTokenizer | FileTokenizer,
    config: ModelConfig,
    eos: frozenset[int],
) -> Grammar | None:
    """The grammar of a request, or None without a schema.

    Raises:
      ValueError: for text that is no JSON, or a schema that cannot be enforced.
    """
    if schema is None:
        return None
    try:
        parsed = json.loads(schema)
    except ValueError as error:
        raise ValueError(
            f"json_schema is no JSON ({error}); pass the schema as JSON text."
        ) from None
    if not isinstance(parsed, dict | bool):
        raise ValueError(f"json_schema must be an object; got {type(parsed).__name__}.")
    path = str(tokenizer.path) if isinstance(tokenizer, FileTokenizer) else None
    end = tuple(sorted(eos)) or (config.vocab_size - 1,)
    return Grammar(schema, _vocabulary(path, config.vocab_size, end))
