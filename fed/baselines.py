"""What KOALA is compared with, on the same splits, seeds, clients' schedules and evaluation; see :mod:`fed.compare` for the server's.

FedDF, FedMD and Fed-ET follow the public code that the specification cites (3.2 - 3.4); each docstring says where this one differs.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fed import augment, distill, ensemble
from fed.aggregate import Mean
from fed.clients import make_optimizer, update_params
from fed.cohort import Cohort
from fed.data import Splits
from fed.distill import Distillation, Lesson, Merge
from fed.driver import run
from fed.history import History
from fed.koala import teach
from fed.models import Model, ModelLike, as_model, as_models, inputs_of
from fed.partition import Partition
from fed.rounds import Context, Method, RunOptions, State, in_chunks, keep_personal, members
from fed.trainable import Trainable


def _models(given: ModelLike | Sequence[ModelLike], data: Splits) -> list[Model]:
    return as_models(given, inputs_of(data.train.inputs))


def fedavg(
    model: ModelLike | Sequence[ModelLike],
    data: Splits,
    partition: Partition,
    options: RunOptions = RunOptions(),
    **more: Any,
) -> History:
    """Federated averaging (McMahan et al., 2017); several architectures are averaged each among its own clients.

    Args:
      model: trained by every client, the small or the large one: a ``fed.Model``, a flax module or a pair (init, apply), or a list.
      data: splits; the proxy set isn't used, but must be one.
      partition: who holds what.
      options: of the run.
      more: assignment, directory, on_round, as in :func:`fed.run`.

    Raises:
      as :func:`fed.run`; TypeError for what is no model. So do the other methods here.
    """
    return run(Method(_models(model, data)), data, partition, options, **more)


def fedprox(
    model: ModelLike | Sequence[ModelLike],
    data: Splits,
    partition: Partition,
    options: RunOptions = RunOptions(),
    *,
    mu: float = 0.01,
    **more: Any,
) -> History:
    """FedAvg with mu/2 * ||w - w_start||^2 in each client's loss (Li et al., 2020); arguments as in :func:`fedavg`."""
    method = Method(_models(model, data))
    method.name = "fedprox"
    local = dataclasses.replace(options.local, proximal=mu)
    return run(method, data, partition, dataclasses.replace(options, local=local), **more)


class _LocalOnly(Method):
    name, keep, averages, personal, silent = "local-only", True, False, True, True

    def update(self, state: State, replies: list[Cohort], context: Context, key: Array) -> Any:
        """Everybody keeps their own."""
        return keep_personal(state, members(state, replies, context), context), {}


def local_only(
    model: ModelLike | Sequence[ModelLike],
    data: Splits,
    partition: Partition,
    options: RunOptions = RunOptions(),
    **more: Any,
) -> History:
    """Every client trains alone and nothing is sent; arguments as in :func:`fedavg`."""
    return run(_LocalOnly(_models(model, data)), data, partition, options, **more)


def centralised(
    model: ModelLike,
    data: Splits,
    partition: Partition,
    options: RunOptions = RunOptions(),
    **more: Any,
) -> History:
    """All clients' examples in one place, as many epochs per round as a client makes; arguments as in :func:`fedavg`.

    The optimiser's state begins anew each round, as the clients' does. Sampling, aggregator and uploads (so attacks too) are of clients and
    have no part in it.
    """
    method = Method(_models(model, data))
    method.name = "centralised"
    whole = Partition([partition.flat], partition.total, "one place")
    alone = dataclasses.replace(
        options,
        aggregator=Mean(),
        uploads=(),
        sampling=dataclasses.replace(
            options.sampling,
            participation=1.0,
            dropout=0.0,
            deadline_s=None,
            partial_work=False,
            quorum=1,
            buffer=0,
        ),
    )
    return run(method, data, whole, alone, **more)


