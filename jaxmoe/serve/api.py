"""The HTTP application: OpenAI's endpoints, health and metrics, and what stands before them all."""

import asyncio
import base64
import binascii
import dataclasses
import hmac
import logging
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxmoe.engine import Chunk, Engine
from jaxmoe.serve import ranks
from jaxmoe.serve._answers import Answer, ChatAnswer, CompletionAnswer, dump, failure
from jaxmoe.serve._body import ApiError, parse_object
from jaxmoe.serve._delivery import (
    ClientGone,
    EventStream,
    Generation,
    unavailable,
    while_connected,
)
from jaxmoe.serve._http import error_response, json_response, read_body
from jaxmoe.serve.metrics import CONTENT_TYPE, Metrics
from jaxmoe.serve.options import ApiOptions
from jaxmoe.serve.protocol import Job, ModelInfo, no_such_model, parse_chat, parse_completion

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/healthz", "/readyz")  # need no key: probes have none, and these tell of no request
_LARGE_BODY = 1 << 16  # bytes; larger ones are parsed and tokenised in a thread
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Lifecycle:
    """Whether requests are taken: "starting", then "ready", then for good "draining"."""

    def __init__(self, phase: str = "ready"):
        self.phase = phase
        self._lock = threading.RLock()

    def become_ready(self) -> None:
        """Ends the start, if it has not been overtaken by the end."""
        with self._lock:
            if self.phase == "starting":
                self.phase = "ready"

    def begin_draining(self) -> str:
        """Takes no more requests; returns the phase before."""
        with self._lock:
            before, self.phase = self.phase, "draining"
            return before

    def check(self) -> None:
        """Raises ApiError 503 unless ready."""
        if self.phase != "ready":
            raise unavailable("it is starting" if self.phase == "starting" else "it shuts down")


@dataclasses.dataclass(frozen=True)
class Service:
    """What handlers share; at ``app.state.service``."""

    engine: Engine
    options: ApiOptions
    info: ModelInfo
    metrics: Metrics
    lifecycle: Lifecycle
    created: int

    def missing(self) -> str | None:
        """What has gone with ranks and keeps requests from being computed; None as a rule."""
        cluster = self.engine.cluster
        return None if cluster is None else cluster.refusal

    def check(self) -> None:
        """Raises ApiError 503 unless requests are taken and can be computed."""
        self.lifecycle.check()
        missing = self.missing()
        if missing is not None:
            raise unavailable(missing, code="coverage_lost")

    def failure(self, chunk: Chunk) -> ApiError | None:
        """The error that a last chunk reports."""
        missing = self.missing() if chunk.finish_reason == "error" else None
        return failure(chunk) if missing is None else unavailable(missing, code="coverage_lost")


# -- responses ---------------------------------------------------------------------------------------


async def _on_api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    path = request.url.path[:200]
    if error.status_code == 404:
        message = f"path must be one of this server's; got {path!r}. See docs/serving.md."
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another")
        message = f"method must be {allowed} at {path!r}; got {request.method[:20]}."
    else:
        message = str(error.detail)
    status = error.status_code
    return error_response(
        ApiError(
            status, message, code="not_found" if status == 404 else None, headers=error.headers
        )
    )


# -- endpoints ---------------------------------------------------------------------------------------


async def _events(
    generation: Generation, answer: Answer, service: Service
) -> AsyncIterator[bytes | None]:
    """The data of a stream's events; None where there is nothing to say for long."""
    for event in answer.opening():
        yield dump(event)
    async for item in generation.chunks(service.options.idle_s):
        if item is None:
            yield None
            continue
        index, chunk = item
        error = service.failure(chunk)
        if error is not None:
            yield dump(error.envelope())
            return
        for event in answer.add(index, chunk):
            yield dump(event)
    for event in answer.closing(await generation.results()):
        yield dump(event)
    yield b"[DONE]"


async def _whole(
    request: Request, generation: Generation, answer: Answer, service: Service
) -> Response:
    """The answer in one piece."""

    async def collect() -> bytes:
        async for item in generation.chunks(service.options.idle_s):
            if item is None:
                continue
            error = service.failure(item[1])
            if error is not None:
                raise error
            answer.add(*item)
        return dump(answer.whole(await generation.results()))

    try:
        body = await while_connected(request.receive, collect())
    except ClientGone:
        return Response(status_code=499)  # for the log: nobody will read it
    finally:
        generation.cancel()
    return Response(body, media_type="application/json")


