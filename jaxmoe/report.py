"""The one format of every report: benches, CLI commands and recovery experiments write the same JSON."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint", "transformers", "torch")


def machine() -> dict[str, Any]:
    """What the numbers were measured on; no host name."""
    devices = jax.devices()
    return {
        "platform": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, where installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def make_report(
    bench: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float] | None = None,
    *,
    command: str | None = None,
) -> dict[str, Any]:
    """A report.

    Args:
      bench: what was measured.
      rows: dicts with at least "name", "value" and "unit".
      ratios: named ratios, the figures that are compared.
      command: how to run it again; default: this process's command line.

    Raises:
      ValueError: if a row lacks a field.
    """
    for row in rows:
        missing = {"name", "value", "unit"} - set(row)
        if missing:
            raise ValueError(
                f"a report row needs name, value and unit; {dict(row)} lacks {sorted(missing)}."
            )
    return {
        "bench": bench,
        "command": command or command_line(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "rows": [dict(row) for row in rows],
        "ratios": dict(ratios or {}),
    }


def median_row(name: str, values: Sequence[float], unit: str, **more: Any) -> dict[str, Any]:
    """A row of repeated measurements: the median, with the extremes and the number of rounds. Of rates ("/s") more is better."""
    best, worst = (max, min) if unit.endswith("/s") else (min, max)
    return {
        "name": name,
        "value": statistics.median(values),
        "unit": unit,
        "best": best(values),
        "worst": worst(values),
        "rounds": len(values),
        **more,
    }


def command_line() -> str:
    """This process's command as a user would type it, without the paths of this machine."""
    program = pathlib.Path(sys.argv[0])
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is not None and module.name and not module.name.startswith("jaxmoe"):
        head = f"python -m {module.name.removesuffix('.__main__')}"
    else:
        head = program.name
    return " ".join([head, *sys.argv[1:]])


def write_report(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, creating directories; replaces an older file at once."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    try:
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