@dataclasses.dataclass(frozen=True)
class DfOptions:
    """Of FedDF.

    Attributes:
      distillation: into each architecture's averaged model. The published runs use up to 10,000 steps and stop early on labelled
        validation data; here steps are fixed.
      merge: the published commands average logits, uniformly.
      augment: as in KOALA.
      copies: as in KOALA.
    """

    distillation: Distillation = Distillation(steps=200, batch_size=128, temperature=1.0)
    merge: Merge = Merge("uniform", space="logits")
    augment: str = "none"
    copies: int = 1


class _FedDf(Method):
    name, keep = "feddf", True

    def __init__(self, models: Sequence[Model], server: Model | None, options: DfOptions):
        super().__init__(models, server)
        self.options = options
        augment.check(options.augment, options.copies, self.models[0].inputs)

    def init(self, key: Array, context: Context) -> State:
        state = super().init(key, context)
        if state.large is None:
            return state
        return state.replace(
            moments=distill.begin(state.large, self.options.distillation).optimizer
        )

    def update(self, state: State, replies: list[Cohort], context: Context, key: Array) -> Any:
        """All received models of all architectures teach each architecture's mean, and the server's model if there is one."""
        how = self.options.distillation
        inputs = augment.proxy_inputs(
            context.proxy,
            jax.random.fold_in(key, 0),
            kind=self.options.augment,
            copies=self.options.copies,
        )
        soft = _consensus(
            self.models, state, replies, context, inputs, self.options.merge, how.temperature
        )
        state = self.average(state, replies, context, jax.random.fold_in(key, 1))
        lesson = Lesson(inputs, soft)
        order = distill.orders(
            jax.random.fold_in(key, 2), inputs.shape[0], how.steps, how.batch_size
        )
        small = [
            teach(params, None, lesson, order, model, how)[0]
            for model, params in zip(self.models, state.small, strict=True)
        ]
        state = state.replace(small=tuple(small))
        if self.server is not None:
            student, _ = distill.distill(
                distill.Student(state.large, state.moments),
                {},
                lesson,
                order,
                model=self.server,
                options=how,
                combine=Trainable(),
            )
            state = state.replace(large=student.params, moments=student.optimizer)
        return state, {}


def _consensus(
    models: Sequence[Model],
    state: State,
    replies: list[Cohort],
    context: Context,
    inputs: Array,
    how: Merge,
    temperature: float,
) -> Array:
    found = members(state, replies, context)
    answers = ensemble.of_clients(models, found, inputs, context.sizes, context.counts)
    return distill.merge(answers.logits, answers.sizes, how, temperature, answers.counts)


def feddf(
    model: ModelLike | Sequence[ModelLike],
    data: Splits,
    partition: Partition,
    options: RunOptions = RunOptions(),
    df_options: DfOptions = DfOptions(),
    *,
    server: ModelLike | None = None,
    **more: Any,
) -> History:
    """Ensemble distillation (Lin et al., 2020): all received models teach each architecture's averaged one.

    Args:
      model: client architectures.
      data: splits with the proxy set.
      partition: who holds what.
      options: of the run.
      df_options: of the method.
      server: a large model as one more student; FedDF itself has none.
      more: as in :func:`fed.run`.
    """
    large = None if server is None else as_model(server, inputs_of(data.train.inputs))
    return run(_FedDf(_models(model, data), large, df_options), data, partition, options, **more)


@dataclasses.dataclass(frozen=True)
class MdOptions:
    """Of FedMD.

    Attributes:
      digest: fitting the consensus; the loss is the mean absolute error of logits.
      subset: proxy examples per round, drawn anew; as they are, since every party must hold the same.
    """

    digest: Distillation = Distillation(steps=100)
    subset: int = 512

    def __post_init__(self) -> None:
        if self.subset < 1:
            raise ValueError(f"subset must be at least 1; got {self.subset}.")


