"""transformers as the oracle: random models, their greedy tokens and logits, and how close their choices were."""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode


class Sizes(NamedTuple):
    """Of a comparison: prompts, their length, and greedy tokens after them."""

    batch: int = 2
    prompt: int = 24
    new: int = 128


class Answer(NamedTuple):
    """What the oracle says.

    Attributes:
      tokens: [batch, prompt + new] int32, the prompt and its greedy continuation.
      logits: [batch, prompt + new, vocab] float32, from one pass over all of it.
      margin: the smallest relative distance, over every discrete choice (keys, groups, experts, tokens), between the
        last candidate taken and the first one left out.
    """

    tokens: np.ndarray
    logits: np.ndarray
    margin: float


def build(family: str, fields: dict, seed: int):
    """A random float32 model in which no parameter is zero, one, or without effect."""
    config = getattr(transformers, f"{family}Config")(**fields)
    config._attn_implementation = "eager"
    with warnings.catch_warnings():
        # A shared expert of width zero is how transformers says "none".
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if fields["hidden_size"] % 4 or fields.get("moe_intermediate_size", 0) % 4:
        model.set_experts_implementation(
            "eager"
        )  # torch's grouped matmul wants rows of whole 16 bytes
    randomise(model, seed)
    return model


# What these produce goes through a norm next: small enough for the norm's epsilon to show.
_SMALL = {"q_a_proj.weight": 0.1, "kv_a_proj_with_mqa.weight": 0.1, "indexer.wk.weight": 0.02}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fills parameters and buffers; matrices keep activations near unit size, so that softmaxes are not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if "inv_freq" in name:
                continue
            value = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight") or ".enorm" in name or ".hnorm" in name:
                value = 1 + 0.3 * value
            elif tensor.ndim == 1:  # biases, among them LayerNorm's and the router's correction
                value = 0.3 * value
            elif "embed_tokens" in name:  # small, for where it is the head too
                value = 0.2 * value
            else:
                gain = next((g for end, g in _SMALL.items() if name.endswith(end)), 1.0)
                value = gain * value / math.sqrt(max(tensor.shape[-1], 1))
            tensor.copy_(value)


class _Margins(TorchFunctionMode):
    """Watches every top-k for the gap at its boundary, relative to the row's largest value."""

    def __init__(self):
        super().__init__()
        self.smallest = math.inf

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            self._watch(args[0], kwargs["k"] if "k" in kwargs else args[1])
        return func(*args, **kwargs)

    def _watch(self, values: torch.Tensor, k: int) -> None:
        if k < values.shape[-1]:
            self.smallest = min(self.smallest, _boundary_gap(values, k))


def _boundary_gap(values: torch.Tensor, k: int) -> float:
    best = values.float().topk(k + 1).values
    taken, left = best[..., k - 1], best[..., k]
    candidates = left > -1e30  # anything lower is a masked key
    if not candidates.any():
        return math.inf
    visible = torch.where(values.float() > -1e30, values.float().abs(), 0.0)
    gap = (taken - left) / visible.amax(-1).clamp(min=1e-9)
    return gap[candidates].min().item()


def ask(model, prompt: np.ndarray, new: int) -> Answer:
    """Greedy continuation with the cache on, then all logits in one pass."""
    ids = torch.from_numpy(prompt.astype(np.int64))
    with torch.no_grad():
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        margins = _Margins()
        with margins:
            logits = model(tokens).logits.float()
    gap = min(margins.smallest, _boundary_gap(logits[:, prompt.shape[1] - 1 :], 1))
    return Answer(tokens.numpy().astype(np.int32), logits.numpy(), gap)
