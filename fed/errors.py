"""What can go wrong in a federation and is neither the user's mistake in an argument nor a bug."""

import importlib
from types import ModuleType

from jaxmoe.errors import JaxMoeError


class BadUpdate(JaxMoeError):
    """A client's upload was unusable, and the options say that this ends the run."""


class QuorumLost(JaxMoeError):
    """Too many rounds in a row had fewer usable replies than the quorum."""


def need(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency, or says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{package} is needed here and isn't installed: pip install 'jaxmoe[{extra}]'."
        ) from error
