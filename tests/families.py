"""Tiny random models of every causal family that transformers can build from a configuration.

A family's own default configuration says which sizes it has; those are made small. What a family needs beyond that is
in `EXCEPTIONS`.
"""

import re
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, PAD, EOS = 64, 0, 1
WIDTH, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 32, 4, 2, 8, 4

# Attributes of configurations and their small values; a family gets those that its default configuration has.
_SIZES: list[tuple[Any, str]] = [
    (WIDTH, "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim lru_width hidden_size_global"),
    (WIDTH, "attention_hidden_size embedding_size input_embedding_size output_embedding_size"),
    (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks num_decoder_layers"),
    (2, "num_encoder_layers num_experts_per_tok num_experts_per_token moe_topk moe_k linear_num_heads o_groups"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads index_n_heads decoder_attention_heads"),
    (HEADS, "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"),
    (HEADS, "linear_num_value_heads"),
    (KV_HEADS, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    (HEAD_DIM, "head_dim d_head dim_head kv_channels attention_head_dim attention_head_size swa_head_dim v_head_dim"),
    (HEAD_DIM, "index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim"),
    (HEAD_DIM, "qk_rope_head_dim rotary_dim global_head_dim mamba_d_head mamba_head_dim mamba_headdim"),
    (2 * HEAD_DIM, "qk_head_dim"),
    (8, "kv_lora_rank q_lora_rank o_lora_rank laurel_rank gated_norm_rank adapter_rank hc_lowrank"),
    (8, "hidden_size_per_layer_input router_hidden_size mamba_n_heads mamba_num_heads n_mamba_heads"),
    (48, "intermediate_size moe_intermediate_size ffn_dim dim_ff dff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size"),
    (48, "feed_forward_size d_inner intermediate_size_mlp shared_expert_intermediate_size shared_intermediate_size"),
    (48, "shared_experts_intermediate_size moe_shared_expert_intermediate_size dense_intermediate_size"),
    (48, "expert_ffn_hidden_size"),
    (EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group"),
    (1, "zero_expert_num mamba_n_groups n_groups mamba_ngroups"),
    (0, "num_kv_shared_layers"),
    (0.0, "router_aux_loss_coef aux_loss_coef"),
    (4, "mamba_d_state state_size ssm_state_size mamba_dt_rank time_step_rank"),
    (2 * WIDTH, "mamba_d_ssm index_topk"),
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (256, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"),
    (256, "max_target_positions original_max_position_embeddings"),
    (8, "sliding_window sliding_window_size window_size attention_window_size local_attention attention_chunk_size"),
    (8, "local_attention_window_len chunk_size mamba_chunk_size"),
    (0.15, "initializer_range init_std"),
    (4.0, "logits_scaling lm_head_multiplier"),
    (5.0, "final_logit_softcapping attn_logit_softcapping logits_soft_cap output_logit_soft_cap"),
    (0.25, "logit_scale"),
    (EOS, "bos_token_id eos_token_id"),
    (PAD, "pad_token_id"),
]
MAY_BE_NONE = ("head_dim", "final_logit_softcapping", "attn_logit_softcapping")
SIZES = {name: size for size, names in _SIZES for name in names.split()}

HYBRID = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
# What some families need beyond small sizes: layers of each kind at a small depth, sizes that depend on each other.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1]}}
    },
    "blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "dots3_note_text": {
        "head_dim": 16, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {
        "shape_embed_dim": 8, "shape_vocab_size": 8, "pronunciation_embed_dim": 8, "pronunciation_vocab_size": 8,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16, "n_mamba_heads": 2} | HYBRID,
    "zamba2": {"num_key_value_heads": HEADS, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16} | HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
NOT_BUILT = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "it reads another model's cache",
    "gemma4_unified_assistant": "it reads another model's cache",
}
DEPTHS = "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks".split()


def _shown(lists: list[list], number: int) -> list[int]:
    """The first and the last layer, and as many between as it takes to show every kind."""
    chosen = {0, number - 1}
    for values in lists:
        missing = {repr(v) for v in values} - {repr(values[i]) for i in chosen}
        chosen |= {[repr(v) for v in values].index(kind) for kind in missing}
    return sorted(chosen)


def tiny_settings(config_class: type[PreTrainedConfig], exceptions: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a configuration of this class tiny: every size that its defaults have."""
    default = config_class(**{k: v for k, v in exceptions.items() if isinstance(v, dict)})
    parts = {name: getattr(default, name, None) for name in config_class.sub_configs}
    known = {k: v for k, v in default.to_dict().items() if k not in parts}
    settings = {k: v for k, v in SIZES.items() if known.get(k) is not None or (k in known and k in MAY_BE_NONE)}
    settings |= {k: 0.0 for k, v in known.items() if re.search("drop|jitter", k) and isinstance(v, float)}
    if "kv_lora_rank" in known and "num_key_value_heads" in known:
        settings["num_key_value_heads"] = HEADS  # latent attention has no groups
    depths = [k for k in DEPTHS if k in known]
    depth = known[depths[0]] if depths else 0
    lists = {k: list(v) for k, v in known.items() if k not in SIZES and isinstance(v, list | tuple)}
    lists = {k: v for k, v in lists.items() if len(v) == depth > 2 and v != [*range(depth)]}
    if lists:
        shown = _shown(list(lists.values()), depth)
        settings |= {k: [v[i] for i in shown] for k, v in lists.items()} | dict.fromkeys(depths, len(shown))
    ids = [k for k, v in known.items() if re.search("_token_id$|_index$", k) and isinstance(v, int) and v >= VOCAB]
    settings |= {k: 3 for k in ids if k not in settings}
    settings |= {k: True for k in ("is_decoder", "causal") if k in known}
    for name, part in parts.items():
        if isinstance(part, PreTrainedConfig):
            own = exceptions.get(name, {})
            settings[name] = {"model_type": part.model_type, **tiny_settings(type(part), own)}
    return settings | {k: v for k, v in exceptions.items() if k not in parts}


def _classes() -> dict[str, type[PreTrainedModel]]:
    """Model types and their classes, each class once."""
    classes: dict[str, type[PreTrainedModel]] = {}
    for name in dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        model_class = getattr(transformers, name)
        classes[model_class.config_class.model_type] = model_class
    return classes


CLASSES = _classes()
NEWER = {"beam"}  # than the oldest transformers that is supported
FAMILIES = [name for name in CLASSES if name not in NOT_BUILT]


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model, with logits far enough from uniform to tell errors."""
    if family in NEWER and family not in CLASSES:
        pytest.skip(f"transformers {transformers.__version__} has no family {family!r}")
    model_class: Any = CLASSES[family]
    config = model_class.config_class(**tiny_settings(model_class.config_class, EXCEPTIONS.get(family, {})))
    torch.manual_seed(seed)
    model = model_class._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()
