"""What the tests of the engine share: one small model, and engines that run it."""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from parity.clear import sharp_params

import jaxmoe
from jaxmoe.engine import Engine, EngineOptions, SamplingParams, sampling

CONFIG = jaxmoe.presets["tiny"].replace(
    num_nextn_predict_layers=0,
    num_hidden_layers=3,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_attention_heads=2,
    index_n_heads=4,
    index_topk=16,
    max_position_embeddings=128,
)
MOE_LAYERS, ACTIVE = 2, CONFIG.num_experts_per_tok
# Room for three or four requests: six run, and so some give way.
OPTIONS = EngineOptions(max_running=6, max_step_tokens=16, page_size=4, pages=40, max_length=96)
WAIT_S = 60  # a hang is a failure


@functools.cache
def model_params() -> dict:
    return sharp_params(CONFIG)


def new_engine(options: EngineOptions = OPTIONS, **changes) -> Engine:
    """An engine of its own; it shares compiled functions with the others."""
    fields = {name: changes.pop(name) for name in list(changes) if hasattr(options, name)}
    return Engine(model_params(), CONFIG, options=dataclasses.replace(options, **fields), **changes)


def assert_empty(engine: Engine) -> None:
    """No request, and every page and slot free."""
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)
    for pool, slots in zip(engine._scheduler.pools, engine._scheduler._slots, strict=True):
        assert pool.available == pool.pages
        assert sorted(slots) == list(range(engine.options.max_running))
    assert not engine._requests


def compiled(engine: Engine) -> dict[str, int]:
    """How many executables each function of the engine's steps has."""
    program = engine._runner.program
    functions = {name: getattr(program, name) for name in ("compute", "commit", "draft")}
    functions["choose"] = sampling.choose
    return {name: function._cache_size() for name, function in functions.items()}


def every_kind(new: int) -> list[SamplingParams]:
    """Requests of all kinds that sampling tells apart, ``new`` tokens each."""
    return [
        exactly(new),
        exactly(new, temperature=1.2, seed=1),
        exactly(new, temperature=1.2, top_k=4, min_p=0.05, seed=2),
        exactly(new, temperature=0.8, top_p=0.9, logprobs=2, seed=3),
        exactly(new, frequency_penalty=1.0, repetition_penalty=1.3),
        exactly(new, logit_bias=((70, 3.0), (71, -100.0)), logprobs=0),
        exactly(new, json_schema='{"type": "array", "items": {"type": "integer"}}'),
    ]


def exactly(new: int, **settings) -> SamplingParams:
    """For exactly ``new`` tokens."""
    return SamplingParams(max_new_tokens=new, ignore_eos=True, **settings)


# Of what goes through ``generate``: few shapes, few compilations.
LONGEST, MOST_NEW, ROWS = 50, 40, 8


def random_prompts(count: int, seed: int = 0, longest: int = LONGEST) -> list[list[int]]:
    """Random bytes; half of the prompts begin with one of two long texts."""
    rng = np.random.default_rng(seed)
    beginnings = [rng.integers(0, 256, 30).tolist() for _ in range(2)]
    prompts = []
    for i in range(count):
        own = rng.integers(0, 256, int(rng.integers(1, longest))).tolist()
        begins = beginnings[i // 2 % 2][: int(rng.integers(1, 31))] if i % 2 else []
        prompts.append([*begins, *own][:longest])
    return prompts


def generated(prompts: list[list[int]], cache_dtype=None, **settings) -> np.ndarray:
    """What ``jaxmoe.generate`` gives, MOST_NEW tokens each; ``settings`` [len(prompts)] for at most ROWS prompts."""
    each = {"cache_dtype": cache_dtype}
    parts = []
    for first in range(0, len(prompts), ROWS):
        own = prompts[first : first + ROWS]
        padded, lengths = np.zeros((ROWS, LONGEST), np.int32), np.ones(ROWS, np.int32)
        for row, prompt in enumerate(own):
            padded[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        every = np.minimum(np.arange(ROWS), len(own) - 1)
        each |= {name: values[every] for name, values in settings.items()}
        new = jaxmoe.generate(model_params(), CONFIG, padded, MOST_NEW, lengths=lengths, **each)
        parts.append(np.asarray(new)[: len(own)])
    return np.concatenate(parts)


def rows_of(tokens: np.ndarray, new: int) -> list[tuple[int, ...]]:
    """The first ``new`` tokens of every row."""
    return [tuple(row[:new]) for row in tokens.tolist()]


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, config, tokens):
    return jaxmoe.forward(params, config, tokens)


def logits_of(tokens: list[int]) -> np.ndarray:
    """[T, V] of a whole pass; padded, so that it compiles once."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(model_params(), CONFIG, padded))[0, : len(tokens)]


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Runs ``work(0)`` ... at a time; the first exception of any is raised."""
    errors = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a caller waits for ever"
    if errors:
        raise errors[0]


def slowed(engine: Engine, seconds: float) -> Engine:
    """Every step takes at least so long."""
    compute = engine._runner.program.compute

    def slow(*arguments):
        time.sleep(seconds)
        return compute(*arguments)

    engine._runner.program = engine._runner.program._replace(compute=slow)
    return engine


def until(condition: Callable[[], bool]) -> None:
    """Waits for it."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)
