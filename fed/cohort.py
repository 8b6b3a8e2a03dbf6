"""Local training of many clients at once (spec 5): chunks of vmapped clients, sums in the carry, a mesh axis "clients".

Memory is one chunk of clients, however many there are: a chunk's updates go into the n-weighted sum, in order of client numbers, and
are dropped, unless somebody needs each (robust aggregation, ensembles, personal models).
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from fed.clients import Batches, LocalOptions, StepState, begin, local_step, local_train
from fed.models import Model, Params
from fed.schedule import Bucket, round_up
from fed.uploads import Upload

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "vmap", "sequential")


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How a cohort is computed; results don't depend on it beyond rounding.

    Attributes:
      backend: vmap (chunks of clients in one program), sequential (one jitted step in a loop over clients and steps, nothing
        padded), auto (times both on the first bucket and keeps the faster).
      chunk: clients per program and device; bounds memory.
      buckets: groups of clients by number of steps.
      devices: devices along the axis "clients"; 0: all there are.
      largest_norm: an update whose L2 norm is larger is rejected.
    """

    backend: str = "vmap"
    chunk: int = 64
    buckets: int = 4
    devices: int = 1
    largest_norm: float = float("inf")

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {self.backend!r}.")
        if self.chunk < 1 or self.buckets < 1:
            raise ValueError(
                f"chunk and buckets must be at least 1; got {self.chunk} and {self.buckets}."
            )
        # How many there are is not asked here: that would start JAX's backends when this module is imported.
        if self.devices < 0:
            raise ValueError(f"devices must be at least 0, which is all; got {self.devices}.")
        if not self.largest_norm > 0:
            raise ValueError(f"largest_norm must be positive; got {self.largest_norm}.")


@struct.dataclass
class _Sum:
    """Running sums over accepted clients."""

    update: Params
    weight: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Cohort:
    """What a group of clients sent, after checks.

    Attributes:
      clients: who trained [K], ascending.
      accepted: whose update was finite and not too large [K].
      weights: examples, or what else an update counts as [K]; 0 where rejected.
      loss: mean loss over each one's steps [K].
      steps: steps done [K].
      examples: examples seen, repeats counted [K].
      norm: of the updates [K].
      mean: weighted mean of the accepted updates; None if there is none.
      updates: each one's, stacked [K, ...], where they were kept.
      ages: versions between what each began with and the newest [K]; None: all began with that.
    """

    clients: np.ndarray
    accepted: np.ndarray
    weights: np.ndarray
    loss: np.ndarray
    steps: np.ndarray
    examples: np.ndarray
    norm: np.ndarray
    mean: Params | None
    updates: Params | None
    ages: np.ndarray | None = None

    @property
    def rejected(self) -> list[int]:
        """Clients whose update was not used."""
        return self.clients[~self.accepted].tolist()


def _norm(update: Params) -> Array:
    """L2 norm; NaN or infinity where a value is."""
    squares = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(update))
    return jnp.sqrt(squares)


def _finish(
    start: Params,
    trained: Params,
    client: Array,
    key: Array,
    uploads: tuple[Upload, ...],
    largest: float,
) -> tuple[Params, Array, Array]:
    """One client's update as the server gets it, whether it is usable, its norm."""
    update = jax.tree.map(jnp.subtract, trained, start)
    norm = _norm(update)
    for i, hook in enumerate(uploads):
        # Behind any step's key: steps fold in their number.
        update = hook.apply(update, client, jax.random.fold_in(key, 2**31 - 1 - i))
        # A codec may make a number of what was none, so what was not finite before a hook stays rejected.
        norm = jnp.where(jnp.isfinite(norm), _norm(update), norm)
    return update, jnp.isfinite(norm) & (norm <= largest), norm


def _add(total: _Sum, updates: Params, weights: Array) -> _Sum:
    """Adds weighted updates one by one: the order of the sum does not depend on the size of chunks."""

    def one(carry: _Sum, row: tuple[Params, Array]) -> tuple[_Sum, None]:
        update, weight = row
        added = jax.tree.map(
            # A rejected update may be NaN, and 0 * NaN is NaN.
            lambda s, u: s + jnp.where(weight > 0, weight * u.astype(s.dtype), jnp.zeros_like(s)),
            carry.update,
            update,
        )
        return _Sum(added, carry.weight + weight), None

    return jax.lax.scan(one, total, (updates, weights))[0]


