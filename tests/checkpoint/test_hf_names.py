"""The table between parameter leaves and Hugging Face tensors."""

import math

import numpy as np
import pytest
from checkpoint.support import SMALLEST

from jaxmoe import presets
from jaxmoe.checkpoint import _hf_names
from jaxmoe.checkpoint._leaves import piece_shape
from jaxmoe.params import flatten, spec

_FP8_IN_V3 = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "wq_b", "wk")
_FP8_IN_V3 += ("gate_proj", "up_proj", "down_proj")


def test_the_table_reproduces_the_published_inventory_of_the_v3_files():
    table = _hf_names.tensors(presets["deepseek_v3"])
    quantised = [t for t in table.values() if t.name.split(".")[-2] in _FP8_IN_V3]
    assert len(table) + len(quantised) == 91_991  # spec 1.3: each fp8 tensor has a scale tensor
    scales = sum(math.ceil(t.shape[0] / 128) * math.ceil(t.shape[1] / 128) for t in quantised)
    assert sum(math.prod(t.shape) for t in table.values()) + scales == 684_531_386_000


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        SMALLEST,
        SMALLEST.replace(attention_bias=True, indexer_types=("full", "shared", "shared")),
        SMALLEST.replace(
            q_lora_rank=None, index_topk=None, index_n_heads=None, index_head_dim=None
        ),
        SMALLEST.replace(tie_word_embeddings=True, num_nextn_predict_layers=2, n_shared_experts=0),
        presets["llama3_1b"].replace(
            attention_bias=True,
            mlp_bias=True,
            num_hidden_layers=2,
            vocab_size=7,
            hidden_size=16,
            intermediate_size=8,
        ),
    ],
)
def test_every_element_of_every_leaf_has_exactly_one_source(config, fused):
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    counts = {name: np.zeros(s.shape, np.int8) for name, s in flatten(spec(config)).items()}
    for tensor in _hf_names.tensors(config, layers if fused else ()).values():
        sources = np.zeros(tensor.shape, np.int8)
        for part in tensor.parts:
            counts[part.leaf][part.index] += 1
            view = part.to_ours(sources)
            assert view.shape == piece_shape(counts[part.leaf].shape, part.index)
            view += 1  # a view: writing to it writes to the tensor
        assert not tensor.parts or (sources == 1).all(), tensor.name
    for name, count in counts.items():
        assert (count == 1).all(), name


def test_layers_that_share_a_selection_have_no_indexer_tensors():
    table = _hf_names.tensors(SMALLEST.replace(indexer_types=("full", "shared", "full")))
    with_indexer = {name.split(".")[2] for name in table if "indexer" in name}
    assert with_indexer == {"0", "2", "3"}  # 3 is the MTP layer
