"""Continuous batching over a paged cache: requests, scheduler, sampling, and the engine that runs them."""

from jaxmoe.engine.engine import Engine, EngineClosed
from jaxmoe.engine.options import EngineOptions
from jaxmoe.engine.requests import Chunk, Result, SamplingParams, TokenLogprobs
from jaxmoe.engine.scheduler import QueueFull
from jaxmoe.engine.stats import EngineStats
from jaxmoe.engine.stream import Stream

__all__ = [
    "Chunk",
    "Engine",
    "EngineClosed",
    "EngineOptions",
    "EngineStats",
    "QueueFull",
    "Result",
    "SamplingParams",
    "Stream",
    "TokenLogprobs",
]
