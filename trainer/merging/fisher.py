"""The Fisher information of the models of a merge: estimated from a text, or kept by a run; read tensor by tensor.

Matena and Raffel 2022 (arXiv 2111.09832): every entry of the merged model is the mean of the models' entries, each
weighed by how strongly that model's predictions on its text depend on it: sum_i w_i F_i theta_i / sum_i w_i F_i. F is
what EWC uses (trainer/retention/fisher.py), with labels drawn from the model. It is not normalised per model, as the
paper's equation is not and its authors' code is: use `--weights` where one model's F is larger by far.

Memory: while F is estimated, one model in float32, its gradient and F; afterwards F lies on the disk.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from formats.cache import TeacherCache
from formats.disk.token_row import IGNORED
from formats.errors import ConfigError
from formats.identity.fingerprint import ModelFingerprint
from formats.progress import Progress
from trainer.checkpoint import is_complete
from trainer.data.collator import LabelAnnealingCollator
from trainer.data.dataset import CachedDataset
from trainer.data.sampler import sample_rows
from trainer.evaluation.evaluate import require_related
from trainer.loading import default_device, load_model, load_tokenizer, on_device
from trainer.loop.output_head import OutputHead
from trainer.merging.models import Models
from trainer.preflight.vocabulary import shared_vocabulary
from trainer.result.saving import stored_form, tied_groups
from trainer.retention.anchor import Held
from trainer.retention.fisher import Fisher, estimate_fisher
from trainer.retention.fisher_file import KEY, WEIGHTS, save_tensors

LABELS, SEED, ROWS = "sampled", 0, 256


class FisherOfModels:
    """F of every model of a merge, under the names of the initial model's tensors.

    Args:
        sources: per model a cache of text that it knows, or the `ewc-fisher` directory of a run that started from it.
        models: of the merge.
        num_rows: rows of a cache that are read; None for `ROWS`.
        work: a directory that does not exist; it is made, and `close` removes it.
        progress: a line per model.

    Raises:
        ConfigError: a directory is neither, is of another model or lacks a tensor; a text has no labels; or rows of
            none are asked for.
        FormatError: a cache is broken.
        IdentityMismatchError: it is of another tokenizer.
    """

    def __init__(
        self, sources: Sequence[str], models: Models, num_rows: int | None, work: Path, progress: Progress
    ) -> None:
        self.models, self.work, self.num_rows, self.progress = models, work, num_rows or ROWS, progress
        self.keys: list[dict[str, Any]] = []
        """What each F was estimated from, for the record."""
        self._open: list[Any] = []
        for place, source in enumerate(sources):
            if _is_kept(Path(source)):
                _require_of(Path(source), models.tuned_dirs[place])
            else:
                TeacherCache(source)  # the cheapest mistakes first
        if num_rows is not None and all(_is_kept(Path(source)) for source in sources):
            raise ConfigError(
                f"--fisher-rows is of texts, got {num_rows} beside F that runs kept; leave it out, or give a cache"
            )
        work.mkdir()
        for place, source in enumerate(sources):
            self._add(place, Path(source))

    def _add(self, place: int, source: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file

        directory = self.models.tuned_dirs[place]
        model = load_model(directory, dtype="float32")
        if _is_kept(source):
            key = json.loads((source / KEY).read_text(encoding="utf-8"))
            fisher = load_file(source / WEIGHTS)
        else:
            key, fisher = self._estimated(model, directory, source)
        path = self.work / f"{place}.safetensors"
        save_tensors(by_stored_name(model, fisher, source), path)
        self.keys.append(key)
        self._open.append(safe_open(path, framework="pt"))

    def _estimated(self, model: Any, directory: Path, source: Path) -> tuple[dict[str, Any], Fisher]:
        started = time.perf_counter()
        cache, tokenizer = TeacherCache(source), load_tokenizer(directory)
        require_related(cache, directory, tokenizer, kl=False)
        head = OutputHead.of(model).install()
        head.vocab_size = shared_vocabulary([cache], head.num_outputs, tokenizer, different_student=True)
        dataset = CachedDataset(cache, loss="ce")
        rows = sample_rows(dataset, self.num_rows, SEED)
        if not any((dataset[row]["labels"][1:] != IGNORED).any() for row in rows.tolist()):
            raise ConfigError(
                f"--fisher must have tokens that carry loss, got none in {len(rows)} rows of {source}; build it from "
                "plain text"
            )
        device = torch.device(default_device())
        model.to(device).eval()
        held = [Held(name, p, p.detach()) for name, p in model.named_parameters()]
        lone: Any = LoneModel(model, head, getattr(tokenizer, "pad_token_id", None) or 0, device)
        fisher, num_tokens = estimate_fisher(lone, held, dataset, rows, LABELS, SEED)
        head.remove()
        self.progress.note(
            f"Fisher information of {directory.name}: {len(rows)} rows of {source}, {num_tokens:,} tokens in "
            f"{time.perf_counter() - started:.0f} s"
        )
        key = {"cache": cache.identity.digest(), "num_rows": self.num_rows, "labels": LABELS, "seed": SEED}
        return key, {name: value.cpu() for name, value in fisher.items()}

    def __getitem__(self, name: str) -> list[torch.Tensor]:
        """F of every model for the initial model's tensor of that name; zero where transformers does not load it."""
        found = []
        for opened, known in zip(self._open, self.models.names, strict=True):
            tuned_name = known[name]
            if tuned_name in opened.keys():  # noqa: SIM118  (no mapping)
                found.append(opened.get_tensor(tuned_name))
            else:
                found.append(torch.zeros(self.models.initial.shapes[name]))
        return found

    def close(self) -> None:
        """Remove what was written."""
        self._open.clear()
        shutil.rmtree(self.work, ignore_errors=True)


class LoneModel:
    """What `estimate_fisher` asks of a Trainer, for a model on its own."""

    is_fsdp_enabled = False

    def __init__(self, model: nn.Module, head: OutputHead, pad_token_id: int, device: torch.device) -> None:
        self.model, self.head = model, head
        self.args = SimpleNamespace(device=device, process_index=0, world_size=1)
        self._collator = LabelAnnealingCollator(pad_token_id)

    def evaluation_model(self) -> nn.Module:
        """The model."""
        return self.model

    def device_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows as one padded batch."""
        return on_device(self._collator(rows), self.args.device)

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Nothing: the weights are float32."""
        return nullcontext()


def by_stored_name(model: Any, fisher: Mapping[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    """F under the names, and cut as, the files have the weights; a tied weight's under each of its names.

    Raises:
        ConfigError: a parameter has none.
    """
    missing = [name for name, _ in model.named_parameters() if name not in fisher]
    if missing:
        raise ConfigError(
            f"--fisher must hold every weight of its model, got none for {missing[0]} in {source}, which that run did "
            "not train; give a cache instead"
        )
    whole = dict(fisher)
    for names in tied_groups(model):
        whole |= {name: whole[names[0]] for name in names}
    return {name: value.clone().contiguous() for name, value in stored_form(model, whole).items()}


def _is_kept(source: Path) -> bool:
    """Whether it is F that a run kept, and no text."""
    return is_complete(source) and (source / KEY).is_file()


def _require_of(kept: Path, model_dir: Path) -> None:
    found = json.loads((kept / KEY).read_text(encoding="utf-8")).get("weights")
    mine = ModelFingerprint.of(model_dir).weights
    if found != mine:
        raise ConfigError(
            f"--fisher must be of its model, got that of other weights ({str(found)[:12]}) in {kept} for {model_dir} "
            f"({mine[:12]}); give them in the order of the models, or a cache"
        )
