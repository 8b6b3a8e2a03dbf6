"""Keys, sizes, full queues, request ids, and the end of a real process."""

import contextlib
import functools
import re
import signal
import socket
import time

import httpx2
import pytest

pytest.importorskip("starlette")

from serve.support import (  # noqa: E402
    LIMIT_S,
    MODEL,
    is_idle,
    make_engine,
    process,
    serving,
    wait_until,
)

from bench._metrics import parse  # noqa: E402
from jaxmoe.serve.api import Lifecycle  # noqa: E402
from jaxmoe.serve.options import ApiOptions  # noqa: E402
from jaxmoe.serve.server import is_loopback, listen  # noqa: E402

# A first request compiles.
get = functools.partial(httpx2.get, timeout=LIMIT_S)
post = functools.partial(httpx2.post, timeout=LIMIT_S)

BODY = {"model": MODEL, "prompt": "Hello", "max_tokens": 2, "temperature": 0}
LONG = BODY | {"max_tokens": 3900, "ignore_eos": True, "stream": True}


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


# -- keys --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(engine):
    with serving(engine, api_key="s3cret") as url:
        yield url


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer s3cret2",
        "s3cret",
        "Basic czNjcmV0",
        "Bearer \xff",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/v1/nothing"])
def test_without_the_key_every_path_of_the_api_is_401(locked, path, header):
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    response = get(locked + path, headers=headers)
    assert error_of(response, 401)["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"


def test_with_the_key_it_works(locked):
    headers = {"authorization": "Bearer s3cret"}
    assert post(f"{locked}/v1/completions", json=BODY, headers=headers).status_code == 200


def test_probes_need_no_key_and_metrics_take_it_as_a_password_too(locked):
    assert get(f"{locked}/healthz").status_code == 200
    assert get(f"{locked}/readyz").json() == {"status": "ready"}
    response = get(f"{locked}/metrics")
    error_of(response, 401)
    assert response.headers["www-authenticate"].startswith("Basic")
    assert get(f"{locked}/metrics", auth=("any", "s3cret")).status_code == 200
    assert get(f"{locked}/metrics", auth=("any", "wrong")).status_code == 401
    assert get(f"{locked}/v1/models", auth=("any", "s3cret")).status_code == 401


@pytest.mark.parametrize("key", ["", "a\nb", "é"])
def test_a_key_that_no_header_can_carry_is_refused(key):
    with pytest.raises(ValueError, match="api_key"):
        ApiOptions(api_key=key)


# -- requests ----------------------------------------------------------------------------------------


def test_unknown_paths_and_methods_are_answered_in_the_envelope(url):
    assert error_of(get(f"{url}/v1/nothing"), 404)["code"] == "not_found"
    error_of(post(f"{url}/v1/completions/", json=BODY), 404)
    response = get(f"{url}/v1/completions")
    assert "POST" in error_of(response, 405)["message"] and response.headers["allow"] == "POST"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_must_say_that_it_is_json(url, kind):
    headers = {} if kind is None else {"content-type": kind}
    response = post(f"{url}/v1/completions", content=b"{}", headers=headers)
    assert "content-type" in error_of(response, 415)["message"]


def test_a_body_beyond_the_limit_is_413_however_it_is_sent(engine):
    json_type = {"content-type": "application/json"}
    large = b'{"model": "' + b"x" * 2000 + b'"}'

    def pieces():
        for i in range(0, len(large), 100):
            yield large[i : i + 100]

    with serving(engine, max_body_bytes=1000) as url:
        for content in (large, pieces()):
            response = post(f"{url}/v1/completions", content=content, headers=json_type)
            assert "1000 bytes" in error_of(response, 413)["message"]
        assert post(f"{url}/v1/completions", json=BODY).status_code == 200


def test_a_body_that_does_not_arrive_is_408(engine):
    with serving(engine, body_timeout_s=0.2) as url:
        address = ("127.0.0.1", httpx2.URL(url).port)
        with socket.create_connection(address, timeout=LIMIT_S) as sock:
            lines = ["POST /v1/completions HTTP/1.1", "host: 127.0.0.1"]
            lines += ["content-type: application/json", "content-length: 100", "", "{"]
            sock.sendall("\r\n".join(lines).encode())
            assert sock.recv(1000).startswith(b"HTTP/1.1 408")


def test_request_ids_are_taken_over_or_made_up(url):
    def sent_back(**headers):
        return get(f"{url}/v1/models", headers=headers).headers["x-request-id"]

    assert sent_back(**{"x-request-id": "my-id.1:2_3"}) == "my-id.1:2_3"
    for bad in ("", "a b", "x" * 129, "a;b"):
        assert re.fullmatch("req_[0-9a-f]{32}", sent_back(**{"x-request-id": bad}))
    assert sent_back() != sent_back()
    refused = get(f"{url}/v1/nothing", headers={"x-request-id": "mine"})
    assert refused.headers["x-request-id"] == "mine"


def test_a_loopback_server_answers_to_its_own_names_only(engine):
    with serving(engine, allowed_hosts=("localhost", "127.0.0.1", "[::1]")) as url:
        assert get(f"{url}/v1/models").status_code == 200
        for good in ("localhost", "LOCALHOST:1", "[::1]:80"):
            assert get(f"{url}/v1/models", headers={"host": good}).status_code == 200
        for bad in ("evil.example", "127.0.0.1.evil.example", "localhost.:80"):
            error_of(get(f"{url}/v1/models", headers={"host": bad}), 403)


# -- a full queue ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_queue_is_429_with_a_time_to_come_back():
    with (
        make_engine(max_running=1, max_waiting=2) as engine,
        serving(engine) as url,
        httpx2.Client(timeout=LIMIT_S) as client,
        contextlib.ExitStack() as streams,
    ):
        completions = f"{url}/v1/completions"
        streams.enter_context(client.stream("POST", completions, json=LONG))
        wait_until(lambda: engine.stats().running == 1)
        # Does not fit as a whole, so none of it stays.
        error_of(client.post(completions, json=BODY | {"n": 3}), 429)
        wait_until(lambda: engine.stats().waiting == 0)
        for _ in range(2):
            streams.enter_context(client.stream("POST", completions, json=LONG))
        response = client.post(completions, json=BODY)
        error = error_of(response, 429)
        assert error["type"] == "rate_limit_error" and error["code"] == "queue_full"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        streams.close()
        wait_until(lambda: is_idle(engine))
        assert client.post(completions, json=BODY).status_code == 200
        samples = parse(client.get(f"{url}/metrics").text)
        labels = (("path", "/v1/completions"), ("status", "429"))
        assert samples[("jaxmoe_http_responses_total", labels)] == 2


# -- beginning and end -------------------------------------------------------------------------------


def test_a_server_that_starts_or_ends_is_not_ready():
    lifecycle = Lifecycle("starting")
    lifecycle.become_ready()
    assert lifecycle.phase == "ready"
    assert lifecycle.begin_draining() == "ready"
    lifecycle.become_ready()
    assert lifecycle.phase == "draining"


def test_addresses_that_cannot_be_listened_on_are_one_line():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ValueError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="0..65535"):
        listen("127.0.0.1", 70000)
    assert is_loopback("::1") and is_loopback("localhost") and not is_loopback("0.0.0.0")


