"""save_hf: what is written, how it is split, and that it comes back."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint.support import (
    SMALLEST,
    assert_trees_equal,
    hf_tensors,
    numbered_params,
    read_model,
    write_hf,
)

from jaxmoe import sharding
from jaxmoe.checkpoint import load_hf, save_hf

CONFIGS = {
    "v32": SMALLEST,
    "v3 without query latent": SMALLEST.replace(
        q_lora_rank=None, index_topk=None, index_n_heads=None, index_head_dim=None
    ),
    "glm with shared selections": SMALLEST.replace(
        indexer_rope_interleave=True, indexer_types=("full", "shared", "shared")
    ),
    "two mtp layers, tied": SMALLEST.replace(num_nextn_predict_layers=2, tie_word_embeddings=True),
    "biases, no shared expert": SMALLEST.replace(attention_bias=True, n_shared_experts=0),
}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 6000])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded_again(tmp_path, name, max_shard_bytes):
    config = CONFIGS[name]
    params = numbered_params(config)
    save_hf(tmp_path, params, config, max_shard_bytes=max_shard_bytes)
    loaded, loaded_config = load_hf(tmp_path)
    assert loaded_config == config
    assert_trees_equal(loaded, params)


def test_the_files_hold_exactly_the_tensors_that_were_loaded(tmp_path, rng):
    tensors = hf_tensors(SMALLEST, rng)
    params, config = load_hf(write_hf(tmp_path / "in", SMALLEST, tensors))
    save_hf(tmp_path / "out", params, config, mtp=True)
    # The copies in the MTP layer are written from the weights they are copies of.
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"]
    written = read_model(tmp_path / "out")
    assert written.keys() == tensors.keys()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(written[name], expected, err_msg=name)


def test_shards_respect_the_size_and_the_index_lists_every_tensor(tmp_path):
    save_hf(tmp_path, numbered_params(SMALLEST), SMALLEST, max_shard_bytes=6000, mtp=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    tensors = read_model(tmp_path)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert all(f.stat().st_size < 6000 + 4000 for f in files)  # plus the header


@pytest.mark.parametrize(("mtp", "in_main", "aside"), [(None, 0, 1), (True, 1, 0), (False, 0, 0)])
def test_mtp_layers_go_where_they_are_asked_to(tmp_path, mtp, in_main, aside):
    save_hf(tmp_path, numbered_params(SMALLEST), SMALLEST, mtp=mtp)
    names = read_model(tmp_path).keys()
    assert (tmp_path / "mtp.safetensors").exists() == bool(aside)
    assert ("model.layers.3.eh_proj.weight" in names) == bool(in_main or aside)
    assert ("model.layers.3.shared_head.head.weight" in names) == bool(in_main)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == (0 if mtp is False else 1)
    assert load_hf(tmp_path)[1].num_nextn_predict_layers == (0 if mtp is False else 1)


def test_at_the_released_depth_mtp_layers_go_into_the_main_files(tmp_path):
    deep = SMALLEST.replace(num_hidden_layers=61, first_k_dense_replace=61, n_routed_experts=2)
    save_hf(tmp_path, numbered_params(deep), deep)
    assert not (tmp_path / "mtp.safetensors").exists()
    assert "model.layers.61.shared_head.head.weight" in read_model(tmp_path)


def test_dtype_converts_all_but_what_must_stay_float32(tmp_path):
    params = numbered_params(SMALLEST)
    save_hf(tmp_path, params, SMALLEST, dtype=jnp.bfloat16)
    tensors = read_model(tmp_path)
    float32 = {name for name, x in tensors.items() if x.dtype == np.float32}
    assert {name.split(".", 3)[-1] for name in float32} == {
        "mlp.gate.e_score_correction_bias",
        "self_attn.indexer.weights_proj.weight",
    }
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    expected = np.asarray(params["embed"]["weight"]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], expected)


def test_sharded_parameters_are_written_like_unsharded_ones(tmp_path, devices):
    mesh = sharding.make_mesh(2, 2, 2, devices=devices)
    tree = sharding.shardings(SMALLEST, mesh, sharding.Rules(embed="data"))
    save_hf(tmp_path, numbered_params(SMALLEST, shardings=tree), SMALLEST)
    loaded, _ = load_hf(tmp_path)
    assert_trees_equal(loaded, numbered_params(SMALLEST))


def test_an_older_model_in_the_directory_is_replaced_completely(tmp_path):
    save_hf(tmp_path, numbered_params(SMALLEST), SMALLEST)
    (tmp_path / "tokenizer.json").write_text("{}")
    new = numbered_params(SMALLEST, offset=1.0)
    save_hf(tmp_path, new, SMALLEST, max_shard_bytes=6000, mtp=True)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "mtp.safetensors").exists()
    assert (tmp_path / "tokenizer.json").exists()
    assert_trees_equal(load_hf(tmp_path)[0], new)
    old = numbered_params(SMALLEST)
    save_hf(tmp_path, old, SMALLEST)
    assert_trees_equal(load_hf(tmp_path)[0], old)
    assert not list(tmp_path.glob("model-*")) and not list(tmp_path.glob(".*"))


def test_a_failed_save_leaves_the_older_model_and_no_litter(tmp_path, monkeypatch):
    old = numbered_params(SMALLEST)
    save_hf(tmp_path, old, SMALLEST)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("jaxmoe.checkpoint.hf.read_into", full)
    with pytest.raises(OSError, match="disk full"):
        save_hf(tmp_path, numbered_params(SMALLEST, offset=1.0), SMALLEST)
    assert_trees_equal(load_hf(tmp_path)[0], old)
    assert not list(tmp_path.glob(".*"))


def test_parameters_of_another_config_are_refused(tmp_path):
    params = numbered_params(SMALLEST)
    with pytest.raises(ValueError, match="unknown mtp/0/embed_norm/weight"):
        save_hf(tmp_path, params, SMALLEST.replace(num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match=r"wrong shape embed/weight: expected \(25, 16\), got"):
        save_hf(tmp_path, params, SMALLEST.replace(vocab_size=25))
    with pytest.raises(ValueError, match="max_shard_bytes must be positive; got 0"):
        save_hf(tmp_path, params, SMALLEST, max_shard_bytes=0)
    with pytest.raises(ValueError, match="dtype must be"):
        save_hf(tmp_path, params, SMALLEST, dtype=jnp.int8)
