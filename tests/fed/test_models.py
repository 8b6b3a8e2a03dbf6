"""Models: convolutions that are matrix products, every architecture, and what users bring."""

import fed_support as support
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fed
from fed import architectures as zoo
from fed import models

IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 9, 3)), jnp.float32)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1), (5, 2)])
def test_shifted_slices_are_a_convolution(size, stride):
    layer = zoo.Conv(3, 4, size, stride, rngs=nnx.Rngs(0))
    kernel = layer.kernel[...].reshape(size, size, 3, 4)
    edge = ((size - 1) // 2, size - 1 - (size - 1) // 2)
    native = jax.lax.conv_general_dilated(
        IMAGE, kernel, (stride, stride), (edge, edge), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer(IMAGE), native, atol=2e-6)


@pytest.mark.parametrize("shape", [(8, 6), (9, 6), (6, 9), (7, 5), (1, 1)])
def test_a_convolution_by_squares_is_one_and_a_maximum(shape):
    """The tolerance is float32's: sums of 27 products."""
    kernel = zoo.Conv(3, 4, rngs=nnx.Rngs(0)).kernel[...]
    bias = jnp.arange(4.0)
    image = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    goal = jax.random.normal(jax.random.key(1), (2, *(-(-n // 2) for n in shape), 4))

    def ours(kernel, bias, x):
        layer = zoo.Conv(3, 4, rngs=nnx.Rngs(0))
        layer.kernel[...], layer.bias[...] = kernel, bias
        return jnp.sum(layer.halved(x) * goal)

    def theirs(kernel, bias, x):
        native = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        native.kernel[...], native.bias[...] = kernel.reshape(3, 3, 3, 4), bias
        edge = [(0, 0), *((0, n % 2) for n in shape), (0, 0)]
        y = jnp.pad(native(x), edge, constant_values=-jnp.inf)
        return jnp.sum(nnx.max_pool(y, (2, 2), (2, 2)) * goal)

    pairs = [jax.value_and_grad(f, (0, 1, 2))(kernel, bias, image) for f in (ours, theirs)]
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_equal_values_share_the_gradient_of_their_maximum():
    y = jnp.array([[2.0, 1.0, 0.0], [2.0, 3.0, 0.0], [0.0, 3.0, 0.0], [1.0, 3.0, 0.0]])
    y = y.reshape(4, 3, 1, 1, 1)
    share = jax.grad(lambda y: jnp.sum(zoo.largest(y)))(y)
    np.testing.assert_allclose(share, jax.grad(lambda y: jnp.sum(jnp.max(y, axis=0)))(y))
    nan = jax.grad(lambda y: jnp.sum(zoo.largest(y)))(y.at[2, 0].set(jnp.nan))
    assert jnp.isnan(nan[:, 0]).all() and jnp.isfinite(nan[:, 1:]).all()


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 2)])
def test_a_maximum_over_squares_is_of_one_kind_of_convolution(size, stride):
    with pytest.raises(ValueError, match=f"size=3 and stride=1; got {size} and {stride}"):
        zoo.Conv(3, 4, size, stride, rngs=nnx.Rngs(0)).halved(IMAGE)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_is_a_grouped_convolution(stride):
    layer = zoo.Depthwise(3, 3, stride, rngs=nnx.Rngs(0))
    native = jax.lax.conv_general_dilated(
        IMAGE,
        layer.kernel[...].reshape(3, 3, 1, 3),
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    np.testing.assert_allclose(layer(IMAGE), native, atol=2e-6)


ARCHITECTURES = {
    "mlp:8,8": (8, 8),
    "cnn:4,8": (9, 9),
    "vgg:4,4": (8, 8, 3),
    "mobilenet:4": (12, 12),
    "vit:8x2": (8, 8),
    "transformer:8x1": (6,),
}
LONG_TO_COMPILE = ("vgg:4,4", "mobilenet:4", "vit:8x2")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n in LONG_TO_COMPILE else [])
        for n in ARCHITECTURES
    ],
)
def test_every_architecture_learns_one_batch(name):
    shape = ARCHITECTURES[name]
    if name.startswith("vit") or name.startswith("transformer"):
        model = (
            zoo.vit(shape, 5, patch=4, width=8, layers=2, heads=2)
            if name.startswith("vit")
            else zoo.transformer(6, 5, width=8, layers=1, heads=2)
        )
    else:
        model = zoo.by_name(name, shape, 5)
    generator = np.random.default_rng(0)
    tokens = name.startswith("transformer")
    inputs = (
        generator.integers(0, 5, (12, *shape)).astype(np.int32)
        if tokens
        else generator.random((12, *shape), np.float32)
    )
    labels = generator.integers(0, 5, (12, 6) if tokens else 12).astype(np.int32)
    steps = 60
    batches = fed.Batches(
        jnp.asarray(inputs),
        jnp.asarray(labels),
        jnp.tile(jnp.arange(12, dtype=jnp.int32), (steps, 1)),
        jnp.ones((steps, 12), bool),
    )
    options = fed.LocalOptions(optimizer="adam", learning_rate=1e-2)
    run = jax.jit(lambda p, k: fed.local_train(model, p, batches, k, options))
    params = model.init(jax.random.key(0))
    trained, _ = run(params, jax.random.key(1))
    before, after = (
        float(jnp.mean(fed.clients.cross_entropy(model.apply(p, batches.inputs), batches.labels)))
        for p in (params, trained)
    )
    assert after < 0.8 * before
    logits, features = model.outputs
    assert logits.shape == ((6, 5) if tokens else (5,)) and len(features.shape) == 1


