"""What a language model of a federation does: read texts, say what it expects, learn from others (``fed.language`` puts it together)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

import jaxmoe
import quant
from fed.clients import update_params
from fed.compress import TopLogits, top_logits
from fed.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Party:
    """A language model, by its shape, and its tokenizer.

    Attributes:
      name: in reports and errors.
      config: of the model; without a multi-token-prediction module, which nothing here would train.
      tokenizer: of ``jaxmoe.tokenizer``.
      width: SEFP width of the device, 3 to 8; None: full precision.

    Raises:
      ValueError: for a config with a multi-token-prediction module.
    """

    name: str
    config: jaxmoe.ModelConfig
    tokenizer: Any
    width: int | None = None

    def __post_init__(self):
        if self.config.num_nextn_predict_layers:
            raise ValueError(
                f"{self.name}: num_nextn_predict_layers must be 0; got {self.config.num_nextn_predict_layers}. Use "
                "config.replace(num_nextn_predict_layers=0)."
            )

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """What the model's ids stand for."""
        return Vocabulary.of(self.tokenizer, self.config.vocab_size)

    def nbytes(self, params: Any) -> int:
        """Bytes of the parameters on the device."""
        if self.width is None:
            return quant.nbytes(params)
        return quant.nbytes(jax.eval_shape(lambda p: quant.quantize_params(p, self.width), params))


class Rows(NamedTuple):
    """Texts as one tokenizer has them; position t of ``inputs`` predicts token t.

    Attributes:
      inputs: int32 [N, T], the document's beginning, then all tokens but the last.
      targets: int32 [N, T].
      lengths: int32 [N]; what is beyond counts nowhere.
      nbytes: int64 [N], of the texts.
    """

    inputs: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    nbytes: np.ndarray


