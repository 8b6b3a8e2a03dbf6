"""Low-rank additions: of every matrix its own, from gradients of the merged weights, with a base that nothing touches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train.support import MODEL

import jaxmoe
import quant
from quant import BpsConfig, LaaConfig, Lora, OtaroConfig, Rule, bps, otaro, otaro_tune

SHAPES = {
    "embed": {"weight": (11, 6)},
    "attention": {"o": {"weight": (3, 2, 5, 6)}},  # layers, heads, head size, out
    "experts": {"down": (3, 4, 7, 6), "gate_up": (3, 4, 6, 2, 7)},  # layers, experts, ...
    "router": {"weight": (3, 6, 4)},
    "norm": {"weight": (3, 6)},
}
LORA = Lora(rank=2, alpha=3.0)
merge = jax.jit(LORA)
# A layer of latent attention and experts; without an indexer, which this loss doesn't train.
MLA = MODEL.replace(
    num_hidden_layers=1,
    first_k_dense_replace=0,
    num_nextn_predict_layers=0,
    index_topk=None,
    index_n_heads=None,
    index_head_dim=None,
)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 13)).astype(np.int32)


def drawn(shapes, seed=0, dtype=jnp.float32):
    generator = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda s: jnp.asarray(generator.standard_normal(s), dtype), shapes, is_leaf=is_shape
    )


def moved(adapters, seed=1):
    """Adapters with a B that isn't zero."""
    return drawn(jax.tree.map(jnp.shape, adapters), seed)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_before_the_first_step_the_merged_weights_are_the_base():
    for dtype in (jnp.float32, jnp.bfloat16):
        base = drawn(SHAPES, dtype=dtype)
        adapters = LORA.init(base, jax.random.key(0))
        whole = merge(base, adapters)
        assert_equal(whole, base)
        assert all(x.dtype == dtype for x in jax.tree.leaves(whole))
    assert adapters["router"]["weight"] is None and adapters["norm"]["weight"] is None
    a = adapters["experts"]["gate_up"]["a"]
    assert a.dtype == jnp.float32 and 0.8 < float(a.std()) * 6**0.5 < 1.2


def test_every_layer_and_every_expert_has_a_pair_of_its_own():
    base = drawn(SHAPES)
    adapters = LORA.init(base, jax.random.key(0))
    pair = adapters["experts"]["down"]
    assert pair["a"].shape == (3, 4, 7, 2) and pair["b"].shape == (3, 4, 2, 6)
    assert adapters["attention"]["o"]["weight"]["a"].shape == (3, 10, 2)
    assert len(np.unique(pair["a"])) == pair["a"].size
    one = jnp.zeros_like(pair["b"]).at[1, 2].set(1.0)
    adapters = {**adapters, "experts": {**adapters["experts"], "down": {**pair, "b": one}}}
    changed = np.asarray(merge(base, adapters)["experts"]["down"] != base["experts"]["down"])
    assert changed[1, 2].all() and changed.sum() == 7 * 6


def test_gradients_are_those_of_the_merged_weights_projected():
    base = drawn(SHAPES)
    adapters = moved(LORA.init(base, jax.random.key(0)))
    targets, width = drawn(SHAPES, 2), jnp.int32(4)

    def loss(params):
        rounded = quant.fake_quantize(params, width)
        squares = jax.tree.map(lambda x, y: jnp.sin(x * y).sum(), rounded, targets)
        return sum(jax.tree.leaves(squares))

    whole = jax.jit(jax.grad(loss))(merge(base, adapters))
    given = jax.jit(jax.grad(lambda adapters: loss(LORA(base, adapters))))(adapters)
    matrices = {
        "down": lambda g: g,
        "gate_up": lambda g: g.reshape(3, 4, 6, 14),
    }
    pairs = [(adapters["experts"][n], whole["experts"][n], f) for n, f in matrices.items()]
    found = [given["experts"][n] for n in matrices]
    # Rows of an embedding are results: its matrix lies on its side.
    pairs.append((adapters["embed"]["weight"], whole["embed"]["weight"], lambda g: g.T))
    found.append(given["embed"]["weight"])
    for (pair, g, matrix), mine in zip(pairs, found, strict=True):
        g = matrix(np.asarray(g, np.float64))
        a, b = (np.asarray(pair[k], np.float64) for k in "ab")
        scale = LORA.alpha / LORA.rank
        # float32 products of at most 14 numbers.
        np.testing.assert_allclose(mine["a"], scale * g @ b.swapaxes(-1, -2), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mine["b"], scale * a.swapaxes(-1, -2) @ g, rtol=1e-4, atol=1e-5)


X = jax.random.normal(jax.random.key(0), (32, 64))
BASE = {"proj": {"weight": 0.1 * jax.random.normal(jax.random.key(1), (64, 8))}}
TO_COME = X @ (BASE["proj"]["weight"] + 0.1)
CONFIG = OtaroConfig(steps=14, laa=LaaConfig(every=2))
OPTIMIZER = optax.adam(1e-2)


def tune(base, config=CONFIG, **options):
    return otaro_tune(
        LORA.init(base, jax.random.key(2)),
        config,
        lambda step: (X, TO_COME),
        loss=loss_of,
        optimizer=OPTIMIZER,
        frozen=base,
        merge=dataclasses.replace(LORA),  # equal ones share a program
        **options,
    )


def loss_of(params, batch):
    x, y = batch
    return jnp.square(x @ params["proj"]["weight"] - y).mean()


