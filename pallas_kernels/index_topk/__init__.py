"""Lightning-index scores and exact top-k selection."""

from pallas_kernels.index_topk.api import index_topk, index_topk_step
from pallas_kernels.index_topk.selection import select_indices, select_mask, select_positions
from pallas_kernels.index_topk.xla import index_scores, step_scores

__all__ = [
    "index_scores",
    "index_topk",
    "index_topk_step",
    "select_indices",
    "select_mask",
    "select_positions",
    "step_scores",
]
