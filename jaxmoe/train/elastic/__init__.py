"""Training on processes that may die and come back."""

from jaxmoe.train.elastic.events import EVENTS, Event
from jaxmoe.train.elastic.options import ElasticOptions
from jaxmoe.train.elastic.run import RanksLost
from jaxmoe.train.elastic.train import train_elastic

__all__ = ["EVENTS", "ElasticOptions", "Event", "RanksLost", "train_elastic"]
