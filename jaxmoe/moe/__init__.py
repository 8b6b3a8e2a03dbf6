"""Mixture of experts: routing, dispatch paths, expert computation."""

from jaxmoe.moe.dispatch import MoeOptions, apply_experts, options_on
from jaxmoe.moe.experts import Experts
from jaxmoe.moe.route import Routing, route
from jaxmoe.moe.tables import ExpertTables, identity_tables

__all__ = [
    "options_on",
    "ExpertTables",
    "Experts",
    "MoeOptions",
    "Routing",
    "apply_experts",
    "identity_tables",
    "route",
]
