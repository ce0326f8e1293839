"""The classes of the zoo, read from transformers' auto mappings, and the subsets that get more cells.

A class is named once, under the first kind that lists it. transformers is imported when asked, so that the parent of
the workers stays light.
"""

from __future__ import annotations

from dataclasses import dataclass

# Kind of model -> the auto mappings that name its classes, in transformers.models.auto.modeling_auto.
KINDS: dict[str, tuple[str, ...]] = {
    "causal LM": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "masked LM": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
    "vision": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_IMAGE_MAPPING_NAMES"),
    "audio": (
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_CTC_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    ),
    "vision-language": (
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    ),
}

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


@dataclass(frozen=True)
class Entry:
    """One class of the zoo."""

    name: str
    kind: str
    model_type: str


def entries() -> list[Entry]:
    """Every class of the mappings above, each once, in the order of KINDS and of the mappings."""
    from transformers.models.auto import modeling_auto

    found: dict[str, Entry] = {}
    for kind, mappings in KINDS.items():
        for mapping in mappings:
            for model_type, names in getattr(modeling_auto, mapping).items():
                for name in (names,) if isinstance(names, str) else names:
                    found.setdefault(name, Entry(name, kind, model_type))
    return list(found.values())
