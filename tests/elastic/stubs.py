"""What a supervisor starts in its tests, instead of a rank: ``python -m elastic.stubs``. What it does depends on its rank."""

import signal
import sys
from multiprocessing.connection import Client

from jaxmoe.elastic.cluster.messages import Reply

READY, HANGS, DEAF, MUMBLES = range(4)
LARGE = bytes(10**6)


def main() -> None:
    """Arguments as of a rank."""
    address, rank, incarnation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    key = sys.stdin.buffer.read()
    if rank == HANGS:
        signal.pause()
    connection = Client(address, authkey=key)
    connection.send((rank, incarnation))
    connection.recv()
    connection.send(Reply("ready", rank, incarnation, -1))
    if rank == MUMBLES:
        connection._send(b"\0\0\0\7half")  # of a message of 7 bytes
    if rank == DEAF:
        signal.pause()
    while True:
        connection.recv()


if __name__ == "__main__":
    main()
