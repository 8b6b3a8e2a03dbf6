"""The spec tree and everything derived from it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import params as params_lib
from jaxmoe import presets
from jaxmoe.cache import bytes_per_token
from jaxmoe.params import Spec, abstract_params, flatten, init_params, nbytes, param_count, spec

TINY = presets["tiny"]
VARIANTS = {
    "tiny": TINY,
    "no query latent, biases": TINY.replace(
        q_lora_rank=None,
        index_topk=None,
        index_n_heads=None,
        index_head_dim=None,
        attention_bias=True,
    ),
    "shared selections, irregular layers": TINY.replace(
        num_hidden_layers=5,
        indexer_types=("full", "shared", "full", "shared", "full"),
        mlp_layer_types=("dense", "sparse", "dense", "sparse", "sparse"),
    ),
    "no shared expert, no MTP": TINY.replace(n_shared_experts=0, num_nextn_predict_layers=0),
    "llama": jaxmoe.ModelConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
}

# -- released sizes ----------------------------------------------------------------------------------


def test_released_parameter_counts_are_exact():
    assert param_count(presets["deepseek_v3"]) == 671_026_419_200
    assert param_count(presets["deepseek_v32"]) == 671_877_944_064


def test_an_indexer_has_13_959_424_parameters_and_an_expert_44_040_192():
    layer = params_lib.layer_spec(presets["deepseek_v32"], presets["deepseek_v32"].layer_kinds[-1])
    sizes = {name: math.prod(s.shape) for name, s in flatten(layer).items()}
    assert sum(n for name, n in sizes.items() if name.startswith("indexer/")) == 13_959_424
    assert sum(n for name, n in sizes.items() if name.startswith("attention/")) == 187_107_328
    assert sum(n for name, n in sizes.items() if "/experts/" in name) == 256 * 44_040_192


def test_the_mtp_module_of_v3_has_11_6_billion_parameters_of_its_own():
    v3 = presets["deepseek_v3"]
    own = param_count(v3, include_mtp=True) - param_count(v3)
    layer = sum(
        math.prod(s.shape) for s in flatten(params_lib.layer_spec(v3, v3.mtp_kind)).values()
    )
    assert own == layer + 2 * 7168 * 7168 + 3 * 7168
    assert round(own / 1e9, 1) == 11.6


def test_active_parameters_count_the_chosen_experts_and_everything_else():
    v3, v32 = (jaxmoe.active_param_count(presets[name]) for name in ("deepseek_v3", "deepseek_v32"))
    assert round(v3 / 1e9, 2) == 37.55
    assert v32 - v3 == 61 * 13_959_424
    assert jaxmoe.active_param_count(presets["llama3_1b"]) == param_count(presets["llama3_1b"])


def test_llama_3_2_1b_has_its_released_size():
    assert param_count(presets["llama3_1b"]) == 1_235_814_400


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 0.8e6, 2e6), ("small", 50e6, 80e6)])
def test_notebook_presets_have_the_advertised_size(name, low, high):
    assert low < param_count(presets[name]) < high


def test_bytes_follow_the_dtype_except_where_the_spec_fixes_one():
    fixed = sum(math.prod(s.shape) for s in jax.tree.leaves(spec(TINY)) if s.dtype is not None)
    total = param_count(TINY, include_mtp=True)
    assert fixed > 0
    assert nbytes(TINY, jnp.float32, include_mtp=True) == 4 * total
    assert nbytes(TINY, jnp.bfloat16, include_mtp=True) == 2 * total + 2 * fixed
    assert nbytes(TINY) < nbytes(TINY, include_mtp=True)


def test_cache_bytes_per_token_of_v3_and_v32():
    assert bytes_per_token(presets["deepseek_v3"]) == 61 * 1152 == 70_272
    assert bytes_per_token(presets["deepseek_v32"]) == 61 * (1152 + 2 * 128)
    assert bytes_per_token(presets["deepseek_v3"], "fp8") == 61 * 656
    assert bytes_per_token(presets["deepseek_v32"], "fp8") == 61 * (656 + 132) == 48_068


# -- the tree ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(VARIANTS | presets))
def test_every_leaf_has_one_axis_name_per_dimension_and_a_known_init(name):
    for path, s in flatten(spec((VARIANTS | presets)[name])).items():
        assert isinstance(s, Spec) and len(s.shape) == len(s.axes), path
        assert all(size > 0 for size in s.shape), path
        assert s.init in ("normal", "ones", "zeros"), path


@pytest.mark.parametrize("name", list(VARIANTS | presets))
def test_stacked_leaves_cover_every_layer_once(name):
    config = (VARIANTS | presets)[name]
    stacked = flatten(spec(config)["segments"])
    counts = [s.shape[0] for path, s in stacked.items() if path.endswith("attention_norm/weight")]
    assert sum(counts) == config.num_hidden_layers
    assert all(s.axes[0] == "layers" for s in stacked.values())


def test_flatten_names_are_unique_readable_and_in_tree_order():
    tree = spec(TINY)
    names = flatten(tree)
    assert len(names) == len(jax.tree.leaves(tree))
    assert list(names.values()) == jax.tree.leaves(tree)
    assert "segments/1/0/moe/experts/down" in names and "mtp/0/layer/indexer/k/weight" in names


def test_abstract_params_of_the_largest_model_allocate_nothing():
    config = presets["deepseek_v32"]
    before = len(jax.live_arrays())
    tree = abstract_params(config, jnp.bfloat16)
    assert len(jax.live_arrays()) == before
    leaves = jax.tree.leaves(tree)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    assert size == nbytes(config, include_mtp=True) > 1.3e12


# -- initialisation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_initial_parameters_have_the_shapes_and_dtypes_of_the_spec(name, dtype):
    config = VARIANTS[name]
    shapes = jax.eval_shape(lambda key: init_params(config, key, dtype=dtype), jax.random.key(0))
    expected = abstract_params(config, dtype)
    assert jax.tree.structure(shapes) == jax.tree.structure(expected)
    for path, leaf in flatten(shapes).items():
        target = flatten(expected)[path]
        assert (leaf.shape, leaf.dtype) == (target.shape, target.dtype), path


def test_initial_values_are_ones_zeros_and_normal_of_the_configured_spread(
    tiny_config, tiny_params
):
    for path, s in flatten(spec(tiny_config)).items():
        values = np.asarray(flatten(tiny_params)[path])
        if s.init != "normal":
            assert (values == {"ones": 1, "zeros": 0}[s.init]).all(), path
            continue
        # Five standard errors of the mean and of the standard deviation.
        sigma, n = tiny_config.initializer_range, values.size
        assert abs(values.mean()) < 5 * sigma / n**0.5, path
        assert abs(values.std() / sigma - 1) < 5 / (2 * n) ** 0.5, path


def test_no_two_parameters_share_their_random_numbers(tiny_config, tiny_params):
    firsts = {}
    for path, leaf in flatten(tiny_params).items():
        if flatten(spec(tiny_config))[path].init == "normal":
            firsts.setdefault(float(np.asarray(leaf).reshape(-1)[0]), []).append(path)
    assert all(len(paths) == 1 for paths in firsts.values()), firsts
    experts = np.asarray(tiny_params["segments"][1][0]["moe"]["experts"]["down"]).reshape(-1)
    assert len(np.unique(experts)) > 0.98 * len(
        experts
    )  # float32 normals repeat a little by chance


def test_initialisation_is_deterministic_in_the_key(tiny_config, tiny_params):
    again = init_params(tiny_config, jax.random.key(0))
    other = init_params(tiny_config, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, again, tiny_params)
    assert not np.array_equal(other["embed"]["weight"], again["embed"]["weight"])


def test_a_parameters_values_depend_on_its_own_name_and_shape_alone(tiny_config, tiny_params):
    # Fewer, larger and additional neighbours: other tree, other order, other neighbours in the drawing.
    changed = tiny_config.replace(
        num_nextn_predict_layers=0,
        intermediate_size=200,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    before, after = flatten(tiny_params), flatten(init_params(changed, jax.random.key(0)))
    same = [path for path in after if path in before and after[path].shape == before[path].shape]
    assert "segments/0/0/attention/kv_a/weight" in same and len(same) > 20
    for path in same:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)


def test_large_parameters_are_drawn_on_their_own_with_the_same_guarantees(monkeypatch):
    monkeypatch.setattr(params_lib, "_DRAWN_TOGETHER", 2000)
    config = VARIANTS["llama"].replace(num_hidden_layers=1, initializer_range=0.5)
    first, again = (init_params(config, jax.random.key(3)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    embed = np.asarray(first["embed"]["weight"])
    assert embed.size > 2000 and abs(embed.std() / 0.5 - 1) < 0.1


@pytest.mark.misuse
@pytest.mark.parametrize("key", [0, None, "seed"])
def test_a_key_that_is_no_key_is_refused(key):
    with pytest.raises(TypeError, match=r"key must be a JAX PRNG key; got .*Use jax.random.key"):
        init_params(TINY, key)


def test_a_spec_is_stacked_on_a_new_leading_axis():
    s = Spec((3, 4), ("embed", None), dtype=jnp.float32)
    assert s.stacked(5) == dataclasses.replace(s, shape=(5, 3, 4), axes=("layers", "embed", None))
