"""Language models that teach each other over a public set of texts (FedMKT, arXiv 2406.02224; the specification's 3.1): a server's and clients'.

A round: every client trains on its own texts; it says what it expects at each position of the public texts, as the k most probable tokens;
the server brings that into its own vocabulary (``fed.vocabulary``), chooses by quality whom to believe for which text, and trains on the
public texts; it answers in the same way, and each client chooses between itself and the server, and trains. Neither texts
nor parameters of a client are sent.

Models are jaxmoe's. A client's may be held at its device's SEFP width: it is trained through the rounding, and everything that it says is said by
the rounded weights (``quant``).
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import jaxmoe
from fed.compress import TopLogits, logits_nbytes
from fed.language_model import (
    Answers,
    Lesson,
    Party,
    Rows,
    answers,
    batches,
    bits_per_byte,
    optimizer,
    rows_of,
    some,
    step,
)
from fed.vocabulary import align, carry, check_same_vocabulary, vocabulary_map

logger = logging.getLogger(__name__)

SELECTIONS = ("greater", "weighted_mean")
DIRECTIONS = ("both", "to_server", "to_clients", "none")


@dataclasses.dataclass(frozen=True)
class TransferOptions:
    """What FedMKT leaves open; defaults are its own, but for rates and sizes, which are for small models.

    Attributes:
      rounds: of communication.
      private_epochs: over a client's texts per round.
      public_epochs: over the public texts, of each party per round.
      batch_size: texts per step.
      learning_rate: of AdamW (0.9, 0.95; weight decay 0.1; gradients clipped to norm 1).
      k: tokens per position that are sent.
      selection: "greater" (of own and others', the distribution of highest quality exp(-CE), per text) or "weighted_mean" (softmax of the
        qualities).
      own_share: of the language-model loss; the rest is the distillation loss.
      temperature: of the distillation.
      direction: "both", "to_server", "to_clients", or "none": the same training without any transfer.
      average: average the clients' parameters at the end of a round (homogeneous clients).
      align: bring other vocabularies into one's own; without it they must be the same.
      cache: directory of vocabulary tables.
      seed: of everything random.
    """

    rounds: int = 3
    private_epochs: int = 1
    public_epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 1e-3
    k: int = 32
    selection: str = "greater"
    own_share: float = 0.9
    temperature: float = 1.0
    direction: str = "both"
    average: bool = False
    align: bool = True
    cache: str | None = None
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (("selection", SELECTIONS), ("direction", DIRECTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}."
                )
        if not 0 <= self.own_share <= 1 or not self.temperature > 0:
            raise ValueError(
                f"own_share must lie in [0, 1] and temperature be positive; got {self.own_share} and {self.temperature}."
            )
        if min(self.rounds, self.batch_size, self.k) < 1:
            raise ValueError(
                f"rounds, batch_size and k must be at least 1; got {self.rounds}, {self.batch_size} and {self.k}."
            )


# -- whom to believe -------------------------------------------------------------------------------


def select(losses: Float[np.ndarray, "P N"], how: str) -> Float[np.ndarray, "N P"]:
    """How much each party counts for each text, by quality exp(-loss).

    Example:
      >>> select(np.array([[1.0, 2.0], [1.5, 0.5]], np.float32), "greater").tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    quality = np.exp(-losses.astype(np.float64)).T
    if how == "greater":
        chosen = np.eye(len(losses))[quality.argmax(1)]
    else:
        grown = np.exp(quality - quality.max(1, keepdims=True))
        chosen = grown / grown.sum(1, keepdims=True)
    return chosen.astype(np.float32)


def lesson(own: Answers, others: Sequence[Answers], how: str) -> Lesson:
    """What a party is to learn: its own distributions first, then others', already in its vocabulary."""
    every = [own, *others]
    k = max(a.top.k for a in every)

    def padded(array: Any, fill: float) -> np.ndarray:
        more = k - array.shape[-1]
        return np.pad(np.asarray(array), ((0, 0), (0, 0), (0, more)), constant_values=fill)

    values = np.stack([padded(a.top.log_probs, -np.inf) for a in every], axis=1)
    ids = np.stack([padded(a.top.ids, 0) for a in every], axis=1)
    return Lesson(values, ids, select(np.stack([a.loss for a in every]), how))


