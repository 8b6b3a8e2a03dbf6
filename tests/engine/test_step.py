"""The engine's step: a token's logits are the same whoever shares its step, bit for bit on the C++ kernels."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.clear import clear_case, sharp_params

import jaxmoe
from jaxmoe.cache import init_cache
from jaxmoe.engine.step import Batch, StepResult, make_program, pack, tiles_of
from pallas_kernels import native, paged

TOLERANCE = 1e-5  # as in test_decode.py
# Root mean square of what rounding makes of logits of deviation 0.7, where every choice of a key or an expert may tip.
ROUNDING = {"rows in bfloat16": 0.15, "rows in fp8": 0.3}
SEQUENCES, LENGTH, PAGE = 3, 24, 4
WIDTH = LENGTH // PAGE  # pages of a sequence
PAGES = 2 * SEQUENCES * WIDTH  # in all: half of them stay unused
SIZES = (
    1,
    7,
    LENGTH,
)  # tokens of a compiled step: odd, and neither a multiple of the vectors nor of the tiles

_MLA = jaxmoe.presets["tiny"].replace(
    num_nextn_predict_layers=0, num_hidden_layers=2, index_topk=16, max_position_embeddings=128
)
CASES = {
    "16 of 24 keys selected": _MLA,
    "all keys selected": _MLA.replace(index_topk=64),
    "selections shared between layers": _MLA.replace(
        num_hidden_layers=3,
        indexer_types=("full", "shared", "full"),
        indexer_rope_interleave=True,
        first_k_dense_replace=0,
    ),
    "no indexer, query latent or expert groups": _MLA.replace(
        q_lora_rank=None,
        index_topk=None,
        index_n_heads=None,
        index_head_dim=None,
        n_group=1,
        topk_group=1,
    ),
    "no experts": _MLA.replace(
        n_routed_experts=None,
        num_experts_per_tok=None,
        moe_intermediate_size=None,
        n_shared_experts=0,
        n_group=1,
        topk_group=1,
    ),
}
LLAMA = "grouped queries"
ROUNDED = {"rows in bfloat16": "bfloat16", "rows in fp8": "fp8"}  # the cache's format
ALL = CASES | {
    **dict.fromkeys(ROUNDED, _MLA),
    LLAMA: jaxmoe.ModelConfig(
        vocab_size=80,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_interleave=False,
    ),
}


FALLBACK = ("16 of 24 keys selected", "rows in fp8", LLAMA)


@pytest.fixture(scope="module", autouse=True, params=["native", "xla"])
def backend(request):
    """Every test on the C++ kernels and on their fallback."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "xla":
            patch.setattr(native, "_refusal", lambda: "switched off by the test")
            patch.setattr(paged, "BLOCK_ROWS", 2 * PAGE)  # LENGTH takes three blocks
        elif not native.available():
            pytest.skip("no C++ compiler")
        _forget_compiled()
        # Bits are promised with LLVM's optimisations too; the fallback only has a tolerance to keep.
        jax.config.update("jax_disable_most_optimizations", request.param == "xla")
        yield request.param
        jax.config.update("jax_disable_most_optimizations", False)
        _forget_compiled()


@pytest.fixture(autouse=True)
def _fewer_on_the_fallback(request, backend, slow_too):
    """The fallback shares its code between most cases: some would only compile the same again."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if backend == "xla" and name not in (None, *FALLBACK) and not slow_too:
        pytest.skip("the fallback runs the cases that differ for it; make test-all runs all")


def _forget_compiled():
    make_program.cache_clear()
    _alone.cache_clear()
    jax.clear_caches()


@functools.cache
def _model(name: str):
    """(params, config, tokens [B, T], logits of the whole sequences)."""
    params = sharp_params(ALL[name])
    return params, ALL[name], *clear_case(params, ALL[name], (SEQUENCES, LENGTH))


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next ``count`` tokens of a sequence."""

    sequence: int
    count: int


