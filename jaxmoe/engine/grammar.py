"""Output that must have a given form: which tokens may come next, by the llguidance library.

A form is put together from the classes below, such as ``Chain((Literal("yes "), Json("{}")))``. It becomes one grammar for
a tokenizer, in which text that is a special token is that token.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.tokenizer import ByteTokenizer, FileTokenizer

# Limits on what a stranger may have compiled: the library is native code that recurses, and has been seen to overflow its
# stack, which ends the process. (Integer constants of -2^63; chains of references: 1000 levels passed, 2000 did not.)
MAX_SCHEMA_LENGTH = 1 << 16  # characters
MAX_SCHEMA_NUMBER = 2**53  # beyond it JSON's numbers are not the same everywhere anyway
MAX_SCHEMA_LEVELS = 1024  # of nesting, if every reference went through all of it
MAX_GRAMMAR_LENGTH = 1 << 18  # characters; that many compile in less than a second
MAX_EXPRESSIONS = 250_000  # that regular expressions become before the first token: about 70 ms, in the submitting thread
MAX_STEP_EXPRESSIONS = 50_000  # for one token later on: about 10 ms, in which all requests wait

_SUSPECTS = 32  # schemas that are looked at to name the one at fault
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def _library() -> Any:
    try:
        import llguidance.numpy
    except ImportError as error:
        raise ValueError(
            "an output of a given form needs the extra 'serve': pip install 'jaxmoe[serve]'."
        ) from error
    return llguidance


# -- forms -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Literal:
    """This text."""

    text: str


@dataclass(frozen=True)
class Json:
    """JSON that satisfies a schema; without white space, which a model could go on with for ever.

    Attributes:
      schema: JSON text.
      name: what messages about the schema call it.
      spaced: a space after every comma and colon, as ``json.dumps`` writes it.
    """

    schema: str
    name: str = "json_schema"
    spaced: bool = False

    def __post_init__(self):
        check_schema(self.schema, self.name)


@dataclass(frozen=True)
class Text:
    """Any text up to and with the first ``end``; without one, up to the end of the output.

    Attributes:
      end: see above.
      without: what the text before ``end`` must not contain.
      least, most: characters before ``end``.
    """

    end: str | None
    without: tuple[str, ...] = ()
    least: int = 0
    most: int | None = None


@dataclass(frozen=True)
class Chain:
    """One after another."""

    parts: tuple["Form", ...]


@dataclass(frozen=True)
class OneOf:
    """One of several."""

    parts: tuple["Form", ...]


@dataclass(frozen=True)
class Repeat:
    """Once or more often."""

    part: "Form"


Form = Literal | Json | Text | Chain | OneOf | Repeat


def check_schema(schema: str, name: str) -> None:
    """Refuses what is no schema, and what is too large for the library.

    Raises:
      ValueError: begins with ``name``.
    """
    if len(schema) > MAX_SCHEMA_LENGTH:
        raise ValueError(
            f"{name} must have at most {MAX_SCHEMA_LENGTH} characters; got {len(schema)}. Simplify it."
        )
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON ({error}); pass the schema as JSON text.") from None
    if not isinstance(parsed, dict | bool):
        raise ValueError(f"{name} must be an object; got {type(parsed).__name__}.")
    depth, references, level = 0, 0, [parsed]
    while level:
        depth += 1
        references += sum(
            key in node for node in level if isinstance(node, dict) for key in _REFERENCES
        )
        below = []
        for node in level:
            if isinstance(node, dict | list):
                below += node.values() if isinstance(node, dict) else node
            elif isinstance(node, int | float) and not abs(node) <= MAX_SCHEMA_NUMBER:
                raise ValueError(
                    f"{name} must have no numbers beyond 2^53; got {node}. Leave the bound out."
                )
        level = below
    if depth * (references + 1) > MAX_SCHEMA_LEVELS:
        raise ValueError(
            f"{name} must have at most {MAX_SCHEMA_LEVELS} levels, counted as depth x (references + 1); "
            f"got {depth} x {references + 1}. Simplify it."
        )


# -- forms to a grammar ------------------------------------------------------------------------------


def _spell(text: str) -> str:
    """``text`` within a regular expression between slashes."""
    plain = (c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):X}}}" for c in text)
    return "".join(plain)


def _json_grammar(form: Json) -> str:
    parsed = json.loads(form.schema)
    if isinstance(parsed, bool):
        parsed = {} if parsed else {"not": {}}
    options: dict[str, Any] = {"whitespace_flexible": False}
    if form.spaced:
        options |= {"item_separator": ", ", "key_separator": ": "}
    return "%json " + json.dumps(parsed | {"x-guidance": options})


class _Writer:
    """Writes a form as a grammar in llguidance's dialect of Lark: one rule for each different part.

    Args:
      split: cuts a text into special tokens and what is between them.
    """

    def __init__(self, split: Callable[[str], Iterator[str | int]]):
        self._split = split
        self._rules: dict[Form, str] = {}
        self._lines: list[str] = []

    def write(self, form: Form) -> str:
        """The grammar."""
        return "\n".join([f"start: {self._rule(form)}", *self._lines])

    def _rule(self, form: Form) -> str:
        """The name of the rule for ``form``."""
        if form not in self._rules:
            body = self._body(form)
            name = self._rules[form] = f"r{len(self._rules)}"
            self._lines.append(f"{name}{body}")
        return self._rules[form]

    def _body(self, form: Form) -> str:
        match form:
            case Literal(text):
                return ": " + self._literal(text)
            case Json():
                return ": " + _json_grammar(form)
            case Chain(parts):
                return ": " + " ".join(map(self._rule, parts))
            case OneOf(parts):
                return ": " + " | ".join(map(self._rule, parts))
            case Repeat(part):
                return f": {self._rule(part)}+"
            case Text():
                return self._text(form)

    def _literal(self, text: str) -> str:
        parts = (
            f"<[{part}]>" if isinstance(part, int) else json.dumps(part)
            for part in self._split(text)
        )
        return " ".join(parts) or '""'

    def _text(self, form: Text) -> str:
        end = list(self._split(form.end or ""))
        if any(isinstance(part, int) for part in end[1:]):
            raise ValueError(
                f"form: the end {form.end!r} of a text has a special token inside, behind which text cannot be told "
                "from the end; use a tokenizer in which that token is none."
            )
        as_token = bool(end) and isinstance(end[0], int)
        # A special token is no text; but its characters may be spelled out.
        without = (*form.without, form.end) if as_token else form.without
        name = f"T{len(self._lines)}"
        most = "" if form.most is None else form.most
        self._lines.append(f"{name}: /(?s:.{{{form.least},{most}}})/{_excluding(without)}")
        if not end:
            return f": {name}"
        if as_token:
            return f": {name} {self._literal(form.end)}"
        self._lines.append(f"{name}_END: {name} {self._literal(form.end)}")
        return f"[lazy]: {name}_END"


def _excluding(texts: tuple[str, ...]) -> str:
    if not texts:
        return ""
    return f" & ~/(?s:.*)({'|'.join(map(_spell, texts))})(?s:.*)/"


# -- tokens ------------------------------------------------------------------------------------------


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


def _split(
    text: str, tokenizer: ByteTokenizer | FileTokenizer, vocabulary: Any
) -> Iterator[str | int]:
    """Special tokens of ``text``, as the library sees them, and the texts between them."""
    if isinstance(tokenizer, FileTokenizer):
        for token in tokenizer.encode(text, bos=False):
            if vocabulary.is_special_token(token):
                before, text = text.split(vocabulary.decode_bytes([token]).decode(), 1)
                yield from [before] if before else []
                yield token
    yield from [text] if text else []


class Grammar:
    """Where one request's output stands in its form.

    Raises:
      ValueError: names the schema that cannot be enforced, or takes too much work at its first token.
    """

    def __init__(self, form: Form, tokenizer: ByteTokenizer | FileTokenizer, vocabulary: Any):
        split = functools.partial(_split, tokenizer=tokenizer, vocabulary=vocabulary)
        self._matcher, self._mask = _matcher(_Writer(split).write(form), vocabulary)
        error = _first_error(self._matcher, self._mask)
        if error is not None:
            name, error = _blame(form, vocabulary) or ("form", error)
            raise ValueError(f"{name} cannot be enforced: {error}; simplify the schema.")

    @property
    def error(self) -> str | None:
        """Why the form can no longer be enforced; what comes from then on means nothing."""
        return _error(self._matcher)

    @property
    def complete(self) -> bool:
        """Whether nothing more may come."""
        return self._matcher.is_stopped() and self.error is None

    def forbid(self, bias: np.ndarray, after: Sequence[int] = ()) -> None:
        """Sets ``bias`` [V] to -inf for every token that may not come next, in place.

        Args:
          bias: changed.
          after: guessed tokens that are taken for granted. Behind one that may not come the result means nothing.
        """
        guessed = self._matcher.try_consume_tokens(list(after)) if after else 0
        allowed = _allowed(self._matcher, self._mask)
        if guessed:
            self._matcher.rollback(guessed)
        size = min(len(bias), len(allowed))
        bias[:size][~allowed[:size]] = -np.inf
        bias[size:] = -np.inf

    def take(self, token: int) -> None:
        """Notes the token that came."""
        self._matcher.consume_token(token)


def _matcher(grammar: str, vocabulary: Any) -> tuple[Any, np.ndarray]:
    """The library's state of a grammar, and room for its masks."""
    if len(grammar) > MAX_GRAMMAR_LENGTH:
        raise ValueError(
            f"Schemas must together have at most {MAX_GRAMMAR_LENGTH} characters as a grammar; got {len(grammar)}. "
            "Simplify them, or leave some out."
        )
    library = _library()
    limits = library.LLParserLimits(
        initial_lexer_fuel=MAX_EXPRESSIONS,
        step_lexer_fuel=MAX_STEP_EXPRESSIONS,
        verbose_errors=False,
    )
    lark = library.LLMatcher.grammar_from_lark(grammar)
    matcher = library.LLMatcher(vocabulary, lark, log_level=0, limits=limits)
    return matcher, library.numpy.allocate_token_bitmask(1, vocabulary.vocab_size)


