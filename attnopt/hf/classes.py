"""The classes that transformers' auto mappings name, each once, under the first kind that lists it.

transformers is imported when asked, so that this module stays light.
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


@dataclass(frozen=True)
class Entry:
    """One class: its name, one of KINDS, and the model type of its configuration."""

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
