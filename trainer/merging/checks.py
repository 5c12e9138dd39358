"""Which models belong together: those whose record and tokenizer are those of the initial one."""

import json
from pathlib import Path
from typing import Any

from formats.errors import ConfigError, IdentityMismatchError
from formats.identity.fingerprint import ModelFingerprint, TokenizerFingerprint, resolve_model
from trainer.evaluation.evaluate import recorded_initial
from trainer.loading import given_as, load_tokenizer


def find_model(name: str, what: str) -> Path:
    """The directory of a model.

    Raises:
        ConfigError: there is none; or it holds adapters alone, an unfinished run or quantised weights.
    """
    with given_as(what):
        path = resolve_model(name)
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ConfigError(
                f"{what} must be a whole model, got adapters alone in {path}; train with lora.merge: true"
            )
        raise ConfigError(f"{what} must be a finished model, got no config.json in {path}; finish its run")
    require_plain_weights(path, what)
    return path


def require_plain_weights(path: Path, what: str) -> None:
    """Refuse quantised weights, between which there is no average.

    Raises:
        ConfigError: config.json says that the weights are quantised, or is not JSON.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"config.json must be JSON, got {path / 'config.json'}: {error}") from None
    if config.get("quantization_config"):
        raise ConfigError(
            f"{what} must have plain weights, got quantised ones in {path}; merge before quantising"
        )


def identity_of(initial: Path, name: str, tokenizer: Any) -> dict[str, Any]:
    """What `anneal.json` says of the initial model, as a training run says it from its cache."""
    model = ModelFingerprint.of(initial)
    teacher = {"name": name, "weights": model.weights, "config": model.config}
    return {"teacher": teacher, "tokenizer": vars(TokenizerFingerprint.of(tokenizer))}


def require_descendant(tuned: Path, identity: dict[str, Any]) -> None:
    """Refuse a tuned model that records another initial model, or reads text otherwise.

    Raises:
        IdentityMismatchError: naming the part that differs.
    """
    recorded, weights = recorded_initial(tuned), identity["teacher"]["weights"]
    if recorded not in (None, weights):
        raise IdentityMismatchError(
            f"tuned models must come from --initial, got {tuned}, which was trained from other weights "
            f"({str(recorded)[:12]}; --initial has {weights[:12]}); give the model it was trained from"
        )
    found = vars(TokenizerFingerprint.of(load_tokenizer(tuned)))
    for part, meaning in (("vocabulary", "vocabulary"), ("pipeline", "tokenizer pipeline")):
        if found[part] != identity["tokenizer"][part]:
            raise IdentityMismatchError(
                f"tuned models must use the tokenizer of --initial, got another {meaning} in {tuned}; merge "
                "models that were fine-tuned from --initial"
            )
