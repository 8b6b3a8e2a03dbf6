"""Connections whose headers do not come are closed, the first time and later; whatever else is slow is not."""

import json
import socket
import time

import httpx2
import pytest

pytest.importorskip("starlette")

from serve.support import LIMIT_S, MODEL, serving  # noqa: E402

HEADER_TIMEOUT_S = 0.3
BODY = {"model": MODEL, "prompt": "Hello", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def impatient(engine):
    with serving(engine, header_timeout_s=HEADER_TIMEOUT_S) as url:
        yield url


def connect(url):
    return socket.create_connection(("127.0.0.1", httpx2.URL(url).port), timeout=LIMIT_S)


def drip(sock, data):
    """Sends ``data`` for ever, byte by byte, until the other side has closed the connection."""
    sock.settimeout(0.02)
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        for byte in data:
            try:
                sock.sendall(bytes([byte]))
                if not sock.recv(1000):
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
    pytest.fail("the connection stayed open")


def test_a_connection_that_says_nothing_is_closed(impatient):
    with connect(impatient) as sock:
        assert sock.recv(1000) == b""


def test_headers_that_come_byte_by_byte_do_not_keep_a_connection_open(impatient):
    with connect(impatient) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n")
        drip(sock, b"x-more: and more\r\n")


def test_nor_do_they_after_a_first_request(impatient):
    with connect(impatient) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        drip(sock, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx-more: ")


def test_a_body_and_an_answer_may_take_longer_than_headers(impatient):
    body = json.dumps(BODY | {"max_tokens": 200, "ignore_eos": True, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with connect(impatient) as sock:
        sock.sendall(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        for part in (body[:10], body[10:]):
            time.sleep(1.5 * HEADER_TIMEOUT_S)
            sock.sendall(part)
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in answer


def test_clients_that_keep_their_connection_are_not_troubled(impatient):
    with httpx2.Client(timeout=LIMIT_S) as client:
        for pause_s in (0, 1.5 * HEADER_TIMEOUT_S, 0):
            time.sleep(pause_s)
            assert client.post(f"{impatient}/v1/completions", json=BODY).status_code == 200
