"""Sampling of a batch of rows against NumPy, row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.requests import Request, SamplingParams
from jaxmoe.engine.sampling import Ask, Kind, choose, histories, kind_of, settings_of
from jaxmoe.engine.stream import key_data

ROWS, VOCAB = 4, 40
EVERYTHING = max(Kind)


def _request(params: SamplingParams, prompt: list[int], output: list[int]) -> Request:
    return Request(prompt, params, output=list(output))


def _asks(requests: list[Request]) -> list[Ask]:
    return [Ask(request) for request in requests]


def _choose(logits: np.ndarray, requests: list[Request], kind: Kind):
    asks = _asks(requests)
    keys = np.stack([key_data(request.sampling.seed or 0) for request in requests])
    bias = np.zeros((len(logits), VOCAB), np.float32)
    for row, request in enumerate(requests):
        for token, value in request.sampling.logit_bias:
            bias[row, token] += value
    seen, counts = histories(asks, len(logits), VOCAB)
    sampled = choose(
        jnp.asarray(logits), settings_of(asks, len(logits), keys), seen, counts, bias, kind=kind
    )
    return jax.device_get(sampled)


def _changed(logits: np.ndarray, request: Request) -> np.ndarray:
    """Logits after penalties and bias."""
    p, out = request.sampling, logits.astype(np.float32).copy()
    for token in {*request.prompt, *request.output}:
        factor = np.float32(p.repetition_penalty)
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token in request.output:
        out[token] -= np.float32(p.frequency_penalty)
    for token in set(request.output):
        out[token] -= np.float32(p.presence_penalty)
    for token, value in p.logit_bias:
        out[token] += np.float32(value)
    return out


def _kept(scaled: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Which tokens the cuts leave: top-k, then min-p, then the nucleus of the rest."""
    keep = np.ones(VOCAB, bool)
    if p.top_k:
        keep[np.argsort(-scaled)[p.top_k :]] = False
    keep &= np.exp(scaled - scaled.max()) >= p.min_p
    if p.top_p < 1:
        probability = np.where(keep, np.exp(scaled - scaled.max()), 0.0)
        order = np.argsort(-probability)
        before = np.cumsum(probability[order] / probability.sum()) - probability[order] / (
            probability.sum()
        )
        keep[order[before >= p.top_p]] = False
        keep[order[0]] = True
    return keep


@jax.jit
def _draw(key, index, logits):
    return jax.random.categorical(jax.random.fold_in(key, index), logits)


def _expected_token(logits: np.ndarray, request: Request) -> int:
    p, changed = request.sampling, _changed(logits, request)
    if p.temperature == 0:
        return int(changed.argmax())
    scaled = changed / np.float32(p.temperature)
    scaled = np.where(_kept(scaled.astype(np.float64), p), scaled, -np.inf)
    index = np.int32(len(request.output))
    return int(_draw(jax.random.key(p.seed), index, scaled.astype(np.float32)))


# Plain values: the run-time type checks of the packages draw random numbers, which strategies must not.
_PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 3.0]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.05]),
        "top_k": st.sampled_from([0, 0, 1, 5, VOCAB, 1000]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.7, 0.6]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.7, -0.4]),
        "logit_bias": st.lists(
            st.tuples(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 2.0, 100.0])),
            max_size=3,
        ).map(tuple),
        "logprobs": st.one_of(st.none(), st.integers(0, 20)),
        "seed": st.integers(0, 2**32 - 1),
    }
)
_HISTORY = st.lists(st.integers(0, VOCAB - 1), max_size=6)
_ROWS = st.lists(st.tuples(_PARAMS, _HISTORY, _HISTORY), min_size=1, max_size=ROWS)


def _requests(rows: list[tuple[dict, list[int], list[int]]]) -> list[Request]:
    return [_request(SamplingParams(**params), [*prompt, 3], out) for params, prompt, out in rows]


def _logits(seed: int) -> np.ndarray:
    return 2 * np.random.default_rng(seed).standard_normal((ROWS, VOCAB)).astype(np.float32)


