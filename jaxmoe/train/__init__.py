"""Training a byte-level language model: data, loss, step, loop."""

from jaxmoe.train.config import TrainConfig, demo_config
from jaxmoe.train.data import Batch, Corpus, DataOptions, load_corpus
from jaxmoe.train.loop import LossNotFinite, Progress, Summary, train
from jaxmoe.train.processes import ProcessLost
from jaxmoe.train.step import TrainState, init_state, train_step

__all__ = [
    "Batch",
    "Corpus",
    "DataOptions",
    "LossNotFinite",
    "ProcessLost",
    "Progress",
    "Summary",
    "TrainConfig",
    "TrainState",
    "demo_config",
    "init_state",
    "load_corpus",
    "train",
    "train_step",
]