def _endpoint(
    parse: Callable[[Any, ModelInfo], Job], answer_type: type[Answer], prefix: str
) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Any:
        service: Service = request.app.state.service
        service.check()
        body = await read_body(request, service.options)

        def read() -> Job:
            return parse(parse_object(body), service.info)

        job = read() if len(body) < _LARGE_BODY else await asyncio.to_thread(read)
        service.check()
        name = f"{prefix}-{uuid.uuid4().hex}"
        answer = answer_type(job, service.info, name)
        generation = await Generation.start(
            service.engine, job, name, service.metrics.retry_after_s
        )
        # No await from here to where the generation has an owner that cancels it.
        if job.stream:
            events = _events(generation, answer, service)
            return EventStream(events, generation, {}, service.options.stall_s)
        return await _whole(request, generation, answer, service)

    return endpoint


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.info.name,
        "object": "model",
        "created": service.created,
        "owned_by": "jaxmoe",
        "max_model_len": service.info.max_length,
        "widths": list(service.info.widths),
    }


async def _models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_model(request.app.state.service)]})


async def _one_model(request: Request) -> Response:
    service, name = request.app.state.service, request.path_params["name"]
    if name != service.info.name:
        raise no_such_model(name, service.info)
    return json_response(_model(service))


async def _healthz(request: Request) -> Response:
    return json_response({"status": "ok"})


async def _readyz(request: Request) -> Response:
    service: Service = request.app.state.service
    phase, missing = service.lifecycle.phase, service.missing()
    if phase == "ready" and missing is not None:
        return json_response({"status": "coverage_lost", "reason": missing}, 503)
    return json_response({"status": phase}, 200 if phase == "ready" else 503)


async def _metrics(request: Request) -> Response:
    # In a thread: a model with many layers and experts has tens of thousands of lines.
    body = await asyncio.to_thread(request.app.state.service.metrics.render)
    return Response(body, headers={"content-type": CONTENT_TYPE})


# -- before all endpoints ----------------------------------------------------------------------------


class _Edge:
    """Request ids, hosts, keys, the log, and an answer where everything else fails."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]):
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (b"x-request-id", request_id.encode())
                message = message | {"headers": [*message.get("headers", ()), own]}
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            app = self._app if refusal is None else error_response(refusal)
            await app(scope, receive, send_on)
        except Exception:
            logger.exception("request_id=%s failed", request_id)
            if not status:
                error = ApiError(500, "The server failed at this request.", code="internal_error")
                await error_response(error)(scope, receive, send_on)
        finally:
            self._note(scope, status, time.perf_counter() - began, request_id)

    def _note(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._service.metrics.responded(path, status)
        line = "method=%s path=%s status=%d seconds=%.3f request_id=%s"
        logger.info(line, scope["method"][:20], path, status, seconds, request_id)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        options = self._service.options
        host = headers.get(b"host", b"").decode("latin-1")
        name = re.sub(r":\d*$", "", host).lower()
        if options.allowed_hosts is not None and host and name not in options.allowed_hosts:
            # A page of another site that had its name point here would otherwise pass as this one.
            message = f"host must be one of {', '.join(options.allowed_hosts)}; got {name[:100]!r}."
            return ApiError(403, message, code="host_not_allowed")
        if options.api_key is None or path in OPEN_PATHS:
            return None
        in_api = path.startswith("/v1/")
        shown = headers.get(b"authorization", b"")
        if hmac.compare_digest(_shown_key(shown, basic=not in_api), options.api_key.encode()):
            return None
        message = "The API key is missing or wrong. Send the header 'Authorization: Bearer KEY'."
        challenge = "Bearer" if in_api else 'Basic realm="jaxmoe"'
        headers_out = {"www-authenticate": challenge}
        return ApiError(401, message, code="invalid_api_key", headers=headers_out)


def _shown_key(authorization: bytes, *, basic: bool) -> bytes:
    """The key in a header: Bearer, or as the password of Basic, which is what a browser can send."""
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if basic and scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def build_app(
    engine: Engine,
    options: ApiOptions = ApiOptions(),
    *,
    lifecycle: Lifecycle | None = None,
    extra_routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """The application over an engine.

    Args:
      engine: runs the requests; the caller starts and closes it.
      options: what an operator may set.
      lifecycle: whether requests are taken; default: from the beginning.
      extra_routes: come under the same key, request ids and log; they find ``app.state.service``.
    """
    stats = engine.stats()
    # No request can have more than one rank's pages.
    capacity = stats.pages // stats.ranks * engine.options.page_size
    info = ModelInfo(
        options.model_name,
        engine.tokenizer,
        engine.config.vocab_size,
        min(engine.max_length, capacity),
        engine.widths,
    )
    metrics = Metrics(engine)
    service = Service(
        engine, options, info, metrics, lifecycle or Lifecycle(), created=int(time.time())
    )
    chat = _endpoint(parse_chat, ChatAnswer, "chatcmpl")
    completions = _endpoint(parse_completion, CompletionAnswer, "cmpl")
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _one_model),
        Route("/healthz", _healthz),
        Route("/readyz", _readyz),
        Route("/metrics", _metrics),
        *ranks.ROUTES,
        *extra_routes,
    ]
    # Labels of a metric must be few: only paths without parameters.
    paths = frozenset(r.path for r in routes if isinstance(r, Route) and "{" not in r.path)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_Edge, service=service, paths=paths)],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app
