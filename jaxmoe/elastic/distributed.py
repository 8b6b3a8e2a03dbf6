"""JAX's distributed runtime where a process may die and come back: the one place that uses its private parts.

``jax.distributed.initialize`` puts the coordination service into process 0, whose death then ends all. Here it lives in a
process that computes nothing, and any of the others may die. On CPU a collective with a dead peer can hang for half an hour,
because gloo has no abort; ``abort_collectives`` shuts down this process's own gloo sockets, and every call that waits raises.
On GPU the runtime aborts by itself (``jax_enable_recoverability``).
"""

import os
import socket
from typing import Any

import jax

HEARTBEAT_S = 10  # of the coordination service; the controller notices sooner, by its own means


def serve(address: str, processes: int) -> Any:
    """Starts the coordination service in this process; it stops when the returned object's ``shutdown()`` is called.

    Args:
      address: "host:port" to listen on.
      processes: how many processes there can be, numbered from 0.
    """
    from jax._src.lib import _jax

    return _jax.get_distributed_runtime_service(
        address, processes, heartbeat_timeout=HEARTBEAT_S, shutdown_timeout=1, recoverable=True
    )


def join(address: str, process: int, processes: int, *, timeout_s: int = 60) -> None:
    """Makes this process number ``process``. Before any computation; again, under the same number, after a restart.

    Raises:
      RuntimeError: if the service cannot be reached within ``timeout_s``, or JAX has started already.
    """
    from jax._src import distributed, xla_bridge
    from jax._src.lib import _jax

    if xla_bridge.backends_are_initialized():
        raise RuntimeError("join must come before the first computation of the process.")
    jax.config.update("jax_enable_recoverability", True)
    state = distributed.global_state
    state.process_id, state.num_processes = process, processes
    state.coordinator_address = address
    state.client = _jax.get_distributed_runtime_client(
        address,
        process,
        init_timeout=timeout_s,
        heartbeat_timeout=HEARTBEAT_S,
        shutdown_on_destruction=False,
        use_compression=True,
    )
    state.client.connect()
    if process == 0:
        _forget_topology(state.client)


def _forget_topology(client: Any) -> None:
    """Process 0 publishes the devices of all; what its predecessor has published would stop it."""
    for key in ("cpu:global_topology/cpu", "cuda:global_topology/cuda"):
        client.key_value_delete(key)


def tcp_sockets() -> dict[int, tuple[Any, Any]]:
    """This process's connected TCP sockets: descriptor -> (own address, peer's address)."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed meanwhile
        with copy:
            try:
                if (
                    copy.family in (socket.AF_INET, socket.AF_INET6)
                    and copy.type == socket.SOCK_STREAM
                ):
                    found[int(name)] = copy.getsockname(), copy.getpeername()
            except OSError:
                continue  # not connected
    return found


def abort_collectives(spare_ports: set[int]) -> int:
    """Ends every CPU collective that this process waits in, with an error; returns how many connections it has shut down.

    Connections that are shut down stay unusable, so the next mesh must have its devices in an order not used before:
    gloo remembers its connections by that order.

    Args:
      spare_ports: connections with such a port at either end are let be: the coordination service's.
    """
    count = 0
    for number, ends in tcp_sockets().items():
        if spare_ports & {end[1] for end in ends}:
            continue
        try:
            with socket.socket(fileno=os.dup(number)) as copy:
                copy.shutdown(socket.SHUT_RDWR)
                count += 1
        except OSError:
            pass  # closed meanwhile
    return count
