"""A model and runs small enough to train in seconds; shared with the processes that the tests kill."""

import dataclasses
import json
import pathlib

from jaxmoe import presets
from jaxmoe.train import TrainConfig

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# Every feature of V3.2, in one dense and one sparse layer and an MTP module.
MODEL = presets["tiny"].replace(
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    index_n_heads=4,
    index_head_dim=8,
    index_topk=8,
    max_position_embeddings=128,
    initializer_range=0.1,
)
RUN = TrainConfig(
    steps=12,
    batch_size=4,
    seq_len=32,
    learning_rate=1e-2,
    warmup_steps=1,
    eval_every=100,
    eval_bytes=2048,
    probe_bytes=512,
    save_every=100,
)


def write_corpus(directory: pathlib.Path) -> pathlib.Path:
    """Thirty files of text with much to learn; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(30):
        lines = [f"def function_{i}_{j}(value):\n    return value + {j}\n" for j in range(20)]
        (directory / f"module_{i}.py").write_text("".join(lines))
    return directory


def with_options(**changes) -> TrainConfig:
    """``RUN`` with changes."""
    return dataclasses.replace(RUN, **changes)


def records(directory: pathlib.Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# What a line says about the computation, not about the clock.
EXACT = ("step", "loss", "mtp_loss", "index_loss", "balance_loss", "grad_norm", "load")


def losses(directory: pathlib.Path) -> list[tuple]:
    """The exact part of every line."""
    return [tuple(map(str, (r[name] for name in EXACT))) for r in records(directory)]