class _FedMd(Method):
    name, keep, averages, personal = "fedmd", True, False, True

    def __init__(self, models: Sequence[Model], options: MdOptions):
        super().__init__(models)
        self.options = options

    def update(self, state: State, replies: list[Cohort], context: Context, key: Array) -> Any:
        """Every party fits the mean of all parties' logits on a subset of the public inputs."""
        how = self.options.digest
        count = min(self.options.subset, context.proxy.shape[0])
        chosen = jax.random.permutation(jax.random.fold_in(key, 0), context.proxy.shape[0])[:count]
        inputs = jnp.take(context.proxy, chosen, axis=0)
        found = members(state, replies, context)
        answers = ensemble.of_clients(self.models, found, inputs, context.sizes, context.counts)
        target = jnp.mean(answers.logits, axis=0)
        order = distill.orders(jax.random.fold_in(key, 1), count, how.steps, how.batch_size)
        taught, chunk = [], context.options.engine.chunk
        for model, (params, clients) in zip(self.models, found, strict=True):
            if len(clients):
                fit = functools.partial(
                    _digest, inputs=inputs, target=target, order=order, model=model, options=how
                )
                params = in_chunks(fit, params, np.arange(len(clients)), chunk)
            taught.append((params, clients))
        return keep_personal(state, taught, context), {}

    def transfer(self, context: Context) -> tuple[list[int], list[int]]:
        """Logits on the subset, up and down; the public set itself lies at the clients beforehand."""
        outputs = self.models[0].outputs[0]
        count = min(self.options.subset, context.proxy.shape[0])
        size = count * int(np.prod(outputs.shape)) * 4
        return [size] * len(self.models), [size] * len(self.models)


@functools.partial(jax.jit, static_argnames=("model", "options"))
def _digest(
    params: Any, inputs: Array, target: Array, order: Array, *, model: Model, options: Distillation
) -> Any:
    """Fits stacked models to logits, by mean absolute error."""
    optimizer = make_optimizer(options.optimizer, options.learning_rate)

    def loss(p: Any, index: Array) -> Array:
        logits = model.apply(p, jnp.take(inputs, index, axis=0))
        return jnp.mean(jnp.abs(logits - jnp.take(target, index, axis=0)))

    def one(p: Any) -> Any:
        def step(carry: Any, index: Array) -> Any:
            gradient = jax.grad(loss)(carry[0], index)
            return update_params(optimizer, gradient, carry[1], carry[0]), None

        return jax.lax.scan(step, (p, optimizer.init(p)), order)[0][0]

    return jax.vmap(one)(params)


def fedmd(
    model: ModelLike | Sequence[ModelLike],
    data: Splits,
    partition: Partition,
    options: RunOptions = RunOptions(),
    md_options: MdOptions = MdOptions(),
    **more: Any,
) -> History:
    """Communication by logits (Li and Wang, 2019): parties keep their own models and fit the mean of all parties' logits.

    The original pre-trains parties on *labelled* public data; this proxy set has no labels, so that step is absent. Updates are never
    combined, so an aggregator has no effect (the run says so), and one that hides updates is refused.

    Args:
      model: client architectures.
      data: splits; the proxy set is the public one.
      partition: who holds what.
      options: of the run.
      md_options: of the method.
      more: as in :func:`fed.run`.
    """
    return run(_FedMd(_models(model, data), md_options), data, partition, options, **more)


@dataclasses.dataclass(frozen=True)
class EtOptions:
    """Of Fed-ET; ``distillation.consensus`` is the weight of the diversity term.

    Attributes:
      distillation: into the large model. The cited code: SGD 5e-3, 128 steps of 64.
      augment: as in KOALA.
      copies: as in KOALA.
    """

    distillation: Distillation = Distillation(
        steps=200, batch_size=64, temperature=1.0, consensus=0.05
    )
    augment: str = "none"
    copies: int = 1


