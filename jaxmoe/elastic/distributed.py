"""JAX's distributed runtime where a process may die and come back: the one place that uses its private parts.

``jax.distributed.initialize`` puts the coordination service into process 0, whose death then ends all. Here it lives in a
process that computes nothing, and any of the others may die. On CPU a collective with a dead peer can hang for half an hour,
because gloo has no abort; ``abort_collectives`` shuts down this process's own gloo sockets, and every call that waits raises;
one that still waits for a peer to say where it is, in the first collective of a mesh, gets an answer that cannot be used.
On GPU the runtime aborts by itself (``jax_enable_recoverability``).
"""

import contextlib
import os
import socket
from typing import Any

import jax

# Under the addresses of a mesh's members, which gloo exchanges as "cpu:gloo/<device ids>/<index>". Of this length it is not one
# (whole 8 byte words follow the header) and is refused with an error; gloo reads shorter values beyond their end.
_RENDEZVOUS, _NO_ADDRESS = "cpu:gloo/", bytes(1026)

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


def abort_collectives(spare_ports: set[int], *, stuck: bool = False) -> int:
    """Ends every CPU collective that this process waits in, with an error; returns how many connections it has shut down.

    While it may be called no member of a mesh may be on its way into its first collective but those that are to fail as well.
    Connections that are shut down stay unusable, so the next mesh must have its devices in an order not used before:
    gloo remembers its connections by that order.

    Args:
      spare_ports: connections with such a port at either end are let be: the coordination service's.
      stuck: whether earlier calls have not helped: then this process waits for another to connect, which has given up.
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
    _end_rendezvous(stuck)
    return count


def _end_rendezvous(stuck: bool) -> None:
    """Whoever waits for a member of a mesh that has never come gets an error instead."""
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        return
    meshes: dict[str, dict[int, bytes]] = {}
    for key, address in client.key_value_dir_get_bytes(_RENDEZVOUS):
        ids, index = key.removeprefix(_RENDEZVOUS).rsplit("/", 1)
        meshes.setdefault(ids, {})[int(index)] = address
    own = {device.id for device in jax.local_devices()}
    for ids, addresses in meshes.items():
        for index, device in enumerate(ids.split(",")):
            key = f"{_RENDEZVOUS}{ids}/{index}"
            if index not in addresses:
                try:
                    client.key_value_set_bytes(key, _NO_ADDRESS)
                except Exception as error:  # it has come after all; or another has been quicker
                    if "ALREADY_EXISTS" not in str(error):
                        raise
            elif stuck and int(device) in own:
                client.key_value_delete(key)  # once is enough
                _visit(addresses[index])


def _visit(address: bytes) -> None:
    """Connects to this process's own gloo in the name of every peer, and goes away: so nobody is waited for any more.

    Args:
      address: as gloo has published it: length and text of the host's name, length and value of a socket's address with 8 bytes
        after it, and for each peer the 8 bytes by which it makes itself known.
    """
    name = 8 + int.from_bytes(address[:8], "little")
    place = address[name + 8 :]
    size = int.from_bytes(address[name : name + 8], "little")
    if int.from_bytes(place[:2], "little") != socket.AF_INET or len(place) <= size:
        return  # none of gloo's, or not over IPv4
    port, host = int.from_bytes(place[2:4], "big"), socket.inet_ntoa(place[4:8])
    for at in range(size, len(place), 8):
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1) as caller:
            caller.sendall(place[at : at + 8])
