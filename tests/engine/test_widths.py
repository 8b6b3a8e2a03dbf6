"""Requests at every SEFP width in one engine: the tokens of ``generate`` at that width, one copy of the weights, drafts at E5M3."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from engine import support
from engine.support import CONFIG, assert_empty, compiled, exactly, random_prompts, rows_of

import jaxmoe
import quant
from jaxmoe.engine import Engine, EngineOptions, SamplingParams
from jaxmoe.params import path_name
from jaxmoe.sharding import make_mesh

WIDTHS = (3, 8)
NEW = 12
OPTIONS = EngineOptions(
    max_running=4, max_step_tokens=8, page_size=4, pages=40, max_length=96, widths=WIDTHS
)


@functools.cache
def stored():
    """A model whose next token depends on the last one above all: so the narrow width is right about it two times in five."""

    def calm(path, leaf):
        small = path_name(path).endswith(("attention/o/weight", "experts/down", "down/weight"))
        return leaf * 0.1 if small else leaf

    return quant.quantize_params(jax.tree_util.tree_map_with_path(calm, support.model_params()))


def new_engine(**changes) -> Engine:
    policy = {name: changes.pop(name) for name in ("width_policy",) if name in changes}
    return Engine(stored(), CONFIG, options=dataclasses.replace(OPTIONS, **changes), **policy)


@functools.cache
def generated(width: int) -> list[tuple[int, ...]]:
    """What ``jaxmoe.generate`` gives for every prompt."""
    prompts = random_prompts(8, longest=24)
    padded = np.zeros((8, 24), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    lengths = [len(prompt) for prompt in prompts]
    new = jaxmoe.generate(stored(), CONFIG, padded, NEW, lengths=lengths, width=width)
    return rows_of(np.asarray(new), NEW)


def addresses(params) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}


@pytest.fixture(scope="module")
def engine():
    with new_engine() as engine:
        yield engine


def test_requests_of_both_widths_at_a_time_get_what_generate_gives_at_theirs(engine):
    prompts = random_prompts(8, longest=24)
    each = [exactly(NEW, width=WIDTHS[i % 2]) for i in range(8)]
    results = engine.generate(prompts, each)
    for i, result in enumerate(results):
        assert result.width == WIDTHS[i % 2]
        assert result.token_ids == generated(result.width)[i]
    assert generated(3) != generated(8)
    assert set(engine.stats().width_steps) == set(WIDTHS)
    assert_empty(engine)


def test_a_prompt_that_is_known_at_one_width_is_computed_anew_at_the_other(engine):
    prompt = random_prompts(8, longest=24)[0]
    for width in (8, 3, 8, 3):
        result = engine.generate([prompt], exactly(NEW, width=width))[0]
        assert result.token_ids == generated(width)[0]
    fresh = [7] * 21
    cached = [
        engine.generate([fresh], exactly(1, width=width))[0].cached_tokens for width in (8, 3, 8, 3)
    ]
    assert cached == [0, 0, 20, 20]


def test_switching_widths_between_requests_compiles_nothing_and_copies_nothing(engine):
    prompt = [1, 2, 3]
    for width in WIDTHS:
        engine.generate([prompt], exactly(4, width=width))
    programs, arrays = compiled(engine), len(jax.live_arrays())
    trees = engine._runner._params
    assert set(trees) == set(WIDTHS)
    for width in (*WIDTHS, *WIDTHS):
        engine.generate([prompt], exactly(4, width=width))
        assert addresses(trees[width]) <= addresses(stored())
    assert compiled(engine) == programs
    assert len(jax.live_arrays()) <= arrays + 8  # a step's results that are not yet collected


def test_one_executable_per_width_and_size_of_step(engine):
    before = compiled(engine)["compute"]
    engine.warmup()
    after = compiled(engine)
    engine.generate(random_prompts(8), [exactly(5, width=WIDTHS[i % 2]) for i in range(8)])
    assert compiled(engine) == after and before <= after["compute"]


def test_a_policy_chooses_for_who_names_no_width_and_is_checked():
    chosen = []

    def policy(prompt, sampling):
        chosen.append(3 if len(prompt) < 6 else None)
        return 5 if prompt[0] == 5 else chosen[-1]

    with new_engine(width_policy=policy) as engine:
        assert engine.widths == WIDTHS
        results = engine.generate(
            [[1, 2], list(range(8)), [1, 2]], [exactly(2), exactly(2), exactly(2, width=8)]
        )
        assert [result.width for result in results] == [3, 8, 8] and chosen == [3, None]
        with pytest.raises(ValueError, match=r"width_policy's result must be one of 3, 8; got 5"):
            engine.submit([5], exactly(1))


def test_widths_that_are_not_served_are_refused_in_one_line(engine):
    with pytest.raises(ValueError, match=r"^width must be one of 3, 8; got 5\. Leave it out"):
        engine.submit([1], SamplingParams(width=5))
    with support.new_engine() as plain:
        assert plain.widths == ()
        with pytest.raises(ValueError, match=r"^width=5 needs SEFP weights, which this engine"):
            plain.submit([1], SamplingParams(width=5))
    for changes, message in (
        ({"widths": (3, 9)}, "widths must be one of 3, 4, 5, 6, 7, 8; got 9"),
        ({"width": 4}, "width must be one of 3, 8; got 4"),
        ({"draft_width": 8, "speculative_tokens": 1}, "draft_width must be below the widest"),
        ({"draft_width": 3}, "needs speculative_tokens >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            new_engine(**changes)


@pytest.mark.slow
def test_two_ranks_give_the_tokens_of_one_device_at_both_widths(devices):
    """Experts are split over the mesh; each width's are a part of the same arrays there, too."""
    mesh = make_mesh(expert=2, devices=devices[:2])
    prompts = random_prompts(8, longest=24)
    with Engine(stored(), CONFIG, options=OPTIONS, mesh=mesh) as engine:
        results = engine.generate(prompts, [exactly(NEW, width=WIDTHS[i % 2]) for i in range(8)])
        trees = engine._runner._params
        for narrow, wide in zip(*(quant.tensors(trees[w]) for w in WIDTHS), strict=True):
            assert narrow.stored.base is wide.stored.base
        down = trees[8]["segments"][1][0]["moe"]["experts"]["down"].stored.base
        assert {shard.data.shape[1] for shard in down.addressable_shards} == {down.shape[1] // 2}
        assert_empty(engine)
    assert [r.token_ids for r in results] == [generated(WIDTHS[i % 2])[i] for i in range(8)]


@pytest.mark.parametrize("drafts", [1, 3])
def test_drafts_at_the_narrow_width_change_no_token_and_save_steps(drafts):
    """Greedy and drawn, at once with requests of the narrow width, which nobody drafts for; under preemption too."""
    prompts = random_prompts(8, longest=24)
    each = [
        exactly(NEW, width=WIDTHS[i % 4 > 0], temperature=0.9 * (i % 2), seed=i) for i in range(8)
    ]
    with new_engine(pages=24) as plain:
        expected = plain.generate(prompts, each)
    changes = {"speculative_tokens": drafts, "draft_width": 3}
    with new_engine(pages=24, **changes) as engine:
        results = engine.generate(prompts, each)
        stats = engine.stats()
        assert_empty(engine)
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.accepted_tokens > stats.drafted_tokens / 10  # the same model, coarser
    with new_engine(**changes) as engine:
        alone = engine.generate(prompts[:1], exactly(NEW, width=8))[0]
        stats = engine.stats()
    assert alone.token_ids == generated(8)[0]
    filling = -(-len(prompts[0]) // OPTIONS.max_step_tokens)  # the last of these gives a token
    assert stats.steps == filling - 1 + NEW - stats.accepted_tokens


def test_drafts_need_no_module_and_their_programs_are_warm():
    with new_engine(widths=(8,), draft_width=3, speculative_tokens=2) as engine:
        assert engine.widths == (8,) and "mtp" not in stored()
        engine.warmup()
        warm = compiled(engine)
        for count in (1, 3, 4):
            engine.generate(random_prompts(count), exactly(9))
            engine.generate(random_prompts(count), exactly(9, temperature=1.0, seed=1))
        assert compiled(engine) == warm
        # Nobody asks for the width of the drafts: it has no steps, only a token for each who runs.
        sizes = {name[2] for name in engine._runner.warm_up(8) if name[:2] == ("compute", 3)}
        assert sizes == {OPTIONS.max_running}
