"""Model configuration: validation, Hugging Face translation, layer segments."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxmoe
from jaxmoe import ModelConfig, RopeConfig, presets
from jaxmoe.config import LayerKind, _compress
from jaxmoe.params import param_count

LLAMA = ModelConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    rope_interleave=False,
)

# -- validation --------------------------------------------------------------------------------------

# (changes to the tiny preset, what the message must name: field, value, way out)
BAD_MODELS = [
    (dict(vocab_size=0), ["vocab_size", "got 0", "Give 1 or more"]),
    (dict(num_hidden_layers=-2), ["num_hidden_layers", "got -2", "Give 1 or more"]),
    (dict(kv_lora_rank=0), ["kv_lora_rank", "got 0", "Give 1 or more, or None"]),
    (dict(index_topk=0), ["index_topk", "got 0", "or None"]),
    (dict(first_k_dense_replace=-1), ["first_k_dense_replace", "got -1", "Give 0 or more"]),
    (dict(hidden_act="swish"), ["hidden_act", "'swish'", "one of", "'silu'"]),
    (
        dict(qk_nope_head_dim=None, v_head_dim=None),
        ["kv_lora_rank=64", "qk_nope_head_dim, v_head_dim", "unset kv_lora_rank"],
    ),
    (dict(qk_rope_head_dim=15), ["qk_rope_head_dim", "even", "got 15", "Add or drop one"]),
    (
        dict(index_n_heads=None),
        ["index_topk, index_n_heads, index_head_dim", "missing index_n_heads"],
    ),
    (dict(q_lora_rank=None), ["index_topk=64", "q_lora_rank=None", "Set both or unset index_topk"]),
    (dict(index_head_dim=8), ["index_head_dim (8)", ">= qk_rope_head_dim (16)"]),
    (
        dict(index_topk=None, index_n_heads=None, index_head_dim=None, indexer_types=("full",) * 4),
        ["indexer_types", "index_topk is not", "set index_topk"],
    ),
    (
        dict(indexer_types=("full",)),
        ["indexer_types has 1", "num_hidden_layers=4", "one per layer"],
    ),
    (
        dict(indexer_types=("full", "none", "full", "x")),
        ["indexer_types", "['none', 'x']", "'shared'"],
    ),
    (dict(indexer_types=("shared", "full", "full", "full")), ["indexer_types[0] must be 'full'"]),
    (dict(mlp_layer_types=("dense",)), ["mlp_layer_types", "each of 4 layers", "got ('dense',)"]),
    (dict(mlp_layer_types=("moe",) * 4), ["mlp_layer_types", "'dense' or 'sparse'", "'moe'"]),
    (
        dict(n_routed_experts=None, mlp_layer_types=("dense", "dense", "dense", "sparse")),
        ["mlp_layer_types names sparse layers", "set n_routed_experts"],
    ),
    (
        dict(num_experts_per_tok=None),
        ["n_routed_experts=8", "num_experts_per_tok", "got None and 64"],
    ),
    (
        dict(moe_intermediate_size=None),
        ["n_routed_experts=8", "moe_intermediate_size", "got 2 and None"],
    ),
    (dict(n_group=3), ["n_routed_experts (8)", "n_group (3)", "use a divisor of 8"]),
    (dict(topk_group=3), ["topk_group (3)", "n_group (2)", "lower topk_group"]),
    (dict(n_group=8), ["8 experts in 8 groups", ">= 2 experts", "Lower n_group"]),
    (dict(num_experts_per_tok=5), ["num_experts_per_tok (5)", "4 experts", "raise topk_group"]),
    (dict(hidden_size="128"), ["hidden_size", "an integer", "'128'"]),
    (dict(num_attention_heads=True), ["num_attention_heads", "an integer", "True"]),
    (dict(rms_norm_eps=None), ["rms_norm_eps", "a number", "None"]),
    (dict(rope={"theta": 1e4}), ["rope", "RopeConfig", "'theta'"]),
]

# (changes to LLAMA, what the message must name)
BAD_LLAMAS = [
    (
        dict(num_key_value_heads=4),
        ["num_attention_heads (6)", "num_key_value_heads (4)", "use a divisor"],
    ),
    (dict(head_dim=7), ["head_dim", "even", "got 7"]),
    (dict(q_lora_rank=8), ["q_lora_rank=8", "kv_lora_rank is unset", "drop q_lora_rank"]),
    (dict(v_head_dim=8), ["v_head_dim=8", "set kv_lora_rank or drop v_head_dim"]),
    (dict(head_dim=None, hidden_size=-48), ["hidden_size must be >= 1", "-48"]),
    (dict(head_dim=None, num_attention_heads=5), ["hidden_size (48)", "(5)", "set head_dim"]),
    (
        dict(index_topk=4, index_n_heads=2, index_head_dim=8),
        ["index_topk=4", "kv_lora_rank=None", "unset index_topk"],
    ),
]

BAD_ROPES = [
    (dict(type="ntk"), ["rope type", "'ntk'", "'yarn'", "Convert"]),
    (dict(theta=0.5), ["theta", "> 1", "got 0.5", "10000.0"]),
    (dict(type="linear", factor=0.5), ["factor", ">= 1", "got 0.5", "'default'"]),
    (
        dict(type="yarn", factor=2.0),
        ["'yarn'", "original_max_position_embeddings", "got None", "Give"],
    ),
    (dict(type="llama3", factor=2.0), ["'llama3'", "original_max_position_embeddings", "got None"]),
]


def check_message(construct, fragments):
    """Asserts that ``construct`` raises ValueError and that its message holds every fragment."""
    with pytest.raises(ValueError) as caught:
        construct()
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.misuse
@pytest.mark.parametrize(("changes", "fragments"), BAD_MODELS, ids=lambda x: str(x)[:60])
def test_a_bad_model_is_refused_with_field_value_and_way_out(changes, fragments):
    check_message(lambda: presets["tiny"].replace(**changes), fragments)


@pytest.mark.parametrize(("changes", "fragments"), BAD_LLAMAS, ids=lambda x: str(x)[:60])
def test_a_bad_llama_is_refused_with_field_value_and_way_out(changes, fragments):
    check_message(lambda: LLAMA.replace(**changes), fragments)


@pytest.mark.parametrize(("changes", "fragments"), BAD_ROPES, ids=lambda x: str(x)[:60])
def test_a_bad_rotary_embedding_is_refused_with_field_value_and_way_out(changes, fragments):
    check_message(lambda: RopeConfig(**changes), fragments)


@pytest.mark.parametrize("name", list(presets))
def test_presets_are_hashable_and_equal_to_their_rebuilt_selves(name):
    config = presets[name]
    assert hash(config) == hash(dataclasses.replace(config)) and config == config.replace()


# -- Hugging Face ------------------------------------------------------------------------------------

# The config.json of DeepSeek-V3.2, as released.
DEEPSEEK_V32_JSON = """{
  "architectures": ["DeepseekV32ForCausalLM"],
  "attention_bias": false,
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "eos_token_id": 1,
  "ep_size": 1,
  "first_k_dense_replace": 3,
  "hidden_act": "silu",
  "hidden_size": 7168,
  "index_head_dim": 128,
  "index_n_heads": 64,
  "index_topk": 2048,
  "initializer_range": 0.02,
  "intermediate_size": 18432,
  "kv_lora_rank": 512,
  "max_position_embeddings": 163840,
  "model_type": "deepseek_v32",
  "moe_intermediate_size": 2048,
  "moe_layer_freq": 1,
  "n_group": 8,
  "n_routed_experts": 256,
  "n_shared_experts": 1,
  "norm_topk_prob": true,
  "num_attention_heads": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 61,
  "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1,
  "q_lora_rank": 1536,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "quantization_config": {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128]
  },
  "rms_norm_eps": 1e-06,
  "rope_scaling": {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn"
  },
  "rope_theta": 10000,
  "routed_scaling_factor": 2.5,
  "scoring_func": "sigmoid",
  "tie_word_embeddings": false,
  "topk_group": 4,
  "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16",
  "v_head_dim": 128,
  "vocab_size": 129280
}"""


def test_the_released_config_json_of_v32_is_the_preset():
    config = ModelConfig.from_hf(json.loads(DEEPSEEK_V32_JSON))
    # The report trains from std 0.006; config.json carries transformers' default.
    assert config.initializer_range == 0.02
    assert config.replace(initializer_range=0.006) == presets["deepseek_v32"]


def test_the_softmax_scale_of_v32_holds_yarns_factor_squared():
    assert presets["deepseek_v32"].softmax_scale == pytest.approx(0.1352337788608801, rel=1e-12)
    assert presets["deepseek_v32"].rope.cos_sin_scale() == 1.0
    assert presets["llama3_1b"].softmax_scale == 64**-0.5


TINY = presets["tiny"]
NO_INDEXER = dict(index_topk=None, index_n_heads=None, index_head_dim=None)
YARN = RopeConfig(type="yarn", factor=8.0, original_max_position_embeddings=512, truncate=False)
VARIANTS = {
    **presets,
    "llama": LLAMA,
    "llama with biases and tied embeddings": LLAMA.replace(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, eos_token_id=(3, 5)
    ),
    "linear rope": LLAMA.replace(rope=RopeConfig(theta=5e5, type="linear", factor=4.0)),
    "yarn with an attention factor": LLAMA.replace(
        rope=dataclasses.replace(YARN, attention_factor=1.5, beta_fast=16.0)
    ),
    "irregular sparse layers": TINY.replace(
        first_k_dense_replace=0, mlp_layer_types=("sparse", "dense", "sparse", "dense")
    ),
    "shared selections": TINY.replace(
        indexer_types=("full", "full", "shared", "full"), indexer_rope_interleave=True
    ),
    "no query latent": TINY.replace(q_lora_rank=None, rope=YARN, **NO_INDEXER),
    "half-split MLA rotation": TINY.replace(rope_interleave=False, **NO_INDEXER),
    "attention bias": TINY.replace(attention_bias=True),
    "no shared expert, no MTP": TINY.replace(n_shared_experts=0, num_nextn_predict_layers=0),
    "weights not normalised": TINY.replace(norm_topk_prob=False, routed_scaling_factor=1.0),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_hugging_face_round_trip_is_exact_through_json(name):
    config = VARIANTS[name]
    hf = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(hf) == config


@pytest.mark.parametrize("name", list(VARIANTS))
def test_own_dictionary_round_trip_is_exact_through_json(name):
    config = VARIANTS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_dictionary_from_a_newer_version_is_refused():
    data = TINY.to_dict() | {"n_quarks": 3}
    check_message(lambda: ModelConfig.from_dict(data), ["['n_quarks']", "newer jaxmoe"])


def test_a_dense_mla_model_keeps_its_layers_and_size_through_hugging_face():
    config = TINY.replace(n_routed_experts=None, num_nextn_predict_layers=0, **NO_INDEXER)
    again = ModelConfig.from_hf(config.to_hf())
    assert again.layer_kinds == config.layer_kinds and param_count(again) == param_count(config)


def deepseek_json(**changes):
    """V3.2's config.json with ``changes``; a value of ... removes the key."""
    merged = json.loads(DEEPSEEK_V32_JSON) | changes
    return {k: v for k, v in merged.items() if v is not ...}


