"""From the engine's thread to a client that reads as it likes.

The engine never waits for a reader: what a reader has not taken yet is merged into one chunk per choice. So a slow one
costs at most its own output in memory, bounded by its request's tokens, and gets fewer, longer pieces.
"""

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from jaxmoe.engine import Chunk, Engine, EngineClosed, QueueFull, Result, Stream
from jaxmoe.serve._body import ApiError
from jaxmoe.serve.protocol import Job, checked

logger = logging.getLogger(__name__)

MERGE_AFTER = 64  # chunks of one choice


def merge(chunks: list[Chunk]) -> Chunk:
    """One chunk with all that ``chunks`` say."""
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        tuple(token for chunk in chunks for token in chunk.token_ids),
        "".join(chunk.text for chunk in chunks),
        tuple(entry for chunk in chunks for entry in chunk.logprobs),
        chunks[-1].finish_reason,
        chunks[-1].error,
    )


class Outbox:
    """Chunks under way from the engine's thread to the event loop ``loop``."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._lock = loop, threading.Lock()
        self._pending: dict[int, list[Chunk]] = {}
        self._ready = asyncio.Event()

    def put(self, index: int, chunk: Chunk) -> None:
        """Adds a chunk of a choice. Any thread; never blocks, never raises."""
        with self._lock:
            first = not self._pending
            waiting = self._pending.setdefault(index, [])
            waiting.append(chunk)
            if len(waiting) > MERGE_AFTER:
                waiting[:] = [merge(waiting)]
        if first:  # Otherwise the loop has been told and has not looked yet.
            try:
                self._loop.call_soon_threadsafe(self._ready.set)
            except RuntimeError:  # The loop is closed: nobody reads any more.
                pass

    async def take(self) -> dict[int, Chunk]:
        """Waits until there is something; all that there is, one chunk per choice."""
        await self._ready.wait()
        self._ready.clear()
        with self._lock:
            pending, self._pending = self._pending, {}
        return {index: merge(chunks) for index, chunks in pending.items()}


class Generation:
    """The engine's requests of one HTTP request."""

    def __init__(self, streams: list[Stream], outbox: Outbox):
        self._streams, self._outbox = streams, outbox
        self._open = set(range(len(streams)))

    @classmethod
    async def start(
        cls, engine: Engine, job: Job, name: str, retry_after_s: Callable[[], int]
    ) -> "Generation":
        """Submits all choices, or none.

        Raises:
          ApiError: 400 for what the engine refuses, 429 if too many wait, 503 if it takes no more.
        """
        outbox = Outbox(asyncio.get_running_loop())
        submit = functools.partial(_submit, engine, job, name, outbox)
        try:
            if not any(choice.sampling.constrained for choice in job.choices):
                return cls(checked(submit), outbox)
            # Compiling a grammar takes time that other requests should not wait for.
            return cls(await _in_thread(functools.partial(checked, submit)), outbox)
        except QueueFull as error:
            headers = {"retry-after": str(retry_after_s())}
            message = str(error)
            raise ApiError(429, message, code="queue_full", headers=headers) from None
        except EngineClosed:
            raise unavailable("the server is shutting down") from None

    async def chunks(self, idle_s: float) -> AsyncIterator[tuple[int, Chunk] | None]:
        """(choice, chunk) until all have ended; None whenever nothing came for ``idle_s``."""
        while self._open:
            try:
                taken = await asyncio.wait_for(self._outbox.take(), idle_s)
            except TimeoutError:
                yield None
                continue
            for index, chunk in taken.items():
                if chunk.finish_reason is not None:
                    self._open.discard(index)
                yield index, chunk

    async def results(self) -> list[Result]:
        """Of all choices, which have ended."""
        # The last chunk comes a moment before the result.
        wait = [functools.partial(stream.result, 60.0) for stream in self._streams]
        return await asyncio.to_thread(lambda: [one() for one in wait])

    def cancel(self) -> None:
        """Ends what has not ended."""
        for index in self._open:
            self._streams[index].cancel()
        self._open.clear()


def unavailable(why: str, code: str = "unavailable") -> ApiError:
    """A 503."""
    message = f"The server takes no requests: {why.rstrip('.')}. Try again later."
    return ApiError(503, message, code=code, headers={"retry-after": "5"})


def _submit(engine: Engine, job: Job, name: str, outbox: Outbox) -> list[Stream]:
    streams: list[Stream] = []
    try:
        for index, choice in enumerate(job.choices):
            stream = engine.submit(
                choice.prompt,
                choice.sampling,
                priority=job.priority,
                timeout_s=job.timeout_s,
                request_id=f"{name}-{index}",
                on_chunk=functools.partial(outbox.put, index),
            )
            streams.append(stream)
    except BaseException:
        _cancel_all(streams)
        raise
    return streams


def _cancel_all(streams: list[Stream]) -> None:
    for stream in streams:
        stream.cancel()


async def _in_thread(submit: Callable[[], list[Stream]]) -> list[Stream]:
    """``submit()`` in a thread. If this is cancelled, so is what it has submitted by then."""
    future = asyncio.get_running_loop().run_in_executor(None, submit)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:

        def undo(done: asyncio.Future) -> None:
            if not done.cancelled() and done.exception() is None:
                _cancel_all(done.result())

        future.add_done_callback(undo)
        raise


class ClientGone(Exception):
    """The client has closed its connection, or does not read."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Result of ``work``, which is cancelled if the client goes.

    Raises:
      ClientGone: then.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream:
    """A response of server-sent events, as an ASGI application.

    Args:
      events: the events' data, or comments (None) that keep the connection alive.
      generation: cancelled when the client goes, or does not read for ``stall_s``.
      headers: of the response.
      stall_s: how long one piece may take to be sent.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes | None],
        generation: Generation,
        headers: Mapping[str, str],
        stall_s: float,
    ):
        self._events, self._generation, self._stall_s = events, generation, stall_s
        all_headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **headers,
        }
        self._headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in all_headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await while_connected(receive, self._send_all(send))
        except ClientGone:
            pass
        finally:
            self._generation.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        async for data in self._events:
            body = b": waiting\n\n" if data is None else b"data: " + data + b"\n\n"
            try:
                async with asyncio.timeout(self._stall_s):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            except TimeoutError:
                logger.warning("client=stalled seconds=%g", self._stall_s)
                raise ClientGone from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})
