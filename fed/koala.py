"""KOALA (arXiv 2407.05268): a large model on the server and small ones on clients teach each other over unlabelled proxy data.

The published abstract and digests fix the three phases, their directions, the proxy set without labels, and the two modes. Losses,
refinement, optimisers, and which parameters are trained are not public: what stands here is the specification's reconstruction
(its section 1.3), and every choice is an option.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from fed import augment, distill, ensemble
from fed.cohort import Cohort
from fed.data import Splits
from fed.distill import Distillation, Lesson, Merge
from fed.driver import OnRound, run
from fed.history import History
from fed.models import Model, ModelLike, Params, as_model, as_models, inputs_of
from fed.partition import Partition
from fed.rounds import Context, Method, RunOptions, State, in_chunks, keep_personal, members
from fed.trainable import Trainable

MODES = ("homo", "hete")


@dataclasses.dataclass(frozen=True)
class KoalaOptions:
    """What KOALA's server does.

    Attributes:
      mode: homo (one architecture, averaged into one teacher) or hete (an ensemble, refined and merged).
      reverse: small models teach the large one.
      forward: the large model teaches small ones; strength matters in hete, where it alone repairs drift between architectures.
      merge: how the ensemble's outputs become one (hete).
      members: of the ensemble: clusters (the mean model of each architecture) or clients (every reply).
      personal: clients keep their own model, refreshed by forward distillation, instead of their architecture's mean (hete, clients).
      trainable: what the server trains.
      augment: changes of proxy inputs (:mod:`fed.augment`).
      copies: proxy inputs per round over the size of the proxy set.
    """

    mode: str = "homo"
    reverse: Distillation = Distillation(steps=200)
    forward: Distillation = Distillation(steps=100, features=0.1)
    merge: Merge = Merge()
    members: str = "clusters"
    personal: bool = False
    trainable: Trainable = Trainable()
    augment: str = "none"
    copies: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be homo or hete; got {self.mode!r}.")
        if self.members not in ("clusters", "clients"):
            raise ValueError(f"members must be clusters or clients; got {self.members!r}.")
        if self.personal and (self.mode, self.members) != ("hete", "clients"):
            raise ValueError(
                f"personal models need mode='hete' and members='clients'; got {self.mode!r} and {self.members!r}."
            )


@struct.dataclass
class _Extra:
    """What KOALA remembers beside models: of each architecture the examples behind it, and its projector."""

    sizes: Array
    counts: Array
    projectors: tuple[Array, ...]
    trained: Any
    base: Any


class Koala(Method):
    """The method; :func:`koala` runs it."""

    def __init__(self, server: Model, models: Sequence[Model], options: KoalaOptions):
        super().__init__(models, server)
        self.options = options
        self.name = f"koala-{options.mode}"
        self.personal = options.personal
        self.averages = not options.personal
        self.keep = options.mode == "hete" and options.members == "clients"
        augment.check(options.augment, options.copies, self.server.inputs)
        if options.mode == "homo" and len(self.models) != 1:
            raise ValueError(
                f"mode='homo' needs one client architecture; got {len(self.models)}; choose mode='hete'."
            )

    def init(self, key: Array, context: Context) -> State:
        """Models, the server's optimiser and the projectors."""
        if self.options.mode == "hete" and not context.options.aggregator.individual:
            raise ValueError(
                f"mode='hete' reads each member's outputs, which {type(context.options.aggregator).__name__} hides; secure "
                "aggregation goes with mode='homo'."
            )
        state = super().init(key, context)
        what = self.options.trainable
        trained, base = what.begin(self.server, state.large, jax.random.fold_in(key, 1001))
        begun = distill.begin(trained, self.options.reverse)
        wide = self.server.outputs[1].shape[-1]
        projectors = []
        for i, model in enumerate(self.models):
            own = jax.random.fold_in(jax.random.fold_in(key, 1002), i)
            narrow = model.outputs[1].shape[-1]
            projectors.append(jax.random.normal(own, (narrow, wide), jnp.float32) * narrow**-0.5)
        full = what.what == "full"
        count = len(self.models)
        extra = _Extra(
            jnp.zeros((count,), jnp.float32),
            jnp.zeros((count, context.counts.shape[1]), jnp.float32),
            tuple(projectors),
            None if full else trained,  # else it is the large model itself
            None if full else base,
        )
        return state.replace(moments=begun.optimizer, extra=extra)

    def update(
        self, state: State, replies: list[Cohort], context: Context, key: Array
    ) -> tuple[State, dict[str, float]]:
        """Phases (ii) and (iii), after combining what phase (i) brought."""
        options = self.options
        inputs = augment.proxy_inputs(
            context.proxy, jax.random.fold_in(key, 0), kind=options.augment, copies=options.copies
        )
        found = members(state, replies, context) if self.keep else []
        if self.personal:
            state = keep_personal(state, found, context)
        else:
            state = self.average(state, replies, context, jax.random.fold_in(key, 1))
        state = self._remember(state, replies, context)
        answers = self._answers(state, found, inputs, context)
        state, reverse = self._reverse(state, answers, inputs, jax.random.fold_in(key, 2))
        state, forward = self._forward(
            state, answers, inputs, replies, context, jax.random.fold_in(key, 3)
        )
        return state, {"reverse_loss": float(reverse), "forward_loss": float(forward)}

    def _remember(self, state: State, replies: list[Cohort], context: Context) -> State:
        """Examples behind each architecture's model, from its latest replies."""
        sizes, counts = np.array(state.extra.sizes), np.array(state.extra.counts)
        for a, cohort in enumerate(replies):
            if cohort.accepted.any():
                sizes[a] = cohort.weights.sum()
                counts[a] = context.counts[cohort.clients[cohort.accepted]].sum(0)
        return state.replace(
            extra=state.extra.replace(sizes=jnp.asarray(sizes), counts=jnp.asarray(counts))
        )

    def _answers(
        self,
        state: State,
        members: list[tuple[Params, np.ndarray]],
        inputs: Array,
        context: Context,
    ) -> ensemble.Answers:
        if self.keep:
            return ensemble.of_clients(self.models, members, inputs, context.sizes, context.counts)
        extra = state.extra
        return ensemble.of_clusters(
            self.models, state.small, inputs, np.asarray(extra.sizes), np.asarray(extra.counts)
        )

    def _soft(self, answers: ensemble.Answers, temperature: float) -> Array:
        """The ensemble's soft label q(x)."""
        how = self.options.merge if self.options.mode == "hete" else Merge("size")
        return distill.merge(answers.logits, answers.sizes, how, temperature, answers.counts)

    def _reverse(
        self, state: State, answers: ensemble.Answers, inputs: Array, key: Array
    ) -> tuple[State, Array]:
        """Phase (ii): small models teach the large one."""
        how = self.options.reverse
        if not how.steps:
            return state, jnp.float32(0.0)
        full = state.extra.trained is None
        lesson = Lesson(inputs, self._soft(answers, how.temperature))
        batches = distill.orders(key, inputs.shape[0], how.steps, how.batch_size)
        trained, base = (state.large, {}) if full else (state.extra.trained, state.extra.base)
        student, loss = distill.distill(
            distill.Student(trained, state.moments),
            base,
            lesson,
            batches,
            model=self.server,
            options=how,
            combine=self.options.trainable,
        )
        if full:
            return state.replace(large=student.params, moments=student.optimizer), loss
        large = self.options.trainable(student.params, base)
        extra = state.extra.replace(trained=student.params)
        return state.replace(large=large, moments=student.optimizer, extra=extra), loss

    def _forward(
        self,
        state: State,
        answers: ensemble.Answers,
        inputs: Array,
        replies: list[Cohort],
        context: Context,
        key: Array,
    ) -> tuple[State, Array]:
        """Phase (iii): the large model teaches small ones, from one pass of it over the proxy inputs."""
        how = self.options.forward
        if not how.steps:
            return state, jnp.float32(0.0)
        logits, features = distill.outputs(state.large, inputs, model=self.server)
        lesson = Lesson(
            inputs,
            jax.nn.softmax(logits / how.temperature, axis=-1),
            features if how.features else None,
            self._soft(answers, how.temperature) if how.consensus else None,
        )
        small = list(state.small if not self.personal else state.personal)
        projectors, losses = list(state.extra.projectors), []
        for a, model in enumerate(self.models):
            order = distill.orders(
                jax.random.fold_in(key, a), inputs.shape[0], how.steps, how.batch_size
            )
            rows = None
            if self.personal:
                cohort = replies[a]
                rows = context.rows[cohort.clients[cohort.accepted]]
                if not len(rows):
                    continue
            small[a], projectors[a], loss = teach(
                small[a],
                projectors[a],
                lesson,
                order,
                model,
                how,
                rows,
                context.options.engine.chunk,
            )
            losses.append(loss)
        extra = state.extra.replace(projectors=tuple(projectors))
        key_name = "personal" if self.personal else "small"
        return state.replace(**{key_name: tuple(small)}, extra=extra), jnp.mean(jnp.stack(losses))


