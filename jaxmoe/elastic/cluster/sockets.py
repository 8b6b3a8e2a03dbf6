"""Limits of control connections, which the standard library has none of."""

import os
import socket
import struct
from multiprocessing.connection import Connection


def limit(connection: Connection, seconds: float) -> None:
    """From now on sending and receiving fail with OSError when nothing gets through for so long: the other end has stopped."""
    interval = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as copy:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            copy.setsockopt(socket.SOL_SOCKET, option, interval)
