"""Federated transfer between small client models and a large server model, simulated as vmapped clients (KOALA, arXiv 2407.05268)."""

from fed import architectures, data, models, partition
from fed.aggregate import Aggregator, Krum, Mean, Median, TrimmedMean
from fed.baselines import centralised, fedavg, feddf, fedet, fedmd, fedprox, local_only
from fed.clients import Batches, GradientRule, LocalOptions, local_train
from fed.cohort import Cohort, EngineOptions, train_cohort
from fed.costs import Cost, measure, savings
from fed.data import Dataset, Splits, Unlabelled, split
from fed.distill import Distillation, Merge
from fed.driver import Driver, run
from fed.errors import BadUpdate, QuorumLost
from fed.history import History
from fed.koala import KoalaOptions, koala
from fed.models import Model
from fed.partition import Partition
from fed.rounds import Context, Method, RunOptions, State
from fed.sampling import Sampling
from fed.trainable import Trainable
from fed.uploads import Attack, Upload

__all__ = [
    "Aggregator",
    "Attack",
    "BadUpdate",
    "Batches",
    "Cohort",
    "Context",
    "Cost",
    "Dataset",
    "Distillation",
    "Driver",
    "EngineOptions",
    "GradientRule",
    "History",
    "KoalaOptions",
    "Krum",
    "LocalOptions",
    "Mean",
    "Median",
    "Merge",
    "Method",
    "Model",
    "Partition",
    "QuorumLost",
    "RunOptions",
    "Sampling",
    "Splits",
    "State",
    "Trainable",
    "TrimmedMean",
    "Unlabelled",
    "Upload",
    "architectures",
    "centralised",
    "data",
    "fedavg",
    "feddf",
    "fedet",
    "fedmd",
    "fedprox",
    "koala",
    "local_only",
    "local_train",
    "measure",
    "models",
    "partition",
    "run",
    "savings",
    "split",
    "train_cohort",
]
