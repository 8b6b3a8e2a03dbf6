"""Training a byte-level language model: data, loss, step, loop."""

from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import Corpus, load_corpus
from jaxmoe.train.loop import Progress, Summary, train
from jaxmoe.train.step import TrainState, init_state, train_step

__all__ = [
    "Corpus",
    "Progress",
    "Summary",
    "TrainConfig",
    "TrainState",
    "init_state",
    "load_corpus",
    "train",
    "train_step",
]
