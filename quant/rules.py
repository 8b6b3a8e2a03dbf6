"""Which parameters are quantised, along which axes, and at which width: regular expressions on their paths."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels import sefp
from quant.tensor import Layout, check_floating, is_sefp


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the parameters whose path, such as ``segments/0/0/attention/o/weight``, contains a match.

    Attributes:
      pattern: regular expression.
      layout: which axes are contracted; None leaves the parameter as it is.
      width: its own width, whatever the others' is (1 to 8; 3 to 8 to be stored); None for the one that is asked for.
    """

    pattern: str
    layout: Layout | None = None
    width: int | None = None

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern must be a regular expression; got {self.pattern!r} ({error})."
            ) from None
        if self.width is not None and not 1 <= self.width <= sefp.MASTER_WIDTH:
            raise ValueError(
                f"width must be from 1 to {sefp.MASTER_WIDTH}, or None; got {self.width}."
            )
        if self.layout is None and self.width is not None:
            raise ValueError(
                f"the rule for {self.pattern!r} has a width ({self.width}) but no layout; give one."
            )


# Parameters of jaxmoe's models, and [..., in, out] of others. Norms, biases and what decides (routers, the indexer's head weights)
# stay: together they are a thousandth of the weights (specification 1.6, 7.1). Of MLA's k_b [heads, nope, latent] and v_b [heads,
# latent, value] the axis that the absorbed form contracts (7.2).
DEFAULT_RULES = (
    Rule(r"norm|bias|router/|head_weights/"),
    Rule(r"(^|/)embed/weight$", Layout(outputs_first=True)),
    Rule(r"attention/(q_b|q|k|v)/weight$|indexer/q_b/weight$", Layout(1, 2)),
    Rule(r"attention/o/weight$", Layout(2, 1)),
    Rule(r"gate_up(/weight)?$", Layout(1, 2)),
    Rule(r"attention/(q_a|kv_a|k_b|v_b)/weight$|indexer/k/weight$", Layout()),
    Rule(r"down(/weight)?$|(^|/)(lm_head|proj)/weight$", Layout()),
)
_MATRICES = Rule(r"", Layout())


def name_of(path: tuple[Any, ...]) -> str:
    """A parameter's path as text."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def rule_for(name: str, leaf: Any, rules: Sequence[Rule]) -> Rule | None:
    """The first rule that matches. None if no rule does, or the one that does leaves the parameter as it is.

    Without a match under the default rules a parameter of two or more axes is [..., in, out].
    """
    for rule in rules:
        if re.search(rule.pattern, name):
            return None if rule.layout is None else rule
    if tuple(rules[-len(DEFAULT_RULES) :]) == DEFAULT_RULES and len(leaf.shape) >= 2:
        return _MATRICES
    return None


def map_ruled(f: Callable[[Rule, Any], Any], params: Any, rules: Sequence[Rule]) -> Any:
    """``params`` with ``f(rule, leaf)`` in place of every leaf that a rule quantises; of leaves in SEFP too.

    Raises:
      ValueError, TypeError: for a parameter that its rule doesn't fit, named.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        name = name_of(path)
        rule = rule_for(name, leaf, rules)
        if rule is None or is_sefp(leaf):
            return leaf
        try:
            rule.layout.split(leaf.shape)
            check_floating(leaf)
            return f(rule, leaf)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_sefp)
