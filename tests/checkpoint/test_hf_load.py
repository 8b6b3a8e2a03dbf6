"""load_hf on files written by these tests, from the format's description."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint.support import (
    SMALLEST,
    assert_trees_equal,
    expected_params,
    hf_tensors,
    layer_of,
    write_hf,
    write_safetensors,
)

from jaxmoe import presets, sharding
from jaxmoe.checkpoint import load_hf
from jaxmoe.errors import CheckpointMismatch


@pytest.mark.parametrize("files", [1, 5])
def test_every_tensor_lands_where_the_spec_says(tmp_path, rng, files):
    tensors = hf_tensors(SMALLEST, rng)
    params, config = load_hf(write_hf(tmp_path, SMALLEST, tensors, files=files))
    assert config == SMALLEST
    expected_params(tensors, config, functools.partial(layer_of, params, config))
    np.testing.assert_array_equal(params["embed"]["weight"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"]["weight"], tensors["model.norm.weight"])
    np.testing.assert_array_equal(params["lm_head"]["weight"], tensors["lm_head.weight"].T)
    prefix, mtp = "model.layers.3.", params["mtp"][0]
    np.testing.assert_array_equal(mtp["embed_norm"]["weight"], tensors[prefix + "enorm.weight"])
    np.testing.assert_array_equal(mtp["hidden_norm"]["weight"], tensors[prefix + "hnorm.weight"])
    np.testing.assert_array_equal(
        mtp["norm"]["weight"], tensors[prefix + "shared_head.norm.weight"]
    )
    # Inputs of eh_proj: the embedding's half first.
    projection = tensors[prefix + "eh_proj.weight"]
    np.testing.assert_array_equal(mtp["proj"]["weight"][:16], projection[:, :16].T)
    np.testing.assert_array_equal(mtp["proj"]["weight"][16:], projection[:, 16:].T)


def test_fused_experts_are_read_like_separate_ones(tmp_path, rng):
    tensors = hf_tensors(SMALLEST, rng)
    expected, _ = load_hf(write_hf(tmp_path / "separate", SMALLEST, tensors))
    for layer in (1, 3):  # layer 2 stays as it is: forms may mix
        p = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([tensors.pop(f"{p}{e}.{name}_proj.weight") for e in range(4)])
            for name in ("gate", "up", "down")
        )
        tensors[p + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[p + "down_proj"] = down
    params, _ = load_hf(write_hf(tmp_path / "fused", SMALLEST, tensors))
    assert_trees_equal(params, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_in_the_file_may_be_mixed_and_are_converted(tmp_path, rng, dtype):
    tensors = hf_tensors(SMALLEST, rng)
    stored = [np.float32, np.float16, ml_dtypes.bfloat16]
    tensors = {name: x.astype(stored[i % 3]) for i, (name, x) in enumerate(tensors.items())}
    params, config = load_hf(write_hf(tmp_path, SMALLEST, tensors), dtype)
    moe = params["segments"][1][0]["moe"]
    assert moe["router"]["bias"].dtype == jnp.float32
    assert moe["experts"]["down"].dtype == dtype
    assert params["segments"][0][0]["indexer"]["head_weights"]["weight"].dtype == jnp.float32
    expected = tensors["model.embed_tokens.weight"].astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(np.asarray(params["embed"]["weight"]), expected)


# -- fp8 -------------------------------------------------------------------------------------------

# kv_a_proj has 512 + 64 = 576 rows: four whole blocks and a half; other sizes are odd on purpose.
FP8 = SMALLEST.replace(
    hidden_size=200,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    index_head_dim=64,
    moe_intermediate_size=136,
)


def _quantise(tensors, rng, block, dtype=ml_dtypes.float8_e4m3fn, scale_dtype=np.float32):
    """(what a released file holds, what it means): most matrices are fp8, the rest bf16 (spec 7)."""
    stored, meant = {}, {}
    for name, x in tensors.items():
        unquantised = ("embed", "head", "eh_proj", "weights_proj", ".gate.weight")
        if x.ndim != 2 or any(part in name for part in unquantised):
            stored[name] = x.astype(ml_dtypes.bfloat16)
            meant[name] = stored[name].astype(np.float32)
            continue
        rows, columns = (-(-n // b) for n, b in zip(x.shape, block, strict=True))
        scale = 2.0 ** rng.integers(-9, 3, (rows, columns))
        if scale_dtype == np.float32:
            scale = scale * rng.uniform(1, 2, (rows, columns))
        scale = scale.astype(scale_dtype)
        stored[name], stored[name + "_scale_inv"] = x.astype(dtype), scale
        full = np.kron(scale.astype(np.float32), np.ones(block, np.float32))
        meant[name] = stored[name].astype(np.float32) * full[: x.shape[0], : x.shape[1]]
    return stored, meant


@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
@pytest.mark.parametrize("shards", [1, 3])
def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path, rng, block, shards):
    stored, meant = _quantise(hf_tensors(FP8, rng), rng, block)
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 200)
    quantisation = {"quant_method": "fp8", "weight_block_size": list(block)}
    directory = write_hf(tmp_path, FP8, stored, files=shards, quantization_config=quantisation)
    params, config = load_hf(directory)
    expected_params(meant, config, functools.partial(layer_of, params, config))
    rounded, _ = load_hf(directory, jnp.bfloat16)
    kv_a = meant["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].T
    np.testing.assert_array_equal(
        np.asarray(rounded["segments"][0][0]["attention"]["kv_a"]["weight"][0]),
        kv_a.astype(ml_dtypes.bfloat16),
    )


def test_fp8_of_the_other_flavour_with_power_of_two_scales_is_read(tmp_path, rng):
    stored, meant = _quantise(
        hf_tensors(FP8, rng), rng, (128, 128), ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu
    )
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    params, config = load_hf(write_hf(tmp_path, FP8, stored, quantization_config=quantisation))
    expected_params(meant, config, functools.partial(layer_of, params, config))


def test_fp8_without_its_scale_or_with_a_wrong_one_is_named(tmp_path, rng):
    stored, _ = _quantise(hf_tensors(FP8, rng), rng, (128, 128))
    gone = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    short = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    del stored[gone]
    stored[short] = stored[short][:, :-1].copy()
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    directory = write_hf(tmp_path, FP8, stored, quantization_config=quantisation)
    with pytest.raises(CheckpointMismatch) as error:
        load_hf(directory)
    assert f"missing {gone}: expected shape (5, 2)" in str(error.value)
    assert f"wrong shape {short}: expected (2, 1), found (2, 0)" in str(error.value)


@pytest.mark.parametrize("fields", [{}, {"quantization_config": 3}])
def test_fp8_without_a_block_size_in_the_config_is_refused(fields, tmp_path, rng):
    stored, _ = _quantise(hf_tensors(FP8, rng), rng, (128, 128))
    with pytest.raises(ValueError, match="weight_block_size is None; only block-quantised"):
        load_hf(write_hf(tmp_path, FP8, stored, **fields))


# -- multi-token prediction ------------------------------------------------------------------------


def _without_mtp(tensors):
    return {name: x for name, x in tensors.items() if not name.startswith("model.layers.3.")}


def test_mtp_layers_are_kept_or_skipped_by_choice(tmp_path, rng):
    directory = write_hf(tmp_path, SMALLEST, hf_tensors(SMALLEST, rng))
    for mtp, count in ((None, 1), (True, 1), (False, 0)):
        params, config = load_hf(directory, mtp=mtp)
        assert config.num_nextn_predict_layers == count
        assert len(params.get("mtp", [])) == count


def test_mtp_layers_announced_but_absent_are_left_out_unless_required(tmp_path, rng):
    directory = write_hf(tmp_path, SMALLEST, _without_mtp(hf_tensors(SMALLEST, rng)))
    assert load_hf(directory)[1].num_nextn_predict_layers == 0
    with pytest.raises(CheckpointMismatch, match=r"missing model\.layers\.3\.enorm\.weight"):
        load_hf(directory, mtp=True)


def test_mtp_layers_present_but_not_announced_are_kept(tmp_path, rng):
    unannounced = SMALLEST.replace(num_nextn_predict_layers=0)
    directory = write_hf(tmp_path, unannounced, hf_tensors(SMALLEST, rng))
    assert load_hf(directory)[1] == SMALLEST
    assert load_hf(directory, mtp=False)[1] == unannounced


def test_copies_of_embedding_and_head_in_an_mtp_layer_are_optional_and_not_loaded(tmp_path, rng):
    tensors = hf_tensors(SMALLEST, rng)
    expected, _ = load_hf(write_hf(tmp_path / "with", SMALLEST, tensors))
    del tensors["model.layers.3.embed_tokens.weight"]
    del tensors["model.layers.3.shared_head.head.weight"]
    params, _ = load_hf(write_hf(tmp_path / "without", SMALLEST, tensors))
    assert_trees_equal(params, expected)


def test_an_mtp_layer_without_an_indexer_is_refused_with_a_way_out(tmp_path, rng):
    tensors = hf_tensors(SMALLEST, rng)
    tensors = {
        n: x for n, x in tensors.items() if not n.startswith("model.layers.3.self_attn.indexer")
    }
    directory = write_hf(tmp_path, SMALLEST, tensors)
    with pytest.raises(
        CheckpointMismatch, match="mtp=False loads it without its incomplete"
    ) as error:
        load_hf(directory)
    assert "5 problems" in str(error.value)
    assert load_hf(directory, mtp=False)[1].num_nextn_predict_layers == 0


def test_the_hint_about_mtp_is_not_given_for_main_layers(tmp_path, rng):
    tensors = hf_tensors(SMALLEST, rng)
    del tensors["model.layers.0.self_attn.indexer.wk.weight"]
    with pytest.raises(CheckpointMismatch) as error:
        load_hf(write_hf(tmp_path, SMALLEST, tensors))
    assert "mtp=False" not in str(error.value)


# -- what does not fit -----------------------------------------------------------------------------


def test_missing_unexpected_and_wrongly_shaped_tensors_are_all_named(tmp_path, rng):
    tensors = hf_tensors(SMALLEST, rng)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] = np.zeros((8, 15), np.float32)
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"] = np.zeros((8, 16), np.float32)
    tensors["model.layers.0.input_layernorm.weight"] = np.zeros(16, np.int32)
    with pytest.raises(CheckpointMismatch) as error:
        load_hf(write_hf(tmp_path, SMALLEST, tensors))
    message = str(error.value)
    assert "4 problems" in message and str(tmp_path) in message
    assert "missing model.norm.weight: expected shape (16,)" in message
    assert (
        "wrong shape model.layers.1.mlp.experts.2.up_proj.weight: expected (8, 16), found (8, 15)"
        in message
    )
    assert "unexpected model.layers.1.mlp.experts.4.up_proj.weight: found shape (8, 16)" in message
    assert "wrong dtype model.layers.0.input_layernorm.weight: " in message and "I32" in message


def test_a_long_list_of_problems_is_cut_but_counted(tmp_path, rng):
    tensors = {f"noise.{i}": np.zeros(1, np.float32) for i in range(100)}
    with pytest.raises(CheckpointMismatch) as error:
        load_hf(write_hf(tmp_path, SMALLEST, hf_tensors(SMALLEST, rng) | tensors))
    assert "(100 problems)" in str(error.value) and "and 60 more" in str(error.value)


def test_nothing_is_allocated_for_files_that_do_not_fit(tmp_path, rng):
    huge = SMALLEST.replace(vocab_size=10**12)
    with pytest.raises(CheckpointMismatch, match="embed_tokens"):
        load_hf(write_hf(tmp_path, huge, hf_tensors(SMALLEST, rng)))


def test_rotary_buffers_of_old_exports_are_overlooked(tmp_path, rng):
    tensors = hf_tensors(SMALLEST, rng)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    load_hf(write_hf(tmp_path, SMALLEST, tensors))


@pytest.mark.parametrize("written", [False, True])
def test_the_head_of_tied_embeddings_may_be_written_or_not(tmp_path, rng, written):
    tied = SMALLEST.replace(tie_word_embeddings=True)
    tensors = hf_tensors(SMALLEST, rng)
    if not written:
        del tensors["lm_head.weight"]
    params, config = load_hf(write_hf(tmp_path, tied, tensors))
    assert "lm_head" not in params and config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3fn, np.float64])
def test_dtypes_that_cannot_hold_weights_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match="float"):
        load_hf(tmp_path, dtype)


# -- where it goes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_loading_onto_a_mesh_equals_loading_onto_one_device(tmp_path, rng, devices, sizes):
    directory = write_hf(tmp_path, SMALLEST, hf_tensors(SMALLEST, rng), files=3)
    expected, config = load_hf(directory)
    mesh = sharding.make_mesh(*sizes, devices=devices)
    rules = sharding.Rules(embed="data")
    params, _ = load_hf(directory, shardings=lambda c: sharding.shardings(c, mesh, rules))
    assert_trees_equal(params, expected)
    tree = sharding.shardings(config, mesh, rules)
    assert jax.tree.map(lambda x: x.sharding, params) == tree
    again, _ = load_hf(directory, shardings=tree)
    assert_trees_equal(again, expected)


def test_loaded_parameters_may_be_donated(tmp_path, rng):
    # On CPU arrays adopt the loader's buffers: donation must not trip over them.
    tensors = hf_tensors(SMALLEST, rng)
    params, _ = load_hf(write_hf(tmp_path, SMALLEST, tensors))
    embed, head = params["embed"]["weight"], params["lm_head"]["weight"]
    doubled = jax.jit(lambda x: x + x, donate_argnums=0)(embed)
    np.testing.assert_array_equal(doubled, 2 * tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(head, tensors["lm_head.weight"].T)
    assert embed.is_deleted()


def test_shardings_of_another_structure_are_refused(tmp_path, rng, devices):
    directory = write_hf(tmp_path, SMALLEST, _without_mtp(hf_tensors(SMALLEST, rng)))
    mesh = sharding.make_mesh(8, devices=devices)
    with pytest.raises(ValueError, match="pass a function of the config") as error:
        load_hf(directory, shardings=sharding.shardings(SMALLEST, mesh))
    assert "mtp/0/norm/weight: only in shardings" in str(error.value)


def test_a_llama_without_the_names_of_mla_loads(tmp_path, rng):
    config = presets["llama3_1b"].replace(
        vocab_size=12, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, mlp_bias=True, attention_bias=True,
    )  # fmt: skip
    shapes = {"model.embed_tokens.weight": (12, 16), "model.norm.weight": (16,)}
    for i in range(2):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (16,),
            p + "post_attention_layernorm.weight": (16,),
        }
        for name, out, into in (
            ("self_attn.q_proj", 24, 16), ("self_attn.k_proj", 12, 16), ("self_attn.v_proj", 12, 16),
            ("self_attn.o_proj", 16, 24), ("mlp.gate_proj", 8, 16), ("mlp.up_proj", 8, 16), ("mlp.down_proj", 16, 8),
        ):  # fmt: skip
            shapes |= {f"{p}{name}.weight": (out, into), f"{p}{name}.bias": (out,)}
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    params, loaded = load_hf(write_hf(tmp_path, config, tensors))
    assert loaded == config
    expected_params(tensors, config, functools.partial(layer_of, params, config))


def test_a_directory_without_safetensors_is_refused(tmp_path):
    write_hf(tmp_path, SMALLEST, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load_hf(tmp_path)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path, rng):
    tensors = hf_tensors(SMALLEST, rng)
    directory = write_hf(tmp_path, SMALLEST, tensors, files=2)
    # The last file loses a tensor and gains one of the first file's.
    path = directory / "model-00002-of-00002.safetensors"
    names = list(tensors)
    kept = names[(len(names) + 1) // 2 : -1]
    write_safetensors(path, {name: tensors[name] for name in [names[0], *kept]})
    with pytest.raises(CheckpointMismatch) as error:
        load_hf(directory)
    assert f"{names[0]} is in both model-00001-of-00002" in str(error.value)
    assert f"{names[-1]} is not in model-00002-of-00002" in str(error.value)
