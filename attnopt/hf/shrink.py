"""Small configurations: a few layers of every type, hidden size 64, four heads, nested configurations alike.

A rule is a pattern of field names and a function of the default value; the first rule that matches a field decides.
What the rules cannot know of a class stands in ADJUSTMENTS, by model type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 64, 4, 2, 16, 128, 256
POSITIONS = 128
# Long enough that windows and chunks of WINDOW end inside it; equal to no other size.
LENGTH, WINDOW, IMAGE, PATCH = 40, 16, 32, 8

LAYER_COUNT = re.compile(
    r"(num_hidden_layers|num_layers|n_layers?|n_head_layers|encoder_layers|decoder_layers|depth|num_decoder_layers"
    r"|num_encoder_layers|encoder_num_hidden_layers|decoder_num_hidden_layers|num_blocks)"
)

POSITION_COUNT = re.compile(
    r"(max_position_embeddings|n_positions|max_target_positions|max_seq_len|n_ctx|max_sequence_length|seq_length"
    r"|max_seq_length|max_position)"
)

Rule = tuple[str, Callable[[Any], Any]]


def fixed(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def at_most(limit: int) -> Callable[[Any], Any]:
    return lambda default: min(default, limit)


# Whole field names; only fields whose default is a number are asked.
NUMBERS: tuple[Rule, ...] = (
    (r".*(drop_?out|dropout_rate|drop_path_rate|drop_path|pdrop|layerdrop|drop_rate)(_prob|_p)?", fixed(0.0)),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads?|num_key_value_heads_per_layer|multi_query_group_num"
     r"|num_global_key_value_heads|swa_num_key_value_heads|kv_n_heads)",
     lambda n: 1 if n == 1 else KV_HEADS),
    (r"(num_attention_heads|num_heads|n_heads?|encoder_attention_heads|decoder_attention_heads|decoder_num_attention_heads"
     r"|encoder_num_attention_heads|swa_num_attention_heads|pooler_num_attention_heads|num_attn_heads)", fixed(HEADS)),
    (r"(head_dim|attention_head_dim|attention_head_size|kv_channels|d_kv|d_head|v_head_dim|global_head_dim|key_dim"
     r"|swa_head_dim|linear_key_head_dim|linear_value_head_dim|value_head_dim|mamba_head_dim|projection_head_dim"
     r"|swa_v_head_dim)", fixed(HEAD_DIM)),
    (r"(qk_rope_head_dim|qk_nope_head_dim|index_head_dim|rotary_dim|mamba_d_state|state_size|ssm_state_size)",
     fixed(8)),
    (r"(qk_head_dim)", fixed(16)),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank|lora_rank|.*_rank)", fixed(32)),
    (r"(linear_num_key_heads|linear_num_value_heads|index_n_heads|mamba_n_heads|n_mamba_heads)", fixed(HEADS)),
    (r"(hidden_size|d_model|n_embd|dim|embed_dim|embedding_dim|embedding_size|emb_dim|hidden_dim|d_embed|encoder_hidden_size"
     r"|decoder_hidden_size|text_embed_dim|word_embed_proj_dim|text_hidden_size|vision_hidden_size|out_hidden_size"
     r"|projection_dim|encoder_embed_dim|decoder_embed_dim|input_dim|lm_hidden_size|hidden_act_size|output_dim|model_dim"
     r"|backbone_hidden_size|proj_dim|output_hidden_size|hidden_sizes?|encoder_dim|decoder_dim|mm_hidden_size"
     r"|output_proj_dim|cross_attention_hidden_size|true_hidden_size|adapter_hidden_size)", fixed(HIDDEN)),
    (r"(.*intermediate_size.*|.*ffn_dim|d_ff|n_inner|dim_ff|d_inner|ffn_hidden_size|dff|.*mlp_dim|inner_dim|ffn_size"
     r"|.*feed_forward_size|hidden_size_ffn|intermediate_dim|mlp_hidden_size|linear_units|.*ffn_intermediate.*)",
     fixed(INNER)),
    (r"(hidden_size_per_layer_input)", lambda n: 16 if n else n),
    (r"(vocab_size|n_vocab|.*_vocab_size.*|text_vocab_size)", at_most(VOCAB)),
    (r"(sliding_window|sliding_window_size|attention_window_size|attention_chunk_size|window_size_left|local_attention"
     r"|block_window|local_window_size|attention_window|chunk_attention_size)", lambda n: n if n <= 0 else WINDOW),
    (r"(full_attention_interval|sliding_window_pattern|global_attn_every_n_layers|attn_layer_period|layer_group_size"
     r"|full_attn_every_n_layers|_sliding_window_pattern)", at_most(2)),
    (r"(attn_layer_offset)", at_most(1)),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index|n_dense_layers|num_kv_shared_layers|num_nextn_predict_layers"
     r"|mtp_num_hidden_layers|moe_layer_end_index)", at_most(1)),
    (r"(max_window_layers)", fixed(1)),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts|num_total_experts|num_moe_experts"
     r"|num_routed_experts|router_num_experts)", lambda n: min(n, 4) if n else n),
    (r"(num_experts_per_tok|num_experts_per_token|moe_k|moe_topk|moe_top_k|top_k_experts|num_selected_experts|top_k_expert|router_topk"
     r"|experts_per_token|experts_top_k|num_experts_per_topk)", at_most(2)),
    (r"(n_group|topk_group|num_expert_group|topk_groups|n_groups|num_groups_experts)", at_most(1)),
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts|num_zero_experts|zero_expert_num)", at_most(1)),
    (r"(index_topk)", at_most(16)),
    (r"(image_size|img_size|input_size|crop_size)", at_most(IMAGE)),
    (r"(patch_size)", lambda n: min(n, PATCH) if n >= 7 else n),
    (r"(max_source_positions|max_audio_length)", at_most(64)),
    (r"(num_mel_bins|num_mel_filters|feature_size)", at_most(16)),
    (r"(num_queries|num_query_tokens|num_latents|num_image_tokens|mm_tokens_per_image|query_length)", at_most(8)),
    (r"(conv_dim|num_conv_pos_embeddings)", at_most(32)),
    (r"(num_conv_pos_embedding_groups|conv_pos_groups)", at_most(4)),
)  # fmt: skip
NUMBERS_COMPILED = tuple((re.compile(pattern), value) for pattern, value in NUMBERS)
# Fields whose default is None and whose meaning then is "like another field".
DERIVED = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS, "attention_head_dim": HEAD_DIM}
TOKEN_ID = re.compile(r".*_(token_id|token_index|token_ids|id|index)")
# Fields that end like a token's and are not one.
NOT_TOKENS = {"layer_index", "vision_feature_layer", "problem_id", "image_grid_id"}

# What the rules cannot know, by model type; the dotted name of a nested field reaches into it.
ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2},
    "falcon": {"num_kv_heads": 1, "multi_query": True},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4,
                 "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    "musicgen_decoder": {"vocab_size": 256, "num_codebooks": 2},
    "musicgen_melody_decoder": {"vocab_size": 256, "num_codebooks": 2},
    "longformer": {"attention_window": [16, 16]},
    "led": {"attention_window": [16, 16]},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1]},
    "canine": {"local_transformer_stride": 16},
    "swin": {"image_size": 32, "patch_size": 4, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4],
             "embed_dim": 32},
    "swinv2": {"image_size": 32, "patch_size": 4, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4],
               "embed_dim": 32},
    "donut-swin": {"image_size": 32, "patch_size": 4, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4],
                   "embed_dim": 32},
    "maskformer-swin": {"image_size": 32, "patch_size": 4, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4],
                        "embed_dim": 32},
    "levit": {"image_size": 64, "key_dim": [8, 8, 8], "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4]},
    "mobilevitv2": {"image_size": 64}, "efficientnet": {"image_size": 32, "width_coefficient": 0.2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
                     "intermediate_size": [128] * 4},
    "perceiver": {"num_latents": 8, "d_latents": 64, "num_blocks": 1, "num_self_attends_per_block": 2,
                  "num_self_attention_heads": 4, "num_cross_attention_heads": 1, "image_size": 32,
                  "train_size": [32, 32], "qk_channels": None, "v_channels": None},
    "glm5_next_text": {"num_key_value_heads": 4}, "glm5_next": {"num_key_value_heads": 4},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}},
    "esmc": {"num_key_value_heads": 4}, "dots3_note": {"num_key_value_heads": 4},
    "esm": {"vocab_size": 40, "pad_token_id": 1, "mask_token_id": 32},
    "step3p7": {"sliding_window": 16},
    "swin2sr": {"image_size": 32, "patch_size": 1, "window_size": 4, "depths": [1, 1], "num_heads": [4, 4],
                "embed_dim": 32},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"]},
    "zamba2": {"mamba_headdim": 16},
    "wav2vec2-bert": {"feature_projection_input_dim": 160, "vocab_size": 64}, "wav2vec2-conformer": {"vocab_size": 64},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "convnextv2": {"image_size": 64}, "convnext": {"image_size": 64},
    # Large enough for every stage to attend to more than one key.
    "pvt": {"image_size": 64}, "pvt_v2": {"image_size": 64}, "segformer": {"image_size": 64},
    "glpn": {"image_size": 64}, "swiftformer": {"image_size": 64}, "pp_formulanet_vision": {"image_size": 64},
    "mobilevit": {"image_size": 128},
}  # fmt: skip


def number(name: str, default: Any) -> Any:
    """The small value of a number field; the default where no rule knows the field."""
    for pattern, value in NUMBERS_COMPILED:
        if pattern.fullmatch(name):
            return value(default)
    return default


def chosen_layers(data: dict[str, Any]) -> list[int]:
    """Indices of the layers that stay: the first of every type, at least two."""
    types = next((data[k] for k in ("layer_types", "layers_block_type", "block_types") if data.get(k)), None)
    if not isinstance(types, Sequence) or isinstance(types, str):
        return [0, 1]
    mlp = data.get("mlp_layer_types") or types
    kinds = list(zip(types, mlp, strict=False))
    first = sorted({kinds.index(kind) for kind in kinds})
    return first if len(first) > 1 else [0, 1]


def shortened(name: str, value: list[Any], count: int, layers: list[int]) -> Any:
    """A list field: one entry per layer that stays, one block a stage, sections of a rotation of a small head."""
    if name in ("depths", "num_blocks", "layers") and all(isinstance(v, int) for v in value):
        return [1] * len(value)
    if count and len(value) == count and count > len(layers):
        return [value[i] for i in layers]
    if name.endswith("mrope_section"):
        return [HEAD_DIM // 2 - 2 * (HEAD_DIM // 6), HEAD_DIM // 6, HEAD_DIM // 6] if len(value) == 3 else value
    if name in ("long_factor", "short_factor"):
        return value[: HEAD_DIM // 2]
    if name in ("image_size", "img_size", "input_size"):
        return [min(v, IMAGE) for v in value]
    if name == "patch_size":
        return [min(v, PATCH) if v >= 7 else v for v in value]
    if name == "conv_dim":
        return [32] * len(value)
    return value


def fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration with their defaults, nested configurations aside."""
    skip = {"model_type", "transformers_version", "architectures", "_name_or_path", "dtype", *config.sub_configs}
    return {name: value for name, value in config.to_dict().items() if name not in skip}


