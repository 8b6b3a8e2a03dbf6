"""Tokens of one tokenizer as those of another, so that models with different vocabularies can teach each other (FedMKT, 2406.02224).

Two steps. A table says for each token of one vocabulary which token of the other is its text, or else the nearest by edit distance
(``vocabulary_map``; made once per ordered pair and kept). For each text, dynamic time warping with edit distance as cost says which positions belong
together (``align``). Where one token meets one token and the table says that they are the same, the other model's distribution is carried over;
elsewhere the text's own token is all that is known (``carry``).

Warping runs along anti-diagonals, all texts at once: T1 + T2 array operations instead of T1 * T2 steps per text.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from fed.compress import TopLogits
from fed.errors import need

_MARKERS = ("▁", "Ġ")  # what SentencePiece and byte-level BPE write for a space
_CHUNK = 4_000_000  # distances, or numbers of other kinds, that are held at once


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What each id stands for.

    Attributes:
      tokens: bytes of each id, one character per byte (Latin-1); special tokens and unused ids have names of their own, "<...>".
      special: ids that aren't text, by role ("bos", "eos", "pad") or name.
    """

    tokens: tuple[str, ...]
    special: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, size: int | None = None) -> "Vocabulary":
        """A tokenizer's vocabulary.

        Args:
          tokenizer: ``jaxmoe.tokenizer.ByteTokenizer`` or ``FileTokenizer``.
          size: the model's ``vocab_size``, if it has more ids than the tokenizer; those are unused.

        Raises:
          ValueError: if the model has fewer ids.
        """
        path = getattr(tokenizer, "path", None)
        tokens, special = _byte_tokens(tokenizer) if path is None else _file_tokens(tokenizer)
        size = len(tokens) if size is None else size
        if size < len(tokens):
            raise ValueError(
                f"size must be at least the tokenizer's {len(tokens)} ids; got {size}. Give the model as many."
            )
        tokens += [f"<unused {i}>" for i in range(len(tokens), size)]
        return cls(tuple(tokens), tuple(sorted(special.items())))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything in it."""
        text = json.dumps([self.tokens, self.special])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens, {self.fingerprint[:8]})"


def _byte_tokens(tokenizer: Any) -> tuple[list[str], dict[str, int]]:
    special = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    names = {number: f"<{name}>" for name, number in special.items()}
    last = tokenizer.vocab_size
    more = [names.get(i, f"<unused {i}>") for i in range(256, last)]
    return [chr(i) for i in range(256)] + more, special


def _file_tokens(tokenizer: Any) -> tuple[list[str], dict[str, int]]:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    byte_level = "ByteLevel" in json.dumps(
        [json.loads(backend.to_str()).get(k) for k in ("decoder", "pre_tokenizer")]
    )
    added = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
    tokens = [f"<unused {i}>" for i in range(tokenizer.vocab_size)]
    for text, number in backend.get_vocab(with_added_tokens=True).items():
        tokens[number] = f"<{text}>" if number in added else _as_bytes(text, byte_level)
    special = {name: number for number, name in added.items()}
    for role, name in (("bos", "bos"), ("eos", "eos")):
        try:
            number = getattr(tokenizer, name)
        except ValueError:  # it has no such token
            continue
        if number is not None:
            special[role] = number
    return tokens, special


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _as_bytes(token: str, byte_level: bool) -> str:
    if byte_level and all(c in _byte_level_alphabet() for c in token):
        return "".join(chr(_byte_level_alphabet()[c]) for c in token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback
        return chr(int(token[3:5], 16))
    for marker in _MARKERS:
        token = token.replace(marker, " ")
    return token.encode().decode("latin-1")


# -- tables ----------------------------------------------------------------------------------------


def check_same_vocabulary(server: Vocabulary, client: Vocabulary, name: str = "client") -> None:
    """Raises ValueError if the two differ, for those who exchange logits without aligning them."""
    if server.fingerprint != client.fingerprint:
        raise ValueError(
            f"{name}'s vocabulary ({len(client)} tokens) must be the server's ({len(server)} tokens); give both one tokenizer, or align "
            "them (fed.language does with align=True)."
        )


_RULE = "prefix"  # of ties, in the names of kept tables: another one makes others
_kept: dict[tuple[str, str], np.ndarray] = {}


def vocabulary_map(
    source: Vocabulary, target: Vocabulary, *, cache: str | os.PathLike[str] | None = None
) -> Int[np.ndarray, " V1"]:
    """For each id of ``source``, the id of ``target`` that is its text, or is nearest to it by edit distance.

    Among equals one with which the source begins wins (what a model says of a position begins there), then the lowest id. Special tokens go to those of the same role, or to none (-1), as unused ids do. Remembered in this process
    for each ordered pair.

    Args:
      source: V1 tokens.
      target: V2 tokens.
      cache: directory of tables that outlive the process.

    Returns:
      int32 [V1], -1 where there is no counterpart.

    Raises:
      ValueError: if a cached file is another pair's, or damaged; for a target without text tokens.

    Example:
      >>> a, b = Vocabulary(("the", " cat", "dog")), Vocabulary((" cats", "the", "o", "d"))
      >>> vocabulary_map(a, b).tolist(), vocabulary_map(a, a).tolist()
      ([1, 0, 3], [0, 1, 2])
    """
    key = (source.fingerprint, target.fingerprint)
    if key not in _kept:
        file = (
            None
            if cache is None
            else pathlib.Path(cache) / f"{key[0][:16]}-{key[1][:16]}-{_RULE}.npy"
        )
        if file is not None and file.is_file():
            _kept[key] = _load_table(file, source, target)
        else:
            _kept[key] = _make_table(source, target)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_suffix(".tmp.npy")
                np.save(temporary, _kept[key])
                temporary.replace(file)
    return _kept[key]


def _load_table(file: pathlib.Path, source: Vocabulary, target: Vocabulary) -> np.ndarray:
    try:
        table = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it.") from None
    if table.shape != (len(source),) or table.dtype != np.int32 or table.max() >= len(target):
        raise ValueError(
            f"{file} is not the table of {len(source)} tokens to {len(target)}; remove it."
        )
    return table


def _make_table(source: Vocabulary, target: Vocabulary) -> np.ndarray:
    if source.fingerprint == target.fingerprint:
        return np.arange(len(source), dtype=np.int32)
    table = np.full(len(source), -1, np.int32)
    hidden = {number for _, number in target.special}
    hidden |= {i for i, t in enumerate(target.tokens) if t.startswith("<unused ") or not t}
    places: dict[str, int] = {}
    for i, token in enumerate(target.tokens):
        if i not in hidden:
            places.setdefault(token, i)
    roles, own = dict(target.special), {number for _, number in source.special}
    for role, number in source.special:
        if role in roles and table[number] < 0:
            table[number] = roles[role]
    left = []
    for i, token in enumerate(source.tokens):
        if i in own or not token or token.startswith("<unused "):
            continue
        table[i] = places.get(token, -1)
        if table[i] < 0:
            left.append(i)
    names, numbers = list(places), np.fromiter(places.values(), np.int32, len(places))
    if left and not names:
        raise ValueError("the target vocabulary has no text tokens; check its tokenizer.")
    step = max(1, _CHUNK // max(len(names), 1))
    for begin in range(0, len(left), step):
        some = left[begin : begin + step]
        distances = edit_distances([source.tokens[i] for i in some], names)
        for i, row in zip(some, distances, strict=True):
            ties = np.flatnonzero(row == row.min())
            begins = [j for j in ties if source.tokens[i].startswith(names[j])]
            table[i] = numbers[begins[0] if begins else ties[0]]
    return table


def edit_distances(a: list[str], b: list[str]) -> Int[np.ndarray, "A B"]:
    """Levenshtein distances of all pairs, on all cores (RapidFuzz)."""
    scorer = need("rapidfuzz.distance", "fed").Levenshtein.distance
    cdist = need("rapidfuzz.process", "fed").cdist
    return cdist(a, b, scorer=scorer, dtype=np.int32, workers=-1)


# -- sequences -------------------------------------------------------------------------------------


def token_costs(
    a: Int[np.ndarray, "B T1"], b: Int[np.ndarray, "B T2"], first: Vocabulary, second: Vocabulary
) -> Int[np.ndarray, "B T1 T2"]:
    """Edit distance of the tokens at each pair of positions; each pair of different tokens is compared once. Ids below zero cost 0."""
    (rows, at), (columns, bt) = (np.unique(np.maximum(x, 0), return_inverse=True) for x in (a, b))
    table = edit_distances([first.tokens[i] for i in rows], [second.tokens[i] for i in columns])
    return table[at.reshape(a.shape)[:, :, None], bt.reshape(b.shape)[:, None, :]]


def warp(
    costs: Shaped[np.ndarray, "B T1 T2"],
    lengths1: Int[np.ndarray, " B"] | None = None,
    lengths2: Int[np.ndarray, " B"] | None = None,
) -> tuple[Shaped[np.ndarray, " B"], Int[np.ndarray, "B S"], Int[np.ndarray, "B S"]]:
    """Dynamic time warping of B pairs of sequences, anti-diagonal by anti-diagonal.

    A path begins at the first positions of both and ends at their last; each step advances one or both, both if that is as cheap, else the first.

    Args:
      costs: of each pair of positions, numbers >= 0.
      lengths1: of the first sequences, from 1 to T1; default T1.
      lengths2: of the second ones, from 1 to T2; default T2.

    Returns:
      (least cost of a path, positions in the first along the path, positions in the second). S = T1 + T2 - 1; -1 beyond a path's end.

    Raises:
      ValueError: for lengths that are zero or beyond the costs.

    Example:
      >>> cost, i, j = warp(np.abs(np.array([[0, 1, 2]])[:, :, None] - np.array([[0, 2, 2]])[:, None, :]))
      >>> int(cost[0]), i[0].tolist(), j[0].tolist()
      (1, [0, 1, 2, -1, -1], [0, 1, 2, -1, -1])
    """
    batch, t1, t2 = costs.shape
    n = np.full(batch, t1) if lengths1 is None else np.asarray(lengths1)
    m = np.full(batch, t2) if lengths2 is None else np.asarray(lengths2)
    if (n < 1).any() or (m < 1).any() or (n > t1).any() or (m > t2).any():
        raise ValueError(
            f"lengths must be from 1 to {t1} and 1 to {t2}; got {n.tolist()} and {m.tolist()}. Leave empty texts out."
        )
    kind = np.float32 if np.issubdtype(costs.dtype, np.floating) else np.int32
    far = np.array(np.inf if kind is np.float32 else 2**30, kind)
    moves = np.zeros((t1 + t2 - 1, batch, t1), np.uint8)
    total = np.zeros(batch, kind)
    # Index i + 1 of a diagonal d is the cell (i, d - i); a border of ``far`` stands before i = 0.
    before, last = (np.full((batch, t1 + 1), far, kind) for _ in range(2))
    place = np.arange(t1)
    for d in range(t1 + t2 - 1):
        low, high = max(0, d - t2 + 1), min(d, t1 - 1) + 1
        now = np.full((batch, t1 + 1), far, kind)
        cells = costs[:, place[low:high], d - place[low:high]]
        both, first, second = before[:, low:high], last[:, low:high], last[:, low + 1 : high + 1]
        least = np.minimum(np.minimum(both, first), second)
        moves[d, :, low:high] = np.where(both <= least, 0, np.where(first <= least, 1, 2))
        now[:, low + 1 : high + 1] = cells + (0 if d == 0 else least)
        ending = n + m - 2 == d
        total[ending] = now[ending, n[ending]]
        before, last = last, now
    return total, *_path(moves, n, m)


def _path(moves: np.ndarray, n: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paths from their ends back, all at once, then turned round."""
    steps, batch = len(moves), moves.shape[1]
    i, j, row = n - 1, m - 1, np.arange(batch)
    back = np.full((2, steps, batch), -1, np.int64)
    live = np.ones(batch, bool)
    for step in range(steps):
        back[0, step, live], back[1, step, live] = i[live], j[live]
        at = np.maximum(i, 0)
        move = moves[np.maximum(i + j, 0), row, at]
        live = live & (i + j > 0)
        i = np.where(live & (move != 2), i - 1, i)
        j = np.where(live & (move != 1), j - 1, j)
    size = (back[0] >= 0).sum(0)
    order = size[None, :] - 1 - np.arange(steps)[:, None]
    turned = np.take_along_axis(back, np.maximum(order, 0)[None], axis=1)
    turned = np.where(order[None] >= 0, turned, -1)
    return turned[0].T.astype(np.int32), turned[1].T.astype(np.int32)


