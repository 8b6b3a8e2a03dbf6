"""How much of a machine's arithmetic a training step uses (model FLOPs utilisation)."""

import functools
import time

import jax
import jax.numpy as jnp

from jaxmoe.config import LayerKind, ModelConfig
from jaxmoe.params import active_param_count
from jaxmoe.train.config import TrainConfig
from pallas_kernels.numerics import precision_of


def step_flops(config: ModelConfig, train_config: TrainConfig) -> float:
    """Operations of one step's matrix products, forward and backward: what any implementation has to do.

    Two per weight and token forward and four backward, and the products of queries with keys and values that may be seen: the earlier
    ones of the row (though documents packed into it see less), or in sparse stages ``index_topk`` of them. What is computed again in the backward pass does not count (PaLM, appendix B).
    In the warm-up only indexers have a backward pass.
    """
    c = train_config
    tokens = c.batch_size * c.seq_len
    # The embedding is read, not multiplied.
    weights = active_param_count(config) - config.vocab_size * config.hidden_size
    if config.tie_word_embeddings:
        weights += config.vocab_size * config.hidden_size
    layers = list(config.layer_kinds)
    if c.mtp_weight > 0 and config.num_nextn_predict_layers:
        layers.append(config.mtp_kind)
        head = config.vocab_size * config.hidden_size
        weights += (weights - head) / max(1, config.num_hidden_layers) + head
    core = sum(_core(config, c, kind) for kind in layers)
    index = sum(_index(config, c, kind) for kind in layers)
    model = 2.0 * tokens * weights + tokens * core
    return model * (3.0 if c.trains_model else 1.0) + 3.0 * tokens * index


def _core(config: ModelConfig, c: TrainConfig, kind: LayerKind) -> float:
    """Forward operations of core attention per query, on average."""
    keys = (c.seq_len + 1) / 2
    if c.attention == "sparse" and kind.indexer is not None:
        k = min(config.index_topk, c.seq_len)
        keys = k - k * (k - 1) / 2 / c.seq_len
    if config.is_mla:
        size = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        size = 2 * config.head_dim
    return 2.0 * config.num_attention_heads * size * keys


def _index(config: ModelConfig, c: TrainConfig, kind: LayerKind) -> float:
    """Forward operations of the index scores per query, on average."""
    if kind.indexer != "full" or (c.index_weight == 0 and c.attention == "dense"):
        return 0.0
    return 2.0 * config.index_n_heads * config.index_head_dim * (c.seq_len + 1) / 2


@functools.lru_cache(maxsize=4)
def peak_flops(dtype: str) -> float:
    """Operations per second of a large matrix product on one device, measured: what utilisation is relative to."""
    size = 1024 if jax.default_backend() == "cpu" else 4096
    key_a, key_b = jax.random.split(jax.random.key(0))
    a = jax.random.normal(key_a, (size, size), dtype)
    b = jax.random.normal(key_b, (size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision_of(a.dtype)))
    jax.block_until_ready(product(a, b))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready([product(a, b) for _ in range(4)])
        best = min(best, (time.perf_counter() - began) / 4)
    return 2.0 * size**3 / best
