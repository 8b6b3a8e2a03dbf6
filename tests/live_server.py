"""A real uvicorn server in a thread, for tests that need connections."""

import contextlib
import socket
import threading
import time

import uvicorn


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def live_server(app, port=None, stop_within_s=10):
    """Serves ``app``; gives its address. At the end, streams that are open are cut off."""
    port = port or free_port()
    config = uvicorn.Config(
        app, port=port, log_level="critical", lifespan="off", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(stop_within_s)
        assert not thread.is_alive(), f"the server did not stop within {stop_within_s} s"
