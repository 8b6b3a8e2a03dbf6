"""Clients that do not read: they hold up nobody, and cost no more than their own output."""

import asyncio
import contextlib
import json
import socket

import httpx2
import pytest

pytest.importorskip("starlette")

from serve.support import LIMIT_S, MODEL, is_idle, make_engine, serving, wait_until  # noqa: E402

from jaxmoe.engine import Chunk, TokenLogprobs  # noqa: E402
from jaxmoe.serve._delivery import MERGE_AFTER, Outbox  # noqa: E402

pytestmark = pytest.mark.slow

TOKENS = 80
BUFFER = 4096  # bytes that the system keeps for a connection, on either side
# Events of about 2 KB each: with uvicorn's own 64 KB, a reader's buffers are full before its output ends.
BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "logprobs": True,
    "top_logprobs": 20,
}


def send(url, **fields):
    """Sends a request and reads nothing; the socket."""
    body = json.dumps(BODY | fields).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: 127.0.0.1", "connection: close"]
    lines += ["content-type: application/json", f"content-length: {len(body)}", "", ""]
    sock = socket.socket()
    sock.settimeout(LIMIT_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    sock.connect(("127.0.0.1", httpx2.URL(url).port))
    sock.sendall("\r\n".join(lines).encode() + body)
    return sock


def events_of(sock):
    """Reads to the end: the events' data."""
    pieces = []
    while piece := sock.recv(1 << 16):
        pieces.append(piece)
    # Chunked transfer: each event is one chunk.
    lines = b"".join(pieces).decode().splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("readers", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_slow_readers_stall_nobody_and_get_everything_later(readers):
    with (
        make_engine(max_running=32, max_step_tokens=128, max_length=512) as engine,
        serving(engine, send_buffer=BUFFER) as url,
        contextlib.ExitStack() as stack,
    ):
        slow = [stack.enter_context(send(url, max_tokens=TOKENS)) for _ in range(readers)]
        wait_until(lambda: engine.stats().running + engine.stats().waiting > 30)
        # A fast one comes through while they block ...
        fast = {"stream": False, "logprobs": False, "top_logprobs": None, "max_tokens": 40}
        response = httpx2.post(
            f"{url}/v1/chat/completions", json=BODY | fast, timeout=LIMIT_S, trust_env=False
        )
        assert response.json()["usage"]["completion_tokens"] == 40
        # ... and the engine ends all of them, although nobody reads.
        wait_until(lambda: engine.stats().finished.get("length") == readers + 1)
        assert is_idle(engine)
        merged = 0
        for sock in slow:
            *events, last = events_of(sock)
            assert last == "[DONE]"
            choices = [json.loads(event)["choices"][0] for event in events]
            sizes = [len(c["logprobs"]["content"]) for c in choices if c["logprobs"]]
            assert sum(sizes) == TOKENS
            merged += max(sizes) > 1
        assert merged == readers


def test_a_client_that_never_reads_is_cut_off_and_its_request_ends(engine):
    before = engine.stats().finished.get("cancelled", 0)
    with serving(engine, send_buffer=BUFFER, stall_s=0.3) as url, send(url, max_tokens=3900):
        wait_until(lambda: engine.stats().running == 1)
        wait_until(lambda: is_idle(engine))
    assert engine.stats().finished.get("cancelled", 0) == before + 1


def test_what_nobody_takes_is_merged_and_loses_nothing():
    async def run():
        outbox = Outbox(asyncio.get_running_loop())
        entry = TokenLogprobs(1, -1.0)
        for i in range(10_000):
            outbox.put(i % 2, Chunk((i,), str(i), (entry,)))
        outbox.put(0, Chunk(finish_reason="length"))
        assert all(len(waiting) <= MERGE_AFTER for waiting in outbox._pending.values())
        return await outbox.take()

    taken = asyncio.run(run())
    for index in (0, 1):
        numbers = range(index, 10_000, 2)
        assert taken[index].token_ids == tuple(numbers)
        assert taken[index].text == "".join(map(str, numbers))
        assert len(taken[index].logprobs) == 5000
    assert (taken[0].finish_reason, taken[1].finish_reason) == ("length", None)


def test_a_closed_loop_does_not_trouble_the_engine():
    loop = asyncio.new_event_loop()
    outbox = Outbox(loop)
    loop.close()
    outbox.put(0, Chunk((1,), "a"))
