"""Language models that teach each other over a public set of texts (FedMKT, arXiv 2406.02224; the specification's 3.1): a server's and clients'.

A round: every client trains on its own texts; it says what it expects at each position of the public texts, as the k most probable tokens;
the server brings that into its own vocabulary (``fed.vocabulary``), chooses by quality whom to believe for which text, and trains on the
public texts; it answers in the same way, and each client chooses between itself and the server, and trains. Neither texts
nor parameters of a client are sent, but for ``average``.

As in FedMKT a party that believes itself is distilled from its own answers, which are from before the phase, and it chooses once per phase. That
holds it back from learning the public texts by heart: with the language-model loss alone instead, or a new choice at every epoch, all parties
end worse on other texts (docs/federated.md). Otherwise than there, quality is nats per byte, which tokenizers do not change, and what
the receiver finds in an answer, not what the sender says of it.

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
import quant
from fed.compress import TopLogits, logits_nbytes
from fed.language_model import (
    Answers,
    Lesson,
    Party,
    Rows,
    answers,
    batches,
    bits_per_byte,
    losses_of,
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

    Raises:
      ValueError: for other names, and numbers out of range.
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
    """How much each party counts for each text, by quality exp(-loss); a loss that is NaN is the worst.

    Args:
      losses: nats per byte of each party on each text.
      how: "greater" or "weighted_mean" (``TransferOptions.selection``).

    Example:
      >>> select(np.array([[1.0, 2.0], [1.5, 0.5]], np.float32), "greater").tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    known = np.where(np.isnan(losses), np.inf, losses).astype(np.float64)
    if how == "greater":
        chosen = np.eye(len(losses))[known.argmin(0)]
    else:
        values = np.exp(-known).T
        grown = np.exp(values - values.max(1, keepdims=True))
        chosen = grown / grown.sum(1, keepdims=True)
    return chosen.astype(np.float32)


def lesson(own: Answers, others: Sequence[Answers], how: str) -> Lesson:
    """What a party is to learn: from its own distributions, which come first, and others', already in its vocabulary.

    Args:
      own: its own answers.
      others: answers of the same texts.
      how: see ``select``.
    """
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

    def learn(
        self, others: Sequence[Answers], seed: Sequence[int], o: TransferOptions
    ) -> tuple[float, float]:
        """Epochs over the public texts, with what others say of them: (mean loss of the steps, share in which others are believed)."""
        taught, believed = None, 0.0
        if others:
            own = answers(self.party, self.params, self.public, o.k)
            taught = lesson(own, others, o.selection)
            believed = float(1 - taught.weights[:, 0].mean())
        return self.train(self.public, o.public_epochs, seed, o, taught), believed

    def answer(self, k: int) -> TopLogits:
        """What it says about the public texts, as it arrives: through the payload's bytes."""
        said = answers(self.party, self.params, self.public, k).top
        return TopLogits.decode(said.encode(), said.ids.shape, said.vocab_size)

    def usable(self, said: TopLogits) -> bool:
        """Whether what it said is log-probabilities; else it is named in the log and not heard."""
        fine = bool((np.asarray(said.log_probs) <= 0).all())  # false of NaN too
        if not fine:
            logger.warning(
                "answer of %s has log-probabilities that are NaN or above zero; left out",
                self.party.name,
            )
        return fine


class _Bridge(NamedTuple):
    """How one party's positions and tokens are another's."""

    positions: np.ndarray
    table: np.ndarray

    def carried(self, said: TopLogits, other: _Learner, base: _Learner) -> Answers:
        """The answers of ``other`` for ``base``, with the quality that they show."""
        targets, size = base.public.targets, base.party.config.vocab_size
        top = carry(said, self.positions, self.table, targets, size)
        top = TopLogits(np.asarray(top.log_probs), np.asarray(top.ids), size)
        return Answers(top, losses_of(said, other.public))


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
      rounds: a record per round: bits per byte of "server" and of each client by name on the test texts, bytes up and down (payloads, and
        parameters where they are averaged), losses, the share in which the server believed clients and clients the server, clients
        whose answers were "rejected".
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
    party: Party,
    public: Sequence[str],
    private: Sequence[str] | None,
    o: TransferOptions,
    tag: int,
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
    federation = _Federation(main, learners, o)
    tests = [rows_of(test, p) for p in (server, *clients)]
    records = []
    for number in range(o.rounds):
        record = federation.round(number)
        for learner, rows in zip((main, *learners), tests, strict=True):
            bits = bits_per_byte(learner.party, learner.params, rows)
            record[f"bits_per_byte_{learner.party.name}"] = bits
        records.append(record)
        logger.info("round=%d %s", number, record)
        if on_round is not None:
            on_round(record)
    return federation.history(records)


