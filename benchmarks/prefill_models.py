"""Stock transformers classes at a realistic size: four layers, hidden size 512, eight heads of 64, any length.

Base models without a language head, as in a prefill that needs one token's logits only. A class that has windows or
chunks gets them well inside the length, so that they are not causal by accident.
"""

from __future__ import annotations

from typing import Any

import torch

from attnopt.hf.tiny import enlarge

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, VOCAB = 4, 512, 8, 2, 1408, 1000
# Fields by their usual names; a configuration is given those of them that it has.
COMMON = {
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "encoder_layers": LAYERS,
    "decoder_layers": LAYERS, "hidden_size": HIDDEN, "n_embd": HIDDEN, "d_model": HIDDEN, "dim": HIDDEN,
    "word_embed_proj_dim": HIDDEN, "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "num_heads": HEADS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "head_dim": HIDDEN // HEADS,
    "d_kv": HIDDEN // HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": INNER, "ffn_dim": INNER,
    "d_ff": INNER, "n_inner": INNER, "hidden_dim": INNER, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER,
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
DROPOUT = ("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout_prob")

# Class -> (its attention, what differs from COMMON; N stands for the length).
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaModel": ("causal, grouped", {}),
    "MistralModel": ("sliding, grouped", {"sliding_window": "N/8"}),
    "Qwen2Model": ("causal, grouped", {}),
    "Qwen3Model": ("causal, grouped, q and k normalised", {}),
    "Gemma2Model": ("soft-capped, every other layer sliding", {"sliding_window": "N/8"}),
    "Gemma3TextModel": ("sliding and causal", {"sliding_window": "N/8", "sliding_window_pattern": 2}),
    "Phi3Model": ("causal, packed projection", {"sliding_window": None}),
    "PhiModel": ("causal, part rotary", {"num_key_value_heads": HEADS}),
    "GPT2Model": ("causal", {}),
    "GPTNeoXModel": ("causal", {}),
    "GPTJModel": ("causal, written out only", {"rotary_dim": 32}),
    "GPTNeoModel": ("causal and local", {"attention_types": [[["global", "local"], 2]], "window_size": "N/8"}),
    "OPTModel": ("causal", {}),
    "FalconModel": ("causal, one KV head", {"multi_query": True, "new_decoder_architecture": False, "alibi": False}),
    "BloomModel": ("causal, ALiBi", {}),
    "MptModel": ("causal, ALiBi", {}),
    "Starcoder2Model": ("sliding, grouped", {"sliding_window": "N/4"}),
    "DeepseekV3Model": ("latent, unequal head sizes", {
        "first_k_dense_replace": LAYERS, "num_key_value_heads": HEADS, "q_lora_rank": 192, "kv_lora_rank": 128,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "head_dim": 32}),
    "BertModel": ("all keys", {}),
    "RobertaModel": ("all keys", {"max_position_embeddings": "N+2"}),
    "DistilBertModel": ("all keys", {}),
    "ModernBertModel": ("band and all keys", {"local_attention": "N/8", "global_attn_every_n_layers": 2}),
    "T5EncoderModel": ("all keys, table bias", {}),
    "BartModel": ("all keys, causal and cross", {"max_position_embeddings": "N"}),
    "WhisperEncoder": ("all keys", {"max_source_positions": "N"}),
    "ViTModel": ("all keys", {"image_size": "side", "patch_size": 16}),
    "SwinModel": ("windows with a table bias", {"image_size": 224, "embed_dim": 96, "depths": [2, 2],
                                                "num_heads": [4, 8], "num_hidden_layers": None, "hidden_size": None}),
}  # fmt: skip
# What else a length may be called, computed from N.
AMOUNTS = {
    "N": lambda n: n, "N+2": lambda n: n + 2, "N/4": lambda n: n // 4, "N/8": lambda n: n // 8,
    "side": lambda n: 16 * round(n**0.5),
}  # fmt: skip


def class_of(name: str) -> Any:
    import transformers

    if name == "WhisperEncoder":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder
    return getattr(transformers, name)


def model_of(name: str, attention: str, dtype: torch.dtype, length: int) -> Any:
    """An instance of the class with random weights, in eval mode. ValueError where it has no such attention."""
    torch.manual_seed(0)
    cls, special = class_of(name), CLASSES[name][1]
    has = cls.config_class().to_dict()
    fields: dict[str, Any] = {k: v for k, v in COMMON.items() if k in has} | {k: length for k in LENGTHS if k in has}
    fields |= {k: 0.0 for k in DROPOUT if k in has}
    fields |= {k: AMOUNTS[v](length) if v in AMOUNTS else v for k, v in special.items() if not isinstance(v, list)}
    fields |= {k: v for k, v in special.items() if isinstance(v, list)}
    config = cls.config_class(**{k: v for k, v in fields.items() if v is not None or k == "sliding_window"})
    model = cls._from_config(config, attn_implementation=attention)
    enlarge(model)
    return model.eval().to(dtype)


def inputs_of(name: str, model: Any, length: int, padded: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of a prefill of one sequence; padding is a sixteenth of it, on the side that is usual."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        if padded:
            raise ValueError("takes no padding")
        return {"pixel_values": torch.randn(1, 3, size, size, generator=generator).to(dtype)}
    if model.main_input_name == "input_features":
        if padded:
            raise ValueError("takes no padding")
        return {"input_features": torch.randn(1, model.config.num_mel_bins, 2 * length, generator=generator).to(dtype)}
    ids = torch.randint(5, VOCAB, (1, length), generator=generator)
    given: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder and not name.endswith("EncoderModel"):
        given["decoder_input_ids"] = torch.randint(5, VOCAB, (1, length), generator=generator)
    if padded:
        mask = torch.ones(1, length, dtype=torch.long)
        left = "causal" in CLASSES[name][0] or "sliding" in CLASSES[name][0]
        left = left and not model.config.is_encoder_decoder
        mask[:, : length // 16] = 0 if left else 1
        mask[:, -(length // 16) :] = 1 if left else 0
        given["attention_mask"] = mask
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return given