def test_both_spellings_of_the_rope_settings_mean_the_same():
    old = json.loads(DEEPSEEK_V32_JSON)
    scaling = {k: v for k, v in old["rope_scaling"].items() if k != "type"}
    new = scaling | {"rope_type": "yarn", "rope_theta": 10000.0}
    expected = ModelConfig.from_hf(old)
    assert (
        ModelConfig.from_hf(deepseek_json(rope_scaling=..., rope_theta=..., rope_parameters=new))
        == expected
    )
    both = old["rope_scaling"] | {"rope_type": "yarn"}
    assert ModelConfig.from_hf(deepseek_json(rope_scaling=both)) == expected


def test_a_null_yarn_factor_is_the_ratio_of_the_lengths_as_in_transformers():
    scaling = {"type": "yarn", "factor": None, "original_max_position_embeddings": 4096}
    assert ModelConfig.from_hf(deepseek_json(rope_scaling=scaling)).rope.factor == 40.0


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_a_softmax_scale_beside_another_rope_than_yarn_survives_the_export(kind):
    scaling = {"type": kind, "factor": 4.0, "mscale_all_dim": 1.0}
    config = ModelConfig.from_hf(deepseek_json(rope_scaling=scaling))
    assert config.rope.softmax_mscale() != 1
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_absent_or_null_rope_scaling_means_plain_rotation():
    plain = RopeConfig(theta=10000.0)
    assert ModelConfig.from_hf(deepseek_json(rope_scaling=None)).rope == plain
    assert ModelConfig.from_hf(deepseek_json(rope_scaling=..., rope_theta=...)).rope == plain
    assert (
        ModelConfig.from_hf(deepseek_json(rope_parameters={"rope_type": "default"})).rope == plain
    )


