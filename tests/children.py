"""Processes that tests start."""

import os


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """The tests' own environment with another number of CPU devices, and with ``more``."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "host_platform_device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join(kept), "JAX_NUM_CPU_DEVICES": str(devices)} | more
