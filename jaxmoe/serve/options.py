"""What an operator may set. Imports no server, so that the command line can describe it where none is installed."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ApiOptions:
    """What an operator may set."""

    model_name: str = "jaxmoe"
    """The name that clients give as ``model``."""
    api_key: str | None = None
    """Clients must show it; None for no key."""
    operable: bool = True
    """Whether ranks can be looked at, drained, resumed and killed by those who may use the server."""
    allowed_hosts: tuple[str, ...] | None = None
    """Host names that requests may be addressed to; None for any."""
    max_body_bytes: int = 4 << 20
    """Larger bodies are refused."""
    body_timeout_s: float = 60.0
    """How long a body may take to arrive."""
    stall_s: float = 300.0
    """A client that takes nothing of a stream for so long is cut off."""
    idle_s: float = 15.0
    """A stream with nothing to say sends a comment so often."""

    def __post_init__(self):
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key must be printable ASCII; choose another.")
        if self.api_key == "":
            raise ValueError("api_key must not be empty; got ''. Leave it out for no key.")
        for name in ("max_body_bytes", "body_timeout_s", "stall_s", "idle_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Where to listen, and how to start and end."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only."""
    port: int = 8000
    """Port; 0 takes a free one."""
    drain_s: float = 60.0
    """On SIGTERM, how long running requests may take to end."""
    warm_up: bool = True
    """Whether to compile everything before requests are taken."""
    header_timeout_s: float = 10.0
    """A connection whose request's headers take longer is closed."""

    def __post_init__(self):
        if not self.drain_s >= 0:
            raise ValueError(f"drain_s must be >= 0; got {self.drain_s}.")
        if not self.header_timeout_s > 0:
            raise ValueError(f"header_timeout_s must be > 0; got {self.header_timeout_s}.")
