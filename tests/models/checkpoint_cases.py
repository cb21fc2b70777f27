"""Small models of each family of Hugging Face checkpoints, by settings of their config.json that are no defaults.

A case is named by its family, then by what it is for; the first of a family, named by it alone, is a fast test.
"""

from typing import Any

from longreach.models import hf

MIXTURE = {"num_local_experts": 6, "num_experts_per_tok": 3}
QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 10}
GEMMA3 = {"hidden_size": 36, "head_dim": 10, "sliding_window": 9}
COHERE2 = {"layer_norm_eps": 1e-3, "sliding_window": 9, "num_key_value_heads": 1, "logit_scale": 0.5}
DEEPSEEK_V3 = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
GPT_OSS = MIXTURE | {
    "head_dim": 10, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "swiglu_limit": 0.8, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}  # fmt: skip
LLAMA4 = {
    "head_dim": 10, "intermediate_size_mlp": 28, "num_local_experts": 4, "moe_layers": [0, 2],
    "attention_chunk_size": 9, "no_rope_layers": [1, 0, 1], "floor_scale": 7, "attn_scale": 0.3,
    "num_key_value_heads": 1,
}  # fmt: skip
KIMI_LINEAR = DEEPSEEK_V3 | {
    "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_local_experts": 8, "linear_head_dim": 8,
    "linear_num_heads": 3, "linear_conv_kernel_dim": 3, "pad_token_id": 0,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
KIMI_LINEAR.pop("n_routed_experts")
MINIMAX = MIXTURE | {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 16, "head_dim": 6,
    "full_attn_alpha_factor": 1.7, "linear_attn_alpha_factor": 1.7, "mlp_alpha_factor": 1.7,
    "full_attn_beta_factor": 0.6, "linear_attn_beta_factor": 0.6, "mlp_beta_factor": 0.6,
}  # fmt: skip
MAMBA = {"state_size": 6, "conv_kernel": 3, "layer_norm_epsilon": 1e-3, "pad_token_id": 0}
MAMBA2 = MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16, "time_step_limit": [0.01, 2.0]}
JAMBA = {
    "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 6,
    "mamba_d_conv": 3, "expert_layer_period": 2, "expert_layer_offset": 1,
}  # fmt: skip
BAMBA = {
    "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_d_conv": 3,
    "mamba_chunk_size": 16,
}  # fmt: skip
QWEN3_NEXT = QWEN3_MOE | {
    "shared_expert_intermediate_size": 20, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 6, "linear_value_head_dim": 5, "linear_conv_kernel_dim": 3, "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
LFM2 = {"norm_eps": 1e-3, "block_multiple_of": 4, "full_attn_idxs": [1]}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"], "ssm_state_size": 6, "head_dim": 10,
    "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "conv_kernel": 3, "chunk_size": 16,
    "layer_norm_epsilon": 1e-3, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 20, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
    "time_step_min": 1e-30,  # transformers takes no smaller steps
}  # fmt: skip
ZAMBA2 = {
    "layers_block_type": ["hybrid", "hybrid", "hybrid"], "hidden_size": 8, "num_mem_blocks": 2, "mamba_d_state": 6,
    "mamba_d_conv": 3, "mamba_ngroups": 2, "n_mamba_heads": 8, "chunk_size": 16, "adapter_rank": 3,
    "hidden_act": "gelu", "rms_norm_eps": 0.05, "time_step_min": 0.002, "pad_token_id": 0,
}  # fmt: skip
GRANITE = {
    "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_d_conv": 3, "mamba_chunk_size": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_local_experts": 6,
    "num_experts_per_tok": 3, "shared_intermediate_size": 20, "embedding_multiplier": 3.0, "logits_scaling": 0.7,
    "residual_multiplier": 0.3, "attention_multiplier": 0.2,
}  # fmt: skip
FALCON_H1 = {
    "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_d_conv": 3,
    "mamba_chunk_size": 16, "head_dim": 10, "pad_token_id": None, "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 0.7, "embedding_multiplier": 3.0, "key_multiplier": 0.6, "lm_head_multiplier": 0.5,
    "mlp_multipliers": [0.9, 1.3], "ssm_in_multiplier": 1.2, "ssm_multipliers": [0.5, 0.75, 1.125, 1.25, 0.875],
    "ssm_out_multiplier": 0.4,
}  # fmt: skip
OLMO_HYBRID = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "pad_token_id": None, "eos_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": None},
}  # fmt: skip
RECURRENT_GEMMA = {
    "hidden_size": 40, "lru_width": 24, "head_dim": 12, "attention_window_size": 9, "conv1d_width": 3,
    "logits_soft_cap": 5.0, "block_types": ["recurrent", "attention"], "pad_token_id": None,
}  # fmt: skip
XLSTM = {  # their cache is made for sizes that 64 divides
    "num_heads": 4, "hidden_size": 128, "chunk_size": 16, "eps": 1e-15, "norm_eps": 1e-3, "gate_soft_cap": 2.0,
    "output_logit_soft_cap": 5.0, "ffn_proj_factor": 0.25, "ffn_round_up_to_multiple_of": 5,
}  # fmt: skip
PHI3 = {
    "partial_rotary_factor": 0.75, "num_key_value_heads": 1, "pad_token_id": None,
    "original_max_position_embeddings": 3 * 32, "rope_parameters": {
        "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 5.0], "rope_theta": 700.0,
    },
}  # fmt: skip
MIXED_WINDOWS = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 9, "head_dim": 10,
    "pad_token_id": None, "eos_token_id": None,
}  # fmt: skip
GRANITE_DENSE = {
    "embedding_multiplier": 3.0, "logits_scaling": 0.7, "residual_multiplier": 0.3, "attention_multiplier": 0.2,
}  # fmt: skip
GLM = {"head_dim": 12, "num_key_value_heads": 1, "pad_token_id": None, "rope_parameters": {"rope_theta": 700.0}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 700.0}
CASES: dict[str, dict[str, Any]] = {
    "mixtral": MIXTURE,
    "mixtral_window": MIXTURE | {"sliding_window": 7, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_dense_layers": QWEN3_MOE
    | {"norm_topk_prob": True, "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 9},
    "gemma3_text": GEMMA3 | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text_scaled": GEMMA3
    | {
        "head_dim": 6,
        "query_pre_attn_scalar": 8,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "gemma2": {**GEMMA3, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 7},
    "gemma2_uncapped": GEMMA3
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    "deepseek_v2": DEEPSEEK_V3
    | {
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.7,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        },
    },
    "deepseek_v2_lite": DEEPSEEK_V3 | {"q_lora_rank": None, "topk_method": "greedy", "attention_bias": True},
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v3_yarn": DEEPSEEK_V3
    | {
        "q_lora_rank": None,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "deepseek_v32": DEEPSEEK_V3 | {"index_topk": 7, "index_n_heads": 16, "index_head_dim": 10},
    "glm4_moe": DEEPSEEK_V3 | {"num_key_value_heads": 2, "use_qk_norm": True, "attention_bias": True, "head_dim": 12},
    "gpt_oss": GPT_OSS,
    "gpt_oss_yarn": MIXTURE | {"head_dim": 6, "attention_bias": False, "sliding_window": 60},
    "llama4_text": LLAMA4,
    "llama4_text_biases": LLAMA4
    | {
        "num_experts_per_tok": 3,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "attention_bias": True,
        "layer_types": ["full_attention", "chunked_attention", "chunked_attention"],
        "tie_word_embeddings": True,
        "interleave_moe_layer_step": 2,
        "moe_layers": None,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 700.0,
        },
    },
    "kimi_linear": KIMI_LINEAR,
    "minimax": MINIMAX,
    "minimax_m2": MIXTURE | {"head_dim": 12, "rotary_dim": 6, "tie_word_embeddings": True},
    "mamba": MAMBA,
    "mamba_biases": MAMBA
    | {"use_bias": True, "use_conv_bias": False, "time_step_rank": 5, "tie_word_embeddings": False},
    "mamba2": MAMBA2,
    "mamba2_biases": MAMBA2 | {"use_bias": True, "use_conv_bias": False, "time_step_limit": [0.0, float("inf")]},
    "falcon_mamba": MAMBA | {"mixer_rms_eps": 1e-3},
    "jamba": JAMBA,
    "jamba_dense": JAMBA | {"num_experts": 1, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 5},
    "bamba": BAMBA,
    "bamba_biases": BAMBA | {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "mamba_d_head": 8},
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_text": {key: value for key, value in QWEN3_NEXT.items() if "expert" not in key and "moe" not in key}
    | {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "linear",
            "factor": 4.0,
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    "qwen3_5_moe_text": QWEN3_NEXT,
    "qwen3_next_biases": QWEN3_NEXT | {"attention_bias": True, "mlp_only_layers": [0], "norm_topk_prob": False},
    "lfm2": LFM2,
    "lfm2_biases": LFM2 | {"conv_bias": True, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
    "nemotron_h": NEMOTRON_H,
    "nemotron_h_biases": NEMOTRON_H
    | {
        "mlp_bias": True,
        "use_bias": True,
        "use_conv_bias": False,
        "layers_block_type": ["linear_attention", "mlp", "full_attention"],
    },
    "nemotron_h_latent": NEMOTRON_H
    | {
        "moe_latent_size": 8,
        "layers_block_type": ["moe", "full_attention", "linear_attention"],
        "norm_topk_prob": False,
    },
    "granitemoehybrid": GRANITE,
    "granitemoehybrid_dense": GRANITE | {"num_local_experts": 0, "position_embedding_type": "rope"},
    "falcon_h1": FALCON_H1,
    "falcon_h1_norms": FALCON_H1
    | {
        "mamba_d_ssm": None,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "tie_word_embeddings": True,
        "mamba_n_heads": 8,
        "mamba_proj_bias": True,
        "projectors_bias": True,
        "mamba_conv_bias": False,
        "attention_bias": True,
        "mlp_bias": True,
        "time_step_limit": [0.01, 1.5],
    },
    "falcon_h1_norm_first": FALCON_H1 | {"mamba_rms_norm": True, "num_hidden_layers": 1},
    "zamba2": ZAMBA2,
    "zamba2_adapters": ZAMBA2
    | {
        "num_mem_blocks": 1,
        "hidden_size": 12,
        "use_shared_attention_adapter": True,
        "num_key_value_heads": 4,
        "use_mem_rope": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        "add_bias_linear": True,
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
    },
    "olmo_hybrid": OLMO_HYBRID,
    "olmo_hybrid_biases": OLMO_HYBRID
    | {"attention_bias": True, "linear_allow_neg_eigval": False, "rope_parameters": {"rope_theta": 7e4}},
    "recurrent_gemma": RECURRENT_GEMMA,
    "recurrent_gemma_biases": RECURRENT_GEMMA
    | {
        "attention_bias": True,
        "tie_word_embeddings": False,
        "lru_width": None,
        "num_key_value_heads": 1,
        "block_types": ["attention", "recurrent", "recurrent"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 1.0},
    },
    "rwkv": {"intermediate_size": 44},
    "rwkv_tied": {"tie_word_embeddings": True, "intermediate_size": None, "num_hidden_layers": 2},
    "xlstm": XLSTM,
    "xlstm_sizes": XLSTM
    | {"num_heads": 2, "hidden_size": 32, "qk_dim_factor": 0.3125, "v_dim_factor": 0.75, "use_cache": False},
    "phi3": PHI3,
    "phi3_window": {
        "sliding_window": 7,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.5,
        "pad_token_id": None,
    },
    "granite": GRANITE_DENSE
    | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rope_parameters": YARN},
    "olmo2": {"num_key_value_heads": 1, "attention_bias": True, "rope_parameters": YARN, "pad_token_id": None},
    "olmo3": MIXED_WINDOWS
    | {
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0},
        },
    },
    "glm": GLM,
    "glm4": GLM | {"head_dim": 8, "partial_rotary_factor": 0.75, "attention_bias": False},
    "seed_oss": {
        "head_dim": 10,
        "num_key_value_heads": 1,
        "attention_out_bias": True,
        "mlp_bias": True,
        "residual_dropout": 0.1,
        "attention_dropout": 0.1,
        "pad_token_id": None,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "num_key_value_heads": 1, "pad_token_id": None},
    "smollm3_windows": {
        "no_rope_layers": [0, 0, 1],
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "use_sliding_window": True,
        "sliding_window": 9,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    },
    "ministral": MIXED_WINDOWS,
    "exaone4": MIXED_WINDOWS | {"num_key_value_heads": 1},
    "exaone4_without_windows": {
        "sliding_window": None,
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": YARN,
        "tie_word_embeddings": True,
    },
    "cohere2": COHERE2 | {"head_dim": 10},
    "cohere2_bias": COHERE2 | {"attention_bias": True, "tie_word_embeddings": False, "sliding_window_pattern": 2},
}
for name, family in hf.known_families().items():
    if family.library == "transformers":
        CASES.setdefault(name, {})  # a new family is tried without a line here


def family_named(case: str) -> str:
    return max((name for name in hf.known_families() if case.startswith(name)), key=len)
