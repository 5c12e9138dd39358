"""How well a model fits a text and how far it has moved from the initial one, read off an evaluation cache.

An evaluation cache holds held-out text with the *initial* model's logprobs, so one pass of the model under
test gives cross-entropy, perplexity and KL(initial || model) (T = 1, forward) without loading the initial
model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formats.cache import TeacherCache
from formats.errors import ConfigError, IdentityMismatchError
from formats.identity.fingerprint import TokenizerFingerprint, resolve_model
from formats.named_path import short_name
from formats.progress import Progress
from formats.table import aligned
from trainer.checks import check_one_of
from trainer.config import DTYPES
from trainer.loading import (
    default_device,
    gives_back_memory,
    load_model,
    load_tokenizer,
    on_device,
    quiet_transformers,
    require_whole_model,
)
from trainer.preflight.vocabulary import shared_vocabulary
from trainer.result.lineage import known_teachers, own_weights
from trainer.result.measured import add_measured, measured_text

Result = dict[str, Any]
COLUMNS = (
    ("CE", "ce", ".4f"),
    ("perplexity", "perplexity", ".3f"),
    ("KL", "kl", ".5f"),
    ("accuracy", "accuracy", ".4f"),
    ("entropy", "entropy", ".4f"),
    ("confidence", "confidence", ".4f"),
    ("calibration error", "calibration_error", ".4f"),
    ("kept", "kept", ".4f"),
    ("tokens", "num_tokens", ","),
)
"""Title, key and format of the table's columns."""


@gives_back_memory()
def evaluate(
    model_dir: str | Path,
    caches: Mapping[str, str | Path] | Sequence[str | Path],
    *,
    batch_tokens: int = 8192,
    dtype: str = "float32",
    device: str | None = None,
    limit: int | None = None,
    kl: bool = True,
    quantize: str = "none",
    progress: Progress | None = None,
    label: str = "",
    per_row: bool = False,
    on_result: Callable[[str, Result], None] = lambda name, result: None,
) -> dict[str, Result]:
    """Evaluate a model (full or adapters) on one or more evaluation caches.

    Args:
        model_dir: the trained model, or the initial one.
        caches: name -> cache directory, or directories, which are then named after themselves.
        batch_tokens: padded tokens per forward pass.
        dtype: of the weights while evaluating.
        device: such as `cuda:0`; by default the first GPU, else the CPU.
        limit: only the first rows of each cache.
        kl: False reads the caches' tokens alone, whichever model built them: no KL, no `kept`.
        quantize: `int4:SIZE` or `int8:SIZE`: evaluate with linear weights rounded to such integers (torchao).
        progress: a phase of rows for each cache; silent by default.
        label: put before the name of a cache in `progress`, such as `tuned: `.
        per_row: also return `row_ce` (summed over the row's tokens) and `row_tokens`, a number for every row.
        on_result: called with every name and result as soon as it is there.

    Returns:
        name -> {ce, perplexity, kl, num_tokens, num_positions, num_rows, kept_mass, accuracy, entropy,
        confidence, calibration_error, kept, num_known}, as `Measurement` names them; nats, per token; and
        `kl_to`, the name of the model that built the cache: kl is KL(that model || this one). kl and
        kept_mass are None for a cache without teacher positions, kept where the initial model knew no token,
        and every other mean for a cache without labels.

    Raises:
        ConfigError: not a model, no tokenizer, two caches of one name, an unknown dtype, adapters alone to quantise.
        FormatError: a cache is missing, unfinished or broken.
        IdentityMismatchError: another vocabulary or tokenizer, or a cache of a model that this one does not
            come from.
    """
    import torch

    from trainer.data.collator import LabelAnnealingCollator
    from trainer.data.dataset import CachedDataset
    from trainer.evaluation.row_losses import RowLosses
    from trainer.loop.measure import measure
    from trainer.loop.output_head import OutputHead
    from trainer.quantization import WeightQuantization

    progress = progress or Progress()
    check_one_of("dtype", dtype, DTYPES)
    quantization = WeightQuantization.parse("--quantize", quantize)
    named = name_caches(caches)
    quiet_transformers()
    directory = resolve_model(model_dir)
    if quantization is not None:  # it would be their factors that are rounded
        require_whole_model(directory, "what --quantize rounds")
    opened = {name: TeacherCache(path) for name, path in named.items()}
    tokenizer = load_tokenizer(directory)
    for cache in opened.values():
        require_related(cache, directory, tokenizer, kl=kl)
    model = load_model(directory, dtype=dtype)
    if quantization is not None:
        quantization.apply(model)
    target = torch.device(default_device(device))
    model.to(target).eval()
    head = OutputHead.of(model).install()
    collator = LabelAnnealingCollator(getattr(tokenizer, "pad_token_id", None) or 0)
    results: dict[str, Result] = {}
    for name, cache in opened.items():
        head.vocab_size = shared_vocabulary([cache], head.num_outputs, tokenizer, different_student=True)
        with_teacher = kl and has_teacher(cache)
        dataset = CachedDataset(cache, loss="both" if with_teacher else "ce")
        dataset.vocab_size = head.vocab_size
        num_rows = len(dataset) if limit is None else min(limit, len(dataset))
        groups = batches_of_tokens(dataset.lengths()[:num_rows], batch_tokens)

        row_losses = RowLosses(head, num_rows) if per_row else None

        def loader(
            dataset: CachedDataset = dataset, groups: list = groups, row_losses: RowLosses | None = row_losses
        ) -> Iterator[Any]:
            for group in groups:
                batch = on_device(collator([dataset[row] for row in group]), target)
                yield batch
                if row_losses is not None:
                    row_losses.add(batch, group)
                progress.advance(len(group))

        progress.start(label + name, num_rows)
        found = measure(model, head, loader())
        progress.finish()
        kl_to = teacher_name(cache) if with_teacher else None
        results[name] = {**found.to_dict(), "num_rows": num_rows, "kl_to": kl_to}
        if row_losses is not None:
            row_losses.remove()
            results[name] |= {"row_ce": row_losses.ce, "row_tokens": row_losses.tokens}
        on_result(name, results[name])
    head.remove()
    return results


