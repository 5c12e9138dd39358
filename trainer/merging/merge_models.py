"""`merge`: from an initial model and tuned ones to a model directory that transformers and vLLM load.

Everything is checked before anything is written. The result grows in a hidden directory beside its place and
gets its name in one rename, so there is a whole model or none. Time: two reads of every model, the
first for its fingerprint, and one write.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from formats.disk.durable import atomic_write_bytes, fsync_directory, fsync_file
from formats.errors import ConfigError, IdentityMismatchError
from formats.identity.fingerprint import ModelFingerprint, TokenizerFingerprint, resolve_model
from formats.progress import Progress
from trainer.loading import given_as, load_tokenizer, quiet_transformers, require_plain_weights
from trainer.merging.methods import Merge, merge_of, moved, require_peft
from trainer.merging.settings import FORMULAS, MergeConfig, setting_text
from trainer.merging.trim import WholeModelTrim
from trainer.merging.weights import open_safetensors, tied_names, wide
from trainer.result.lineage import ancestors_of, joined, lineage_of, to_record
from trainer.result.model_card import card_head
from trainer.result.run_directory import RECORD_NAME
from trainer.result.saving import copy_companions, write_config
from trainer.result.stored_weights import StoredWeights, write_like
from trainer.result.weight_distance import DistanceSums


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A model that was merged, and from how much."""

    out: Path
    """The model directory."""
    num_models: int
    """Tuned models that were merged."""
    num_tensors: int
    """Tensors of the result."""
    seconds: float
    """Wall time."""

    def line(self) -> str:
        """The last line for the user."""
        models = "1 model" if self.num_models == 1 else f"{self.num_models} models"
        return f"merged {models}, {self.num_tensors} tensors in {self.seconds:.0f} s; model in {self.out}"


def merge(config: MergeConfig, progress: Progress | None = None) -> MergedModel:
    """Merge `config.tuned` with `config.initial` and write the result to `config.out`.

    Args:
        config: models, method, strengths.
        progress: a phase of tensors; silent by default.

    Raises:
        ConfigError: a model, its tensors or the output directory do not fit.
        FormatError: a weight file is torn.
        IdentityMismatchError: a tuned model comes from another initial model, or has another tokenizer.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    quiet_transformers()
    if config.method == "ties":
        require_peft()
    if config.alpha is not None and config.alpha > 1:
        progress.note(
            f"alpha {config.alpha:g} lies beyond the tuned model: what it changed is changed further"
        )
    out = Path(config.out)
    require_empty(out)
    initial_dir = find_model(config.initial, "--initial")
    tuned_dirs = [find_model(name, "TUNED") for name in config.tuned]
    initial, tuned = open_safetensors(initial_dir), [open_safetensors(path) for path in tuned_dirs]
    identity = identity_of(initial_dir, config.initial, load_tokenizer(initial_dir))
    for path in tuned_dirs:
        require_descendant(path, identity)
    names = [tied_names(initial, weights) for weights in tuned]
    function_of = functions(config, initial, tuned, names, progress)
    distance = DistanceSums()
    progress.start("merge", len(initial.shapes), unit="tensor")

    def tensor_of(name: str) -> torch.Tensor:
        others = [weights[known[name]] for weights, known in zip(tuned, names, strict=True)]
        theta0 = initial[name]
        merged = merge_tensor(name, function_of(name), theta0, others)
        distance.add(merged, theta0)
        progress.advance(1)
        return merged

    models = zip([config.initial, *config.tuned], [initial_dir, *tuned_dirs], strict=True)
    record: dict[str, Any] = {
        "status": "complete",
        "identity": identity,
        "lineage": to_record(joined(lineage_of(path, name) for name, path in models)),
        "merge": {
            "method": config.method,
            **config.settings(),
            "tuned": [
                {"name": name, "weights": ModelFingerprint.of(path).weights}
                for name, path in zip(config.tuned, tuned_dirs, strict=True)
            ],
        },
    }
    with staged(out) as staging:
        write_like(initial, staging, tensor_of)
        progress.finish()
        record["distance"] = distance.distance().to_dict()
        copy_companions(initial_dir, staging)
        write_config(initial_dir, staging, None)
        (staging / "README.md").write_text(merge_card(config, identity), encoding="utf-8")
        text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
        atomic_write_bytes(staging / RECORD_NAME, text.encode())
    return MergedModel(
        out=out,
        num_models=len(tuned),
        num_tensors=len(initial.shapes),
        seconds=time.perf_counter() - started,
    )


def functions(
    config: MergeConfig,
    initial: StoredWeights,
    tuned: Sequence[StoredWeights],
    names: Sequence[Mapping[str, str]],
    progress: Progress,
) -> Callable[[str], Merge]:
    """Name of a tensor -> how it is merged. Reads the models where the method looks at all tensors first."""
    if config.trim == "model" and config.density is not None and config.density < 1:
        trim = WholeModelTrim(initial, tuned, names, config.density, progress)

        def trimmed(name: str) -> Merge:
            def merge(theta0: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
                return moved(config, theta0, others, trim.kept(name, [other - theta0 for other in others]))

            return merge

        return trimmed
    plain = merge_of(config)
    return lambda name: plain


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


def require_empty(out: Path) -> None:
    """Refuse an output directory that holds something.

    Raises:
        ConfigError: it is not new or empty.
    """
    contents = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    if contents or (out.exists() and not out.is_dir()):
        what = f"which holds {contents[0]}" if contents else "which is a file"
        raise ConfigError(f"--out must be new or empty, got {out} {what}; choose another directory")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden directory that becomes `out` when the block ends well, and is removed when it does not."""
    out = out.absolute()
    staging = out.with_name(f".{out.name}.merge.staging")
    made = [parent for parent in out.parents if not parent.exists()]  # innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)  # of a merge that was killed
        staging.mkdir()
    except OSError as error:
        raise ConfigError(f"--out must be a place that can be written, got {out}: {error.strerror}") from None
    try:
        yield staging
        for file in staging.iterdir():
            fsync_file(file)
        fsync_directory(staging)
        os.rename(staging, out)  # replaces an empty directory
        fsync_directory(out.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


# --- which models belong together ---------------------------------------------------------------------


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
    if recorded and weights not in {entry.weights for entry in recorded}:
        line = ", ".join(entry.weights[:12] for entry in recorded)
        raise IdentityMismatchError(
            f"tuned models must come from --initial, got {tuned}, which was trained from other weights "
            f"({line}; --initial has {weights[:12]}); give the model it was trained from"
        )
    found = vars(TokenizerFingerprint.of(load_tokenizer(tuned)))
    for part, meaning in (("vocabulary", "vocabulary"), ("pipeline", "tokenizer pipeline")):
        if found[part] != identity["tokenizer"][part]:
            raise IdentityMismatchError(
                f"tuned models must use the tokenizer of --initial, got another {meaning} in {tuned}; merge "
                "models that were fine-tuned from --initial"
            )


def merge_card(config: MergeConfig, identity: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    base = str(identity["teacher"]["name"])
    title, formula = FORMULAS[config.method]
    lines = card_head(base, "merge", f"merged by {title}")
    lines += [f"The weights are `{formula}`, theta0 being those of `{base}`.", "", "| setting | value |"]
    lines += ["|---|---|", f"| initial model | `{base}` |"]
    lines += [f"| tuned model | `{name}` |" for name in config.tuned]
    lines += [f"| {name} | {setting_text(value)} |" for name, value in config.settings().items()]
    lines += ["", "What was merged is recorded in `anneal.json`.", ""]
    return "\n".join(lines)