class Feeder:
    """Feeds pieces of a case's sequences to the engine's program over a cache that is NaN where nothing was written.

    Args:
      name: the case.
      pages: [B, WIDTH] of the sequences; default in order.
    """

    def __init__(self, name: str, pages: np.ndarray | None = None):
        self.params, self.config, self.tokens, _ = _model(name)
        self.program = make_program(self.config, None)
        entries = init_cache(self.config, PAGES, PAGE, ROUNDED.get(name, "float32")).entries
        # In 8 bits all ones are NaN, too: every code, scale and bfloat16 number.
        self.entries = jax.tree.map(
            lambda x: jnp.full_like(x, 255 if x.dtype == jnp.uint8 else np.nan), entries
        )
        default = np.arange(SEQUENCES * WIDTH).reshape(SEQUENCES, WIDTH)
        self.pages = np.asarray(default if pages is None else pages, np.int32)
        self.computed = np.zeros(SEQUENCES, int)

    def batch(self, pieces: list[Piece], size: int, before: int = 0) -> Batch:
        """The pieces one after another, with padding before and after them."""
        tokens, slots, lengths = (np.zeros(size, np.int32) for _ in range(3))
        positions = np.full(size, -1, np.int32)
        spans = np.stack([np.arange(size), np.arange(1, size + 1)], -1).astype(np.int32)
        first = before
        for piece in pieces:
            start, end = self.computed[piece.sequence], first + piece.count
            tokens[first:end] = self.tokens[piece.sequence, start : start + piece.count]
            slots[first:end], lengths[first:end] = piece.sequence, start
            positions[first:end] = np.arange(start, start + piece.count)
            spans[first:end, 0] = first
            first = end
        # Pages of tokens to come are not known yet, as in the engine.
        known = -(-(self.computed + [self._count(pieces, i) for i in range(SEQUENCES)]) // PAGE)
        tables = np.where(np.arange(WIDTH) < known[:, None], self.pages, -1).astype(np.int32)
        rows = np.arange(size, dtype=np.int32)
        tiles = tiles_of([piece.count for piece in pieces], size, SEQUENCES, before)
        return Batch(tokens, slots, lengths, spans, positions, tables, rows, tiles)

    @staticmethod
    def _count(pieces: list[Piece], sequence: int) -> int:
        return sum(piece.count for piece in pieces if piece.sequence == sequence)

    def compute(self, batch: Batch) -> StepResult:
        return self.program.compute(self.params, self.entries, batch, None)

    def step(self, pieces: list[Piece], size: int, before: int = 0) -> list[np.ndarray]:
        """Computes and commits; logits [count, V] of each piece."""
        batch = self.batch(pieces, size, before)
        result = self.compute(batch)
        self.entries = self.program.commit(self.entries, result.entries, batch)
        for piece in pieces:
            self.computed[piece.sequence] += piece.count
        ends = before + np.cumsum([piece.count for piece in pieces])
        logits = np.asarray(result.logits)
        return [logits[e - p.count : e] for e, p in zip(ends, pieces, strict=True)]


@functools.cache
def _alone(name: str) -> np.ndarray:
    """Logits [B, T, V] of every sequence, its prompt in one step of its own."""
    feeder = Feeder(name)
    return np.stack([feeder.step([Piece(b, LENGTH)], LENGTH)[0] for b in range(SEQUENCES)])


def _assert_same(backend: str, name: str, actual: np.ndarray, expected: np.ndarray, where: str):
    if backend == "native" and name != LLAMA:
        np.testing.assert_array_equal(actual, expected, err_msg=where)
    elif (
        name in ROUNDED
    ):  # rounding may fall either way, and a choice of a key or an expert with it
        assert np.sqrt(np.mean((actual - expected) ** 2)) < ROUNDING[name], where
    else:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE, err_msg=where)


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_rows_give_nearly_the_logits_of_the_whole_pass(name):
    off = _alone(name) - _model(name)[3]
    assert 0 < np.sqrt(np.mean(off**2)) < ROUNDING[name]


@pytest.mark.parametrize("name", [name for name in ALL if name not in ROUNDED])
def test_a_prompt_in_one_step_gives_the_logits_of_the_whole_pass(name):
    np.testing.assert_allclose(_alone(name), _model(name)[3], rtol=0, atol=TOLERANCE)
    assert _alone(name).std() > 0.4, "the logits are too flat to compare"


@pytest.mark.parametrize("name", ALL)
def test_one_token_at_a_time_gives_the_same_logits_as_one_step(name, backend):
    feeder = Feeder(name)
    for t in range(LENGTH):
        (logits,) = feeder.step([Piece(1, 1)], 1)
        _assert_same(backend, name, logits[0], _alone(name)[1, t], f"token {t}")


