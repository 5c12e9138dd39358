"""Multimodal models are trained as the text model that they hold: text in, the encoders of images and sound untouched.

Most open weights come as `...ForConditionalGeneration`: a text model under the name `language_model`, encoders beside
it. Such a model is loaded whole, so that what is saved has every tensor of the initial one; whatever lies outside the
text model and the output head is not trained and gets no adapters.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.errors import ConfigError
from formats.identity.config_file import is_adapter, read_adapter_config

if TYPE_CHECKING:
    import torch

PLACES = ("model.language_model.", "language_model.")
"""Where transformers keeps the text model of a multimodal one."""
PLANES = ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe", "glm_ocr", "paddleocr_vl", "ernie4_5_vl_moe")
"""Types of models that take positions in time, height and width, and look for packed rows (transformers 5.19) in a
fourth plane alone, before these; their successors make four planes of one by themselves."""


def auto_class(model_dir: Path) -> Any:
    """The auto class of transformers that loads all of a model: of several that a configuration knows, the one with the
    encoders, for the other would save less than was loaded.

    Raises:
        OSError, ValueError: as transformers, for a configuration that is missing or unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = AutoConfig.from_pretrained(base_of(model_dir))
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def base_of(model_dir: Path) -> str:
    """Where the configuration is: beside adapters alone there is none, they name the model that they were made for."""
    if is_adapter(model_dir):
        return str(read_adapter_config(model_dir)["base_model_name_or_path"])
    return str(model_dir)


def require_text_model(model: Any) -> None:
    """Refuse a multimodal model that is no decoder of text with encoders beside it.

    Raises:
        ConfigError: names its class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(model.config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return
    if model.config.is_encoder_decoder or not any(_text_names(model)):
        raise ConfigError(
            "--model must be a causal language model, alone or as the language_model of a multimodal one, got "
            f"{type(model).__name__}; use the checkpoint of its text model"
        )


def packed_positions(model_type: str, position_ids_BL: "torch.Tensor") -> "torch.Tensor":
    """Positions of packed rows as this type of model takes them: [B, L], or [4, B, L] with `PLANES`, all alike."""
    if model_type not in PLANES:
        return position_ids_BL
    return position_ids_BL.expand(4, *position_ids_BL.shape)


def encoders(model: Any) -> dict[str, list[Any]]:
    """The parameters outside the text model and the output head, by the module that holds them; none for a model of
    text alone.

    Args:
        model: a transformers model, not wrapped, without adapters.
    """
    if not (inside := _text_names(model)):
        return {}
    head = model.get_output_embeddings()
    kept = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    found: dict[str, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if name in inside or id(parameter) in kept:
            continue
        first, *rest = name.split(".")
        found.setdefault(f"{first}.{rest[0]}" if first == "model" else first, []).append(parameter)
    return found


def encoders_note(found: dict[str, list[Any]]) -> str | None:
    """One line for the user; None for a model of text alone."""
    if not found:
        return None
    names = ", ".join(name.removeprefix("model.") for name in found)
    return f"multimodal: trained as its text model; {names} ({sum(map(len, found.values()))} tensors) stay as they are"


def _text_names(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(PLACES)}
