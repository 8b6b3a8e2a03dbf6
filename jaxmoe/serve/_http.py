"""JSON in and out of HTTP, for all endpoints."""

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from jaxmoe.serve._answers import dump
from jaxmoe.serve._body import ApiError
from jaxmoe.serve.options import ApiOptions


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as JSON."""
    return Response(dump(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """An error in OpenAI's envelope."""
    return json_response(error.envelope(), error.status, error.headers)


async def read_body(request: Request, options: ApiOptions) -> bytes:
    """The body, if it is JSON by its own account and not too large."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps other sites' pages in a browser out: this type needs a preflight, which is not answered.
        message = f"content-type must be application/json; got {kind[:100]!r}. Set the header."
        raise ApiError(415, message, code="unsupported_media_type")
    limit = options.max_body_bytes
    too_large = ApiError(
        413, f"The body must have at most {limit} bytes. Shorten it.", code="body_too_large"
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 15 or int(length) > limit):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(options.body_timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        message = f"The body must arrive within {options.body_timeout_s:g} s. Send it faster."
        raise ApiError(408, message, code="body_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The client closed the connection within the body.") from None
    return bytes(body)
