"""What of a model is trained: low-rank additions to what its matrices really are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fed
from fed.models import from_functions

SHAPES = {
    "attention/q/weight": (2, 6, 4, 5),  # layers, in, heads, head size
    "attention/o/weight": (2, 4, 5, 6),
    "mlp/gate_up/weight": (2, 6, 2, 7),
    "embed/weight": (9, 6),
    "norm/weight": (2, 6),
    "dense/kernel": (6, 7),
}
AS_MATRICES = {
    "attention/q/weight": (2, 6, 20),
    "attention/o/weight": (2, 20, 6),
    "mlp/gate_up/weight": (2, 6, 14),
    "embed/weight": (9, 6),
    "dense/kernel": (6, 7),
}


def begun(shapes, rank):
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    model = from_functions(lambda key: params, lambda p, x: x, (3,), name="some")
    choice = fed.Trainable("lora", rank=rank)
    return choice, params, *choice.begin(model, params, jax.random.key(0))


def test_what_lora_adds_is_of_low_rank_in_the_matrix_that_the_model_multiplies_with():
    choice, params, trained, base = begun(SHAPES, 2)
    drawn = np.random.default_rng(0)
    for pair in filter(None, trained.values()):
        pair["b"] = jnp.asarray(drawn.standard_normal(pair["b"].shape), jnp.float32)
    added = jax.tree.map(lambda a, b: np.asarray(a - b), choice(trained, base), params)
    for name, change in added.items():
        assert change.shape == SHAPES[name]
        if name == "norm/weight":
            assert not change.any()
        else:
            assert (np.linalg.matrix_rank(change.reshape(AS_MATRICES[name]), 1e-4) == 2).all()
    assert trained["attention/q/weight"]["b"].shape == (2, 2, 20)
    assert trained["attention/o/weight"]["a"].shape == (2, 20, 2)


def test_a_parameter_whose_matrix_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"got conv/kernel of shape \(3, 3, 8, 8\)"):
        begun({"conv/kernel": (3, 3, 8, 8)}, 2)
    with pytest.raises(ValueError, match="both sides above rank=7"):
        begun({"dense/kernel": (6, 7)}, 7)
