"""At which SEFP width the weights are read for a request.

Weights in SEFP hold every width nested, so an engine has them once, whatever widths it serves. A width is another tree of the same
arrays: another executable, and no copy. Rows of the cache depend on the width; a page is reused at its own width only.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxmoe.engine.requests import SamplingParams
from pallas_kernels.sefp.format import BASE_WIDTH
from quant import at_width, tensors

WidthPolicy = Callable[[Sequence[int], SamplingParams], int | None]
"""(prompt, sampling) to the width of a request that names none; None for the engine's default. Called on the caller's thread."""


def stored_widths(params: Any) -> tuple[int, ...]:
    """Widths at which parameters can be read, narrowest first; none if they aren't in SEFP, or all pinned."""
    highest = min((t.width for t in tensors(params) if not t.pinned), default=BASE_WIDTH - 1)
    return tuple(range(BASE_WIDTH, highest + 1))


class Widths:
    """The widths that an engine serves.

    Args:
      params: parameters, in SEFP or not; None if ranks hold them.
      served: widths that requests may ask for; None for all that are stored.
      default: of requests that ask for none; None for the widest served.
      drafts: at which drafts are made; None for none. Served to nobody unless it is among ``served``.
      policy: chooses for requests that ask for none, before the default.

    Raises:
      ValueError: for a width that isn't stored, or not served.
    """

    def __init__(
        self,
        params: Any,
        served: Sequence[int] | None = None,
        default: int | None = None,
        drafts: int | None = None,
        policy: WidthPolicy | None = None,
    ):
        stored = stored_widths(params)
        self.served = tuple(sorted(set(stored if served is None else served)))
        asked = {"widths": served or (), "width": (default,), "draft_width": (drafts,)}
        for name, values in asked.items():
            for value in values:
                if value is not None and value not in stored:
                    raise ValueError(_refusal(name, value, stored))
        self.default = default if default is not None or not self.served else self.served[-1]
        if default is not None and default not in self.served:
            raise ValueError(_refusal("width", default, self.served))
        if drafts is not None and drafts >= self.served[-1]:
            raise ValueError(
                f"draft_width must be below the widest width served ({self.served[-1]}); got {drafts}. Leave it out."
            )
        self._policy = policy
        # A set: drafts may be made at a width that is served, too.
        every = {*self.served, *(() if drafts is None else (drafts,))}
        self.params = {w: at_width(params, w) for w in sorted(every)} or {None: params}

    def choose(self, prompt: Sequence[int], sampling: SamplingParams) -> int | None:
        """The width of a request; None if the weights have none.

        Raises:
          ValueError: if what it asks for, or the policy says, isn't served.
        """
        width, name = sampling.width, "width"
        if width is None and self._policy is not None:
            width, name = self._policy(prompt, sampling), "width_policy's result"
        if width is None:
            return self.default
        if width not in self.served:
            raise ValueError(_refusal(name, width, self.served))
        return width


def _refusal(name: str, width: Any, known: Sequence[int]) -> str:
    if not known:
        return (
            f"{name}={width} needs SEFP weights, which this engine does not have; make them with quant.quantize_params, or leave "
            "it out."
        )
    return f"{name} must be one of {', '.join(map(str, known))}; got {width!r}. Leave it out for the default."