def test_yarn_without_an_original_length_takes_the_maximum_as_transformers_does():
    scaling = {"type": "yarn", "factor": 4.0}
    rope = ModelConfig.from_hf(deepseek_json(rope_scaling=scaling)).rope
    assert rope.original_max_position_embeddings == 163840


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        (dict(indexer_types=["full", "full", "shared", "full"]), "FFSF"),
        (dict(index_topk_pattern="FSSF"), "FSSF"),
        (dict(index_topk_freq=2), "FFSF"),
        (dict(index_topk_freq=3, index_skip_topk_offset=1), "FSSF"),
        (dict(), "FFFF"),
    ],
)
def test_every_spelling_of_glms_shared_selections_is_read(settings, kinds):
    hf = json.loads(json.dumps(presets["glm5"].to_hf())) | {"num_hidden_layers": 4}
    del hf["mlp_layer_types"]
    config = ModelConfig.from_hf(hf | settings)
    names = {"full": "F", "shared": "S"}
    assert "".join(names[kind.indexer] for kind in config.layer_kinds) == kinds
    assert config.indexer_rope_interleave and config.model_type == "glm_moe_dsa"


def test_sparse_layers_may_be_given_by_frequency_or_by_list():
    by_frequency = ModelConfig.from_hf(
        deepseek_json(num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    )
    assert [k.mlp for k in by_frequency.layer_kinds] == [
        "dense",
        "dense",
        "moe",
        "dense",
        "moe",
        "dense",
    ]
    types = ["sparse", "dense", "sparse"]
    by_list = ModelConfig.from_hf(deepseek_json(num_hidden_layers=3, mlp_layer_types=types))
    assert [k.mlp for k in by_list.layer_kinds] == ["moe", "dense", "moe"]


def test_a_config_json_may_omit_what_equals_the_class_defaults():
    config = ModelConfig.from_hf({"model_type": "deepseek_v32"})
    full = ModelConfig.from_hf(deepseek_json(rope_scaling=None, num_nextn_predict_layers=0))
    assert config == full


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (dict(model_type="gpt2"), ["'gpt2'", "supported", "deepseek_v32", "llama"]),
        (dict(model_type=...), ["None", "deepseek_v32"]),
        (dict(scoring_func="softmax"), ["scoring_func='softmax'", "'sigmoid'"]),
        (dict(topk_method="greedy"), ["topk_method='greedy'", "'noaux_tc'"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5", "1.0"]),
        (dict(rope_scaling={"type": "longrope"}), ["rope type", "'longrope'", "'yarn'"]),
        (dict(rope_scaling={"type": "linear"}), ["'linear'", "factor"]),
        (dict(rope_scaling={"type": "linear", "factor": "4"}), ["factor", "a number", "'4'"]),
        (dict(rope_scaling="yarn"), ["rope_scaling", "object", "'yarn'"]),
        (dict(model_type=["llama"]), ["model_type ['llama']", "deepseek_v32"]),
        (dict(num_hidden_layers="61"), ["num_hidden_layers", "integer", "'61'"]),
        (dict(hidden_size=7168.5), ["hidden_size", "integer", "7168.5"]),
        (dict(q_lora_rank="none"), ["q_lora_rank", "integer or None", "'none'"]),
        (dict(norm_topk_prob="yes"), ["norm_topk_prob", "true or false", "'yes'"]),
        (dict(mlp_layer_types=5), ["mlp_layer_types", "list", "5"]),
        (
            dict(model_type="glm_moe_dsa", num_hidden_layers=3, index_topk_pattern="FXS"),
            ["indexer_types", "'full' or 'shared'", "'X'"],
        ),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0, "bend": 2}), ["['bend']", "'yarn'"]),
    ],
)
def test_what_would_change_the_logits_is_refused_by_name(changes, fragments):
    check_message(lambda: ModelConfig.from_hf(deepseek_json(**changes)), fragments)


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        (
            TINY.replace(indexer_types=("full", "shared", "full", "full")),
            ["indexer_rope_interleave=False", "glm_moe_dsa", "Set it to True"],
        ),
        (
            TINY.replace(rope_interleave=False),
            ["rope_interleave=False", "set rope_interleave=True"],
        ),
        (
            TINY.replace(mlp_layer_types=("sparse", "dense", "sparse", "sparse"), **NO_INDEXER),
            ["deepseek_v3", "mlp_layer_types=['sparse', 'dense'"],
        ),
        (
            LLAMA.replace(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=8),
            ["grouped-query attention with routed experts", "export"],
        ),
    ],
)
def test_what_no_hugging_face_type_can_hold_is_refused_on_export(config, fragments):
    check_message(config.to_hf, fragments)


