"""Committed checkpoints with transformers' answers: parity where neither torch nor transformers is installed."""

import pathlib

import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint import load_hf

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TOLERANCE = 5e-5  # as in test_transformers.py


def test_every_model_type_has_a_golden():
    assert {path.name for path in GOLDENS.iterdir()} == {
        "deepseek_v3",
        "deepseek_v32",
        "glm_moe_dsa",
        "llama",
    }


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "glm_moe_dsa", "llama"])
def test_logits_and_greedy_tokens_are_the_committed_ones(name):
    params, config = load_hf(GOLDENS / name)
    assert config.model_type == name
    with np.load(GOLDENS / name / "expected.npz") as expected:
        tokens, logits, length = (expected[k] for k in ("tokens", "logits", "prompt_length"))
    actual = np.asarray(jaxmoe.forward(params, config, tokens))
    np.testing.assert_allclose(actual, logits, rtol=0, atol=TOLERANCE)
    new = tokens.shape[1] - length
    generated = jaxmoe.generate(params, config, tokens[:, :length], int(new))
    np.testing.assert_array_equal(generated, tokens[:, length:])
