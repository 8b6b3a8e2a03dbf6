"""JAX's distributed runtime where a process may die and come back: the one place that uses its private parts.

``jax.distributed.initialize`` puts the coordination service into process 0, whose death then ends all. Here it lives in a
process that computes nothing, and any of the others may die. On CPU a collective with a dead peer can hang for half an hour,
because gloo has no abort; ``Connections.abort`` shuts down this process's own gloo sockets, and every call that waits raises;
one that still waits for a peer to say where it is, in the first collective of a mesh, gets an answer that cannot be used.
On GPU the runtime aborts by itself (``jax_enable_recoverability``).
"""

import contextlib
import logging
import os
import pathlib
import re
import socket
import threading
from typing import Any

import jax

logger = logging.getLogger(__name__)

# Under the addresses of a mesh's members, which gloo exchanges as "cpu:gloo/<device ids>/<index>". Of this length it is not one
# (whole 8 byte words follow the header) and is refused with an error; gloo reads shorter values beyond their end.
_RENDEZVOUS, _NO_ADDRESS = "cpu:gloo/", bytes(1026)

_GRACE_S = 0.25  # for gloo to close connections by itself
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


class Connections:
    """This process's connections for CPU collectives.

    Args:
      spare_ports: connections with such a port at either end are others: the coordination service's.
    """

    def __init__(self, spare_ports: set[int]):
        self._spare_ports = spare_ports
        self._ended: dict[int, int] = {}  # descriptor -> inode

    def abort(self, *, stuck: bool = False) -> None:
        """Ends every collective that this process waits in, with an error.

        While it may be called no member of a mesh may be on its way into its first collective but those that are to fail as well.
        Connections that are shut down stay unusable, so the next mesh must have its devices in an order not used before:
        gloo remembers its connections by that order.

        Args:
          stuck: whether earlier calls have not helped: then this process waits for another to connect, which has given up.
        """
        self._shut_down()
        try:
            _end_rendezvous(stuck)
        except (
            Exception
        ) as error:  # the service is busy: it is called again, as long as it has not helped
            logger.warning("rendezvous not ended: %s", error)

    def end(self) -> None:
        """Ends all connections of earlier meshes, while no collective runs and before the next mesh connects.

        Where one end has failed and the other has sent something meanwhile, gloo neither reads nor closes, and its thread turns
        without end: such connections are taken away from it a little later.
        """
        self._shut_down()
        timer = threading.Timer(_GRACE_S, self._bury)
        timer.daemon = True
        timer.start()

    def _shut_down(self) -> None:
        for number, ends in tcp_sockets().items():
            if self._spare_ports & {end[1] for end in ends}:
                continue
            try:
                with socket.socket(fileno=os.dup(number)) as copy:
                    copy.shutdown(socket.SHUT_RDWR)
                    self._ended[number] = os.fstat(copy.fileno()).st_ino
            except OSError:
                pass  # closed meanwhile

    def _bury(self) -> None:
        """Puts something that never happens in the place of what gloo still watches, though it is shut down."""
        watched, ended = _watched(), self._ended
        self._ended = {}
        for number, inode in ended.items():
            with contextlib.suppress(OSError):
                if number in watched and os.fstat(number).st_ino == inode:
                    silent = os.eventfd(0, os.EFD_CLOEXEC)
                    os.dup2(silent, number, inheritable=False)
                    os.close(silent)


def _watched() -> set[int]:
    """Descriptors that some epoll of this process is told about."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                info = pathlib.Path(f"/proc/self/fdinfo/{name}").read_text()
                found |= {int(n) for n in re.findall(r"^tfd:\s*(\d+)", info, re.MULTILINE)}
    return found


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