def align(
    base: Int[np.ndarray, "B T1"],
    other: Int[np.ndarray, "B T2"],
    base_vocabulary: Vocabulary,
    other_vocabulary: Vocabulary,
    lengths1: Int[np.ndarray, " B"] | None = None,
    lengths2: Int[np.ndarray, " B"] | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
) -> Int[np.ndarray, "B T1"]:
    """For each token of ``base`` the position of the same token in ``other``, or -1.

    Args:
      base: token ids of texts.
      other: the same texts in the other vocabulary.
      base_vocabulary: of ``base``.
      other_vocabulary: of ``other``.
      lengths1: tokens of each text in ``base``; default T1.
      lengths2: in ``other``; default T2.
      cache: as of ``vocabulary_map``.

    Returns:
      int32; j >= 0 only where position i is on the path with j alone and j with i alone, and the table has j's token as i's.

    Raises:
      ValueError: for empty texts, and as of ``vocabulary_map``.
    """
    if base_vocabulary.fingerprint == other_vocabulary.fingerprint and np.array_equal(base, other):
        place = np.arange(base.shape[1], dtype=np.int32)
        end = base.shape[1] if lengths1 is None else np.asarray(lengths1)[:, None]
        return np.where(place < end, place, -1) * np.ones((len(base), 1), np.int32)
    table = vocabulary_map(other_vocabulary, base_vocabulary, cache=cache)
    vocabularies = (base_vocabulary, other_vocabulary)
    size = max(1, _CHUNK // max(base.shape[1] * other.shape[1], 1))
    found = np.full(base.shape, -1, np.int32)
    for begin in range(0, len(base), size):
        block = slice(begin, begin + size)
        lengths = [None if x is None else np.asarray(x)[block] for x in (lengths1, lengths2)]
        found[block] = _align(base[block], other[block], table, vocabularies, lengths)
    return found


def _align(
    base: Int[np.ndarray, "B T1"],
    other: Int[np.ndarray, "B T2"],
    table: Int[np.ndarray, " V2"],
    vocabularies: tuple[Vocabulary, Vocabulary],
    lengths: list[np.ndarray | None],
) -> Int[np.ndarray, "B T1"]:
    """A block of texts of ``align``; its costs [B, T1, T2] exist at once."""
    _, i, j = warp(token_costs(base, other, *vocabularies), *lengths)
    rows, on = np.nonzero(i >= 0)
    i, j = i[rows, on], j[rows, on]
    uses1, uses2 = np.zeros(base.shape, np.int32), np.zeros(other.shape, np.int32)
    np.add.at(uses1, (rows, i), 1)
    np.add.at(uses2, (rows, j), 1)
    same = (uses1[rows, i] == 1) & (uses2[rows, j] == 1) & (table[other[rows, j]] == base[rows, i])
    found = np.full(base.shape, -1, np.int32)
    found[rows[same], i[same]] = j[same]
    return found


def carry(
    top: TopLogits,
    positions: Int[Array | np.ndarray, "B T1"],
    table: Int[Array | np.ndarray, " V2"],
    targets: Int[Array | np.ndarray, "B T1"],
    vocab_size: int,
) -> TopLogits:
    """Distributions of the other model on the base vocabulary, at the base positions.

    Args:
      top: [B, T2, k] over the other vocabulary, where position j is the distribution *of* token j.
      positions: of ``align``.
      table: ``vocabulary_map`` from the other vocabulary to the base one.
      targets: the base tokens; where nothing is carried, the token itself has all the mass.
      vocab_size: of the base.

    Returns:
      [B, T1, k]. Tokens that the table makes one have the sum of their probabilities.
    """
    size = max(1, _CHUNK // max(np.shape(positions)[1] * top.k**2, 1))
    parts = []
    for begin in range(0, len(top.ids), size):
        x = [a[begin : begin + size] for a in (top.log_probs, top.ids, positions, targets)]
        parts.append(_carry(*map(jnp.asarray, x), jnp.asarray(table)))
    values, ids = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    return TopLogits(values, ids, vocab_size)


@jax.jit
def _carry(
    log_probs: Float[Array, "B T2 k"],
    theirs: Int[Array, "B T2 k"],
    positions: Int[Array, "B T1"],
    targets: Int[Array, "B T1"],
    table: Int[Array, " V2"],
) -> tuple[Float[Array, "B T1 k"], Int[Array, "B T1 k"]]:
    """A block of texts of ``carry``, whose pairs of tokens [B, T1, k, k] exist at once: (log-probabilities, ids)."""
    at = jnp.maximum(positions, 0)[..., None]
    ids = table[jnp.take_along_axis(theirs, at, axis=1)]
    values = jnp.take_along_axis(log_probs, at, axis=1)
    probs = jnp.where(ids >= 0, jnp.exp(values), 0.0)
    same = (ids[..., :, None] == ids[..., None, :]) & (ids >= 0)[..., None, :]
    k = ids.shape[-1]
    earlier = jnp.tril(jnp.ones((1, 1, k, k), bool), -1)
    first = ~(same & earlier).any(-1) & (ids >= 0)
    merged = jnp.where(first, jnp.where(same, probs[..., None, :], 0.0).sum(-1), 0.0)
    alone = jnp.zeros((1, 1, k), jnp.float32).at[..., 0].set(1.0)
    none = (positions < 0)[..., None]
    ids = jnp.where(none, targets[..., None], jnp.maximum(ids, 0))
    # log(0) only where nothing is sent; the gradient isn't needed here.
    return jnp.log(jnp.where(none, alone, merged)), ids.astype(jnp.int32)