def name_caches(caches: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str]:
    """Name -> path; a path without a name is called by its last part.

    Raises:
        ConfigError: none given, or two of one name.
    """
    if isinstance(caches, Mapping):
        named = {str(name): str(path) for name, path in caches.items()}
    else:
        named = {}
        for path in caches:
            name = short_name(path)
            if name in named:
                raise ConfigError(
                    f"evaluation caches need different names, got {name} twice; name them NAME=CACHE"
                )
            named[name] = str(path)
    if not named:
        raise ConfigError("evaluation needs at least one cache, got none; build one from held-out text")
    return named


def add_to_card(model_dir: str | Path, caches: Mapping[str, str], results: Mapping[str, Result]) -> bool:
    """Tell what was found on whole texts in the card of the model, if it is a directory that this program made."""
    if not Path(model_dir).is_dir():
        return False
    opened = {name: TeacherCache(path) for name, path in caches.items()}
    return add_measured(
        Path(model_dir), [measured_text(name, opened[name], result) for name, result in results.items()]
    )


def batches_of_tokens(lengths: np.ndarray, batch_tokens: int) -> list[list[int]]:
    """Row numbers in batches of similar length, each of one row or at most `batch_tokens` padded tokens."""
    batches: list[list[int]] = []
    for row in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        # Sorted longest first, so the first row of a batch sets its width.
        if batches and (len(batches[-1]) + 1) * int(lengths[batches[-1][0]]) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def require_related(cache: TeacherCache, model_dir: Path, tokenizer: Any, *, kl: bool = True) -> None:
    """Refuse a cache whose numbers mean nothing for this model.

    The vocabulary must agree; and a model that records where it comes from (`anneal.json`) is only compared with
    caches of its ancestors, of the teacher that it was distilled from, or of itself. A cache without teacher
    positions holds tokens alone.

    Raises:
        IdentityMismatchError: naming the part that differs.
    """
    recorded = cache.identity
    vocabulary = TokenizerFingerprint.of(tokenizer).vocabulary
    if recorded.tokenizer.get("vocabulary") not in (None, vocabulary):
        raise IdentityMismatchError(
            f"{cache.path}: an evaluation cache must use the model's tokenizer, got another vocabulary; "
            "rebuild it with the initial model"
        )
    teacher = recorded.teacher.get("weights")
    if teacher is None or not kl or not has_teacher(cache):
        return
    known = known_teachers(model_dir)
    if known and teacher not in known and teacher != own_weights(model_dir):
        line = ", ".join(f"{name} {weights[:12]}" for weights, name in known.items())
        raise IdentityMismatchError(
            f"{cache.path}: KL needs a cache of the initial model or of another ancestor, got one built with "
            f"other weights ({str(teacher)[:12]}; the model was trained from {line}); rebuild the cache with the "
            "initial model, or leave KL out (--no-kl)"
        )


def has_teacher(cache: TeacherCache) -> bool:
    """Whether any position of a cache has teacher targets."""
    return cache.manifest.num_positions > 0


def teacher_name(cache: TeacherCache) -> str | None:
    """What to call the model that built a cache."""
    name = cache.identity.teacher.get("name")
    return short_name(name) if name else None


def format_evaluation(results: Mapping[str, Result]) -> str:
    """A table for people: one line per cache."""
    teachers = sorted({str(to) for result in results.values() if (to := result.get("kl_to"))})
    kl_title = f"KL to {teachers[0]}" if len(teachers) == 1 else "KL"
    several = len(teachers) > 1
    titles = [kl_title if key == "kl" else title for title, key, _ in COLUMNS]
    rows: list[tuple[str, ...]] = [("cache", *titles, *(["KL to"] if several else []))]
    for name, result in results.items():
        cells = [_cell(result.get(key), form) for _, key, form in COLUMNS]
        rows.append((name, *cells, *([str(result.get("kl_to") or "-")] if several else [])))
    return aligned(rows)


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