_FULL = Trainable()


def teach(
    params: Params,
    projector: Array | None,
    lesson: Lesson,
    batches: Array,
    model: Model,
    options: Distillation,
    rows: np.ndarray | None = None,
    chunk: int = 64,
) -> tuple[Params, Array | None, Array]:
    """Distils into one small model, or into ``rows`` of stacked ones, ``chunk`` at a time: (params, projector, loss).

    Stacked models share what they get as projector: its mean over them.
    """

    def one(params: Params) -> tuple[Params, Array | None, Array]:
        student = distill.begin(params, options, projector if options.features else None)
        student, loss = distill.distill(
            student, {}, lesson, batches, model=model, options=options, combine=_FULL
        )
        return student.params, student.projector, loss

    if rows is None:
        taught, learned, loss = one(params)
    else:
        new, learned, loss = in_chunks(jax.vmap(one), params, rows, chunk)
        taught = jax.tree.map(lambda s, p: s.at[rows].set(p), params, new)
        learned, loss = (None if learned is None else jnp.mean(learned, axis=0)), jnp.mean(loss)
    return taught, projector if learned is None else learned, loss


def koala(
    server: ModelLike,
    clients: ModelLike | Sequence[ModelLike],
    data: Splits,
    partition: Partition,
    options: RunOptions = RunOptions(),
    koala_options: KoalaOptions | None = None,
    *,
    assignment: Sequence[int] | None = None,
    directory: str | pathlib.Path | None = None,
    on_round: OnRound | None = None,
) -> History:
    """Trains a large model that no client ever sees, from small ones that train on private data.

    Args:
      server: the large model; as each client's a ``fed.Model``, a flax module or a pair (init, apply).
      clients: the small architecture, or a list of several for a heterogeneous fleet.
      data: ``data.train`` is what ``partition`` divides; ``data.proxy`` is the server's and has no labels.
      partition: who holds what.
      options: of the run.
      koala_options: of the method; default: homo for one architecture, hete for several.
      assignment: architecture of each client; default: in turn.
      directory: for checkpoints; a run found there goes on.
      on_round: called with each round's record.

    Returns:
      records of every round, and the models.

    Raises:
      ValueError: for models, data and options that do not fit each other.
      TypeError: for what is no model.
      BadUpdate: as :func:`fed.run`.
      QuorumLost: as :func:`fed.run`.
    """
    inputs = inputs_of(data.train.inputs)
    models = as_models(clients, inputs)
    if koala_options is None:
        koala_options = KoalaOptions(mode="homo" if len(models) == 1 else "hete")
    method = Koala(as_model(server, inputs), models, koala_options)
    return run(
        method,
        data,
        partition,
        options,
        assignment=assignment,
        directory=directory,
        on_round=on_round,
    )
