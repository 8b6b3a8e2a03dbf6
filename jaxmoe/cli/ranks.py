"""``jaxmoe ranks``: how the ranks of a running server are, and taking them out and in."""

import http.client
import json as json_lib
import os
import time
import urllib.error
import urllib.request
from typing import Annotated, Any, Literal

import rich.console
import rich.table
import tyro

from jaxmoe.cli.serve import KEY_VARIABLE

_ANSWER_S = 30.0  # for an answer, beyond the time that draining may take


def _ask(url: str, path: str, api_key: str | None, body: Any, timeout_s: float) -> dict[str, Any]:
    """The server's answer; what is wrong is one line."""
    headers = {"content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    data = None if body is None else json_lib.dumps(body).encode()
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url must begin with http:// or https://; got {url!r}.")
    request = urllib.request.Request(url.rstrip("/") + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json_lib.load(response)
    except urllib.error.HTTPError as error:
        raise ValueError(_told(error, url)) from None
    except TimeoutError:
        raise ValueError(
            f"the server at {url} has not answered in {timeout_s:g} s; look again with `jaxmoe ranks list`."
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise ValueError(
            f"no server answers at {url} ({reason}); start one with `jaxmoe serve`, or give its --url."
        ) from None
    except json_lib.JSONDecodeError:
        raise ValueError(f"what answers at {url} is no jaxmoe server; check --url.") from None


def _told(error: urllib.error.HTTPError, url: str) -> str:
    """What the server says about its refusal."""
    try:
        told = json_lib.load(error)["error"]
        message, code = told["message"], told["code"]
    except (ValueError, KeyError, TypeError):
        return f"what answers at {url} is no jaxmoe server (status {error.code}); check --url."
    if code == "invalid_api_key":
        return f"the API key is missing or wrong; give --api-key, or set ${KEY_VARIABLE}."
    return message


def _show(status: dict[str, Any]) -> None:
    console = rich.console.Console(soft_wrap=True, highlight=False)
    console.print(_headline(status))
    table = rich.table.Table(box=None, pad_edge=False)
    for name in ("rank", "state", "incarnation", "pid", "experts", "compiles"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for rank in status["ranks"]:
        pid = "-" if rank["pid"] is None else rank["pid"]
        cells = rank["rank"], rank["state"], rank["incarnation"], pid
        table.add_row(*map(str, (*cells, rank["experts"], rank["compiles"])))
    console.print(table)
    for event in status["events"]:
        at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        phases = ", ".join(f"{name} {1e3 * s:.0f}" for name, s in event["phases"].items())
        ranks = ", ".join(map(str, event["ranks"])) or "-"
        console.print(
            f"{at} epoch {event['epoch']}: {event['type']} {ranks}, "
            f"stood still for {1e3 * event['seconds']:.0f} ms" + (f" ({phases})" if phases else "")
        )


def _headline(status: dict[str, Any]) -> str:
    active = sum(rank["state"] in ("active", "draining") for rank in status["ranks"])
    line = f"epoch {status['epoch']}, {active} of {len(status['ranks'])} ranks active, "
    if status["refusal"] is not None:
        return line + f"nothing is served: {status['refusal']}"
    copies = status["min_copies"]
    return line + f"at least {copies} cop{'y' if copies == 1 else 'ies'} of every expert"


def ranks(
    action: Annotated[Literal["list", "drain", "resume", "kill"], tyro.conf.Positional] = "list",
    rank: Annotated[int | None, tyro.conf.Positional] = None,
    url: str = "http://127.0.0.1:8000",
    api_key: str | None = None,
    timeout_s: float = 30.0,
    json: bool = False,
) -> None:
    """Lists, drains, resumes or kills the ranks of a server that runs with --ranks.

    Args:
      action: list shows all. drain takes a rank out, once its requests have ended or gone elsewhere, and waits for that; resume
        starts it again, or one that was given up; it takes part when it is ready. kill sends SIGKILL: the others go on as when a
        rank dies.
      rank: Number of the rank to drain, resume or kill.
      url: Address of the server.
      api_key: Its key; default: $JAXMOE_API_KEY.
      timeout_s: How long requests of a rank that is drained may take to end, in seconds; what is left then goes on elsewhere.
      json: Print the server's answer as JSON.
    """
    if (rank is None) != (action == "list"):
        needs = "no rank" if action == "list" else "the number of a rank"
        raise ValueError(f"{action} takes {needs}; got {rank}. `jaxmoe ranks list` shows them.")
    if not timeout_s >= 0:
        raise ValueError(f"--timeout-s must be >= 0; got {timeout_s}.")
    key = api_key or os.environ.get(KEY_VARIABLE)
    if action == "list":
        status = _ask(url, "/ranks", key, None, _ANSWER_S)
    else:
        body = {"timeout_s": timeout_s} if action == "drain" else {}
        wait_s = body.get("timeout_s", 0.0) + _ANSWER_S
        status = _ask(url, f"/ranks/{rank}/{action}", key, body, wait_s)
    if json:
        print(json_lib.dumps(status, indent=2))
    else:
        _show(status)
