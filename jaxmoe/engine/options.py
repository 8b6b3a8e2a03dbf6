"""Sizes and limits of an engine."""

import dataclasses
from typing import Literal

from jaxmoe.config import ModelConfig
from jaxmoe.engine.runner import Sizes
from jaxmoe.engine.scheduler import Limits
from pallas_kernels import cache_rows

DEFAULT_TOKENS_PER_REQUEST = 1024  # of the default cache: for max_running requests of this length


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Sizes and limits of an engine."""

    max_running: int = 32
    """Requests with cache pages, per rank."""
    max_step_tokens: int = 256
    """Tokens of one step, per rank; longer prompts are cut into steps."""
    max_waiting: int = 1024
    """Requests that may wait; one more is refused."""
    page_size: int = 32
    """Tokens per cache page."""
    pages: int | None = None
    """Cache pages per rank; default: for max_running requests of 1024 tokens, and for one of max_length."""
    max_length: int | None = None
    """Tokens that a request may have, prompt included; default: the model's, at most 8192."""
    prefix_reuse: bool = True
    """Whether prompts that begin like earlier ones reuse their cache rows."""
    speculative_tokens: int = 0
    """Tokens that are guessed ahead, by the model's multi-token-prediction module or at ``draft_width``; they change the speed
    and, where a token's arithmetic does not depend on who shares its step (``Engine``), no token."""
    cache_dtype: Literal["float32", "bfloat16", "fp8"] | None = None
    """How the cache stores its rows; default: as the parameters. fp8: latent attention in 8 bits with scales."""
    widths: tuple[int, ...] | None = None
    """SEFP widths that requests may ask for; each compiles its own steps. Default: all that are stored."""
    width: int | None = None
    """SEFP width of requests that ask for none; default: the widest."""
    draft_width: int | None = None
    """SEFP width at which the model itself guesses ahead for requests at higher ones; default: its MTP module does."""

    def __post_init__(self):
        for name in (
            "max_running",
            "max_step_tokens",
            "max_waiting",
            "page_size",
            "pages",
            "max_length",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}.")
        if self.speculative_tokens < 0:
            raise ValueError(
                f"speculative_tokens must be >= 0; got {self.speculative_tokens}. Use 0 for none."
            )
        if (self.draft_width is not None) and not self.speculative_tokens:
            raise ValueError(
                f"draft_width={self.draft_width} needs speculative_tokens >= 1, the tokens to guess; got 0."
            )
        if self.widths == ():
            raise ValueError("widths must name at least one; got none. Leave it out for all.")
        if self.cache_dtype not in (None, *cache_rows.FORMATS):
            raise ValueError(
                f"cache_dtype must be one of {', '.join(cache_rows.FORMATS)}, or None for the parameters' own; "
                f"got {self.cache_dtype!r}."
            )

    @property
    def draft_rows(self) -> int:
        """Rows that making drafts writes behind a step's: the MTP module's first guess needs none of its own."""
        module = self.draft_width is None
        return max(self.speculative_tokens - 1, 0) if module else self.speculative_tokens

    def longest(self, config: ModelConfig) -> int:
        """Tokens that a request to a model may have.

        Raises:
          ValueError: if ``max_length`` is more than the model can take.
        """
        most = config.max_position_embeddings
        if self.max_length is not None and self.max_length > most:
            raise ValueError(
                f"max_length ({self.max_length}) must be <= the model's max_position_embeddings ({most}); shorten it."
            )
        return self.max_length or min(most, 8192)

    def limits(self) -> Limits:
        """What a scheduler may plan."""
        return Limits(
            self.max_running,
            self.max_step_tokens,
            self.max_waiting,
            self.draft_rows,
            self.draft_width,
        )

    def sizes(self, max_length: int) -> Sizes:
        """The shapes of a runner whose requests may have ``max_length`` tokens."""
        table = -(-max_length // self.page_size)
        default = self.max_running * DEFAULT_TOKENS_PER_REQUEST // self.page_size
        return Sizes(
            self.max_running,
            self.max_step_tokens,
            self.pages or max(table, default),
            self.page_size,
            table,
            self.speculative_tokens,
            self.cache_dtype,
            self.draft_width,
        )
