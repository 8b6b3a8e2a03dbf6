"""Named configurations. ``presets["tiny"].replace(index_topk=32)`` derives a new one."""

from jaxmoe.config import ModelConfig, RopeConfig

BYTE_VOCAB_SIZE = (
    320  # 256 bytes, then special tokens (jaxmoe.tokenizer), padded to a multiple of 64.
)

_DEEPSEEK_YARN = RopeConfig(
    theta=10000.0,
    type="yarn",
    factor=40.0,
    original_max_position_embeddings=4096,
    mscale=1.0,
    mscale_all_dim=1.0,
)

_TINY = ModelConfig(
    vocab_size=BYTE_VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=384,
    moe_intermediate_size=64,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    index_n_heads=16,
    index_head_dim=32,
    index_topk=64,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    max_position_embeddings=16384,
    initializer_range=0.02,
    bos_token_id=256,
    eos_token_id=257,
)

_SMALL = _TINY.replace(
    hidden_size=512,
    intermediate_size=1408,
    moe_intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=8,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    index_head_dim=64,
    index_topk=256,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    max_position_embeddings=16384,
)

_MEDIUM = _SMALL.replace(
    vocab_size=32768,
    hidden_size=1024,
    intermediate_size=3072,
    moe_intermediate_size=512,
    num_hidden_layers=16,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    index_head_dim=128,
    index_topk=2048,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=4,
)

_DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    rope=_DEEPSEEK_YARN,
    max_position_embeddings=163840,
)

presets: dict[str, ModelConfig] = {
    # About 1 M parameters: every feature of V3.2 at notebook size.
    "tiny": _TINY,
    # About 60 M parameters: 8 layers, 32 experts; the shape of the CPU benches.
    "small": _SMALL,
    # About 1.7 B parameters: V3.2's latent sizes and top-k in a model that fits any data-centre GPU; of the GPU benches.
    "medium": _MEDIUM,
    # Spec 1.1. The released sizes.
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3.replace(index_n_heads=64, index_head_dim=128, index_topk=2048),
    # zai-org/GLM-5: V3.2's attention with an interleaved indexer rotation and no expert groups.
    "glm5": ModelConfig(
        vocab_size=154880,
        hidden_size=6144,
        intermediate_size=12288,
        moe_intermediate_size=2048,
        num_hidden_layers=78,
        first_k_dense_replace=3,
        num_attention_heads=64,
        q_lora_rank=2048,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        index_n_heads=32,
        index_head_dim=128,
        index_topk=2048,
        indexer_rope_interleave=True,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        rope=RopeConfig(theta=1000000.0),
        max_position_embeddings=202752,
        rms_norm_eps=1e-5,
    ),
    # meta-llama/Llama-3.2-1B (tied embeddings, llama3 rotary scaling).
    "llama3_1b": ModelConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rope=RopeConfig(
            theta=500000.0,
            type="llama3",
            factor=32.0,
            original_max_position_embeddings=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        rope_interleave=False,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
}
