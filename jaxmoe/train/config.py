"""Training configuration."""

import dataclasses
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.model import REMAT
from jaxmoe.presets import presets

STAGES = ("pretrain", "dsa_warmup", "dsa_sparse", "sft")
# Peak learning rates. Warm-up: V3.2's (spec 4.1). Sparse training there goes on at the rate at which pre-training ended: a tenth of the
# peak here. For chat examples no rate is published; a third of that.
_LEARNING_RATES = {"pretrain": 3e-3, "dsa_warmup": 1e-3, "dsa_sparse": 3e-4, "sft": 1e-4}

COMPUTE_DTYPES = ("float32", "bfloat16")

# What a resumed run may change.
_BESIDE_THE_LOSSES = ("eval_every", "eval_bytes", "probe_bytes", "save_every", "keep")


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that random generators cannot hold."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits; got {seed}.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of a run; defaults follow V3's pre-training where a laptop can (spec 4.3)."""

    stage: str = "pretrain"
    """Of the way to a sparse model (spec 4.1): pretrain (dense attention), dsa_warmup (dense, only the indexers learn), dsa_sparse
    (attention to what they select, everything learns), or sft (the same, on examples)."""
    steps: int = 1000
    """Optimiser steps in all."""
    batch_size: int = 16
    """Sequences per step."""
    accumulate: int = 1
    """Passes per step, each over an equal part of the batch: less memory for activations, the same step."""
    compute_dtype: str = "float32"
    """Of activations and of the weights that are multiplied: float32 or bfloat16. Master weights, moments and losses stay float32."""
    seq_len: int = 256
    """Tokens per sequence."""
    learning_rate: float | None = None
    """Peak learning rate; default by stage: 3e-3, 1e-3, 3e-4, 1e-4."""
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
    fp8: bool = False
    """Whether the experts' products, forward and backward, have operands rounded to 8 bits (spec 7)."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss (lambda)."""
    balance_weight: float = 1e-4
    """Weight of the sequence-wise balance loss (alpha)."""
    bias_update_speed: float = 1e-3
    """Step of the routers' correction bias (gamma)."""
    index_weight: float = 1.0
    """Weight of the indexer's KL loss; with 0 indexers stay as they are."""
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
    remat: str = "core"
    """What each layer recomputes in the backward pass: none; full, everything; core, all but attention's result; dots, all but that and
    the products with weights. Less memory, and on CPU less time too."""
    remat_moe: str | None = None
    """The same for layers with experts; default as the others."""

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}; got {self.stage!r}.")
        positive = (
            "steps",
            "batch_size",
            "accumulate",
            "seq_len",
            "peak_learning_rate",
            "clip_norm",
            "eval_every",
            "save_every",
            "keep",
        )
        for name in (*positive, "eval_bytes", "probe_bytes"):
            if not getattr(self, name) > 0:  # nor NaN
                shown = name.removeprefix("peak_")
                raise ValueError(f"{shown} must be positive; got {getattr(self, name)}.")
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
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate}); change one of them."
            )
        for name in ("remat", "remat_moe"):
            given = getattr(self, name)
            if given not in REMAT and not (name == "remat_moe" and given is None):
                raise ValueError(f"{name} must be one of {', '.join(REMAT)}; got {given!r}.")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}; got {self.compute_dtype!r}."
            )
        if self.stage == "dsa_warmup" and self.index_weight == 0:
            raise ValueError(
                "index_weight must be positive in stage dsa_warmup, whose only loss it is; got 0.0."
            )

    @property
    def peak_learning_rate(self) -> float:
        """``learning_rate``, or the stage's."""
        return _LEARNING_RATES[self.stage] if self.learning_rate is None else self.learning_rate

    @property
    def attention(self) -> str:
        """How the model attends in training: "dense", or "sparse" to what its indexers select."""
        return "sparse" if self.stage in ("dsa_sparse", "sft") else "dense"

    @property
    def held_out_attention(self) -> str:
        """How held-out text is scored: "sparse", as at inference, unless nothing has trained the indexers."""
        return "sparse" if self.attention == "sparse" or self.index_weight > 0 else "dense"

    @property
    def trains_model(self) -> bool:
        """Whether anything but the indexers learns."""
        return self.stage != "dsa_warmup"

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError if this run does not fit the model."""
        if self.seq_len > model.max_position_embeddings:
            raise ValueError(
                f"seq_len ({self.seq_len}) must be <= the model's max_position_embeddings "
                f"({model.max_position_embeddings}); shorten seq_len or derive a config with more positions."
            )
        if self.stage.startswith("dsa") and model.index_topk is None:
            raise ValueError(
                f"stage {self.stage} trains indexers, and the model has none (index_topk is None); choose a model with them, "
                "and --init-from for the other weights."
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict."""
        return dataclasses.asdict(self)

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the losses: equal ones, on equal text, give equal losses."""
        return {k: v for k, v in self.to_dict().items() if k not in _BESIDE_THE_LOSSES}


def trajectory_of(saved: dict[str, Any]) -> dict[str, Any]:
    """What ``trajectory`` gave when a run was saved, in today's words: ``remat`` was true for core and false for none."""
    words = {True: "core", False: "none"}
    given = saved.get("remat")
    return saved | {"remat": words[given]} if isinstance(given, bool) else saved


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
        remat="none",
    )
    return presets["tiny"].replace(initializer_range=0.06), run
