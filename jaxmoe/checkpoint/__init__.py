"""Checkpoints: Hugging Face safetensors both ways, and native ones for training and recovery."""

from jaxmoe.checkpoint.hf import load_hf, save_hf
from jaxmoe.checkpoint.native import (
    Restored,
    latest_step,
    restore,
    restore_config,
    restore_experts,
    save,
)

__all__ = [
    "Restored",
    "latest_step",
    "load_hf",
    "restore",
    "restore_config",
    "restore_experts",
    "save",
    "save_hf",
]
