"""The live dashboard: one static page and a stream of server-sent events. Figures only, never a prompt or an output."""

import base64
import hashlib
import importlib.resources
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from jaxmoe.serve.dashboard.feed import EventStream, Feed

__all__ = ["page", "routes"]


def page() -> tuple[str, dict[str, str]]:
    """The page, its style and script inside, and the headers that let it load nothing else."""
    files = importlib.resources.files(__name__)
    html, css, *scripts = (
        files.joinpath(name).read_text("utf-8")
        for name in ("dashboard.html", "dashboard.css", "dashboard.js", "ranks.js")
    )
    style, script = f"\n{css}", "\n" + "".join(scripts)
    html = html.replace("<style></style>", f"<style>{style}</style>")
    html = html.replace("<script></script>", f"<script>{script}</script>")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return html, headers


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def routes(
    engine: Any,
    *,
    stopping: Callable[[], bool] = lambda: False,
    interval_s: float = 1.0,
    most_viewers: int = 64,
) -> list[Route]:
    """Routes of the dashboard: the page at ``/`` and its events at ``/events``.

    Streams end by themselves when the engine is draining and has no request left, or when ``stopping()`` is true:
    a server that waits for open connections before it exits must make one of the two happen.

    Args:
      engine: the engine to show.
      stopping: whether the server is about to exit.
      interval_s: seconds between snapshots.
      most_viewers: streams at one time; further viewers get status 503.

    Returns:
      Starlette routes.

    Example:
      app = Starlette(routes=jaxmoe.serve.dashboard.routes(engine))
    """
    feed = Feed(engine, interval_s=interval_s, most_viewers=most_viewers)
    html, headers = page()

    async def index(request: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    async def events(request: Request) -> Response:
        if feed.viewers >= feed.most_viewers:
            message = f"{feed.most_viewers} viewers are connected, the most allowed; try again."
            return JSONResponse({"error": message}, 503, {"retry-after": "10"})
        return EventStream(feed, stopping)

    return [
        Route("/", index, methods=["GET"], name="dashboard"),
        Route("/events", events, methods=["GET"], name="dashboard events"),
    ]
