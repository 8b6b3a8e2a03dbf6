"""Entry point: subcommands, and errors as one line instead of a traceback."""

import os
import sys
from collections.abc import Sequence

import rich.console
import tyro

from jaxmoe.cli.bench import bench
from jaxmoe.cli.convert import convert
from jaxmoe.cli.demo import demo
from jaxmoe.cli.generate import generate
from jaxmoe.cli.info import info
from jaxmoe.cli.plot import plot
from jaxmoe.cli.ranks import ranks
from jaxmoe.cli.recover import recover
from jaxmoe.cli.serve import serve
from jaxmoe.cli.train import train
from jaxmoe.cli.tune import tune
from jaxmoe.errors import JaxMoeError


def _fed() -> None:
    """Federated methods: run, compare, deploy; see jaxmoe fed --help."""


COMMANDS = {
    "demo": demo,
    "train": train,
    "tune": tune,
    "plot": plot,
    "generate": generate,
    "serve": serve,
    "recover": recover,
    "ranks": ranks,
    "convert": convert,
    "info": info,
    "fed": _fed,
    "bench": bench,
}

# What a user can cause and mend; anything else is our bug and keeps its traceback.
_USER_ERRORS = (ValueError, TypeError, JaxMoeError, OSError)


def _message(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        path = error.filename if error.filename2 is None else error.filename2
        return f"{path}: {error.strerror}; check the path and its permissions."
    first, *rest = str(error).splitlines() or [type(error).__name__]
    return " ".join([first, "; ".join(line.strip() for line in rest)]).strip()


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; exits 0, 1 for a user's mistake, 2 for a wrong option, 130 when interrupted."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        if args[:1] == ["bench"] and args[1:2] not in ([], ["-h"], ["--help"]):
            bench(args[1], tuple(args[2:]))  # its options are its own
            return
        if args[:1] == ["fed"]:  # lies above this package, so it is loaded when asked for only
            from jaxmoe.cli import fed

            fed.main(args[1:])
            return
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="jaxmoe",
            description="One life of one sparse mixture-of-experts model.",
            args=args,
        )
    except _USER_ERRORS as error:
        if os.environ.get("JAXMOE_TRACEBACK"):
            raise
        rich.console.Console(stderr=True, soft_wrap=True).print(
            f"[red]error:[/] {rich.markup.escape(_message(error))}"
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
