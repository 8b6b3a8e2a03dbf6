"""Checkpoints: Hugging Face safetensors both ways, native ones for training and recovery, and one file of every SEFP width."""

from jaxmoe.checkpoint.directory import holds_sefp, is_hf, load, load_config, locate
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
from jaxmoe.checkpoint.sefp import is_sefp, load_sefp, save_sefp

__all__ = [
    "Restored",
    "holds_sefp",
    "is_hf",
    "is_sefp",
    "latest_step",
    "load",
    "load_config",
    "load_hf",
    "load_sefp",
    "locate",
    "restore",
    "restore_config",
    "restore_experts",
    "restore_extra",
    "save",
    "save_hf",
    "save_sefp",
    "topology_of",
]