def rows_of(texts: Sequence[str], party: Party, multiple: int = 8) -> Rows:
    """Tokenizes texts; nothing is cut off.

    Raises:
      ValueError: for an empty text, or a tokenizer without a token that begins a document.
    """
    if party.tokenizer.bos is None:
        raise ValueError(
            f"{party.name}'s tokenizer has no token that begins a document; name one as bos_token in its tokenizer_config.json."
        )
    encoded = [e.ids for e in party.tokenizer.encode_all(list(texts), ends=False)]
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    if not len(encoded) or lengths.min() == 0:
        raise ValueError(
            f"texts must not be empty; {int((lengths == 0).sum())} of {len(encoded)} are."
        )
    size = -(-int(lengths.max()) // multiple) * multiple
    targets = np.zeros((len(encoded), size), np.int32)
    for row, ids in zip(targets, encoded, strict=True):
        row[: len(ids)] = ids
    first = np.full((len(encoded), 1), party.tokenizer.bos, np.int32)
    inputs = np.concatenate([first, targets[:, :-1]], axis=1)
    return Rows(inputs, targets, lengths, np.array([len(t.encode()) for t in texts], np.int64))


# -- what a model says -----------------------------------------------------------------------------


class Answers(NamedTuple):
    """What a party says about the public texts.

    Attributes:
      top: [N, T, k].
      loss: float32 [N], cross-entropy of each text in nats per byte, so that tokenizers can be compared; exp(-loss) is its quality.
    """

    top: TopLogits
    loss: np.ndarray


def _seen(params: Any, width: int | None) -> Any:
    return params if width is None else quant.fake_quantize(params, width)


def _mask(targets: Array, lengths: Int[Array, " B"]) -> Bool[Array, "B T"]:
    return jnp.arange(targets.shape[1], dtype=jnp.int32)[None] < lengths[:, None]


def _text_losses(
    log_probs: Float[Array, "B T V"], targets: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Mean cross-entropy of each text."""
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    total = jnp.where(_mask(targets, lengths), -picked, 0.0).sum(1)
    return total / jnp.maximum(lengths, 1).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "width", "k"))
def _answer(
    params: Any,
    inputs: Int[Array | np.ndarray, "B T"],
    targets: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"],
    config: jaxmoe.ModelConfig,
    width: int | None,
    k: int,
) -> tuple[TopLogits, Float[Array, " B"]]:
    """(the k most probable tokens [B, T, k], mean cross-entropy of each text in nats per token)."""
    logits = jaxmoe.forward(_seen(params, width), config, inputs)
    losses = _text_losses(jax.nn.log_softmax(logits, axis=-1), targets, lengths)
    return top_logits(logits, k), losses


def batches(count: int, size: int, order: np.ndarray | None = None) -> list[tuple[np.ndarray, int]]:
    """Rows of each batch, padded to ``size`` with row 0, and how many are real."""
    order = np.arange(count) if order is None else order
    cut = [order[i : i + size] for i in range(0, count, size)]
    return [(np.pad(part, (0, size - len(part))), len(part)) for part in cut]


def some(rows: Rows, index: np.ndarray, real: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and lengths of a batch; those of its padding are zero."""
    lengths = np.where(np.arange(len(index)) < real, rows.lengths[index], 0).astype(np.int32)
    return rows.inputs[index], rows.targets[index], lengths


def answers(party: Party, params: Any, rows: Rows, k: int, batch_size: int = 32) -> Answers:
    """What a model expects at every position of ``rows``, and how well it does."""
    parts, losses = [], []
    for index, real in batches(len(rows.inputs), min(batch_size, len(rows.inputs))):
        inputs, targets, lengths = some(rows, index, real)
        top, loss = _answer(params, inputs, targets, lengths, party.config, party.width, k)
        parts.append((np.asarray(top.log_probs)[:real], np.asarray(top.ids)[:real]))
        losses.append(np.asarray(loss)[:real])
    values, ids = (np.concatenate(x) for x in zip(*parts, strict=True))
    loss = np.concatenate(losses) * (rows.lengths / rows.nbytes).astype(np.float32)
    return Answers(TopLogits(values, ids, party.config.vocab_size), loss)


def losses_of(top: TopLogits, rows: Rows) -> Float[np.ndarray, " N"]:
    """Nats per byte of each text by the distributions that were sent: their receiver need not take the sender's word for their quality.

    Args:
      top: [N, T, k], position t the distribution of token t.
      rows: the texts in the sender's vocabulary.

    Returns:
      float32 [N]. A token that wasn't sent has an even share of what is left to one.
    """
    values, ids = np.asarray(top.log_probs, np.float32), np.asarray(top.ids)
    mass = np.logaddexp.reduce(values, axis=-1)
    # Values travel as bfloat16, so what is left to one is known to about a thousandth.
    rest = np.log(np.maximum(-np.expm1(np.minimum(mass, 0.0)), 1e-3))
    sent = np.where(ids == rows.targets[..., None], values, -np.inf).max(-1)
    sent = np.where(np.isfinite(sent), sent, rest - np.log(max(top.vocab_size - top.k, 1)))
    real = np.arange(ids.shape[1]) < rows.lengths[:, None]
    nats = np.where(real, np.maximum(mass, 0.0) - sent, 0.0).sum(1)
    return (nats / rows.nbytes).astype(np.float32)


def bits_per_byte(party: Party, params: Any, rows: Rows, batch_size: int = 32) -> float:
    """Of the model on texts, whatever its vocabulary."""
    losses = answers(party, params, rows, 1, batch_size).loss.astype(np.float64)
    return float((losses * rows.nbytes).sum() / np.log(2) / rows.nbytes.sum())


# -- learning ----------------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """Distributions of P parties at every position, and how much each counts for a text.

    Attributes:
      log_probs: float32 [N, P, T, k].
      ids: int32 [N, P, T, k].
      weights: float32 [N, P], adding up to one.
    """

    log_probs: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def soft_cross_entropy(
    log_probs: Float[Array, "*S V"],
    values: Float[Array, "*S k"],
    ids: Int[Array, "*S k"],
    temperature: float,
) -> Float[Array, "*S"]:
    """-sum_v p(v) log q(v), where p is known at k tokens and even over the others (``TopLogits``), without making p.

    Args:
      log_probs: the student's at ``temperature``.
      values: the teacher's log-probabilities at temperature 1; -inf where there is no entry.
      ids: their tokens; without repetitions among real entries.
      temperature: of the teacher's distribution.
    """
    present = values > -jnp.inf
    count = jnp.maximum(log_probs.shape[-1] - present.sum(-1), 1).astype(jnp.float32)
    tail = jnp.maximum(-jnp.expm1(jnp.minimum(jax.nn.logsumexp(values, axis=-1), 0.0)), 1e-12)
    kept, each = values / temperature, (jnp.log(tail) - jnp.log(count)) / temperature
    others = each + jnp.log(count)
    total = jnp.logaddexp(jax.nn.logsumexp(kept, axis=-1), others)
    chosen = jnp.where(present, jnp.take_along_axis(log_probs, ids, axis=-1), 0.0)
    probs = jnp.exp(kept - total[..., None])
    rest = (log_probs.sum(-1) - chosen.sum(-1)) / count
    return -(probs * chosen).sum(-1) - jnp.exp(others - total) * rest


def optimizer(learning_rate: float) -> optax.GradientTransformation:
    """AdamW (0.9, 0.95; weight decay 0.1) on gradients clipped to norm 1, as FedMKT's."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.1),
    )


def _distilled(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    taught: Lesson,
    temperature: float,
) -> Float[Array, " B"]:
    """Distillation loss of each text, mean over its tokens."""
    soft = jax.nn.log_softmax(logits / temperature, axis=-1)
    parties = jax.vmap(soft_cross_entropy, (None, 1, 1, None), out_axes=1)
    each = parties(soft, taught.log_probs, taught.ids, temperature)
    text = jnp.where(_mask(targets, lengths)[:, None], each, 0.0).sum(2)
    text = text / jnp.maximum(lengths, 1).astype(jnp.float32)[:, None]
    return (taught.weights * text).sum(1) * temperature**2


@functools.partial(
    jax.jit,
    static_argnames=("config", "width", "learning_rate", "own_share", "temperature"),
    donate_argnames=("params", "moments"),
)
def step(
    params: Any,
    moments: Any,
    batch: tuple[Any, Any, Any],
    taught: Lesson | None,
    config: jaxmoe.ModelConfig,
    width: int | None,
    learning_rate: float,
    own_share: float,
    temperature: float,
) -> tuple[Any, Any, Float[Array, ""]]:
    """One step on a batch; the first two arguments are donated.

    Args:
      params: of the model.
      moments: the optimiser's state.
      batch: inputs int32 [B, T], targets int32 [B, T], lengths int32 [B], as of ``some``.
      taught: what parties say about these B texts, or None: the language-model loss alone.
      config: of the model.
      width: SEFP width that it is trained through, or None.
      learning_rate: of ``optimizer``.
      own_share: of the language-model loss; the rest is the distillation loss.
      temperature: of the distillation.

    Returns:
      (params, moments, mean loss of the real texts, float32).
    """
    inputs, targets, lengths = batch

    def loss(p: Any) -> Array:
        logits = jaxmoe.forward(_seen(p, width), config, inputs)
        each = _text_losses(jax.nn.log_softmax(logits, axis=-1), targets, lengths)
        if taught is not None:
            distilled = _distilled(logits, targets, lengths, taught, temperature)
            each = own_share * each + (1 - own_share) * distilled
        real = lengths > 0
        return jnp.where(real, each, 0.0).sum() / jnp.maximum(real.sum(), 1).astype(jnp.float32)

    value, gradient = jax.value_and_grad(loss)(params)
    params, moments = update_params(optimizer(learning_rate), gradient, moments, params)
    return params, moments, value