def test_a_config_is_read_from_a_file_or_its_directory(tmp_path):
    (tmp_path / "config.json").write_text(DEEPSEEK_V32_JSON)
    expected = ModelConfig.from_hf(json.loads(DEEPSEEK_V32_JSON))
    assert ModelConfig.from_hf(tmp_path) == expected
    assert ModelConfig.from_hf(str(tmp_path / "config.json")) == expected


def test_unreadable_config_files_are_named(tmp_path):
    check_message(lambda: ModelConfig.from_hf(tmp_path / "absent"), ["absent", "config.json"])
    for text in ("{", "\x00", "[1, 2]"):
        (tmp_path / "config.json").write_text(text)
        check_message(
            lambda: ModelConfig.from_hf(tmp_path), [str(tmp_path), "JSON", "ownload it again"]
        )


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("deepseek_v3", "deepseek_v3"),
        ("deepseek_v32", "deepseek_v32"),
        ("glm5", "glm_moe_dsa"),
        ("llama3_1b", "llama"),
    ],
)
def test_presets_know_their_hugging_face_type(name, model_type):
    assert presets[name].model_type == presets[name].to_hf()["model_type"] == model_type


# -- segments ----------------------------------------------------------------------------------------

KINDS = [LayerKind("dense", None), LayerKind("moe", "full"), LayerKind("moe", "shared")]