def _check_average(clients: Sequence[Party], o: TransferOptions) -> None:
    if not o.average:
        return
    for client in clients[1:]:
        if client.config != clients[0].config:
            raise ValueError(
                f"average needs clients of one architecture; {client.name} differs from {clients[0].name}. Leave average out."
            )
        check_same_vocabulary(clients[0].vocabulary, client.vocabulary, client.name)


class _Federation:
    """A server, its clients, and how each one's words are the other's."""

    def __init__(self, main: _Learner, learners: list[_Learner], options: TransferOptions):
        self.main, self.learners, self.options = main, learners, options
        self.ups: list[_Bridge] = []
        self.downs: list[_Bridge] = []
        if options.direction != "none":
            self.ups = [_bridge(main, learner, options) for learner in learners]
            self.downs = [_bridge(learner, main, options) for learner in learners]

    def round(self, number: int) -> dict[str, Any]:
        """One round; with direction "none" the same training, each party for itself."""
        o, seed = self.options, [self.options.seed, number]
        private = [
            x.train(x.private, o.private_epochs, [*seed, 1 + i], o)
            for i, x in enumerate(self.learners)
        ]
        record = {"round": number, "bytes_up": 0, "bytes_down": 0}
        record |= self._up(seed) | self._down(seed)
        if o.average:
            sent = _average(self.learners)
            record["bytes_up"] += sent
            record["bytes_down"] += sent
        return record | {"private_loss": float(np.mean(private))}

    def _up(self, seed: Sequence[int]) -> dict[str, Any]:
        """Clients answer and the server learns."""
        o, others, record = self.options, [], {}
        if o.direction in ("both", "to_server"):
            said = [x.answer(o.k) for x in self.learners]
            record = {"bytes_up": sum(map(_sent, said)), "rejected": []}
            for client, top, bridge in zip(self.learners, said, self.ups, strict=True):
                if client.usable(top):
                    others.append(bridge.carried(top, client, self.main))
                else:
                    record["rejected"].append(client.party.name)
        loss, believed = self.main.learn(others, [*seed, 0], o)
        if o.direction in ("both", "to_server"):
            record["clients_believed"] = believed
        return record | {"server_loss": loss}

    def _down(self, seed: Sequence[int]) -> dict[str, Any]:
        """The server answers and clients learn."""
        o, said, record = self.options, None, {}
        if o.direction in ("both", "to_clients"):
            said = self.main.answer(o.k)
            record["bytes_down"] = _sent(said) * len(self.learners)
            said = said if self.main.usable(said) else None
        believed = []
        for i, client in enumerate(self.learners):
            others = [] if said is None else [self.downs[i].carried(said, self.main, client)]
            believed.append(client.learn(others, [*seed, 1000 + i], o)[1])
        if o.direction in ("both", "to_clients"):
            record["server_believed"] = float(np.mean(believed))
        return record

    def history(self, records: list[dict[str, Any]]) -> LanguageHistory:
        """The result."""
        real = self.main.public.lengths.sum()
        return LanguageHistory(
            records,
            self.main.params,
            [x.params for x in self.learners],
            [float((b.positions >= 0).sum() / real) for b in self.ups],
            [x.party.nbytes(x.params) for x in self.learners],
        )


def _sent(said: TopLogits) -> int:
    """Bytes of an answer. Its quality isn't sent: the receiver finds it in the answer."""
    return logits_nbytes(said.ids.shape, said.vocab_size)


def _average(learners: list[_Learner]) -> int:
    """Everybody gets the mean; bytes up, and as many down.

    FedMKT's homogeneous variant weights by the length of the public set, which all have: a plain mean. What travels is what is trained, in
    full precision.
    """
    mean = jax.tree.map(lambda *x: sum(x[1:], x[0]) / len(x), *(x.params for x in learners))
    for learner in learners:
        learner.params = jax.tree.map(jnp.copy, mean)
    return quant.nbytes(mean) * len(learners)
