"""What viewers of the dashboard are sent: a thread that samples the engine, and server-sent events of its samples."""

import asyncio
import json
import secrets
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from jaxmoe.serve.dashboard.window import Aggregator
from jaxmoe.serve.ranks import describe

_SEND_TIMEOUT_S = 30.0  # a viewer that reads nothing for so long loses its place
_POLLS = 5  # looks for a new sample per interval
_QUIET = 3  # intervals without one after which a viewer is told


class Sample(NamedTuple):
    """One snapshot as sent; ``over`` once the engine has drained and nothing more will happen."""

    number: int
    text: str
    over: bool


def server_sent(event: str, data: str) -> str:
    """One server-sent event; ``data`` must be one line."""
    return f"event: {event}\ndata: {data}\n\n"


def _run(feed_of: Callable[[], "Feed | None"], stop: threading.Event, interval_s: float) -> None:
    while not stop.wait(interval_s):
        feed = feed_of()
        if feed is None:
            return
        feed.sample()
        del feed


class Feed:
    """Samples an engine from a daemon thread, whether or not anyone looks, so that a page opens with its history.

    The thread ends when the feed is gone. Viewers only read the latest sample: a slow one skips samples and
    costs no memory. While no sample can be taken, viewers get comments instead.

    Args:
      engine: the engine.
      interval_s: between samples.
      most_viewers: streams at one time.
    """

    def __init__(self, engine: Any, *, interval_s: float = 1.0, most_viewers: int = 64):
        self.interval_s, self.most_viewers = interval_s, most_viewers
        self.instance = secrets.token_hex(8)
        self.started = time.time()
        self.viewers = 0
        self._engine = engine
        self._lock = threading.Lock()
        self._aggregator = Aggregator()
        self._stop = threading.Event()
        self._unsubscribe = engine.subscribe(self._event)
        self.latest = self._sample(0)
        arguments = weakref.ref(self), self._stop, interval_s
        threading.Thread(target=_run, args=arguments, name="dashboard", daemon=True).start()

    def _event(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._aggregator.event(time.monotonic(), event)

    def sample(self) -> None:
        """Takes the next sample."""
        self.latest = self._sample(self.latest.number + 1)

    def _sample(self, number: int) -> Sample:
        stats, cluster = self._engine.stats(), self._engine.cluster
        with self._lock:
            snapshot = self._aggregator.sample(time.monotonic(), time.time(), stats)
        snapshot["cluster"] = None if cluster is None else describe(cluster)
        over = snapshot["draining"] and not snapshot["running"] and not snapshot["waiting"]
        return Sample(number, json.dumps(snapshot, allow_nan=False), over)

    def close(self) -> None:
        """Stops sampling."""
        self._stop.set()
        self._unsubscribe()

    def hello(self) -> str:
        """What a new viewer is told first: which server this is, and the timeline so far."""
        with self._lock:
            timeline = [list(point) for point in self._aggregator.timeline]
        first = {
            "instance": self.instance,
            "started": self.started,
            "interval_s": self.interval_s,
            "timeline": timeline,
        }
        return json.dumps(first, allow_nan=False)

    async def stream(self, stopping: Callable[[], bool]) -> AsyncIterator[str]:
        """Events for one viewer, until the server stops or the engine has drained."""
        yield server_sent("hello", self.hello())
        seen, quiet = None, 0
        while True:
            sample = self.latest
            quiet += 1
            if sample.number != seen:
                seen, quiet = sample.number, 0
                yield server_sent("snapshot", sample.text)
            elif quiet % (_POLLS * _QUIET) == 0:
                yield ": the engine does not answer\n\n"
            if sample.over or stopping():
                return
            await asyncio.sleep(self.interval_s / _POLLS)


class EventStream(StreamingResponse):
    """A viewer's stream: gives its place back however it ends."""

    def __init__(self, feed: Feed, stopping: Callable[[], bool]):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(feed.stream(stopping), media_type="text/event-stream", headers=headers)
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the viewer goes or no longer reads."""

        async def send_soon(message: Message) -> None:
            await asyncio.wait_for(send(message), _SEND_TIMEOUT_S)

        self._feed.viewers += 1
        try:
            await super().__call__(scope, receive, send_soon)
        except* (TimeoutError, ClientDisconnect):
            pass  # gone, or as good as gone
        finally:
            self._feed.viewers -= 1
            await self.body_iterator.aclose()
