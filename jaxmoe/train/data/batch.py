"""Rows of packed documents."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows of tokens in which documents lie one after another.

    Arrays; or, in the same form, ``jax.ShapeDtypeStruct``s or shardings.

    Attributes:
      tokens: int32 [B, W]; W is seq_len + 2, so that the last query has a target, and one for multi-token prediction.
      starts: int32 [B, W], the index within the row of the first token of each token's document. A document that
        began in an earlier row starts at 0, and a token of padding at itself.
      weights: float32 [B, W], how much each token counts as a target: 0 for prompts and padding.
    """

    tokens: Any
    starts: Any
    weights: Any