class _FedEt(Method):
    name, keep = "fed-et", True

    def __init__(self, server: Model, models: Sequence[Model], options: EtOptions):
        super().__init__(models, server)
        self.options = options
        augment.check(options.augment, options.copies, self.server.inputs)

    def init(self, key: Array, context: Context) -> State:
        state = super().init(key, context)
        return state.replace(
            moments=distill.begin(state.large, self.options.distillation).optimizer
        )

    def update(self, state: State, replies: list[Cohort], context: Context, key: Array) -> Any:
        """Weighted consensus with a diversity term teaches the large model; heads are shared where they fit."""
        how = self.options.distillation
        inputs = augment.proxy_inputs(
            context.proxy,
            jax.random.fold_in(key, 0),
            kind=self.options.augment,
            copies=self.options.copies,
        )
        found = members(state, replies, context)
        answers = ensemble.of_clients(self.models, found, inputs, context.sizes, context.counts)
        state = self.average(state, replies, context, jax.random.fold_in(key, 1))
        consensus, diversity = _diverse(answers.logits)
        order = distill.orders(
            jax.random.fold_in(key, 2), inputs.shape[0], how.steps, how.batch_size
        )
        heads = _heads(self.models, state, self.server)
        large = state.large
        if heads:
            mean = jax.tree.map(lambda *x: sum(x[1:], x[0]) / len(x), *(h for _, h in heads))
            large = {**large, **mean}
        student, loss = distill.distill(
            distill.Student(large, state.moments),
            {},
            Lesson(inputs, consensus, None, diversity),
            order,
            model=self.server,
            options=how,
            combine=Trainable(),
        )
        small = list(state.small)
        for a, head in heads:
            small[a] = {**small[a], **{name: student.params[name] for name in head}}
        return state.replace(small=tuple(small), large=student.params, moments=student.optimizer), {
            "reverse_loss": loss
        }


@jax.jit
def _diverse(logits: Array) -> tuple[Array, Array]:
    """The weighted consensus as a hard label, and the mean of the members that disagree with it (the mean of all, where none does)."""
    alpha = jnp.var(logits, axis=-1)
    alpha = alpha / jnp.maximum(jnp.sum(alpha, axis=0, keepdims=True), 1e-12)
    log = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.argmax(jnp.sum(alpha[..., None] * log, axis=0), axis=-1)
    others = (jnp.argmax(logits, axis=-1) != chosen[None]).astype(jnp.float32)
    weight = alpha * jnp.where(jnp.sum(others, axis=0, keepdims=True) > 0, others, 1.0)
    weight = weight / jnp.maximum(jnp.sum(weight, axis=0, keepdims=True), 1e-12)
    diversity = jnp.sum(weight[..., None] * jnp.exp(log), axis=0)
    return jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32), diversity


def _heads(models: Sequence[Model], state: State, server: Model) -> list[Any]:
    """Heads of the architectures whose head has the server's shape."""
    wanted = {
        name: jax.tree.map(jnp.shape, state.large[name])
        for name in server.head
        if name in state.large
    }
    found = []
    for a, params in enumerate(state.small):
        own = {name: params[name] for name in wanted if name in params}
        if wanted and jax.tree.map(jnp.shape, own) == wanted:
            found.append((a, own))
    return found


def fedet(
    server: ModelLike,
    model: ModelLike | Sequence[ModelLike],
    data: Splits,
    partition: Partition,
    options: RunOptions = RunOptions(),
    et_options: EtOptions = EtOptions(),
    **more: Any,
) -> History:
    """Fed-ET (Cho et al., 2022): variance-weighted consensus with diversity from client models into a larger one.

    Args:
      server: the large model.
      model: client architectures.
      data: splits with the proxy set.
      partition: who holds what.
      options: of the run.
      et_options: of the method.
      more: as in :func:`fed.run`.
    """
    large = as_model(server, inputs_of(data.train.inputs))
    return run(_FedEt(large, _models(model, data), et_options), data, partition, options, **more)