# -- training --------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Learner:
    """A party in training."""

    party: Party
    params: Any
    moments: Any
    public: Rows
    private: Rows | None = None

    def train(
        self,
        rows: Rows,
        epochs: int,
        seed: Sequence[int],
        o: TransferOptions,
        taught: Lesson | None = None,
    ) -> float:
        """Epochs over rows; the mean loss of the steps."""
        losses = []
        size = min(o.batch_size, len(rows.inputs))
        for epoch in range(epochs):
            order = np.random.default_rng([*seed, epoch]).permutation(len(rows.inputs))
            for index, real in batches(len(order), size, order):
                chosen = None if taught is None else Lesson(*(x[index] for x in taught))
                self.params, self.moments, loss = step(
                    self.params, self.moments, some(rows, index, real), chosen,
                    self.party.config, self.party.width, o.learning_rate, o.own_share, o.temperature,
                )  # fmt: skip
                losses.append(loss)
        return float(np.mean(jax.device_get(losses))) if losses else float("nan")

    def answer(self, k: int) -> Answers:
        """What it says about the public texts, as it arrives: through the payload's bytes."""
        said = answers(self.party, self.params, self.public, k)
        top = TopLogits.decode(said.top.encode(), said.top.ids.shape, said.top.vocab_size)
        return Answers(top, said.loss)


class _Bridge(NamedTuple):
    """How one party's positions and tokens are another's."""

    positions: np.ndarray
    table: np.ndarray

    def carried(self, said: Answers, base: _Learner) -> Answers:
        top = _carried(
            said.top, self.positions, self.table, base.public.targets, base.party.config.vocab_size
        )
        return Answers(
            TopLogits(np.asarray(top.log_probs), np.asarray(top.ids), top.vocab_size), said.loss
        )


_carried = jax.jit(carry, static_argnums=4)


def _bridge(base: _Learner, other: _Learner, options: TransferOptions) -> _Bridge:
    ours, theirs = base.party.vocabulary, other.party.vocabulary
    if not options.align:
        check_same_vocabulary(ours, theirs, f"{other.party.name}")
    positions = align(
        base.public.targets, other.public.targets, ours, theirs,
        base.public.lengths, other.public.lengths, cache=options.cache,
    )  # fmt: skip
    return _Bridge(positions, vocabulary_map(theirs, ours, cache=options.cache))


# -- rounds ----------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class LanguageHistory:
    """The course of a transfer.

    Attributes:
      rounds: a record per round: bits per byte of "server" and of each client by name on the test texts, bytes up and down, losses.
      server: parameters.
      clients: parameters of each.
      aligned: of each client, the share of the server's public tokens at which its distribution is carried over.
      device_bytes: of each client's model at its width.
    """

    rounds: list[dict[str, Any]]
    server: Any
    clients: list[Any]
    aligned: list[float]
    device_bytes: list[int]


def _learner(
    party: Party, public: Sequence[str], private: Sequence[str] | None, o: TransferOptions, tag: int
) -> _Learner:
    params = jaxmoe.init_params(party.config, jax.random.fold_in(jax.random.key(o.seed), tag))
    own = None if private is None else rows_of(private, party)
    moments = optimizer(o.learning_rate).init(params)
    return _Learner(party, params, moments, rows_of(public, party), own)


