"""What recovery is compared with: ending everything and starting again, and ranks that were healthy all the time."""

import dataclasses
import os
import signal
import time

import numpy as np

from jaxmoe.elastic.experiment.metrics import rate, token_times
from jaxmoe.elastic.experiment.stand import Stand

_FIRST_S = 3.0  # of a load: requests are not yet in step with each other, and programs for the next loss are being loaded
_BEFORE_S = 3.0  # of load before the kill and after the restart, for the picture
_PATIENCE_S = 60.0


@dataclasses.dataclass(frozen=True)
class Restart:
    """A restart of everything because of one rank.

    Attributes:
      pause_s: from the last token before to the first one after.
      times: when tokens came, in seconds since the kill.
    """

    pause_s: float
    times: np.ndarray


def restart(stand: Stand, rank: int, seed: int) -> Restart:
    """Kills a rank under load, ends everything, starts everything again from the programs on disk, and sends new requests.

    The stand is started anew afterwards. In the baseline's favour: the death is noticed at once, the controller's process,
    with JAX loaded, stays, and nobody has to be told of a new address.
    """
    load = stand.load(seed).start()
    load.first_token.wait(_PATIENCE_S)
    time.sleep(_BEFORE_S)
    killed = time.monotonic()
    pids = stand.cluster.pids
    os.kill(pids[rank], signal.SIGKILL)
    for pid in pids.values():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended by itself
    before = token_times(load.stop(0))
    stand.end()
    stand.start()
    load = stand.load(seed).start()
    load.first_token.wait(_PATIENCE_S)
    time.sleep(_BEFORE_S)
    after = token_times(load.stop(_PATIENCE_S))
    return Restart(float(after[0] - before[-1]), np.concatenate([before, after]) - killed)


def without(stand: Stand, rank: int, seed: int, seconds: float) -> float:
    """Tokens per second of the others, healthy, once a rank has left as planned; it is called back afterwards."""
    stand.cluster.drain(rank).result(_PATIENCE_S)
    try:
        load = stand.load(seed).start()
        load.first_token.wait(_PATIENCE_S)
        began = time.monotonic() + _FIRST_S
        time.sleep(_FIRST_S + seconds)
        return rate(token_times(load.stop(_PATIENCE_S)), began, began + seconds)
    finally:
        stand.wait_until_whole()
