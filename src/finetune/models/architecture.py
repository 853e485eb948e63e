"""Which class of transformers trains a checkpoint on text, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CAUSAL = "AutoModelForCausalLM"
IMAGE_TEXT = "AutoModelForImageTextToText"


def language_model_class(config: Any) -> str:
    """Returns the auto class to load a checkpoint with: `IMAGE_TEXT` where it takes images too, else `CAUSAL`.

    `AutoModelForCausalLM` does not know Qwen2.5-VL, and of Qwen3.5 it takes the text part alone, so the saved model
    would have lost its vision tower. Encoder-decoders stay with `CAUSAL`, which takes their decoder or refuses them.
    """
    if getattr(config, "is_encoder_decoder", False):
        return CAUSAL
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = getattr(config, "model_type", "")
    architecture = next(iter(getattr(config, "architectures", None) or ()), None)
    if architecture is None:  # a configuration on its own: the text part is taken where there is one
        known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
        return IMAGE_TEXT if kind in known else CAUSAL
    if architecture in image_text_classes():
        return CAUSAL if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) == architecture else IMAGE_TEXT
    remote = getattr(config, "auto_map", None) or {}
    return IMAGE_TEXT if IMAGE_TEXT in remote and CAUSAL not in remote else CAUSAL


def takes_images(config: Any) -> bool:
    """Returns whether the model of a configuration takes images beside text, so that a processor belongs to it."""
    architectures = getattr(config, "architectures", None) or ()
    return language_model_class(config) == IMAGE_TEXT or any(name in image_text_classes() for name in architectures)


def image_text_classes() -> set[str]:
    """Returns the names of the classes in transformers that write text from images and text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return class_names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def class_names(mapping: Mapping[str, Any]) -> set[str]:
    """Returns the class names in a mapping of transformers, whose values are names or tuples of them."""
    return {name for value in mapping.values() for name in ([value] if isinstance(value, str) else value)}