def test_a_causal_transformer_does_not_look_ahead():
    model = zoo.transformer(6, 5, width=8, layers=2, heads=2)
    params = model.init(jax.random.key(0))
    tokens = jnp.asarray([[1, 2, 3, 4, 0, 1]], jnp.int32)
    changed = tokens.at[0, 4].set(2)
    one, two = (model.apply(params, t) for t in (tokens, changed))
    np.testing.assert_allclose(one[:, :4], two[:, :4], atol=1e-6)
    assert float(jnp.abs(one[:, 4:] - two[:, 4:]).max()) > 1e-3


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Dense(7)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(4, name="head")(x), x


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 7, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.again = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(7, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.again(self.drop(nnx.relu(self.hidden(x)))))


@pytest.mark.parametrize("given", [Linen(), Nnx])
def test_a_user_s_flax_module_is_a_model(given):
    model = models.as_model(given, (6,))
    params = model.init(jax.random.key(0))
    x = jnp.ones((3, 6))
    assert model.apply(params, x).shape == (3, 4) and model.parameters == 6 * 7 + 7 + 7 * 4 + 4
    assert np.array_equal(model.apply(params, x), model.apply(params, x))
    one, same, other = (model.apply(params, x, jax.random.key(k)) for k in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_an_nnx_module_begins_with_its_own_values():
    given = Nnx(nnx.Rngs(3))
    model = models.as_model(given, (6,))
    params = model.init(jax.random.key(7))
    assert model.name == "Nnx"
    assert np.array_equal(params["head"]["kernel"], given.head.kernel[...])
    given.eval()
    x = jnp.ones((3, 6))
    np.testing.assert_allclose(model.apply(params, x), given(x), atol=1e-6)


def pair():
    def init(key):
        return {"head": 0.1 * jax.random.normal(key, (6, 4))}

    return init, lambda p, x: x @ p["head"]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (Nnx, ["Nnx"]),
        (Linen(), ["Linen"]),
        (pair(), ["functions"]),
        ((Nnx, Nnx), ["Nnx", "Nnx"]),
        ((Linen(), Linen()), ["Linen", "Linen"]),
        ([pair(), Linen()], ["functions", "Linen"]),
    ],
)
def test_one_architecture_or_a_list_of_them(given, names):
    assert [m.name for m in models.as_models(given, (6,))] == names


