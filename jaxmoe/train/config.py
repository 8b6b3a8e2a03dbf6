"""Training configuration."""

import dataclasses
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.presets import presets
from jaxmoe.tokenizer import ByteTokenizer

# What a resumed run may change.
_BESIDE_THE_LOSSES = ("eval_every", "eval_bytes", "probe_bytes", "save_every", "keep")


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that random generators cannot hold."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits; got {seed}.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of a run; defaults follow V3's pre-training where a laptop can (spec 4.3)."""

    steps: int = 1000
    """Optimiser steps in all."""
    batch_size: int = 16
    """Sequences per step."""
    seq_len: int = 256
    """Tokens per sequence."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    final_learning_rate_ratio: float = 0.1
    """Learning rate at the last step, relative to the peak (cosine)."""
    warmup_steps: int = 50
    """Steps of linear warm-up; at most a tenth of the run."""
    beta1: float = 0.9
    """AdamW first-moment decay."""
    beta2: float = 0.95
    """AdamW second-moment decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; the indexer's is taken apart from the model's."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss (lambda)."""
    balance_weight: float = 1e-4
    """Weight of the sequence-wise balance loss (alpha)."""
    bias_update_speed: float = 1e-3
    """Step of the routers' correction bias (gamma)."""
    index_weight: float = 1.0
    """Weight of the indexer's KL loss."""
    eval_every: int = 200
    """Steps between evaluations; there is one at the end in any case."""
    eval_bytes: int = 1 << 20
    """Held-out bytes scored at the end; the standard library has about 250,000, so all of them."""
    probe_bytes: int = 16384
    """Held-out bytes scored by the evaluations before, spread evenly over the same text."""
    save_every: int = 200
    """Steps between checkpoints; there is one at the end in any case."""
    keep: int = 3
    """Checkpoints to keep."""
    seed: int = 0
    """Seed of parameters and data order."""
    remat: bool = True
    """Recompute activations in the backward pass: less memory, and on CPU less time too."""

    def __post_init__(self):
        positive = (
            "steps",
            "batch_size",
            "seq_len",
            "learning_rate",
            "clip_norm",
            "eval_every",
            "save_every",
            "keep",
        )
        for name in (*positive, "eval_bytes", "probe_bytes"):
            if not getattr(self, name) > 0:  # nor NaN
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in (
            "mtp_weight",
            "balance_weight",
            "bias_update_speed",
            "index_weight",
            "weight_decay",
            "final_learning_rate_ratio",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0; got {self.warmup_steps}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}.")
        check_seed(self.seed)

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError if this run does not fit the model."""
        if self.seq_len > model.max_position_embeddings:
            raise ValueError(
                f"seq_len ({self.seq_len}) must be <= the model's max_position_embeddings "
                f"({model.max_position_embeddings}); shorten seq_len or derive a config with more positions."
            )

        if model.vocab_size < ByteTokenizer.pad + 1:
            raise ValueError(
                f"vocab_size ({model.vocab_size}) must be >= {ByteTokenizer.pad + 1}, the ids of bytes and special "
                f"tokens; use a config with vocab_size={ByteTokenizer.vocab_size}."
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict."""
        return dataclasses.asdict(self)

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the losses: equal ones, on equal text, give equal losses."""
        return {k: v for k, v in self.to_dict().items() if k not in _BESIDE_THE_LOSSES}


def demo_config() -> tuple[ModelConfig, TrainConfig]:
    """Model and run of the demo: about three minutes of training on two cores.

    The initial deviation is larger than the preset's: at a width of 128, 0.02 leaves the layers almost silent and
    costs about 150 of the first 300 steps.
    """
    run = TrainConfig(
        steps=400,
        batch_size=8,
        seq_len=256,
        learning_rate=4e-3,
        warmup_steps=40,
        eval_every=200,
        eval_bytes=131072,
        save_every=200,
        remat=False,
    )
    return presets["tiny"].replace(initializer_range=0.06), run
