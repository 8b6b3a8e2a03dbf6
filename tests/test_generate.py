"""Generation: greedy and sampled tokens, independence of the batch, streaming, stopping, compilation, errors."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.clear import sharp_params

import jaxmoe

# The function of the same name hides the module as an attribute of the package.
_module = sys.modules["jaxmoe.generate"]

TINY = jaxmoe.presets["tiny"].replace(index_topk=16, num_nextn_predict_layers=0)
LLAMA = jaxmoe.ModelConfig(
    vocab_size=80,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_interleave=False,
)


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    """Without LLVM's optimisations: what is tested is which tokens come out, not how fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def _params(config):
    return sharp_params(config)


def _prompts(config, batch: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def _generate(config, prompts, new, **options) -> np.ndarray:
    return np.asarray(jaxmoe.generate(_params(config), config, prompts, new, **options))


# -- greedy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["tiny", "llama"])
def test_greedy_tokens_are_the_argmax_of_the_whole_pass(config):
    prompts = _prompts(config, 2, 20)
    new = _generate(config, prompts, 80)
    assert new.shape == (2, 80) and new.dtype == np.int32
    logits = jaxmoe.forward(_params(config), config, np.concatenate([prompts, new], axis=1))
    np.testing.assert_array_equal(new, np.argmax(logits[:, 19:-1], axis=-1))
    assert len(np.unique(new)) > 10, "a constant continuation proves nothing"


def test_prompts_padded_on_the_right_continue_as_they_do_alone():
    lengths = np.array([3, 21, 12, 1], np.int32)
    prompts = _prompts(TINY, 4, 21)
    together = _generate(TINY, prompts, 20, lengths=lengths)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        alone = _generate(TINY, prompt[None, :length], 20)
        np.testing.assert_array_equal(together[row], alone[0], err_msg=f"length {length}")
    changed = np.where(np.arange(21) < lengths[:, None], prompts, 7)
    np.testing.assert_array_equal(_generate(TINY, changed, 20, lengths=lengths), together)


# -- sampling ----------------------------------------------------------------------------------------

_REQUESTS = 8
_TEMPERATURES = np.array([0.7, 0.0, 1.0, 1.3, 0.9, 0.0, 2.0, 0.5], np.float32)
_TOP_PS = np.array([1.0, 0.5, 0.9, 0.8, 0.3, 1.0, 0.95, 0.6], np.float32)


def _sampled(rows: np.ndarray) -> np.ndarray:
    """Requests ``rows``, each with its own key and settings, as one batch."""
    keys = jax.vmap(jax.random.key)(jnp.arange(100, 100 + _REQUESTS, dtype=jnp.uint32))
    return _generate(
        TINY,
        _prompts(TINY, _REQUESTS, 18)[rows],
        24,
        temperature=_TEMPERATURES[rows],
        top_p=_TOP_PS[rows],
        key=keys[rows],
    )


def test_a_request_samples_the_same_tokens_alone_in_a_batch_and_at_another_index():
    everyone = _sampled(np.arange(_REQUESTS))
    backwards = _sampled(np.arange(_REQUESTS)[::-1])
    np.testing.assert_array_equal(backwards[::-1], everyone)
    for row in (1, 3, 6):
        np.testing.assert_array_equal(_sampled(np.array([row]))[0], everyone[row])
    assert len(np.unique(everyone, axis=0)) == _REQUESTS


def test_one_key_gives_every_sequence_its_own_draws_and_is_reproducible():
    prompts = np.repeat(_prompts(TINY, 1, 18), 8, axis=0)
    options = {"temperature": 1.0, "key": jax.random.key(3)}
    first = _generate(TINY, prompts, 24, **options)
    assert len(np.unique(first, axis=0)) == 8
    np.testing.assert_array_equal(_generate(TINY, prompts, 24, **options), first)
    own_keys = jax.vmap(jax.random.fold_in, (None, 0))(options["key"], jnp.arange(8))
    np.testing.assert_array_equal(
        _generate(TINY, prompts, 24, temperature=1.0, key=own_keys), first
    )
    other = _generate(TINY, prompts, 24, temperature=1.0, key=jax.random.key(4))
    assert (other != first).any(axis=1).all()


def _distribution(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """What sampling must follow, in float64: softmax, cut to the smallest set of at least ``top_p``, renormalised."""
    weights = np.exp((logits - logits.max()) / temperature)
    probability = weights / weights.sum()
    order = np.argsort(-probability)
    size = np.searchsorted(np.cumsum(probability[order]), top_p) + 1
    kept = np.zeros_like(probability)
    kept[order[:size]] = probability[order[:size]]
    return kept / kept.sum()


def _assert_follows(drawn: np.ndarray, probability: np.ndarray) -> None:
    """Pearson's chi-square at about one in ten thousand (Wilson-Hilferty); rare tokens share one bin."""
    counts = np.bincount(drawn, minlength=len(probability))
    assert not counts[probability == 0].any(), "tokens outside the nucleus were drawn"
    expected = probability * len(drawn)
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    normal = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
    assert normal < 3.7, f"chi-square {statistic:.0f} with {freedom} degrees of freedom"


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (0.8, 0.5), (1.0, 0.1)]
)
def test_drawn_tokens_follow_temperature_and_top_p(temperature, top_p):
    draws = 4096
    prompt = _prompts(LLAMA, 1, 9)
    logits = np.asarray(jaxmoe.forward(_params(LLAMA), LLAMA, prompt))[0, -1].astype(np.float64)
    probability = _distribution(logits, temperature, top_p)
    assert (probability > 0).sum() >= 2
    prompts = np.repeat(prompt, draws, axis=0)
    options = {"temperature": temperature, "top_p": top_p, "key": jax.random.key(11)}
    drawn = _generate(LLAMA, prompts, 1, **options)
    _assert_follows(drawn[:, 0], probability)


