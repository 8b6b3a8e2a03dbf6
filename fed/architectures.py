"""Architectures for clients and servers, as flax.nnx modules, each from a function that returns a :class:`fed.models.Model`.

Convolutions are shifted slices and one matrix product: under vmap over clients a native convolution becomes a grouped one,
and inside any loop it loses XLA:CPU's fast routine (spec 5.3). What remains is memory traffic, most of it around the maximum over
squares, so a convolution before one is computed by squares (:func:`squares`). Norms are over an example's own values, never over a
batch.
"""

import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fed.models import Model, from_nnx

_NORMAL = nnx.initializers.he_normal()


def shifted(x: Float[Array, "B H W C"], size: int, stride: int) -> list[Array]:
    """The ``size`` x ``size`` neighbours of every ``stride``-th pixel, zero beyond the edge: as many [B, H', W', C]."""
    before = (size - 1) // 2
    edge = (before, size - 1 - before)
    padded = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
    height, width = (-(-n // stride) for n in x.shape[1:3])
    return [
        padded[
            :, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride
        ]
        for i in range(size)
        for j in range(size)
    ]


class Conv(nnx.Module):
    """A convolution with zero padding; its kernel [size * size * in, out] is a matrix."""

    def __init__(
        self, inside: int, outside: int, size: int = 3, stride: int = 1, *, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(
            _NORMAL(rngs.params(), (size * size * inside, outside), jnp.float32)
        )
        self.bias = nnx.Param(jnp.zeros((outside,), jnp.float32))
        self.size, self.stride = size, stride

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        """The convolved image."""
        patches = jnp.concatenate(shifted(x, self.size, self.stride), axis=-1)
        return patches @ self.kernel[...] + self.bias[...].reshape(1, 1, 1, -1)

    def halved(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        """The convolved image's maximum over squares of 2 x 2; an odd last row or column is its own square.

        Raises:
          ValueError: for another size than 3, or a stride.
        """
        if (self.size, self.stride) != (3, 1):
            raise ValueError(
                f"halved needs size=3 and stride=1; got {self.size} and {self.stride}. Convolve, then take the maximum."
            )
        y = largest(squares(x, self.kernel[...])).transpose(3, 1, 2, 0)
        return y + self.bias[...].reshape(1, 1, 1, -1)


def squares(
    x: Float[Array, "B H W C"], kernel: Float[Array, "9*C D"]
) -> Float[Array, "4 D H2 W2 B"]:
    """A 3 x 3 convolution, zero beyond the edge, by squares of 2 x 2 pixels: all first corners, all second ones, ...

    A square's four results are one product with its 4 x 4 neighbourhood, which is four neighbouring squares of the input. The kernel
    stands in that matrix four times among zeros: 16/9 of the multiplications, but 16 copied values for four pixels instead of 36, a
    wider product, and the maximum over a square is one over a leading axis. With the batch as the last axis few channels cost no speed.
    Where height or width is odd, the last squares reach over the edge and are -inf there.
    """
    (b, h, w, c), d = x.shape, kernel.shape[-1]
    high, wide = (h + 1) // 2, (w + 1) // 2
    blocks = jnp.pad(x.transpose(3, 1, 2, 0), ((0, 0), (1, 1 + h % 2), (1, 1 + w % 2), (0, 0)))
    blocks = blocks.reshape(c, high + 1, 2, wide + 1, 2, b).transpose(2, 4, 0, 1, 3, 5)
    blocks = blocks.reshape(4 * c, high + 1, wide + 1, b)
    near = jnp.concatenate(
        [blocks[:, i : i + high, j : j + wide] for i in range(2) for j in range(2)]
    )
    corners = [
        jnp.pad(kernel.reshape(3, 3, c, d), ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)))
        for i in range(2)
        for j in range(2)
    ]
    matrix = jnp.stack(corners, axis=3).reshape(2, 2, 2, 2, c, 4 * d)
    matrix = matrix.transpose(0, 2, 1, 3, 4, 5).reshape(16 * c, 4 * d)
    y = jax.lax.dot_general(matrix, near.reshape(16 * c, -1), (((0,), (0,)), ((), ())))
    y = y.reshape(2, 2, d, high, wide, b)
    if h % 2 or w % 2:
        row, column = (
            jnp.arange(2)[:, None] + 2 * jnp.arange(n)[None] < size
            for n, size in ((high, h), (wide, w))
        )
        inside = row.reshape(2, 1, 1, high, 1, 1) & column.reshape(1, 2, 1, 1, wide, 1)
        y = jnp.where(inside, y, -jnp.inf)
    return y.reshape(4, d, high, wide, b)


@jax.custom_vjp
def largest(y: Float[Array, "4 D H W B"]) -> Float[Array, "D H W B"]:
    """Maximum over the first axis; equal ones share the gradient, and NaN spreads, as under ``jnp.max``.

    By hand, because XLA:CPU runs a reduction and its gradient several times slower than this.
    """
    return jnp.maximum(jnp.maximum(y[0], y[1]), jnp.maximum(y[2], y[3]))


def _largest_forward(y: Array) -> tuple[Array, tuple[Array, Array]]:
    top = largest(y)
    return top, (y, top)


def _largest_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    y, top = kept
    equal = y == top[None]
    count = functools.reduce(jnp.add, (equal[i].astype(y.dtype) for i in range(4)))
    # Where the maximum is NaN nothing equals it, and 0 * inf or 0 * NaN is NaN in each place.
    return (equal.astype(y.dtype) * (gradient / count)[None],)


largest.defvjp(_largest_forward, _largest_backward)


class Depthwise(nnx.Module):
    """One filter per channel, kernel [size * size, C]: a weighted sum of shifted images."""

    def __init__(self, channels: int, size: int = 3, stride: int = 1, *, rngs: nnx.Rngs):
        scale = (2.0 / (size * size)) ** 0.5
        self.kernel = nnx.Param(
            scale * jax.random.normal(rngs.params(), (size * size, channels), jnp.float32)
        )
        self.size, self.stride = size, stride

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        """The filtered image."""
        kernel = self.kernel[...]
        parts = shifted(x, self.size, self.stride)
        return functools.reduce(
            jnp.add, (part * kernel[i].reshape(1, 1, 1, -1) for i, part in enumerate(parts))
        )


def _image(x: Array) -> Array:
    """[B, H, W] or [B, H, W, C] as [B, H, W, C]."""
    return x if x.ndim == 4 else x[..., None]


class _Mlp(nnx.Module):
    def __init__(self, inside: int, hidden: Sequence[int], classes: int, dropout: float, *, rngs):
        sizes = [inside, *hidden]
        self.layers = nnx.List(
            [
                nnx.Linear(a, b, kernel_init=_NORMAL, rngs=rngs)
                for a, b in zip(sizes[:-1], sizes[1:], strict=True)
            ]
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.head = nnx.Linear(sizes[-1], classes, rngs=rngs)

    def logits_and_features(self, x):
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
            x = x if self.dropout is None else self.dropout(x)
        return self.head(x), x


class _Cnn(nnx.Module):
    def __init__(
        self,
        side: int,
        inside: int,
        channels: Sequence[int],
        hidden: int,
        classes: int,
        per_stage: int,
        *,
        rngs,
    ):
        sizes = [inside, *channels]
        self.stages = nnx.List(
            [
                nnx.List([Conv(a if i == 0 else b, b, rngs=rngs) for i in range(per_stage)])
                for a, b in zip(sizes[:-1], sizes[1:], strict=True)
            ]
        )
        for _ in channels:
            side = (side + 1) // 2
        self.dense = nnx.Linear(side * side * sizes[-1], hidden, kernel_init=_NORMAL, rngs=rngs)
        self.head = nnx.Linear(hidden, classes, rngs=rngs)

    def logits_and_features(self, x):
        x = _image(x)
        for stage in self.stages:
            *before, last = stage
            for conv in before:
                x = jax.nn.relu(conv(x))
            x = jax.nn.relu(last.halved(x))  # of the maximum: the same, on a quarter of the values
        x = jax.nn.relu(self.dense(x.reshape(x.shape[0], -1)))
        return self.head(x), x


class _InvertedResidual(nnx.Module):
    def __init__(self, inside: int, outside: int, expand: int, stride: int, *, rngs):
        wide = inside * expand
        self.expand = Conv(inside, wide, 1, rngs=rngs)
        self.depthwise = Depthwise(wide, 3, stride, rngs=rngs)
        self.norm = nnx.GroupNorm(wide, num_groups=1, rngs=rngs)
        self.project = Conv(wide, outside, 1, rngs=rngs)
        self.residual = stride == 1 and inside == outside

    def __call__(self, x):
        y = jax.nn.relu6(self.expand(x))
        y = self.project(jax.nn.relu6(self.norm(self.depthwise(y))))
        return x + y if self.residual else y


class _MobileNet(nnx.Module):
    def __init__(self, inside: int, width: int, stages: int, classes: int, *, rngs):
        self.stem = Conv(inside, width, 3, 2, rngs=rngs)
        blocks = []
        for stage in range(stages):
            wider = width * 3 // 2
            blocks += [
                _InvertedResidual(width, wider, 3, 2 if stage else 1, rngs=rngs),
                _InvertedResidual(wider, wider, 3, 1, rngs=rngs),
            ]
            width = wider
        self.blocks = nnx.List(blocks)
        self.last = Conv(width, 2 * width, 1, rngs=rngs)
        self.head = nnx.Linear(2 * width, classes, rngs=rngs)

    def logits_and_features(self, x):
        x = jax.nn.relu6(self.stem(_image(x)))
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(jax.nn.relu6(self.last(x)), axis=(1, 2))
        return self.head(x), x


class _Block(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, causal: bool, *, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.heads, self.causal = heads, causal

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        b, t, d = x.shape
        q, k, v = jnp.split(
            self.qkv(self.norm1(x)).reshape(b, t, 3 * self.heads, d // self.heads), 3, axis=2
        )
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.reshape(b, t, d))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class _Vit(nnx.Module):
    def __init__(
        self,
        shape: tuple[int, int, int],
        patch: int,
        width: int,
        layers: int,
        heads: int,
        classes: int,
        *,
        rngs,
    ):
        height, wide, channels = shape
        count = (height // patch) * (wide // patch)
        self.patch = patch
        self.embed = nnx.Linear(patch * patch * channels, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (count, width)))
        self.blocks = nnx.List([_Block(width, heads, False, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def logits_and_features(self, x):
        x = _image(x)
        (b, h, w, c), p = x.shape, self.patch
        x = (
            x.reshape(b, h // p, p, w // p, p, c)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(b, -1, p * p * c)
        )
        x = self.embed(x) + self.positions[...][None]
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(self.norm(x), axis=1)
        return self.head(x), x


class _Transformer(nnx.Module):
    def __init__(self, vocab: int, length: int, width: int, layers: int, heads: int, *, rngs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, width)))
        self.blocks = nnx.List([_Block(width, heads, True, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def logits_and_features(self, tokens: Int[Array, "B T"]):
        x = self.embed(tokens) + self.positions[...][None, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x), x


def _size(inputs: Sequence[int]) -> int:
    total = 1
    for n in inputs:
        total *= n
    return total


def mlp(
    inputs: Sequence[int], hidden: Sequence[int], classes: int, *, dropout: float = 0.0
) -> Model:
    """A multi-layer perceptron: ``inputs`` flattened, layers of ``hidden`` units, ``classes`` logits."""
    build = functools.partial(_Mlp, _size(inputs), tuple(hidden), classes, dropout)
    name = "mlp-" + "-".join(map(str, hidden or ["linear"]))
    return from_nnx(lambda rngs: build(rngs=rngs), tuple(inputs), name=name)


def cnn(
    inputs: Sequence[int],
    channels: Sequence[int],
    classes: int,
    *,
    hidden: int = 64,
    per_stage: int = 1,
) -> Model:
    """3 x 3 convolutions and halvings by the maximum, ``per_stage`` convolutions to each of ``channels``, then a dense layer.

    With two or more convolutions per stage it is VGG-shaped.
    """
    height, width, inside = _as_image(inputs)
    if height != width:
        raise ValueError(f"inputs must be square images; got {height} x {width}.")
    build = functools.partial(_Cnn, height, inside, tuple(channels), hidden, classes, per_stage)
    name = ("cnn-" if per_stage == 1 else "vgg-") + "-".join(map(str, (*channels, hidden)))
    return from_nnx(lambda rngs: build(rngs=rngs), tuple(inputs), name=name)


def mobilenet(inputs: Sequence[int], classes: int, *, width: int = 8, stages: int = 2) -> Model:
    """Inverted residuals with depthwise filters, MobileNet-shaped, for images of 28 to 64 pixels."""
    build = functools.partial(_MobileNet, _as_image(inputs)[2], width, stages, classes)
    return from_nnx(
        lambda rngs: build(rngs=rngs), tuple(inputs), name=f"mobilenet-{width}x{stages}"
    )


def vit(
    inputs: Sequence[int],
    classes: int,
    *,
    patch: int = 4,
    width: int = 64,
    layers: int = 4,
    heads: int = 4,
) -> Model:
    """A vision transformer with mean pooling."""
    shape = _as_image(inputs)
    if shape[0] % patch or shape[1] % patch:
        raise ValueError(f"patch must divide the image, {shape[0]} x {shape[1]}; got {patch}.")
    _check_heads(width, heads)
    build = functools.partial(_Vit, shape, patch, width, layers, heads, classes)
    return from_nnx(lambda rngs: build(rngs=rngs), tuple(inputs), name=f"vit-{width}x{layers}")


def transformer(
    length: int, vocab: int, *, width: int = 64, layers: int = 2, heads: int = 4
) -> Model:
    """A causal language model over ``length`` tokens: logits [B, T, vocab] of each next token."""
    _check_heads(width, heads)
    build = functools.partial(_Transformer, vocab, length, width, layers, heads)
    example = jax.ShapeDtypeStruct((length,), jnp.int32)
    return from_nnx(lambda rngs: build(rngs=rngs), example, name=f"transformer-{width}x{layers}")


def by_name(text: str, inputs: Sequence[int], classes: int) -> Model:
    """A model from its short form, e.g. ``mlp:256,256``, ``cnn:8,16``, ``vgg:16,32``, ``mobilenet:8``, ``vit:32x2``, ``transformer:64x2``."""
    kind, _, rest = text.partition(":")
    if not re.fullmatch(r"(\d+([,x]\d+)*)?", rest):
        kind = ""
    numbers = [int(n) for n in re.findall(r"\d+", rest)]
    if kind == "mlp":
        return mlp(inputs, numbers, classes)
    if kind in ("cnn", "vgg") and numbers:
        return cnn(inputs, numbers, classes, per_stage=1 if kind == "cnn" else 2)
    if kind == "mobilenet" and len(numbers) < 2:
        return mobilenet(inputs, classes, width=numbers[0] if numbers else 8)
    if kind == "vit" and len(numbers) == 2:
        return vit(inputs, classes, width=numbers[0], layers=numbers[1])
    if kind == "transformer" and len(numbers) == 2:
        return transformer(inputs[0], classes, width=numbers[0], layers=numbers[1])
    raise ValueError(
        f"a model must be mlp:16, cnn:8,16, vgg:16,32, mobilenet:8, vit:32x2 or transformer:64x2; got {text!r}."
    )


def _as_image(inputs: Sequence[int]) -> tuple[int, int, int]:
    if len(inputs) not in (2, 3):
        raise ValueError(f"inputs must be an image, (H, W) or (H, W, C); got {tuple(inputs)}.")
    height, width, *channels = inputs
    return height, width, channels[0] if channels else 1


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"heads must divide width={width}; got {heads}.")
