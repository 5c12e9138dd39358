"""The models of a merge: opened, checked to belong together, and read and written a tensor at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from formats.errors import ConfigError, IdentityMismatchError
from formats.identity.fingerprint import ModelFingerprint, TokenizerFingerprint, resolve_model
from trainer.loading import load_tokenizer, require_plain_weights, require_whole_model
from trainer.merging.methods import Merge
from trainer.merging.settings import MergeConfig
from trainer.merging.weights import open_safetensors, tied_names, wide
from trainer.result.lineage import ancestors_of, own_weights
from trainer.result.saving import copy_companions, write_config
from trainer.result.stored_weights import StoredWeights, write_like


@dataclass(frozen=True, kw_only=True)
class Models:
    """The initial model and tuned ones whose tensors are its own."""

    initial_dir: Path
    tuned_dirs: Sequence[Path]
    initial: StoredWeights
    tuned: Sequence[StoredWeights]
    names: Sequence[Mapping[str, str]]
    """Per tuned model: the initial model's name of a tensor -> its name there."""
    identity: Mapping[str, Any]
    """Of the initial model, as `anneal.json` holds it."""

    @classmethod
    def open(cls, config: MergeConfig) -> "Models":
        """Find and check them; no tensor is read but those that might be tied.

        Raises:
            ConfigError: a model or its tensors do not fit.
            FormatError: a weight file is torn.
            IdentityMismatchError: a tuned model comes from another initial model, or has another tokenizer.
        """
        initial_dir = find_model(config.initial, "--initial", config.revision)
        tuned_dirs = [find_model(name, "TUNED") for name in config.tuned]
        initial, tuned = open_safetensors(initial_dir), [open_safetensors(path) for path in tuned_dirs]
        identity = identity_of(initial_dir, config.initial, load_tokenizer(initial_dir))
        for path in tuned_dirs:
            require_descendant(path, identity)
        names = [tied_names(initial, weights) for weights in tuned]
        return cls(
            initial_dir=initial_dir,
            tuned_dirs=tuned_dirs,
            initial=initial,
            tuned=tuned,
            names=names,
            identity=identity,
        )

    def only(self, places: Sequence[int]) -> "Models":
        """The initial model and the tuned ones of these places."""
        return replace(
            self,
            tuned_dirs=[self.tuned_dirs[place] for place in places],
            tuned=[self.tuned[place] for place in places],
            names=[self.names[place] for place in places],
        )

    def write(
        self,
        target: Path,
        function_of: Callable[[str], Merge],
        seen: Callable[[torch.Tensor, torch.Tensor], None] = lambda merged, theta0: None,
    ) -> None:
        """Write the merged model, complete but for card and record, to an existing directory.

        Args:
            target: the directory.
            function_of: name of a tensor -> how it is merged; asked in the order in which they are stored.
            seen: called with every merged tensor and theta0.

        Raises:
            ConfigError: as `merge_tensor`.
        """

        def tensor_of(name: str) -> torch.Tensor:
            others = [weights[known[name]] for weights, known in zip(self.tuned, self.names, strict=True)]
            theta0 = self.initial[name]
            merged = merge_tensor(name, function_of(name), theta0, others)
            seen(merged, theta0)
            return merged

        write_like(self.initial, target, tensor_of)
        copy_companions(self.initial_dir, target)
        write_config(self.initial_dir, target, None)


def merge_tensor(
    name: str, function: Merge, initial: torch.Tensor, tuned: list[torch.Tensor]
) -> torch.Tensor:
    """The merged tensor in the dtype in which the initial one is stored.

    Raises:
        ConfigError: integers differ, of which there is no in-between, or the result is not finite.
    """
    if not initial.is_floating_point():
        if all(torch.equal(initial, other) for other in tuned):
            return initial
        raise ConfigError(
            f"only floating-point tensors can be merged, got {name} of {initial.dtype}, which differs "
            "between the models; merge before quantising"
        )
    theta0 = wide(initial)
    merged = function(theta0, [other.to(theta0.dtype) for other in tuned]).to(initial.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise ConfigError(
            f"merged weights must be finite, got infinity or NaN in {name}; use a smaller --scale, and check "
            "the tuned models"
        )
    return merged


# --- which models belong together ---------------------------------------------------------------------


def find_model(name: str, what: str, revision: str | None = None) -> Path:
    """The directory of a model.

    Raises:
        ConfigError: there is none, or a revision of a directory; or it holds adapters alone, an unfinished run or
            quantised weights.
    """
    path = resolve_model(name, revision, what=what)
    require_whole_model(path, what)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{what} must be a finished model, got no config.json in {path}; finish its run")
    require_plain_weights(path, what)
    return path


def identity_of(initial: Path, name: str, tokenizer: Any) -> dict[str, Any]:
    """What `anneal.json` says of the initial model, as a training run says it from its cache."""
    model = ModelFingerprint.of(initial)
    teacher = {"name": name, "weights": model.weights, "config": model.config}
    return {"teacher": teacher, "tokenizer": vars(TokenizerFingerprint.of(tokenizer))}


def require_descendant(tuned: Path, identity: dict[str, Any]) -> None:
    """Refuse a tuned model that records other ancestors, or reads text otherwise.

    Raises:
        IdentityMismatchError: naming the part that differs.
    """
    recorded, weights = ancestors_of(tuned), identity["teacher"]["weights"]
    known = {entry.weights for entry in recorded}
    if known and weights not in known and weights != own_weights(tuned):  # the initial model itself may go in
        line = ", ".join(entry.weights[:12] for entry in recorded)
        raise IdentityMismatchError(
            f"tuned models must come from --initial, got {tuned}, which was trained from other weights "
            f"({line}; --initial has {weights[:12]}); give the model it was trained from"
        )
    found = vars(TokenizerFingerprint.of(load_tokenizer(tuned)))
    for part, meaning in (("vocabulary", "vocabulary"), ("pipeline", "tokenizer pipeline")):
        if found[part] != identity["tokenizer"][part]:
            raise IdentityMismatchError(
                f"tuned models must use the tokenizer of --initial, got another {meaning} in {tuned}; give "
                "models that were fine-tuned from --initial"
            )
