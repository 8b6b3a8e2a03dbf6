"""Models as pure functions, for clients and servers alike: flax.nnx and linen modules, (init, apply) pairs, jaxmoe language models.

The training code of this package sees nothing but :class:`Model`. Parameters are nested dicts of arrays; what a module holds
besides parameters (dropout's counters) is rebuilt at each call, so a client's whole state is its parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Params = Any
ModelLike = Any  # what as_model takes
# (params, inputs, key or None) -> logits, features. A key means training: dropout draws from it.
Forward = Callable[[Params, Array, Array | None], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A differentiable classifier or language model.

    Attributes:
      name: in reports and errors.
      init: key -> params.
      forward: (params, inputs [B, ...], key or None) -> logits [B, ..., C] float32, pooled features [B, D] float32.
      inputs: shape and dtype of one example.
      head: first names of the parameters that "the head" means (the last block), for servers that train only that.
    """

    name: str
    init: Callable[[Array], Params]
    forward: Forward
    inputs: jax.ShapeDtypeStruct
    head: tuple[str, ...] = ("head",)

    def apply(self, params: Params, inputs: Array, key: Array | None = None) -> Array:
        """Logits [B, ..., C]."""
        return self.forward(params, inputs, key)[0]

    @functools.cached_property
    def shapes(self) -> Params:
        """Shapes and dtypes of the parameters; allocates nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @functools.cached_property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of one example's logits and features."""
        batch = jax.ShapeDtypeStruct((1, *self.inputs.shape), self.inputs.dtype)
        logits, features = jax.eval_shape(lambda p, x: self.forward(p, x, None), self.shapes, batch)
        cut = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (logits, features)]
        return cut[0], cut[1]

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(x.size for x in jax.tree.leaves(self.shapes))

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters: storage at a client, and one transfer without compression."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.shapes))

    def __repr__(self) -> str:
        return f"Model({self.name}: {self.parameters:,} parameters, {self.nbytes / 1e6:.3g} MB)"


def check_same_task(models: Mapping[str, Model]) -> None:
    """Refuses models that don't answer the same question: inputs and classes must agree."""
    (first, one), *others = models.items()
    for name, other in others:
        if other.inputs != one.inputs:
            raise ValueError(
                f"{name} must take the inputs of {first}, {one.inputs.shape} {one.inputs.dtype}; {other.name} takes "
                f"{other.inputs.shape} {other.inputs.dtype}; build both for the same data."
            )
        if other.outputs[0].shape != one.outputs[0].shape:
            raise ValueError(
                f"{name} must have the outputs of {first}, {one.outputs[0].shape}; {other.name} has "
                f"{other.outputs[0].shape}; for language models of different vocabularies see fed.language."
            )


def from_functions(
    init: Callable[[Array], Params],
    apply: Callable[[Params, Array], Any],
    inputs: tuple[int, ...] | jax.ShapeDtypeStruct,
    *,
    name: str = "functions",
    head: tuple[str, ...] = ("head",),
) -> Model:
    """A model from a plain pair of functions.

    Args:
      init: key -> params.
      apply: (params, inputs [B, ...]) -> logits [B, ..., C], or (logits, features [B, D]).
      inputs: shape of one example (float32), or shape and dtype.
      name: in reports.
      head: first names of the last block's parameters.
    """

    def forward(params: Params, batch: Array, key: Array | None) -> tuple[Array, Array]:
        return _with_features(apply(params, batch))

    return Model(name, init, forward, _example(inputs), head)


def from_nnx(
    build: Callable[[Any], Any],
    inputs: tuple[int, ...] | jax.ShapeDtypeStruct,
    *,
    name: str | None = None,
    head: tuple[str, ...] = ("head",),
) -> Model:
    """A model from a flax.nnx module.

    Args:
      build: nnx.Rngs -> the module. Its call returns logits; a method ``logits_and_features``, where there is one, is called
        instead and returns both (else the logits are the features that forward distillation compares).
      inputs: shape of one example (float32), or shape and dtype.
      name: default: the module's class.
      head: first names of the last block's parameters.

    Raises:
      ValueError: if the module keeps statistics of batches, which padded batches of clients would falsify.
    """
    from flax import nnx

    def split(key: Array) -> tuple[Any, Any, Any]:
        return nnx.split(build(nnx.Rngs(params=key, dropout=key)), nnx.Param, ...)

    graph, state, rest = nnx.eval_shape(lambda: split(jax.random.key(0)))
    kinds = {type(v) for v in jax.tree.leaves(rest, is_leaf=lambda v: isinstance(v, nnx.Variable))}
    if any(issubclass(kind, nnx.BatchStat) for kind in kinds):
        raise ValueError(
            f"a client's module must not keep batch statistics; {_class(build)} does; use GroupNorm or LayerNorm."
        )

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(split(key)[1])

    def forward(params: Params, batch: Array, key: Array | None) -> tuple[Array, Array]:
        filled = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(filled, params)
        module = nnx.merge(graph, filled, _reseed(rest, key))
        module.eval() if key is None else module.train()
        return _with_features(getattr(module, "logits_and_features", module)(batch))

    return Model(name or _class(build), init, forward, _example(inputs), head)