def test_only_adapters_are_tuned_and_the_base_is_data():
    before = jax.tree.map(np.array, BASE)
    tuned = tune(BASE)
    assert_equal(BASE, before)
    shapes = {"a": (64, 2), "b": (2, 8)}
    assert jax.tree.map(jnp.shape, tuned.params) == {"proj": {"weight": shapes}}
    moments = [x.shape for x in jax.tree.leaves(tuned.state.opt_state) if x.ndim]
    assert sorted(moments) == sorted([*shapes.values()] * 2)
    assert [x.shape for x in jax.tree.leaves(tuned.state.laa.total)] == [*shapes.values()]
    assert tuned.history[-1]["loss"] < 0.9 * tuned.history[0]["loss"]
    after = otaro.losses_by_width(merge(BASE, tuned.params), [(X, TO_COME)], loss=loss_of)
    assert all(after[width] < tuned.losses()[width][0] for width in bps.WIDTHS)
    programs = otaro._step._cache_size()
    tune(jax.tree.map(lambda x: x + 1.0, BASE), dataclasses.replace(CONFIG, steps=1))
    assert otaro._step._cache_size() == programs


def test_a_run_that_goes_on_equals_one_that_was_never_interrupted():
    whole, saved = tune(BASE), []

    def stop(state, record):
        saved.append(jax.tree.map(np.asarray, state))
        return record["step"] == 9

    first = tune(BASE, on_step=stop)
    rest = tune(BASE, state=jax.tree.map(jnp.asarray, saved[-1]))
    assert first.history + rest.history == whole.history
    assert_equal(rest.state, whole.state)


def test_the_joint_objective_tunes_adapters_too():
    joint = OtaroConfig(steps=4, laa=LaaConfig(low=()), objective="joint")
    before, *_, after = (record["loss"] for record in tune(BASE, joint).history)
    assert after < before


def test_adapters_of_latent_attention_and_experts_make_every_width_better():
    base, lora = jaxmoe.init_params(MLA, jax.random.key(0)), Lora(rank=4)

    def loss(params, tokens):
        logits = jaxmoe.forward(params, MLA, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    tuned = otaro_tune(
        lora.init(base, jax.random.key(1)),
        OtaroConfig(24, BpsConfig(schedule=bps.round_robin), LaaConfig(low=())),
        lambda step: jnp.asarray(TOKENS),
        loss=loss,
        optimizer=optax.adam(1e-2),
        frozen=base,
        merge=lora,
    )
    losses = tuned.losses()
    assert set(losses) == set(bps.WIDTHS)
    for first, *_, last in losses.values():
        assert last < 0.8 * first


def test_adapters_of_another_lora_are_refused_by_name():
    base = drawn(SHAPES)
    adapters = LORA.init(base, jax.random.key(0))
    for other, words in (
        (Lora(3), r"attention/o/weight must have adapters of .*rank=3.*got shapes \(\(3, 10, 2\)"),
        (Lora(6), "attention/o/weight must have no adapters with rank=6"),
        (
            Lora(2, rules=(Rule("experts"), *quant.DEFAULT_RULES)),
            "experts/down must have no adapters with rank=2",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            other(base, adapters)
        with pytest.raises(ValueError, match=words):
            jax.jit(other)(base, adapters)


def test_a_layout_that_does_not_fit_is_refused_by_name():
    adapters = LORA.init(BASE, jax.random.key(0))
    lora = Lora(2, rules=(Rule("proj", quant.Layout(2, 1)),))
    words = r"proj/weight: a parameter of shape \(64, 8\) lacks axes"
    with pytest.raises(ValueError, match=words):
        lora.init(BASE, jax.random.key(0))
    with pytest.raises(ValueError, match=words):
        lora(BASE, adapters)


@pytest.mark.misuse
def test_rules_may_be_a_list_and_a_rank_is_an_int():
    assert hash(Lora(2, rules=list(quant.DEFAULT_RULES))) == hash(Lora(2))
    for rank in (4.0, "4", None):
        with pytest.raises(TypeError, match=f"rank must be an int; got {rank!r}"):
            Lora(rank)


def test_rules_choose_and_what_cannot_be_is_refused():
    base = drawn(SHAPES)
    some = Lora(2, rules=(Rule("experts|embed"), *quant.DEFAULT_RULES))
    adapters = some.init(base, jax.random.key(0))
    assert adapters["experts"] == {"down": None, "gate_up": None}
    assert jax.tree.map(jnp.shape, adapters["attention"]) == {
        "o": {"weight": {"a": (3, 10, 2), "b": (3, 2, 6)}}
    }
    for options, words in (
        ({"rank": 0}, "rank must be at least 1; got 0"),
        ({"alpha": 0.0}, "alpha must be positive and finite; got 0.0"),
        ({"alpha": float("inf")}, "alpha must be positive and finite; got inf"),
        ({"alpha": float("nan")}, "alpha must be positive and finite; got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            Lora(**options)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="both sides above rank=64"):
        Lora(64).init(base, key)
    with pytest.raises(ValueError, match=r"got conv/kernel of shape \(3, 3, 8, 8\)"):
        LORA.init({"conv": {"kernel": jnp.ones((3, 3, 8, 8))}}, key)
    with pytest.raises(TypeError, match="proj/weight must be of a floating type; got int32"):
        LORA.init({"proj": {"weight": jnp.ones((8, 8), jnp.int32)}}, key)
    with pytest.raises(TypeError, match="proj/weight must be an array; it is in SEFP"):
        LORA.init(quant.quantize_params(BASE), key)
    for half in ({"frozen": BASE}, {"merge": LORA}):
        with pytest.raises(ValueError, match=f"got {next(iter(half))} only"):
            otaro_tune(
                BASE, CONFIG, lambda s: (X, TO_COME), loss=loss_of, optimizer=OPTIMIZER, **half
            )