def test_consecutive_draws_of_one_sequence_are_independent():
    """The same logits at every index: pairs of draws follow the product of the distributions."""
    draws = 4096
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    sampling = _module.Sampling(
        jnp.ones(draws, jnp.float32),
        jnp.ones(draws, jnp.float32),
        jax.random.split(jax.random.key(5), draws),
    )
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (draws, 4))
    first, second = (
        np.asarray(_module.sample(rows, sampling, jnp.asarray(i, jnp.int32), nucleus=False))
        for i in (0, 1)
    )
    joint = np.outer(np.exp(logits), np.exp(logits)).reshape(-1)
    _assert_follows(first * 4 + second, joint)


def test_the_smallest_nucleus_and_temperature_zero_are_greedy():
    prompts = _prompts(LLAMA, 3, 9)
    greedy = _generate(LLAMA, prompts, 12)
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        _generate(LLAMA, prompts, 12, temperature=5.0, top_p=1e-6, key=key), greedy
    )
    mixed = _generate(
        LLAMA, prompts, 12, temperature=np.array([0.0, 9.0, 0.0], np.float32), key=key
    )
    np.testing.assert_array_equal(mixed[[0, 2]], greedy[[0, 2]])
    assert (mixed[1] != greedy[1]).any()


# -- streaming and stopping --------------------------------------------------------------------------


@pytest.mark.parametrize("new", [1, 2, 8, 9, 30])
def test_streamed_pieces_concatenate_to_the_result(new):
    pieces = []
    prompts = _prompts(LLAMA, 2, 9)
    result = _generate(LLAMA, prompts, new, on_tokens=pieces.append)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), result)
    np.testing.assert_array_equal(result, _generate(LLAMA, prompts, new))
    for piece in pieces:
        assert piece.dtype == np.int32 and piece.shape[0] == 2 and 1 <= piece.shape[1] <= 8


def _first_at(row: np.ndarray, ids: list[int]) -> int:
    """Index of the first stop token, or the length."""
    found = np.flatnonzero(np.isin(row, ids))
    return int(found[0]) if found.size else len(row)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_a_stop_token_ends_its_sequence_and_no_other(several, streamed):
    prompts = _prompts(LLAMA, 3, 9)
    free = _generate(LLAMA, prompts, 40)
    ids = [int(free[0, 6]), int(free[1, 17])] if several else [int(free[0, 6])]
    pieces = []
    stopped = _generate(
        LLAMA,
        prompts,
        40,
        eos_token_id=ids if several else ids[0],
        on_tokens=pieces.append if streamed else None,
    )
    assert stopped.shape == free.shape
    for row in range(3):
        end = _first_at(free[row], ids)
        np.testing.assert_array_equal(stopped[row, :end], free[row, :end])
        if end < 40:
            assert (stopped[row, end:] == free[row, end]).all()
    if streamed:
        streamed_tokens = np.concatenate(pieces, axis=1)
        np.testing.assert_array_equal(streamed_tokens, stopped[:, : streamed_tokens.shape[1]])