def from_linen(
    module: Any,
    inputs: tuple[int, ...] | jax.ShapeDtypeStruct,
    *,
    name: str | None = None,
    head: tuple[str, ...] = ("head",),
) -> Model:
    """A model from a flax.linen module, whose call returns logits, or logits and features. Its dropout, if any, needs a ``train`` argument.

    Args:
      module: the module.
      inputs: shape of one example (float32), or shape and dtype.
      name: default: the module's class.
      head: first names of the last block's parameters.

    Raises:
      ValueError: if the module has other variables than parameters.
    """
    import inspect

    example = _example(inputs)
    takes_train = "train" in inspect.signature(type(module).__call__).parameters

    def variables(key: Array) -> Any:
        batch = jnp.zeros((1, *example.shape), example.dtype)
        more = {"train": False} if takes_train else {}
        return module.init({"params": key, "dropout": key}, batch, **more)

    kinds = set(jax.eval_shape(variables, jax.random.key(0))) - {"params"}
    if kinds:
        raise ValueError(
            f"a client's module must have parameters only; {type(module).__name__} also has {sorted(kinds)}; "
            "use GroupNorm or LayerNorm instead of batch statistics."
        )

    def forward(params: Params, batch: Array, key: Array | None) -> tuple[Array, Array]:
        more = {"train": key is not None} if takes_train else {}
        rngs = {} if key is None else {"dropout": key}
        return _with_features(module.apply({"params": params}, batch, rngs=rngs, **more))

    def init(key: Array) -> Params:
        return variables(key)["params"]

    return Model(name or type(module).__name__, init, forward, example, head)


def from_jaxmoe(config: Any, length: int, *, name: str = "jaxmoe") -> Model:
    """A jaxmoe language model as server (or client): next-token logits over its vocabulary.

    Args:
      config: a ``jaxmoe.ModelConfig``.
      length: tokens per example.
      name: in reports.
    """
    import jaxmoe
    from jaxmoe import model

    def forward(params: Params, tokens: Array, key: Array | None) -> tuple[Array, Array]:
        hidden = model.run(params, config, tokens).hidden
        return model.unembed(params, hidden), jnp.mean(hidden.astype(jnp.float32), axis=1)

    def init(key: Array) -> Params:
        return jaxmoe.init_params(config, key)

    return Model(
        name, init, forward, jax.ShapeDtypeStruct((length,), jnp.int32), ("lm_head", "norm")
    )


def as_model(given: ModelLike, inputs: Any = None) -> Model:
    """A :class:`Model` from what a user has.

    Args:
      given: a Model; a linen module; an nnx module, which begins with its own values, or a function of nnx.Rngs that makes one (a
        class); or a pair (init, apply).
      inputs: shape of one example (float32), or shape and dtype; all but a Model need it.

    Raises:
      TypeError: for anything else, and without ``inputs``.
      ValueError: for a module that keeps statistics of batches.
    """
    if isinstance(given, Model):
        return given
    if inputs is None:
        raise TypeError(
            f"a model must be a fed.Model; got {type(given).__name__}; wrap it with fed.models.from_nnx, from_linen or from_functions."
        )
    if _is_pair(given):
        return from_functions(*given, inputs)
    from flax import linen, nnx

    if isinstance(given, linen.Module):
        return from_linen(given, inputs)
    if isinstance(given, nnx.Module):
        return from_nnx(lambda rngs: given, inputs, name=type(given).__name__)
    if callable(given):
        return from_nnx(given, inputs)
    raise TypeError(
        f"a model must be a fed.Model, a flax module or a pair (init, apply); got {type(given).__name__}."
    )


def as_models(given: ModelLike | Sequence[ModelLike], inputs: Any = None) -> list[Model]:
    """One architecture, or a list of them, as models; arguments and errors as of :func:`as_model`.

    A tuple of two functions is one architecture, the pair (init, apply).
    """
    if isinstance(given, list | tuple) and not _is_pair(given):
        return [as_model(one, inputs) for one in given]
    return [as_model(given, inputs)]


def inputs_of(inputs: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one example of ``inputs`` [N, ...] on the device."""
    return jax.ShapeDtypeStruct(inputs.shape[1:], jax.dtypes.canonicalize_dtype(inputs.dtype))


def _is_pair(given: Any) -> bool:
    """Whether this is (init, apply), and not two modules or classes of them."""
    from flax import linen, nnx

    def plain(f: Any) -> bool:
        f = f.func if isinstance(f, functools.partial) else f
        return callable(f) and not isinstance(f, type | linen.Module | nnx.Module)

    return isinstance(given, tuple) and len(given) == 2 and all(map(plain, given))


def _example(inputs: tuple[int, ...] | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if isinstance(inputs, jax.ShapeDtypeStruct):
        return inputs
    return jax.ShapeDtypeStruct(tuple(inputs), jnp.float32)


def _with_features(out: Any) -> tuple[Array, Array]:
    """Logits and features, both float32; of a sequence the mean of its features."""
    logits, features = out if isinstance(out, tuple) else (out, out)
    if features.ndim > 2:
        features = jnp.mean(features, axis=tuple(range(1, features.ndim - 1)))
    return logits.astype(jnp.float32), features.astype(jnp.float32)


def _class(build: Any) -> str:
    if isinstance(build, functools.partial):
        build = build.func
    return getattr(build, "__name__", type(build).__name__)


def _reseed(rest: Any, key: Array | None) -> Any:
    """Random state of an nnx module: every stream draws from its own branch of ``key``; nothing draws where it is None."""
    leaves, structure = jax.tree.flatten(rest)
    base = jax.random.key(0) if key is None else key
    filled = [
        jax.random.fold_in(base, i)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, filled)