@jax.jit
def weighted_mean(updates: Params, weights: Array) -> Params:
    """The mean of updates stacked [K, ...] that came one by one, as a simulation adds them; weights [K], 0 for those to leave out."""
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.float32), updates)
    total = _add(_Sum(zero, jnp.float32(0.0)), updates, weights)
    return jax.tree.map(lambda x: x / total.weight, total.update)


def _chunk(
    total: _Sum,
    start: Params,
    data: tuple[Array, Array],
    rows: dict[str, Array],
    key: Array,
    *,
    model: Model,
    options: LocalOptions,
    uploads: tuple[Upload, ...],
    largest: float,
    personal: bool,
    keep: bool,
    axis: str | None,
) -> tuple[_Sum, dict[str, Any]]:
    """Trains a chunk of clients and adds their updates to ``total``. ``rows``: index, mask, clients, weights [K, ...]."""

    def one(start: Params, index: Array, mask: Array, client: Array) -> Any:
        own = jax.random.fold_in(key, client)
        trained, metrics = local_train(model, start, Batches(*data, index, mask), own, options)
        update, accepted, norm = _finish(start, trained, client, own, uploads, largest)
        return update, metrics | {"accepted": accepted, "norm": norm}

    run = jax.vmap(one, in_axes=(0 if personal else None, 0, 0, 0))
    updates, out = run(start, rows["index"], rows["mask"], rows["clients"])
    weights = jnp.where(out["accepted"], rows["weights"], 0.0)
    if axis is None:
        total = _add(total, updates, weights)
    else:
        own = jax.lax.psum(_add(jax.tree.map(jnp.zeros_like, total), updates, weights), axis)
        total = jax.tree.map(jnp.add, total, own)
    return total, out | ({"updates": updates} if keep else {})


@functools.cache
def _program(mesh: Any, **static: Any) -> Any:
    """The compiled form of :func:`_chunk` for one architecture and one way of treating it."""
    if mesh is None:
        return jax.jit(functools.partial(_chunk, axis=None, **static), donate_argnums=0)
    spread = functools.partial(_chunk, axis="clients", **static)
    start = P("clients") if static["personal"] else P()
    sharded = jax.shard_map(
        spread,
        mesh=mesh,
        in_specs=(P(), start, P(), P("clients"), P()),
        out_specs=(P(), P("clients")),
        check_vma=False,  # every client's scan begins with replicated values: parameters, step 0
    )
    return jax.jit(sharded, donate_argnums=0)