@settings(max_examples=150)
@given(rows=_ROWS, seed=st.integers(0, 2**32 - 1))
def test_every_row_gets_the_token_that_numpy_gives_it_alone(rows, seed):
    requests, logits = _requests(rows), _logits(seed)
    tokens = _choose(logits, requests, EVERYTHING).token
    expected = [_expected_token(row, r) for row, r in zip(logits, requests, strict=False)]
    assert tokens[: len(requests)].tolist() == expected
    assert tokens[len(requests) :].tolist() == logits[len(requests) :].argmax(-1).tolist()


@settings(max_examples=25)
@given(rows=_ROWS, seed=st.integers(0, 2**32 - 1))
def test_what_other_rows_need_and_where_a_row_stands_do_not_change_its_token(rows, seed):
    requests, logits = _requests(rows), _logits(seed)
    together = _choose(logits, requests, EVERYTHING).token[: len(requests)]
    backwards = _choose(
        logits[::-1], [*[Request([0])] * (ROWS - len(requests)), *requests[::-1]], EVERYTHING
    )
    np.testing.assert_array_equal(backwards.token[::-1][: len(requests)], together)
    alone = _choose(logits[:1], requests[:1], kind_of(_asks(requests[:1]))).token
    assert alone[0] == together[0]


def test_a_row_without_cuts_keeps_every_token_although_others_have_cuts():
    """Rounded sums of probabilities reach 1 early where one token has nearly all of it."""
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, 0] = 25
    free = SamplingParams(temperature=8.0, seed=5)  # 25 / 8: others are drawn too
    cold = dataclasses.replace(free, temperature=1.0)
    cut = SamplingParams(temperature=1.0, top_k=2, seed=6)
    for params in (free, cold):
        for index in range(20):
            row = _request(params, [1], [0] * index)
            both = _choose(logits, [row, _request(cut, [1], [])], Kind.CUTS)
            assert both.token[0] == _choose(logits[:1], [row], Kind.DRAWS).token[0]


def test_no_cut_means_that_even_tokens_beyond_a_rounded_sum_of_one_stay():
    from jaxmoe.engine.sampling import _cut

    scaled = np.zeros((2, VOCAB), np.float32)
    scaled[:, 0] = 40
    params = [SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.99)]
    rows = settings_of(_asks([Request([0], p) for p in params]), 2, np.zeros((2, 2), np.uint32))
    kept = np.isfinite(jax.jit(_cut)(scaled, rows))
    assert kept.sum(-1).tolist() == [VOCAB, 1]


@given(rows=_ROWS, seed=st.integers(0, 2**32 - 1))
def test_logprobs_are_those_of_the_models_own_distribution(rows, seed):
    logits = _logits(seed)
    sampled = _choose(logits, _requests(rows), EVERYTHING)
    exact = logits.astype(np.float64)
    expected = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    # Rounding of float32 at values of up to 10.
    np.testing.assert_allclose(
        sampled.logprob, expected[np.arange(ROWS), sampled.token], rtol=0, atol=3e-6
    )
    best = np.argsort(-logits, axis=-1)[:, :20]
    np.testing.assert_array_equal(sampled.top_tokens, best)
    np.testing.assert_allclose(
        sampled.top_logprobs, np.take_along_axis(expected, best, -1), rtol=0, atol=3e-6
    )


def test_only_what_is_asked_for_is_computed():
    plain = SamplingParams()
    assert kind_of([]) == kind_of([Ask(Request([1], plain))]) == Kind.GREEDY
    for changes, kind in (
        ({"temperature": 0.5}, Kind.DRAWS),
        ({"temperature": 0.5, "top_k": 3}, Kind.CUTS),
        ({"temperature": 0.5, "min_p": 0.1}, Kind.CUTS),
        ({"top_p": 0.5}, Kind.GREEDY),  # no draw to cut
        ({"presence_penalty": 1.0}, Kind.CHANGES),
        ({"frequency_penalty": 1.0}, Kind.CHANGES),
        ({"repetition_penalty": 1.1}, Kind.CHANGES),
        ({"logit_bias": ((1, 1.0),)}, Kind.CHANGES),
        ({"json_schema": "{}", "logprobs": 1}, Kind.CHANGES),
        ({"logprobs": 0}, Kind.LOGPROBS),
    ):
        both = [Request([1], plain), Request([1], SamplingParams(**changes))]
        assert kind_of(_asks(both)) == kind
    assert _choose(_logits(0), [Request([1], plain)], Kind.GREEDY).logprob is None


