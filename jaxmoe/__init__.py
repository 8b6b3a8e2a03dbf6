"""jaxmoe: one life of one sparse mixture-of-experts model, in JAX."""

from jaxmoe import checkpoint
from jaxmoe.cache import init_cache
from jaxmoe.config import ModelConfig, RopeConfig
from jaxmoe.engine import Engine, EngineOptions, SamplingParams
from jaxmoe.generate import generate
from jaxmoe.model import forward
from jaxmoe.params import active_param_count, init_params, param_count
from jaxmoe.presets import presets

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "EngineOptions",
    "ModelConfig",
    "RopeConfig",
    "SamplingParams",
    "active_param_count",
    "checkpoint",
    "forward",
    "generate",
    "init_cache",
    "init_params",
    "param_count",
    "presets",
]
