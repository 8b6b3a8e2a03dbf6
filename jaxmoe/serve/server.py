"""The process around the application: a socket, warm-up, signals, and the end.

At the end running requests have ``drain_s`` to finish, and their clients a few seconds more to take the answers.
Slower readers are cut off.
"""

import asyncio
import dataclasses
import functools
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxmoe.engine import Engine
from jaxmoe.serve.api import Lifecycle, build_app
from jaxmoe.serve.options import ApiOptions, ServerOptions

logger = logging.getLogger(__name__)

_FLUSH_S = 5  # for clients to take what is left, once the engine is done
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
      ValueError: says what is wrong with host or port.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port must be in 0..65535; got {port}. 0 takes a free one.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ValueError(
            f"host and port must be an address of this machine that is free; got {host}:{port} "
            f"({error.strerror}). Choose another --port or --host."
        ) from None


class _Connection(H11Protocol):
    """A connection that must send the headers of each request within ``header_timeout_s`` of its first byte.

    The first request's time runs from the beginning; between requests uvicorn's own limit holds.
    """

    def __init__(self, *args: Any, header_timeout_s: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._header_timeout_s = header_timeout_s
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the time."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Starts the time with a request's first byte, ends it with its headers."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the time."""
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self._header_timeout_s, self._close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        logger.info("client=closed headers took longer than %g s", self._header_timeout_s)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn that warms the engine up, and on the first signal drains it before it goes.

    Args:
      app: from ``build_app``.
      engine: closed at the end.
      lifecycle: the application's.
      options: how to start and end; where to listen is the sockets' matter.
    """

    def __init__(
        self, app: Starlette, engine: Engine, lifecycle: Lifecycle, options: ServerOptions
    ):
        config = uvicorn.Config(
            app,
            http=functools.partial(_Connection, header_timeout_s=options.header_timeout_s),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_FLUSH_S,
        )
        super().__init__(config)
        self._engine, self._lifecycle = engine, lifecycle
        self._drain_s, self._warm_up = options.drain_s, options.warm_up
        self._draining: asyncio.Task[None] | None = None
        self.warming: threading.Thread | None = None
        self.failure: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens at once, so that probes see the start; takes requests once warm."""
        await super().startup(sockets)
        self.warming = threading.Thread(target=self._warm, name="jaxmoe-warmup", daemon=True)
        self.warming.start()

    def _warm(self) -> None:
        try:
            if self._warm_up:
                report = self._engine.warmup()
                logger.info("warm-up %s", " ".join(f"{k}={v}" for k, v in report.items()))
            self._lifecycle.become_ready()
        except Exception as error:
            self.failure, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then go. Second, or before the engine is warm: go.

        uvicorn would raise the signal again at the end, so that the process dies of it; this one ends with 0.
        """
        before = self._lifecycle.begin_draining()
        if before != "ready":
            self.force_exit = before == "draining"
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Starts draining once a signal has asked for it: a signal's handler itself may do little."""
        asked = self._lifecycle.phase == "draining" and not self.should_exit
        if asked and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        logger.info("draining limit_s=%g", self._drain_s)
        if not await asyncio.to_thread(self._engine.drain, self._drain_s):
            logger.warning("draining did not end in %g s; the rest is cancelled", self._drain_s)
            await asyncio.to_thread(self._engine.close)
        self.should_exit = True


def run(
    engine: Engine,
    api: ApiOptions | None = None,
    options: ServerOptions = ServerOptions(),
    *,
    extra_routes: Sequence[BaseRoute] = (),
    on_listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains and closes the engine.

    Args:
      engine: to serve.
      api: what clients see.
      options: where to listen, and how to start and end.
      extra_routes: for the application.
      on_listening: called with the address once the socket listens.
    """
    api = api or ApiOptions()
    sock = listen(options.host, options.port)
    if is_loopback(options.host):
        if api.allowed_hosts is None:
            api = dataclasses.replace(api, allowed_hosts=(*_LOOPBACK_NAMES, options.host))
    elif api.api_key is None:
        logger.warning("host=%s everyone who reaches it may use it: no API key", options.host)
        api = dataclasses.replace(api, operable=False)
    lifecycle = Lifecycle("starting")
    app = build_app(engine, api, lifecycle=lifecycle, extra_routes=extra_routes)
    server = Server(app, engine, lifecycle, options)
    host = f"[{options.host}]" if ":" in options.host else options.host
    on_listening(f"http://{host}:{sock.getsockname()[1]}")
    try:
        server.run(sockets=[sock])
        if server.failure is not None:
            raise server.failure
    finally:
        if server.warming is not None and server.warming.is_alive():
            # A compilation cannot be interrupted, and the end of the interpreter would trip over it.
            if engine.cluster is not None:
                engine.cluster.close()
            logging.shutdown()
            os._exit(0)
        engine.close()