@pytest.mark.slow
def test_sigterm_refuses_the_new_finishes_the_old_and_exits_with_0():
    with process() as (child, url), httpx2.Client(timeout=LIMIT_S) as client:
        body = LONG | {"model": "tiny", "max_tokens": 300}
        with (
            client.stream("GET", f"{url}/events") as dashboard,  # must not keep it alive
            client.stream("POST", f"{url}/v1/completions", json=body) as stream,
        ):
            next(dashboard.iter_lines())
            lines = stream.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get(f"{url}/readyz").status_code == 503)
            refused = client.post(f"{url}/v1/completions", json=BODY)
            assert error_of(refused, 503)["code"] == "unavailable"
            assert "retry-after" in refused.headers
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert child.wait(LIMIT_S) == 0


@pytest.mark.slow
def test_what_does_not_end_in_time_is_ended_with_an_error():
    with process("--drain-s", "0.5") as (child, url), httpx2.Client(timeout=LIMIT_S) as client:
        with client.stream("POST", f"{url}/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"error"' in rest[-1] and "shutting down" in rest[-1]
        assert child.wait(LIMIT_S) == 0


@pytest.mark.slow
def test_a_second_signal_does_not_wait():
    with process("--drain-s", "1000") as (child, url), httpx2.Client(timeout=LIMIT_S) as client:
        with client.stream("POST", f"{url}/v1/completions", json=LONG) as stream:
            next(stream.iter_lines())
            child.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get(f"{url}/readyz").status_code == 503)
            time.sleep(0.2)
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 0


@pytest.mark.slow
def test_a_signal_does_not_wait_for_the_warm_up():
    with process(warm_up=True) as (child, url):
        assert error_of(post(f"{url}/v1/completions", json=BODY), 503)
        child.send_signal(signal.SIGTERM)
        assert child.wait(LIMIT_S) == 0