def changes(config: Any, positions: int = POSITIONS) -> dict[str, Any]:
    """The constructor arguments that make `config`, an instance with its defaults, small."""
    data = fields(config)
    layers = chosen_layers(data)
    counts = [v for k, v in data.items() if LAYER_COUNT.fullmatch(k) and isinstance(v, int)]
    small: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, bool):
            continue
        if value is None:
            # Left to the class, these would follow the sizes of the published model.
            small.update({name: DERIVED[name]} if name in DERIVED else {})
            continue
        if isinstance(value, int) and LAYER_COUNT.fullmatch(name):
            small[name] = min(value, len(layers))
        elif isinstance(value, int) and POSITION_COUNT.fullmatch(name):
            small[name] = min(value, positions)
        elif isinstance(value, (int, float)):
            small[name] = number(name, value)
        elif isinstance(value, (list, tuple)) and value:
            small[name] = shortened(name, list(value), max(counts, default=0), layers)
        elif isinstance(value, dict):
            small[name] = shrunk_dict(value)
    if "qk_rope_head_dim" in small and "head_dim" in small:
        # Latent attention: the field called head_dim is the size of the rotated part.
        small["head_dim"] = small["qk_rope_head_dim"]
    if "kv_lora_rank" in data and "num_key_value_heads" in data:
        # Every head of latent attention gets keys of its own.
        small["num_key_value_heads"] = HEADS
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        held = small.get("rope_parameters") or data.get("rope_parameters") or {}
        half = int(small.get("head_dim", data.get("head_dim", HEAD_DIM)) * held.get("partial_rotary_factor", 1.0)) // 2
        rope = small.get("rope_parameters") or data.get("rope_parameters") or {}
        rope = {"rope_type": "default", "rope_theta": 10000.0, **rope}
        small["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    small = {k: v for k, v in small.items() if k not in data or v != data[k]}
    return {**small, **token_ids({**data, **small})}


def shrunk_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    """A dict field, such as rope_parameters: its lists are shortened, the rest stays."""
    return {
        k: shrunk_dict(v) if isinstance(v, dict) else shortened(str(k), v, 0, []) if isinstance(v, list) else v
        for k, v in value.items()
    }


def token_ids(data: dict[str, Any]) -> dict[str, Any]:
    """Special tokens outside the small vocabulary get ids of their own inside it, counted from its end."""
    vocab = data.get("vocab_size")
    vocab = vocab if isinstance(vocab, int) else VOCAB
    small: dict[str, Any] = {}
    free = vocab - 1
    for name, value in data.items():
        held = value if isinstance(value, list) else [value]
        if not TOKEN_ID.fullmatch(name) or name in NOT_TOKENS:
            continue
        if any(isinstance(v, int) and not isinstance(v, bool) and v >= vocab for v in held):
            small[name] = [free - n for n in range(len(value))] if isinstance(value, list) else free
            free -= len(held)
    return small


def shrink(config: Any, adjust: bool = True, positions: int = POSITIONS) -> Any:
    """A small configuration of the same class as `config`, an instance with its defaults or a published model's.

    positions: the tokens that tables of positions hold, unless the model has fewer. Sizes that several fields share
    stay consistent because every rule gives one size wherever it applies.
    """
    small = changes(config, positions)
    for name, cls in config.sub_configs.items():
        nested = getattr(config, name, None)
        if nested is None and cls.__name__ != "AutoConfig":
            continue
        if nested is not None and hasattr(nested, "sub_configs"):
            small[name] = shrink(nested, adjust, positions)
    if adjust:
        small.update(ADJUSTMENTS.get(config.model_type, {}))
    return type(config)(**small)
