"""Operating the ranks behind a server: which there are and how they are; draining one, taking it back in, killing it.

Everything here is for operators. Whoever may send requests may do this too, unless ``ApiOptions.operable`` is off: as it is for a
server that others can reach and that has no key.
"""

import asyncio
import functools
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxmoe.elastic import Cluster
from jaxmoe.elastic.cluster.status import RankStatus
from jaxmoe.errors import JaxMoeError
from jaxmoe.serve._body import ApiError, number, parse_object
from jaxmoe.serve._http import json_response, read_body

EVENTS = 8  # the latest ones are told
TAKING_PART = ("active", "draining")
_NOTICE_S = 20.0  # for the engine to take note of what was asked
_MOST_DRAIN_S = 24 * 3600.0

# What a rank must be for an action.
_STATES = {
    "drain": ("active",),
    "resume": ("drained", "away"),
    "kill": ("active", "draining", "starting", "ready"),
}


def describe(cluster: Cluster) -> dict[str, Any]:
    """A cluster at this moment, for JSON: its status, its capacity, and its latest events with times since 1970."""
    began = time.time() - time.monotonic()
    events = [event.to_dict() for event in cluster.events[-EVENTS:]]
    return cluster.status().to_dict() | {
        "capacity": cluster.ranks,
        "events": [event | {"at": round(began + event["at"], 3)} for event in events],
    }


def _cluster(request: Request) -> Cluster:
    service = request.app.state.service
    if not service.options.operable:
        message = (
            "ranks can be operated only where the server has an API key or listens on a loopback address; "
            "start it with --api-key."
        )
        raise ApiError(403, message, code="not_operable")
    if service.engine.cluster is None:
        message = (
            "This server has one device in its own process; start it with --ranks N to have ranks."
        )
        raise ApiError(404, message, code="no_ranks")
    return service.engine.cluster


async def _list(request: Request) -> Response:
    return json_response(describe(_cluster(request)))


async def _act(action: str, request: Request) -> Response:
    """One action on one rank; answers with the cluster as it is afterwards."""
    cluster = _cluster(request)
    rank = _rank(request.path_params["rank"], cluster)
    # Its content type keeps pages of other sites from doing this by a form.
    body = parse_object(await read_body(request, request.app.state.service.options))
    limit_s = number(body, "timeout_s", 0.0, _MOST_DRAIN_S, 30.0)
    before = cluster.status().ranks[rank]
    if before.state not in _STATES[action]:
        allowed = " or ".join(_STATES[action])
        message = f"rank {rank} is {before.state}; to {action} it, it must be {allowed}."
        raise ApiError(409, message, param="rank", code="wrong_state")
    try:
        if action == "kill":
            events = len(cluster.events)
            cluster.kill(rank)
            await _noticed(cluster, before, events)
        else:
            change = cluster.drain(rank, limit_s) if action == "drain" else cluster.resume(rank)
            # It goes on though this may not wait for it.
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(change)), limit_s + _NOTICE_S)
    except TimeoutError:
        message = f"rank {rank} is not there yet: {action} goes on. Look at /ranks later."
        raise ApiError(504, message, param="rank", code="not_yet") from None
    except (ValueError, JaxMoeError) as error:
        raise ApiError(409, str(error), param="rank", code="refused") from None
    return json_response(describe(cluster))


async def _noticed(cluster: Cluster, before: RankStatus, events: int) -> None:
    """Waits, not for ever, until the others go on without a process that was killed."""
    end = time.monotonic() + _NOTICE_S
    while time.monotonic() < end:
        told = len(cluster.events) > events or before.state not in TAKING_PART
        if told and cluster.status().ranks[before.rank].pid != before.pid:
            return
        await asyncio.sleep(0.02)


def _rank(text: str, cluster: Cluster) -> int:
    if not text.isdecimal() or int(text) >= cluster.ranks:
        message = f"rank must be in 0..{cluster.ranks - 1}; got {text[:20]!r}."
        raise ApiError(404, message, param="rank", code="no_such_rank")
    return int(text)


ROUTES = [
    Route("/ranks", _list),
    *(
        Route(f"/ranks/{{rank}}/{action}", functools.partial(_act, action), methods=["POST"])
        for action in _STATES
    ),
]
