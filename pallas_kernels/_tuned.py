"""Measured kernel settings: ``tuned/<op>.json``, written by ``bench/tune.py``.

    {"NVIDIA H200": {KEY: {"date": "2026-11-26", "jax": "0.11.2", "settings": {...}}}}

A key names a class of shapes and is made by the op's ``config.py``, which has a heuristic for what is not in the table.
"""

import functools
import json
import logging
import pathlib
from typing import Any

import jax

_FOLDER = pathlib.Path(__file__).parent / "tuned"
_log = logging.getLogger(__name__)


def path_of(op: str) -> pathlib.Path:
    """Where the settings of ``op`` are kept."""
    return _FOLDER / f"{op}.json"


def size_class(count: int) -> int:
    """The power of two that ``count`` belongs to, for keys: settings measured at one size serve its neighbours."""
    return 1 << (max(count, 1) - 1).bit_length()


@functools.cache
def _settings(op: str, device_kind: str) -> dict[str, dict[str, Any]]:
    path = path_of(op)
    if not path.exists():
        return {}
    return json.loads(path.read_text()).get(device_kind, {})


@functools.cache
def _say_missing(op: str, device_kind: str, key: str) -> None:
    _log.info(
        "no measured settings, using the heuristic op=%s device=%s key=%r", op, device_kind, key
    )


def lookup(op: str, key: str) -> dict[str, Any] | None:
    """What was measured best for ``key`` on this kind of device; None, and a line in the log once, where nothing was."""
    device = jax.devices()[0]
    found = _settings(op, device.device_kind).get(key, {}).get("settings")
    if found is None and device.platform != "cpu":
        _say_missing(op, device.device_kind, key)
    return found
