"""Several processes of one run: if one is gone, the others say so and end.

Nobody can compute without it. Where its connections are closed, as the system does when it is killed, what the others compute with it
fails at once (gloo, on CPU). Where they stay open, as of a machine without power, JAX ends all when it has been silent for
``heartbeat_timeout_seconds`` of ``jax.distributed.initialize``, 100 by default; and at once if it is process 0.
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator

import jax

from jaxmoe.errors import JaxMoeError

# What errors of communication have in their first line, after JAX's status; their types tell nothing.
_COMMUNICATION = re.compile("[A-Z_]+: .*(?i:gloo|nccl|barrier|heartbeat|coordination)")
_GRACE_S = 2.0


class ProcessLost(JaxMoeError):
    """Another process of the run is gone; the message says what to go on from."""


def kept(step: int | None) -> str:
    """What to go on from, in a sentence.

    Args:
      step: that is saved; None if there is none.
    """
    if step is None:
        return "Nothing was saved yet; run the command again to start over."
    return f"Step {step} is saved; run the command again to go on from there."


@contextlib.contextmanager
def with_others(saved: Callable[[], int | None]) -> Iterator[None]:
    """Computes with all processes of a run.

    Args:
      saved: gives the last step that is saved, if any.

    Raises:
      ProcessLost: instead of an error that says that another process is gone.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:  # JAX raises both
        if jax.process_count() == 1 or not _COMMUNICATION.match(str(error)):
            raise
        number, count = jax.process_index(), jax.process_count()
        reason = str(error).splitlines()[0]
        raise ProcessLost(
            f"process {number} of {count} ends because another is gone ({reason}). {kept(saved())}"
        ) from error


def status_of(error: BaseException) -> int:
    """The status with which a process ends by an error that nobody catches, or by Ctrl-C."""
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        return error.code or 0
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def leave(status: int) -> None:
    """Ends this process, without JAX's own ending, which waits for all processes, so for one that is gone too."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(_GRACE_S)  # JAX's coordination ends with it: the others are to have said why
    finally:
        os._exit(status)
