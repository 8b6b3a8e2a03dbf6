"""The three dispatch paths agree, forward and gradient, under every kind of load and placement."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.moe import Experts, ExpertTables, MoeOptions, apply_experts, identity_tables
from jaxmoe.sharding import make_mesh

TOKENS, SIZE, HIDDEN, EXPERTS, ACTIVE = 24, 8, 6, 16, 3
# Relative to the largest element; the sums are short and all paths accumulate them in float32.
TOLERANCE = 1e-6


@dataclasses.dataclass
class Problem:
    """Arguments of the expert computation, and the cotangent of its result."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    dy: np.ndarray


def random_ids(rng, tokens=TOKENS, candidates=range(EXPERTS)):
    """Distinct experts per token out of ``candidates``."""
    return np.stack([rng.permutation(candidates)[:ACTIVE] for _ in range(tokens)]).astype(np.int32)


def problem(rng, ids):
    """Random arrays around ``ids``, scaled so that results are of size 1."""
    tokens, active = ids.shape
    return Problem(
        x=rng.standard_normal((tokens, SIZE), np.float32),
        ids=ids,
        weights=rng.uniform(0.1, 1, (tokens, active)).astype(np.float32),
        gate_up=0.4 * rng.standard_normal((EXPERTS, SIZE, 2, HIDDEN), np.float32),
        down=0.4 * rng.standard_normal((EXPERTS, HIDDEN, SIZE), np.float32),
        dy=rng.standard_normal((tokens, SIZE), np.float32),
    )


@functools.partial(jax.jit, static_argnames="options")
def _run(x, ids, weights, gate_up, down, dy, tables, options):
    def forward(x, weights, gate_up, down):
        experts = Experts(gate_up, down, gate_up.shape[0])
        return apply_experts(x, ids, weights, experts, tables=tables, options=options)

    y, pullback = jax.vjp(forward, x, weights, gate_up, down)
    return y, *pullback(dy)


def run(p, options, tables=None):
    """(y, dx, d_weights, d_gate_up, d_down) as NumPy arrays."""
    arrays = (jnp.asarray(getattr(p, f.name)) for f in dataclasses.fields(p))
    return [np.asarray(a) for a in _run(*arrays, tables, options)]


def assert_equal(got, expected):
    """Asserts that results and gradients agree to TOLERANCE."""
    names = ("y", "dx", "d_weights", "d_gate_up", "d_down")
    for name, a, b in zip(names, got, expected, strict=True):
        error = np.abs(a - b).max() / max(1, np.abs(b).max())
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


DENSE = MoeOptions(path="dense")


@pytest.fixture(scope="module", params=["local", "eight ranks", "two by two by two"])
def options(request, devices):
    """Every way to run that is not the oracle."""
    if request.param == "local":
        return MoeOptions(path="local")
    sizes = (1, 8, 1) if request.param == "eight ranks" else (2, 2, 2)
    return MoeOptions(path="all_to_all", mesh=make_mesh(*sizes, devices=devices))


@pytest.fixture(scope="module")
def eight_ranks(devices):
    return MoeOptions(path="all_to_all", mesh=make_mesh(expert=8, devices=devices))


def test_the_oracle_equals_a_plain_loop(rng):
    p = problem(rng, random_ids(rng))
    p.ids[3, 1] = p.ids[7] = -1
    expected = np.zeros((TOKENS, SIZE))
    for t, a in np.argwhere(p.ids >= 0):
        gate, up = (p.x[t] @ p.gate_up[p.ids[t, a], :, i].astype(np.float64) for i in range(2))
        expected[t] += p.weights[t, a] * ((gate / (1 + np.exp(-gate)) * up) @ p.down[p.ids[t, a]])
    np.testing.assert_allclose(run(p, DENSE)[0], expected, rtol=1e-5, atol=1e-6)


LOADS = {
    "uniform": lambda rng: random_ids(rng),
    "one expert takes a choice of every token": lambda rng: np.insert(
        random_ids(rng, candidates=[e for e in range(EXPERTS) if e != 5])[:, 1:], 0, 5, axis=1
    ),
    "all tokens to the same experts": lambda rng: np.tile(np.int32([9, 2, 14]), (TOKENS, 1)),
    "all tokens to one rank": lambda rng: random_ids(rng, candidates=[4, 5, 6, 7]),
    "all tokens to one expert only": lambda rng: np.tile(np.int32([15, -1, -1]), (TOKENS, 1)),
    "padding": lambda rng: np.where(rng.random((TOKENS, ACTIVE)) < 0.4, -1, random_ids(rng)),
    "nothing but padding": lambda rng: np.full((TOKENS, ACTIVE), -1, np.int32),
}


@pytest.mark.parametrize("load", list(LOADS))
def test_every_path_equals_dense_forward_and_backward(load, options, rng):
    p = problem(rng, LOADS[load](rng))
    assert_equal(run(p, options), run(p, DENSE))


@pytest.mark.parametrize("tokens", [1, 21])
def test_token_counts_that_do_not_divide_over_the_ranks_are_padded(tokens, options, rng):
    p = problem(rng, random_ids(rng, tokens))
    assert_equal(run(p, options), run(p, DENSE))