@pytest.mark.parametrize("given", [Nnx, Linen(), pair()])
def test_what_a_user_has_runs_in_a_federation(given):
    cut = support.splits(200)
    part = support.ragged(len(cut.train), [10, 10])
    run = fed.RunOptions(rounds=1, local=fed.LocalOptions(batch_size=10))
    step = fed.Distillation(steps=1, batch_size=16)
    how = fed.KoalaOptions(reverse=step, forward=step)
    found = fed.koala(given, given, cut, part, run, how)
    assert 0 <= found.final["large_accuracy"] <= 1
    assert 0 <= fed.fedavg([given], cut, part, run).final["small_accuracy"] <= 1


@pytest.mark.misuse
def test_what_is_no_model_is_refused_where_it_enters():
    cut = support.splits(200)
    part = support.ragged(len(cut.train), [10, 10])
    with pytest.raises(TypeError, match="a flax module or a pair .* got int"):
        fed.fedavg(3, cut, part)
    with pytest.raises(TypeError, match="must be a fed.Model; got Linen"):
        fed.Method([Linen()])


def test_dropout_layers_of_a_module_draw_apart():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            return jnp.stack([self.one(x), self.two(x)], axis=1) * self.head[...].reshape(1, 1, 1)

    model = models.from_nnx(Twice, (50,))
    out = model.apply(model.init(jax.random.key(0)), jnp.ones((1, 50)), jax.random.key(1))
    assert not np.array_equal(out[:, 0], out[:, 1])


class Batchy(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


class LinenBatchy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(x)


@pytest.mark.parametrize("given", [Batchy, LinenBatchy()])
def test_batch_statistics_are_refused(given):
    with pytest.raises(ValueError, match="use GroupNorm or"):
        models.as_model(given, (6,))


@pytest.mark.misuse
def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="must be a fed.Model, a flax module or a pair"):
        models.as_model(3, (6,))
    with pytest.raises(TypeError, match="wrap it with fed.models.from_nnx"):
        models.as_model(Linen())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zoo.by_name("mlp:a", (4,), 2), "a model must be mlp:16"),
        (lambda: zoo.cnn((4, 5), (2,), 2), "square images; got 4 x 5"),
        (lambda: zoo.vit((9, 9), 2, patch=4), "patch must divide the image, 9 x 9; got 4"),
        (lambda: zoo.transformer(4, 5, width=6, heads=4), "heads must divide width=6; got 4"),
        (lambda: zoo.mobilenet((4,), 2), "inputs must be an image"),
    ],
)
def test_impossible_shapes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_a_jaxmoe_language_model_is_taught_by_small_transformers(tmp_path):
    import jaxmoe

    path = tmp_path / "play.txt"
    path.write_text(
        "\n\n".join(
            f"{who}:\n{text * 40}"
            for who, text in (
                ("A", "to be or not "),
                ("B", "all the world "),
                ("C", "now is the winter "),
            )
        )
    )
    cut = fed.split(fed.data.speakers(path, 16, minimum=1), proxy=20, validation=5, test=10)
    part = fed.partition.natural(cut.train.owners)
    config = jaxmoe.presets["tiny"]
    server = models.from_jaxmoe(config, 16)
    client = zoo.transformer(16, server.outputs[0].shape[-1], width=16, layers=1, heads=2)
    run = fed.RunOptions(
        rounds=4,
        local=fed.LocalOptions(epochs=4, batch_size=4, optimizer="adam", learning_rate=1e-2),
    )
    step = fed.Distillation(steps=40, batch_size=8, learning_rate=3e-3, temperature=1.0)
    options = fed.KoalaOptions(reverse=step, forward=fed.Distillation(steps=5, batch_size=8))
    found = fed.koala(server, client, cut, part, run, options)
    first, last = found.rounds[0], found.rounds[-1]
    assert last["large_accuracy"] > 0.4 and last["reverse_loss"] < first["reverse_loss"]