def test_generation_ends_early_when_every_sequence_has_stopped():
    prompts = _prompts(LLAMA, 2, 9)
    free = _generate(LLAMA, prompts, 40)
    ids = [int(free[0, 2]), int(free[1, 5])]
    last = max(_first_at(row, ids) for row in free)
    pieces = []
    result = _generate(LLAMA, prompts, 400, eos_token_id=ids, on_tokens=pieces.append)
    assert result.shape == (2, 400)
    assert sum(piece.shape[1] for piece in pieces) == last + 1
    stop = [row[_first_at(row, ids)] for row in free]
    np.testing.assert_array_equal(
        result[:, last:], np.repeat(np.array(stop)[:, None], 400 - last, 1)
    )


# -- compilation -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_executables_are_bounded_by_buckets_not_by_lengths_or_settings():
    config = LLAMA.replace(num_hidden_layers=1, hidden_size=24, intermediate_size=20)
    functions = (_module._fill, _module._first, _module._decode)
    before = [function._cache_size() for function in functions]

    def compiled() -> tuple[int, ...]:
        return tuple(f._cache_size() - n for f, n in zip(functions, before, strict=True))

    shapes = [(length, new) for length in range(1, 25, 3) for new in (1, 2, 5, 8, 9, 14, 20)]
    for length, new in shapes:
        _generate(config, _prompts(config, 1, length), new)
    bucket = _module.bucket
    pairs = {(bucket(n), bucket(n + new)) for n, new in shapes}
    capacities = {capacity for _, capacity in pairs}
    assert len(pairs) < len(shapes) / 2
    assert compiled()[0] <= len(pairs)
    assert compiled()[1] == 1
    assert compiled()[2] <= len(capacities)

    fill, first, decode = compiled()
    prompts = _prompts(config, 1, 5)
    for temperature, seed in ((0.5, 0), (0.9, 1), (1.4, 2)):
        _generate(config, prompts, 7, temperature=temperature, key=jax.random.key(seed))
    assert compiled() == (fill, first + 1, decode + 1)
    for top_p in (0.3, 0.6, 0.9):
        _generate(config, prompts, 7, temperature=1.0, top_p=top_p, key=jax.random.key(0))
    assert compiled() == (fill, first + 2, decode + 2)
    for eos in (3, 4):
        _generate(config, prompts, 7, eos_token_id=eos)
    assert compiled() == (fill, first + 3, decode + 3)


def test_buckets_hold_their_number_with_little_padding_and_are_few():
    sizes = [_module.bucket(n) for n in range(1, 5000)]
    assert all(size >= n for n, size in enumerate(sizes, start=1))
    assert all(size <= max(16, n * 4 / 3) for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 4 * 10
    assert all(_module.bucket(size) == size for size in sizes)


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": np.zeros(4, np.int32)}, ValueError, r"tokens must be .* shape \(4,\)"),
        ({"tokens": np.zeros((0, 4), np.int32)}, ValueError, r"tokens must be a non-empty"),
        ({"tokens": np.zeros((1, 4))}, TypeError, "tokens must be integer"),
        ({"tokens": np.full((1, 4), 80)}, ValueError, r"vocab_size=80\); got 80..80"),
        ({"tokens": np.full((1, 4), -1)}, ValueError, r"vocab_size=80\); got -1..-1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer >= 1; got 0"),
        ({"width": 8}, ValueError, "width=8 needs SEFP weights"),
        ({"lengths": np.array([3, 5])}, ValueError, r"lengths must be 2 numbers in 1..4"),
        ({"lengths": np.array([0, 1])}, ValueError, r"lengths must be 2 numbers in 1..4"),
        ({"lengths": np.array([1])}, ValueError, r"lengths must be 2 numbers in 1..4"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and >= 0"),
        ({"temperature": np.nan}, ValueError, "temperature must be finite and >= 0"),
        ({"temperature": np.ones(3, np.float32)}, ValueError, "temperature"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\]"),
        ({"temperature": 1.0}, ValueError, "needs a random key"),
        ({"cache_dtype": "fp8"}, ValueError, '"fp8" is for latent attention'),
        ({"cache_dtype": "int8"}, ValueError, "must be one of float32, .*; got 'int8'"),
        ({"temperature": 1.0, "key": 0}, (TypeError, ValueError), "key"),
        (
            {"temperature": 1.0, "key": jax.random.split(jax.random.key(0), 3)},
            ValueError,
            r"key must be one key or one per sequence \(2\)",
        ),
    ],
)
def test_misuse_is_refused_with_the_argument_and_its_value(arguments, error, message):
    full = {"tokens": np.zeros((2, 4), np.int32), "max_new_tokens": 3} | arguments
    with pytest.raises(error, match=message):
        jaxmoe.generate(_params(LLAMA), LLAMA, **full)