def expand(segments):
    """The layers that segments stand for, in order."""
    return tuple(kind for s in segments for _ in range(s.repeats) for kind in s.kinds)


@given(st.lists(st.sampled_from(KINDS), max_size=40))
def test_expanding_the_segments_gives_the_layers(kinds):
    segments = _compress(tuple(kinds))
    assert expand(segments) == tuple(kinds)
    assert all(s.repeats >= 1 and s.kinds for s in segments)


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.integers(2, 12))
def test_a_repeated_pattern_is_one_segment(pattern, repeats):
    assert len(_compress(tuple(pattern * repeats))) == 1


def test_released_models_are_few_segments():
    assert [(len(s.kinds), s.repeats) for s in presets["deepseek_v32"].segments] == [
        (1, 3),
        (1, 58),
    ]
    shared = presets["glm5"].replace(
        indexer_types=("full", "full") + ("full", "shared", "shared") * 25 + ("full",)
    )
    assert len(shared.segments) <= 5 and expand(shared.segments) == shared.layer_kinds


def test_an_mtp_layer_has_an_indexer_of_its_own():
    shared = TINY.replace(
        indexer_types=("full", "full", "full", "shared"), indexer_rope_interleave=True
    )
    assert shared.mtp_kind == LayerKind("moe", "full")
    assert TINY.replace(**NO_INDEXER).mtp_kind == LayerKind("moe", None)


def test_public_names_are_exported():
    assert set(jaxmoe.__all__) >= {"ModelConfig", "RopeConfig", "presets"}