def _allowed(matcher: Any, mask: np.ndarray) -> np.ndarray:
    """[V] bool: the tokens that may come next. Overwrites ``mask``."""
    _library().numpy.fill_next_token_bitmask(matcher, mask, 0)
    return np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)


def _error(matcher: Any) -> str | None:
    if not matcher.is_error():
        return None
    # Below the first line the library quotes the grammar, or a backtrace.
    return matcher.get_error().strip().splitlines()[0][:300].rstrip(":. ")


def _first_error(matcher: Any, mask: np.ndarray) -> str | None:
    """What is wrong up to the first token. That token's mask can be most of the work of a form."""
    if matcher.is_error():
        return _error(matcher)
    first = np.flatnonzero(_allowed(matcher, mask))
    # The library tells that a mask was too much work only when the next token comes.
    ahead = matcher.deep_copy()
    ahead.consume_tokens(first[:1].tolist())
    return _error(ahead)


def _schemas(form: Form) -> Iterator[Json]:
    match form:
        case Json():
            yield form
        case Chain(parts) | OneOf(parts):
            for part in parts:
                yield from _schemas(part)
        case Repeat(part):
            yield from _schemas(part)


def _blame(form: Form, vocabulary: Any) -> tuple[str, str] | None:
    """The name of the first schema at fault and what the library says of it, if one is on its own."""
    for part in itertools.islice(_schemas(form), _SUSPECTS):
        error = _first_error(*_matcher("start: " + _json_grammar(part), vocabulary))
        if error is not None:
            return part.name, error
    return None


def start(
    form: Form | None,
    tokenizer: ByteTokenizer | FileTokenizer,
    config: ModelConfig,
    eos: frozenset[int],
) -> Grammar | None:
    """The grammar of a request whose output must have ``form``; None for None.

    Raises:
      ValueError: for a form that cannot be enforced.
    """
    if form is None:
        return None
    path = str(tokenizer.path) if isinstance(tokenizer, FileTokenizer) else None
    end = tuple(sorted(eos)) or (config.vocab_size - 1,)
    return Grammar(form, tokenizer, _vocabulary(path, config.vocab_size, end))
