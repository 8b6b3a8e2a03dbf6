"""Checkpoints: Hugging Face safetensors both ways, and native ones for training and recovery."""

from jaxmoe.checkpoint.directory import is_hf, load, load_config, locate
from jaxmoe.checkpoint.hf import load_hf, save_hf
from jaxmoe.checkpoint.native import (
    Restored,
    latest_step,
    restore,
    restore_config,
    restore_experts,
    restore_extra,
    save,
    topology_of,
)

__all__ = [
    "Restored",
    "is_hf",
    "latest_step",
    "load",
    "load_config",
    "load_hf",
    "locate",
    "restore",
    "restore_config",
    "restore_experts",
    "restore_extra",
    "save",
    "save_hf",
    "topology_of",
]
