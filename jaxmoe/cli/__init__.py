"""The ``jaxmoe`` command. tyro is imported here and nowhere else, so that benches run without it."""

from jaxmoe.cli.main import main

__all__ = ["main"]