@settings(max_examples=25)
@given(rows=_ROWS)
def test_tokens_asked_about_in_advance_count_like_those_that_have_come(rows):
    requests = _requests(rows)
    early = [
        Ask(dataclasses.replace(r, output=r.output[:1]), tuple(r.output[1:])) for r in requests
    ]
    keys = np.stack([key_data(request.sampling.seed or 0) for request in requests])
    asks = _asks(requests)
    for got, expected in zip(
        (*histories(early, ROWS, VOCAB), settings_of(early, ROWS, keys).index),
        (*histories(asks, ROWS, VOCAB), settings_of(asks, ROWS, keys).index),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


@given(st.integers(0, 2**32 - 1))
def test_a_seed_is_the_key_of_that_number(seed):
    np.testing.assert_array_equal(key_data(seed), jax.random.key_data(jax.random.key(seed)))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2, unique=True))
def test_different_seeds_of_64_bits_are_different_keys(seeds):
    assert key_data(seeds[0]).tolist() != key_data(seeds[1]).tolist()


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer >= 1; got 0"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens must be an integer >= 1; got 2.5"),
        ({"temperature": -0.1}, ValueError, r"temperature must be in \[0, 100\]; got -0.1"),
        ({"temperature": float("nan")}, ValueError, r"temperature must be in \[0, 100\]; got nan"),
        ({"temperature": "hot"}, ValueError, r"temperature must be in \[0, 100\]; got 'hot'"),
        ({"top_p": 0}, ValueError, "top_p must be above 0; got 0"),
        ({"top_p": 1.1}, ValueError, r"top_p must be in \[0, 1\]; got 1.1"),
        ({"top_k": -1}, ValueError, "top_k must be an integer >= 0 .*; got -1"),
        ({"top_k": 2**31}, ValueError, "top_k must be an .* below 2.31; got 2147483648"),
        ({"min_p": 2}, ValueError, r"min_p must be in \[0, 1\]; got 2"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be in .*; got 0"),
        ({"presence_penalty": 1e9}, ValueError, "presence_penalty must be in .*; got 10"),
        ({"frequency_penalty": None}, ValueError, "frequency_penalty must be in .*; got None"),
        ({"logit_bias": ((-1, 0.0),)}, ValueError, "logit_bias takes token ids .*; got -1: 0.0"),
        ({"logit_bias": ((1, float("inf")),)}, ValueError, "logit_bias .*; got 1: inf"),
        ({"logit_bias": ((1, 1e30),)}, ValueError, r"within 1e\+06; got 1: 1e\+30"),
        ({"logit_bias": {1: 2.0}}, TypeError, r"logit_bias must be .*pairs.*; got \{1: 2.0\}"),
        ({"logit_bias": ((1.5, 2.0),)}, TypeError, "logit_bias must be a tuple of .token id"),
        ({"logprobs": 21}, ValueError, r"logprobs must be in 0..20 or None; got 21"),
        ({"logprobs": 2.5}, TypeError, r"logprobs must be an integer in 0..20 or None; got 2.5"),
        ({"stop": ("",)}, ValueError, "stop must not contain an empty text"),
        ({"stop": "END"}, TypeError, r"stop must be a tuple of texts, .*; got 'END'"),
        ({"stop": (3,)}, TypeError, r"stop must be a tuple of texts, .*; got \(3,\)"),
        ({"stop_token_ids": 257}, TypeError, "stop_token_ids must be a tuple of .*; got 257"),
        ({"seed": 0.5}, TypeError, "seed must be an integer or None; got 0.5"),
        ({"json_schema": {}}, TypeError, "json_schema must be JSON text or None; use json.dumps"),
        ({"width": 9}, ValueError, "width must be in 3..8 or None; got 9"),
        ({"width": "8"}, TypeError, "width must be an integer in 3..8 or None; got '8'"),
    ],
)
def test_misuse_is_refused_with_the_argument_and_its_value(arguments, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**arguments)