@given(st.integers(0, 2**32 - 1), st.integers(1, EXPERTS), st.sampled_from([0.0, 0.2, 0.9]))
def test_no_routing_exceeds_the_capacity_of_the_exchange(eight_ranks, seed, spread, missing):
    # Few candidates put all load on few ranks: were a row dropped, its token would differ from dense.
    rng = np.random.default_rng(seed)
    candidates = rng.permutation(EXPERTS)[: max(spread, ACTIVE)]
    ids = random_ids(rng, candidates=candidates)
    p = problem(rng, np.where(rng.random(ids.shape) < missing, -1, ids))
    assert_equal(run(p, eight_ranks), run(p, DENSE))


def test_bfloat16_tokens_keep_their_dtype_and_stay_close_to_dense(options, rng):
    p = problem(rng, random_ids(rng))
    exact = run(p, DENSE)[0]
    ids, weights, gate_up, down = (jnp.asarray(a) for a in (p.ids, p.weights, p.gate_up, p.down))

    @jax.jit
    def forward(x):
        return apply_experts(x, ids, weights, Experts(gate_up, down, EXPERTS), options=options)

    y = forward(jnp.asarray(p.x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    # Two roundings of the hidden layer and one of the result, at 2**-8 each.
    np.testing.assert_allclose(
        np.asarray(y, np.float32), exact, atol=4 * 2**-8 * np.abs(exact).max()
    )


# -- placements --------------------------------------------------------------------------------------

# 32 slots for 16 experts: two copies each, and the same with three slots lost, slot 0 among them.
TWICE = np.tile(np.arange(EXPERTS), 2)
LOST = np.where(np.isin(np.arange(32), [0, 7, 25]), -1, TWICE)
SHUFFLED = np.random.default_rng(0).permutation(TWICE)


def place(p, slot_expert):
    """(problem with weights by slot, NaN where a slot is empty; tables)."""
    empty = slot_expert < 0
    placed = dataclasses.replace(p, gate_up=p.gate_up[slot_expert], down=p.down[slot_expert])
    placed.gate_up[empty] = placed.down[empty] = np.nan
    return placed, ExpertTables.from_slots(slot_expert, EXPERTS, max_copies=2)


@pytest.mark.parametrize("slot_expert", [TWICE, LOST, SHUFFLED], ids=["twice", "lost", "shuffled"])
@pytest.mark.parametrize("load", ["uniform", "all tokens to the same experts", "padding"])
def test_any_placement_gives_the_same_result_and_its_copies_share_the_gradient(
    load, slot_expert, options, rng
):
    p = problem(rng, LOADS[load](rng))
    placed, tables = place(p, slot_expert)
    y, dx, d_weights, *d_slots = run(placed, options, tables)
    d_experts = []
    for d in d_slots:
        assert not d[slot_expert < 0].any()
        total = np.zeros((EXPERTS, *d.shape[1:]), np.float32)
        np.add.at(total, slot_expert[slot_expert >= 0], d[slot_expert >= 0])
        d_experts.append(total)
    assert_equal((y, dx, d_weights, *d_experts), run(p, DENSE))


def test_the_oracle_itself_ignores_lost_slots(rng):
    p = problem(rng, LOADS["padding"](rng))
    placed, tables = place(p, LOST)
    np.testing.assert_allclose(
        run(placed, DENSE, tables)[0], run(p, DENSE)[0], rtol=1e-6, atol=1e-6
    )


def test_identity_tables_equal_no_tables(rng):
    p = problem(rng, random_ids(rng))
    for a, b in zip(run(p, DENSE, identity_tables(EXPERTS)), run(p, DENSE), strict=True):
        np.testing.assert_array_equal(a, b)


# -- misuse ------------------------------------------------------------------------------------------


def test_an_unknown_path_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"path must be one of \('dense', 'local', 'all_to_all', 'exchange'\); got 'x'",
    ):
        MoeOptions(path="x")


def test_the_exchange_needs_a_mesh_with_its_axis(devices):
    with pytest.raises(
        ValueError, match=r"needs a mesh with axis 'expert'; got axes None.*make_mesh"
    ):
        MoeOptions(path="all_to_all")
    mesh = jax.sharding.Mesh(np.asarray(devices), ("rows",))
    with pytest.raises(ValueError, match=r"axis 'expert'; got axes \('rows',\)"):
        MoeOptions(path="all_to_all", mesh=mesh)


def test_tokens_must_be_sharded_over_the_axis_of_the_exchange(devices):
    mesh = make_mesh(expert=8, devices=devices)
    with pytest.raises(ValueError, match=r"token_axes must include 'expert'; got \('data',\)"):
        MoeOptions(path="all_to_all", mesh=mesh, token_axes=("data",))


def test_slots_that_do_not_divide_over_the_ranks_are_refused(eight_ranks, rng):
    p = problem(rng, random_ids(rng, candidates=range(12)))
    p.gate_up, p.down = p.gate_up[:12], p.down[:12]
    with pytest.raises(
        ValueError, match=r"expert slots \(12\).*mesh axis 'expert' \(8\).*redundant"
    ):
        run(p, eight_ranks)