def _schedule(rng: np.random.Generator) -> Iterator[tuple[list[Piece], int, int]]:
    """Steps as (pieces, size, padding before them) that feed all sequences to their ends, in random cuts and company."""
    left = [LENGTH] * SEQUENCES
    while any(left):
        size = room = int(rng.choice(SIZES[1:]))
        pieces = []
        for b in rng.permutation(SEQUENCES):
            count = min(int(rng.integers(0, 10)), left[b], room)
            if count:
                pieces.append(Piece(b, count))
                left[b] -= count
                room -= count
        if pieces:
            yield pieces, size, int(rng.integers(0, room, endpoint=True))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_cuts_company_padding_and_places_change_nothing(name, backend, seed):
    """Pages never written stay NaN, as do those of the future: any read of one would show."""
    rng = np.random.default_rng(seed)
    pages = rng.permutation(PAGES)[: SEQUENCES * WIDTH]
    feeder = Feeder(name, pages.reshape(SEQUENCES, WIDTH))
    for pieces, size, before in _schedule(rng):
        starts = feeder.computed.copy()
        for piece, logits in zip(pieces, feeder.step(pieces, size, before), strict=True):
            start = starts[piece.sequence]
            expected = _alone(name)[piece.sequence, start : start + piece.count]
            where = f"sequence {piece.sequence} from {start} in {pieces} of {size} after {before}"
            _assert_same(backend, name, logits, expected, where)


def test_sequences_that_share_the_pages_of_their_beginning_compute_as_with_their_own(backend):
    name, shared = "16 of 24 keys selected", 2 * PAGE
    feeder = Feeder(name)
    feeder.tokens = np.array(feeder.tokens)
    feeder.tokens[1, :shared] = feeder.tokens[0, :shared]
    own = Feeder(name)
    own.tokens = feeder.tokens
    (expected,) = own.step([Piece(1, LENGTH)], LENGTH)
    feeder.pages[1, :2] = feeder.pages[0, :2]
    feeder.step([Piece(0, LENGTH)], LENGTH)
    feeder.computed[1] = shared
    (logits,) = feeder.step([Piece(1, LENGTH - shared)], LENGTH)
    _assert_same(backend, name, logits, expected[shared:], "after the shared pages")


@pytest.mark.parametrize("name", [next(iter(CASES)), LLAMA])
def test_a_step_repeated_without_commit_is_the_same_and_leaves_the_cache_alone(name):
    feeder = Feeder(name)
    feeder.step([Piece(0, 9), Piece(2, 5)], LENGTH)
    batch = feeder.batch([Piece(2, 3), Piece(0, 1)], 7)
    before = jax.tree.map(np.array, feeder.entries)
    first, second = feeder.compute(batch), feeder.compute(batch)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, feeder.entries, before)


def test_padding_writes_no_row_and_uses_no_expert():
    feeder = Feeder(next(iter(CASES)))
    feeder.step([Piece(1, 2)], 7, before=3)
    for rows in feeder.entries.values():
        written = ~np.isnan(np.asarray(rows)).all(axis=(0, 3))
        expected = np.zeros_like(written)
        expected[feeder.pages[1, 0], :2] = True
        np.testing.assert_array_equal(written, expected)
    for pieces, tokens in (([], 0), ([Piece(0, 4)], 4), ([Piece(0, 4), Piece(1, 3)], 7)):
        load = np.asarray(feeder.compute(feeder.batch(pieces, 7)).load)
        assert load.shape == (1, feeder.config.n_routed_experts)
        assert load.sum() == tokens * feeder.config.num_experts_per_tok


def test_expert_loads_are_in_layer_order_and_the_same_in_any_company():
    name = "selections shared between layers"
    feeder = Feeder(name)
    together = np.asarray(feeder.compute(feeder.batch([Piece(0, 12), Piece(2, 12)], 24)).load)
    parts = [np.asarray(feeder.compute(feeder.batch([Piece(b, 12)], 24)).load) for b in (0, 2)]
    np.testing.assert_array_equal(together, parts[0] + parts[1])
    assert together.shape == (3, feeder.config.n_routed_experts)
    assert len(np.unique(together, axis=0)) == 3, "layers that load experts alike prove nothing"


def test_a_batch_does_not_change_with_the_tables_that_it_was_made_from():
    """A step may still be running when the pages of the next one are noted."""
    tables = np.full((2, WIDTH), 5, np.int32)
    batch = pack([], 4, 2, tables)
    tables[:] = -1
    assert (batch.tables == 5).all()
