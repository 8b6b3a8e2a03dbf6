"""Merging of ensembles, distillation, and what of a model is trained."""

import fed_support as support
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fed
from fed import augment, distill
from fed.distill import Lesson, Merge, merge

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 4)) * 2, jnp.float32)
SIZES = jnp.asarray([1.0, 2.0, 5.0], jnp.float32)
COUNTS = jnp.asarray(np.random.default_rng(1).integers(0, 9, (3, 4)), jnp.float32)


@pytest.mark.parametrize("space", ["probabilities", "logits"])
@pytest.mark.parametrize("weights", distill.MERGES)
def test_every_merge_gives_probabilities(weights, space):
    q = merge(LOGITS, SIZES, Merge(weights, space=space), 2.0, COUNTS)
    assert q.shape == (7, 4) and float(q.min()) >= 0
    np.testing.assert_allclose(q.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("weights", distill.MERGES)
def test_one_member_is_its_own_consensus(weights):
    q = merge(LOGITS[:1], SIZES[:1], Merge(weights), 2.0, COUNTS[:1] + 1)
    np.testing.assert_allclose(q, jax.nn.softmax(LOGITS[0] / 2), atol=1e-6)


def test_size_weights_are_shares_of_examples():
    q = merge(LOGITS, SIZES, Merge("size"), 1.0)
    expected = np.einsum("m,mbc->bc", np.array([1, 2, 5]) / 8, jax.nn.softmax(LOGITS))
    np.testing.assert_allclose(q, expected, atol=1e-6)


def test_confidence_follows_the_variance_of_logits():
    sure, vague = jnp.float32([[[9.0, 0, 0, 0]]]), jnp.float32([[[0, 0.1, 0, 0]]])
    q = merge(jnp.concatenate([sure, vague]), SIZES[:2], Merge("confidence"), 1.0)
    np.testing.assert_allclose(q, jax.nn.softmax(sure[0]), atol=2e-3)


def test_agreement_leaves_out_who_contradicts_the_majority():
    votes = jnp.float32([[[5.0, 0, 0, 0]], [[0, 5.0, 0, 0]], [[0, 4.0, 0, 0]]])
    q = merge(votes, jnp.ones(3), Merge("agreement"), 1.0)
    expected = (jax.nn.softmax(votes[1]) + jax.nn.softmax(votes[2])) / 2
    np.testing.assert_allclose(q, expected, atol=1e-6)


def test_reliability_believes_who_has_seen_the_class():
    votes = jnp.float32([[[5.0, 0, 0, 0]], [[0, 5.0, 0, 0]]])
    counts = jnp.float32([[9, 0, 0, 0], [7, 0, 0, 0]])
    q = merge(votes, jnp.ones(2), Merge("reliability"), 1.0, counts)
    np.testing.assert_allclose(q, jax.nn.softmax(votes[0]), atol=1e-6)
    with pytest.raises(ValueError, match="needs the clients' label counts"):
        merge(votes, jnp.ones(2), Merge("reliability"), 1.0)


def test_sharpening_sharpens():
    flat, sharp = (merge(LOGITS, SIZES, Merge("size", sharpen=s), 1.0) for s in (1.0, 0.3))
    assert float(sharp.max(-1).mean()) > float(flat.max(-1).mean()) + 0.05


def test_members_without_a_say_count_alike():
    flat = jnp.zeros((2, 1, 4))
    np.testing.assert_allclose(merge(flat, jnp.ones(2), Merge(), 1.0), 0.25)


def test_divergence_is_zero_for_equal_and_positive_for_others():
    p = jax.nn.softmax(LOGITS[0])
    assert abs(float(distill.divergence(p, LOGITS[0]))) < 1e-6
    assert float(distill.divergence(p, LOGITS[1])) > 0.1
    certain = jax.nn.one_hot(jnp.argmax(p, -1), 4, dtype=jnp.float32)
    assert np.isfinite(distill.divergence(certain, LOGITS[0]))  # 0 log 0


def test_orders_are_epochs_of_shuffles():
    order = distill.orders(jax.random.key(0), 20, 12, 5)
    assert order.shape == (12, 5)
    for epoch in range(3):
        assert sorted(order[4 * epoch : 4 * epoch + 4].reshape(-1).tolist()) == list(range(20))


@pytest.fixture(scope="module")
def lesson():
    inputs = jnp.asarray(support.blobs(64).inputs)
    teacher = support.mlp(9)
    logits, features = distill.outputs(teacher.init(jax.random.key(8)), inputs, model=teacher)
    return Lesson(inputs, jax.nn.softmax(logits / 2), features)


@pytest.mark.parametrize("what", ["full", "head", "lora"])
def test_distillation_moves_what_is_trainable_and_nothing_else(lesson, what):
    model = support.mlp(8)
    params = model.init(jax.random.key(1))
    choice = fed.Trainable(what, rank=2)
    trained, base = choice.begin(model, params, jax.random.key(2))
    assert support.equal(choice(trained, base), params)
    options = fed.Distillation(steps=60, batch_size=16, learning_rate=1e-2)
    student = distill.begin(trained, options)
    order = distill.orders(jax.random.key(3), 64, 60, 16)
    after, _ = distill.distill(
        student, base, lesson, order, model=model, options=options, combine=choice
    )
    new = choice(after.params, base)
    loss = [
        float(distill.divergence(lesson.soft, model.apply(p, lesson.inputs) / 2))
        for p in (params, new)
    ]
    assert loss[1] < 0.8 * loss[0]
    moved = support.largest_difference(new["layers"], params["layers"])
    assert (moved == 0) == (what == "head")
    biases = support.largest_difference(new["head"]["bias"], params["head"]["bias"])
    assert (biases == 0) == (what == "lora")


def test_a_feature_term_brings_features_together(lesson):
    model = support.mlp(8)
    params = model.init(jax.random.key(1))
    projector = jax.random.normal(jax.random.key(5), (8, 9)) * 0.3
    order = distill.orders(jax.random.key(3), 64, 80, 16)
    gaps = {}
    for gamma in (1e-9, 1.0):
        options = fed.Distillation(steps=80, learning_rate=1e-2, features=gamma)
        student = distill.begin(params, options, projector)
        after, _ = distill.distill(
            student, {}, lesson, order, model=model, options=options, combine=fed.Trainable()
        )
        features = model.forward(after.params, lesson.inputs, None)[1]
        gaps[gamma] = float(jnp.mean(jnp.square(features @ after.projector - lesson.features)))
    assert gaps[1.0] < 0.5 * gaps[1e-9]


@pytest.mark.slow
def test_an_anchor_holds_the_student(lesson):
    model = support.mlp(8)
    params = model.init(jax.random.key(1))
    order = distill.orders(jax.random.key(3), 64, 40, 16)
    moved = []
    for anchor in (0.0, 10.0):
        options = fed.Distillation(steps=40, learning_rate=1e-2, anchor=anchor)
        after, _ = distill.distill(
            distill.begin(params, options), {}, lesson, order,
            model=model, options=options, combine=fed.Trainable(),
        )  # fmt: skip
        moved.append(support.largest_difference(after.params, params))
    assert moved[1] < 0.5 * moved[0]


def test_outputs_in_blocks_equal_outputs_at_once():
    model = support.mlp()
    params = [model.init(jax.random.key(i)) for i in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *params)
    inputs = jnp.asarray(support.blobs(23).inputs)
    many, _ = distill.outputs(stacked, inputs, model=model, many=True, block=8)
    for i, p in enumerate(params):
        np.testing.assert_allclose(many[i], model.apply(p, inputs), atol=1e-6)


@pytest.mark.parametrize("kind", ["shift", "mix", "shift+mix"])
def test_augmented_inputs_keep_the_originals_first(kind):
    images = jnp.asarray(np.random.default_rng(0).random((5, 8, 8)), jnp.float32)
    more = augment.proxy_inputs(images, jax.random.key(0), kind=kind, copies=3)
    assert more.shape == (15, 8, 8) and np.array_equal(more[:5], images)
    assert not np.array_equal(more[5:10], images)
    assert not np.array_equal(more[5:10], more[10:])
    assert float(more.min()) >= 0 and float(more.max()) <= 1


def test_tokens_are_not_augmented():
    tokens = jax.ShapeDtypeStruct((8,), jnp.int32)
    with pytest.raises(ValueError, match="augment must be none for tokens"):
        augment.check("mix", 2, tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Merge("best"), "weights must be one of uniform"),
        (lambda: fed.Distillation(temperature=0.0), "temperature must be positive"),
        (lambda: fed.Distillation(steps=-1), "steps must not be negative"),
        (lambda: fed.Trainable("some"), "trainable must be full, head or lora"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (fed.Distillation, {"learning_rate": 0.0}, "learning_rate must be positive; got 0"),
        (fed.Distillation, {"temperature": -1.0}, "temperature must be positive; got -1"),
        (fed.Distillation, {"weight": -1.0}, "weight must not be negative; got -1"),
        (fed.Distillation, {"features": float("nan")}, "features must not be negative; got nan"),
        (fed.Distillation, {"steps": -1}, "steps must not be negative"),
        (fed.Merge, {"sharpen": 0.5, "space": "logits"}, "sharpen must be 1 with space='logits'"),
    ],
)
def test_wrong_numbers_are_refused(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)
