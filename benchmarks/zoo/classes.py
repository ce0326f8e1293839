"""The classes of the zoo, all that transformers' auto mappings name, and the subsets that get more cells."""

from __future__ import annotations

from attnopt.hf.classes import Entry, entries

__all__ = ["FAST", "FULL", "Entry", "entries"]

# Twenty classes of pairwise different attention: what the tests run.
FAST = (
    "LlamaForCausalLM", "MistralForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM", "Qwen3ForCausalLM",
    "FalconForCausalLM", "BloomForCausalLM", "GPTNeoXForCausalLM", "OPTForCausalLM", "GptOssForCausalLM",
    "DeepseekV3ForCausalLM", "CohereForCausalLM", "BertForMaskedLM", "RobertaForMaskedLM", "DebertaV2ForMaskedLM",
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "ViTForImageClassification",
    "SwinForImageClassification", "CLIPModel",
)  # fmt: skip

# The classes that get the full grid.
FULL = (
    *FAST,
    "Gemma3ForCausalLM", "Phi3ForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM", "MptForCausalLM",
    "MixtralForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM", "StableLmForCausalLM", "DiffLlamaForCausalLM",
    "Qwen3NextForCausalLM", "Llama4ForCausalLM", "ModernBertForMaskedLM", "AlbertForMaskedLM", "DistilBertForMaskedLM",
    "MarianMTModel", "WhisperForConditionalGeneration", "Dinov2ForImageClassification", "Wav2Vec2ForCTC",
    "SiglipModel",
)  # fmt: skip