def transfer(
    server: Party,
    clients: Sequence[Party],
    private: Sequence[Sequence[str]],
    public: Sequence[str],
    test: Sequence[str],
    options: TransferOptions = TransferOptions(),
    on_round: Callable[[dict[str, Any]], None] | None = None,
) -> LanguageHistory:
    """Trains a server's language model and clients' with each other's help.

    Args:
      server: the large model.
      clients: the small ones.
      private: texts of each client.
      public: texts that all have.
      test: texts that nobody trains on.
      options: of the transfer.
      on_round: called with each round's record.

    Raises:
      ValueError: for texts or parties that don't fit each other; different vocabularies without ``align``.
    """
    o = options
    if len(private) != len(clients) or not clients:
        raise ValueError(
            f"private must have the texts of each of {len(clients)} clients, one at least; got {len(private)}."
        )
    _check_average(clients, o)
    main = _learner(server, public, None, o, 0)
    learners = [
        _learner(c, public, texts, o, 1 + i)
        for i, (c, texts) in enumerate(zip(clients, private, strict=True))
    ]
    ups, downs = [], []
    if o.direction != "none":
        ups = [_bridge(main, learner, o) for learner in learners]
        downs = [_bridge(learner, main, o) for learner in learners]
    tests = [rows_of(test, p) for p in (server, *clients)]
    records = []
    for number in range(o.rounds):
        record = _round(main, learners, ups, downs, o, number)
        names = [server.name, *(c.name for c in clients)]
        for name, learner, rows in zip(names, (main, *learners), tests, strict=True):
            record[f"bits_per_byte_{name}"] = bits_per_byte(learner.party, learner.params, rows)
        records.append(record)
        logger.info("round=%d %s", number, record)
        if on_round is not None:
            on_round(record)
    real = main.public.lengths.sum()
    return LanguageHistory(
        records,
        main.params,
        [x.params for x in learners],
        [float((b.positions >= 0).sum() / real) for b in ups],
        [x.party.nbytes(x.params) for x in learners],
    )


def _check_average(clients: Sequence[Party], o: TransferOptions) -> None:
    if not o.average:
        return
    for client in clients[1:]:
        if client.config != clients[0].config:
            raise ValueError(
                f"average needs clients of one architecture; {client.name} differs from {clients[0].name}. Leave average out."
            )
        check_same_vocabulary(clients[0].vocabulary, client.vocabulary, client.name)


def _round(
    main: _Learner,
    learners: list[_Learner],
    ups: list[_Bridge],
    downs: list[_Bridge],
    o: TransferOptions,
    number: int,
) -> dict[str, Any]:
    """One round of FedMKT; with direction "none" the same training, each party for itself."""
    seed = [o.seed, number]
    record: dict[str, Any] = {"round": number, "bytes_up": 0, "bytes_down": 0}
    private = [
        x.train(x.private, o.private_epochs, [*seed, 1 + i], o) for i, x in enumerate(learners)
    ]
    taught = None
    if o.direction in ("both", "to_server"):
        said = [x.answer(o.k) for x in learners]
        record["bytes_up"] = sum(_sent(a) for a in said)
        others = [bridge.carried(a, main) for bridge, a in zip(ups, said, strict=True)]
        taught = lesson(answers(main.party, main.params, main.public, o.k), others, o.selection)
        record["clients_believed"] = float(1 - taught.weights[:, 0].mean())
    record["server_loss"] = main.train(main.public, o.public_epochs, [*seed, 0], o, taught)
    said = main.answer(o.k) if o.direction in ("both", "to_clients") else None
    record["bytes_down"] = 0 if said is None else _sent(said) * len(learners)
    believed = []
    for i, learner in enumerate(learners):
        taught = None
        if said is not None:
            own = answers(learner.party, learner.params, learner.public, o.k)
            taught = lesson(own, [downs[i].carried(said, learner)], o.selection)
            believed.append(float(taught.weights[:, 1].mean()))
        learner.train(learner.public, o.public_epochs, [*seed, 1000 + i], o, taught)
    if believed:
        record["server_believed"] = float(np.mean(believed))
    if o.average:
        _average(learners)
    return record | {"private_loss": float(np.mean(private))}


def _sent(said: Answers) -> int:
    """Bytes of an answer: the payload, and a float32 of quality per text."""
    return logits_nbytes(said.top.ids.shape, said.top.vocab_size) + 4 * len(said.loss)


def _average(learners: list[_Learner]) -> None:
    """FedMKT's homogeneous variant weights by the length of the public set, which all have: a plain mean."""
    mean = jax.tree.map(lambda *x: sum(x[1:], x[0]) / len(x), *(x.params for x in learners))
    for learner in learners:
        learner.params = jax.tree.map(jnp.copy, mean)