@functools.cache
def _mesh(devices: int) -> Any:
    there = len(jax.devices())
    if devices > there:
        raise ValueError(
            f"devices must be at most {there}, what JAX has; got {devices}; jax_num_cpu_devices gives more on CPU."
        )
    count = devices or there
    if count == 1:
        return None
    return jax.make_mesh(
        (count,), ("clients",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )


@functools.partial(jax.jit, static_argnames=("model", "options"), donate_argnames="state")
def _step(
    start: Params,
    state: StepState,
    data: tuple[Array, Array],
    index: Array,
    mask: Array,
    key: Array,
    *,
    model: Model,
    options: LocalOptions,
) -> StepState:
    x, y = jnp.take(data[0], index, axis=0), jnp.take(data[1], index, axis=0)
    return local_step(model, start, state, x, y, mask, key, options)


_begin = jax.jit(
    lambda params, options: begin(jax.tree.map(jnp.copy, params), options), static_argnums=1
)


@functools.partial(jax.jit, static_argnames=("uploads", "largest"), donate_argnames="total")
def _collect(
    total: _Sum,
    start: Params,
    trained: Params,
    client: Array,
    weight: Array,
    key: Array,
    *,
    uploads: tuple[Upload, ...],
    largest: float,
) -> tuple[_Sum, Params, Array, Array]:
    update, accepted, norm = _finish(start, trained, client, key, uploads, largest)
    rows = jax.tree.map(lambda x: x[None], update)
    total = _add(total, rows, jnp.where(accepted, weight, 0.0)[None])
    return total, update, accepted, norm


def _row(params: Params, i: int | np.ndarray) -> Params:
    return jax.tree.map(lambda x: x[i], params)


def _sequential(total, start, data, bucket, weights, key, static, engine, personal, keep):
    """The same as one chunk, with a Python loop over clients and their real steps."""
    out = []
    for i, client in enumerate(bucket.clients):
        origin = _row(start, i) if personal else start
        own = jax.random.fold_in(key, int(client))
        state = _begin(origin, static["options"])
        live = np.flatnonzero(bucket.mask[i].any(1))
        for s in live:
            index, mask = bucket.index[i, s], bucket.mask[i, s]
            state = _step(
                origin,
                state,
                data,
                index,
                mask,
                own,
                model=static["model"],
                options=static["options"],
            )
        total, update, accepted, norm = _collect(
            total,
            origin,
            state.params,
            jnp.int32(client),
            jnp.float32(weights[i]),
            own,
            uploads=static["uploads"],
            largest=engine.largest_norm,
        )
        row = {
            "loss": state.loss / max(len(live), 1),
            "steps": state.steps,
            "examples": jnp.int32(bucket.mask[i].sum()),
            "accepted": accepted,
            "norm": norm,
        }
        out.append(row | ({"updates": update} if keep else {}))
    return total, jax.tree.map(lambda *x: jnp.stack(x), *out)


def _pad(rows: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Adds clients without examples and without weight until there are ``count``."""
    more = count - len(rows["clients"])
    return {
        k: np.concatenate([v, np.zeros((more, *v.shape[1:]), v.dtype)]) for k, v in rows.items()
    }


def _vmapped(total, start, data, bucket, weights, key, static, engine, personal, keep):
    """Chunks of a bucket. The last one is cut down to a size of the ladder, so that programs stay few and little is padded."""
    mesh = _mesh(engine.devices)
    many = 1 if mesh is None else mesh.size
    run = _program(mesh, **static, largest=engine.largest_norm, personal=personal, keep=keep)
    rows = {
        "index": bucket.index,
        "mask": bucket.mask,
        "clients": bucket.clients,
        "weights": weights.astype(np.float32),
    }
    out, at, count = [], 0, len(bucket.clients)
    while at < count:
        left = -(-(count - at) // many)
        size = many * min(engine.chunk, round_up(left))
        real = min(size, count - at)
        part = _pad({k: v[at : at + real] for k, v in rows.items()}, size)
        origin = start
        if personal:
            origin = _row(start, np.minimum(np.arange(at, at + size), count - 1))
        total, result = run(total, origin, data, part, key)
        out.append(jax.tree.map(lambda x, real=real: x[:real], result))
        at += real
    return total, out[0] if len(out) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *out)


def train_cohort(
    model: Model,
    start: Params,
    data: tuple[Array, Array],
    buckets: Sequence[Bucket],
    key: Array,
    options: LocalOptions,
    engine: EngineOptions = EngineOptions(),
    *,
    weights: np.ndarray,
    personal: np.ndarray | None = None,
    uploads: tuple[Upload, ...] = (),
    keep: bool = False,
) -> Cohort:
    """Trains every client of ``buckets``.

    Args:
      model: the architecture that they share.
      start: parameters they begin with; with ``personal`` stacked, a row per client.
      data: (inputs [M, ...], labels [M, ...]) on the device.
      buckets: schedules, from :func:`fed.schedule.buckets`.
      key: fold_in(key of the run, round).
      options: of local training.
      engine: how to compute it.
      weights: of all clients, by client number [N].
      personal: each client has a start of its own: the row of ``start`` by client number [N].
      uploads: hooks on updates.
      keep: return every update.

    Returns:
      what came back, by ascending client number.

    Raises:
      ValueError: for backend "auto", and more devices than JAX has.
    """
    if engine.backend == "auto":
        raise ValueError(
            "backend must be vmap or sequential here; got 'auto'; let fed.cohort.choose settle it."
        )
    run, own = (_sequential if engine.backend == "sequential" else _vmapped), personal is not None
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape[1:] if own else x.shape, jnp.float32), start)
    total = _Sum(zero, jnp.float32(0.0))
    static = {"model": model, "options": options, "uploads": uploads}
    parts = []
    for bucket in buckets:
        origin = _row(start, personal[bucket.clients]) if own else start
        given = weights[bucket.clients]
        total, out = run(total, origin, data, bucket, given, key, static, engine, own, keep)
        parts.append(out)
    return _gather(buckets, parts, total, weights, keep)


def choose(
    model: Model,
    start: Params,
    data: tuple[Array, Array],
    bucket: Bucket,
    key: Array,
    options: LocalOptions,
    engine: EngineOptions,
    weights: np.ndarray,
) -> EngineOptions:
    """``engine`` with the backend that trains a chunk of ``bucket`` faster here; both are compiled and timed once.

    Under vmap a native convolution becomes a grouped one, which XLA:CPU runs slower than a loop (spec 5.3); small matrix
    products gain tenfold. Which is which for a model, its sizes and a machine, is measured.
    """
    few = slice(0, min(engine.chunk, len(bucket.clients)))
    part = Bucket(bucket.clients[few], bucket.index[few], bucket.mask[few])
    seconds = {}
    for backend in ("vmap", "sequential"):
        tried = dataclasses.replace(engine, backend=backend)
        for _ in range(2):  # the first compiles
            began = time.perf_counter()
            found = train_cohort(model, start, data, [part], key, options, tried, weights=weights)
            jax.block_until_ready(found.mean)
            seconds[backend] = time.perf_counter() - began
    best = min(seconds, key=lambda name: seconds[name])
    timed = " ".join(f"{name}_s={value:.4f}" for name, value in seconds.items())
    logger.info("model=%s backend=%s %s", model.name, best, timed)
    return dataclasses.replace(engine, backend=best)


def _gather(
    buckets: Sequence[Bucket],
    parts: list[dict[str, Any]],
    total: _Sum,
    weights: np.ndarray,
    keep: bool,
) -> Cohort:
    """Buckets' results as one, by ascending client number."""
    if not parts:
        none = np.zeros(0, np.int32)
        floats = np.zeros(0, np.float32)
        return Cohort(none, none.astype(bool), floats, floats, none, none, floats, None, None)
    clients = np.concatenate([b.clients for b in buckets])
    order = np.argsort(clients)
    clients = clients[order]
    figures = {
        k: np.concatenate([np.asarray(p[k]) for p in parts])[order]
        for k in ("loss", "steps", "examples", "accepted", "norm")
    }
    updates = None
    if keep:
        updates = jax.tree.map(lambda *x: jnp.concatenate(x)[order], *(p["updates"] for p in parts))
    mean = None
    if float(total.weight) > 0:
        mean = jax.tree.map(lambda x: x / total.weight, total.update)
    given = np.where(figures["accepted"], weights[clients], 0).astype(np.float32)
    return Cohort(
        clients,
        figures["accepted"],
        given,
        figures["loss"],
        figures["steps"],
        figures["examples"],
        figures["norm"],
        mean,
        updates,
    )


def join(cohorts: Sequence[Cohort], ages: Sequence[int] = ()) -> Cohort:
    """Cohorts of one architecture that began with different versions, as one.

    Args:
      cohorts: of clients who began alike.
      ages: of the version that each began with; none: the newest.
    """
    if ages:
        aged = zip(cohorts, ages, strict=True)
        cohorts = [dataclasses.replace(c, ages=np.full(len(c.clients), age)) for c, age in aged]
    if len(cohorts) == 1:
        return cohorts[0]
    if not cohorts:
        return _gather([], [], _Sum(None, jnp.float32(0.0)), np.zeros(0, np.float32), False)
    order = np.argsort(np.concatenate([c.clients for c in cohorts]))

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(c, name) for c in cohorts])[order]

    names = ("clients", "accepted", "weights", "loss", "steps", "examples", "norm")
    columns = [column(name) for name in names]
    usable = [(c.mean, float(c.weights.sum())) for c in cohorts if c.mean is not None]
    mean = None
    if usable:
        total = sum(w for _, w in usable)
        mean = jax.tree.map(
            lambda *x: sum(u * (w / total) for u, (_, w) in zip(x, usable, strict=True)),
            *(m for m, _ in usable),
        )
    updates = None
    if cohorts[0].updates is not None:
        updates = jax.tree.map(lambda *x: jnp.concatenate(x)[order], *(c.updates for c in cohorts))
    return Cohort(*columns, mean, updates, column("ages") if ages else None)
