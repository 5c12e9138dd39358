"""What a run reads and starts from: settings in; opened caches, their rows and the loaded initial model out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.cache import TeacherCache
from formats.errors import IdentityMismatchError
from formats.identity.fingerprint import TokenizerFingerprint, resolve_model
from formats.named_path import short_name
from trainer.config import TrainConfig
from trainer.data.dataset import CachedDataset
from trainer.data.label_terms import bare_objective, reads_initial, resolved
from trainer.data.mixture import amount_of
from trainer.loading import load_model, load_tokenizer, open_cache, require_plain_weights
from trainer.multimodal import encoders, encoders_note
from trainer.objective import Objective
from trainer.preflight.frozen import freeze, freeze_encoders
from trainer.preflight.vocabulary import require_outputs, shared_vocabulary
from trainer.quantization import WeightQuantization
from trainer.recipe import DEFAULTS, weights_dtype
from trainer.result.lineage import Ancestor, lineage_of
from trainer.result.lora import attach_adapters
from trainer.result.saving import ResultLayout
from trainer.result.stored_weights import StoredWeights


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads: the directory of the model that it starts from, and caches that belong to it."""

    model_dir: Path
    tokenizer: Any
    lineage: list[Ancestor]
    """The models that the result descends from, oldest first; the last one is that in `model_dir`."""
    target: TeacherCache
    """The cache of the text to learn."""
    mixed: list[TeacherCache]
    """Those of `config.caches`."""
    held_out: dict[str, TeacherCache]
    """Name -> evaluation cache."""
    known: list[TeacherCache]
    """Those of `config.ewc_tasks`."""
    anchors: list[Path | None]
    """The directory of each of these tasks' model; None for the model that the run starts from."""
    without_kl: list[TeacherCache]
    """Those of them on which no KL acts."""
    tokens_only: list[TeacherCache]
    """Those of these that only give text: no weight of the cross-entropy is read from them either."""

    @property
    def start(self) -> Ancestor:
        """The model that the run starts from, to which L2, EWC and SFA hold."""
        return self.lineage[-1]

    @property
    def with_kl(self) -> list[TeacherCache]:
        """The caches of the training rows on which KL acts, the target first if it is one."""
        return [cache for cache in (self.target, *self.mixed) if not _among(cache, self.without_kl)]

    @property
    def checked(self) -> TeacherCache | None:
        """The cache of the check before the first update: the first of the training rows whose teacher is read."""
        read = [cache for cache in (self.target, *self.mixed) if not _among(cache, self.tokens_only)]
        return next(iter([*self.with_kl, *read]), None)

    @property
    def kl_to(self) -> Ancestor | None:
        """The model to which KL holds: the teacher of the first cache that has a KL; None without one."""
        return teacher_of(self.with_kl[0], self.lineage) if self.with_kl else None

    @property
    def ancestor(self) -> str | None:
        """The name of the teacher of `checked`, where it is an ancestor of the model that the run starts from."""
        older = {entry.weights for entry in self.lineage[:-1]}
        teacher = None if self.checked is None else teacher_of(self.checked, self.lineage)
        return teacher.name if teacher is not None and teacher.weights in older else None

    @property
    def with_teacher(self) -> list[TeacherCache]:
        """The caches whose teacher's numbers are read."""
        caches = [self.target, *self.mixed, *self.held_out.values(), *self.known]
        return [cache for cache in caches if not _among(cache, self.tokens_only)]


def _among(cache: TeacherCache, caches: list[TeacherCache]) -> bool:
    return any(cache is other for other in caches)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run, as its parts read them."""

    training: CachedDataset
    mixed: list[tuple[CachedDataset, float]]
    """Further training rows, and how many of them per row of `training`, or their `Share`."""
    first_check: CachedDataset | None
    """Rows of the target cache with their teacher, for the KL before the first update; None where nothing is read
    of the teacher and it is another model."""
    evaluation: dict[str, CachedDataset]
    fisher: list[CachedDataset]
    """Text for the Fisher information of each EWC task."""
    objective: Objective
    """That of the settings, with every number known."""

    @property
    def with_teacher(self) -> list[CachedDataset]:
        """Those whose targets are read."""
        checked = [self.first_check] if self.first_check is not None else []
        return [self.training, *checked, *(rows for rows, _ in self.mixed), *self.evaluation.values()]


@dataclass(frozen=True, kw_only=True)
class Student:
    """The initial model as it is trained."""

    model: Any
    """In memory, with adapters if there are any."""
    vocab_size: int | None
    """V, where the output head is padded beyond it."""
    layout: ResultLayout | None
    """Where its weights go in the result; None when adapters alone are saved."""
    dtype: str
    """Of its weights; adapters keep float32 ones of their own."""
    encoders_note: str | None = None
    """One line for the user, where it is the text model of a multimodal one."""


def open_inputs(config: TrainConfig) -> Inputs:
    """Find the model and every cache, and see that they belong together; no weights are loaded.

    A cache whose teacher is read must have been built by the model or by one of its ancestors; one of which only
    the tokens are used, by a model of the same tokenizer and template.
    """
    paths = [config.cache, *(cache.path for cache in config.caches), *config.eval_caches.values()]
    for path in [*paths, *(task.cache for task in config.ewc_tasks)]:
        TeacherCache(path)  # the cheapest mistakes first
    model_dir = resolve_model(config.model, config.revision)
    require_plain_weights(model_dir, "--model")
    tokenizer = load_tokenizer(model_dir)
    lineage = lineage_of(model_dir, config.model)
    teachers = {entry.weights for entry in lineage}

    without_kl: list[TeacherCache] = []
    tokens_only: list[TeacherCache] = []

    def opened(
        path: str, loss: str | None = None, *, weighted: bool = True, target: bool = False
    ) -> TeacherCache:
        """For training with `loss` on it, its cross-entropy weighted or not, or for evaluation."""
        plain = loss is not None and has_no_kl(config, loss)
        tokens = plain and not (weighted and reads_initial(config.weighting, target=target))
        check = not config.allow_different_student
        cache = open_cache(
            path, model_dir, tokenizer, check_identity=check, teachers=teachers, tokens_only=tokens
        )
        without_kl.extend([cache] if plain else [])
        tokens_only.extend([cache] if tokens else [])
        return cache

    target = opened(config.cache, config.loss, target=True)
    return Inputs(
        model_dir=model_dir,
        tokenizer=tokenizer,
        lineage=lineage,
        target=target,
        mixed=[opened(cache.path, cache.loss) for cache in config.caches],
        held_out={name: opened(path) for name, path in config.eval_caches.items()},
        known=[opened(task.cache, "ce", weighted=False) for task in config.ewc_tasks],
        anchors=[
            None if task.model is None else anchor_dir(task.model, tokenizer) for task in config.ewc_tasks
        ],
        without_kl=without_kl,
        tokens_only=tokens_only,
    )


def anchor_dir(name: str, tokenizer: Any) -> Path:
    """The directory of an EWC task's model.

    Raises:
        ConfigError: there is none, or its weights are quantised.
        IdentityMismatchError: it reads text otherwise than the model that the run starts from.
    """
    path = resolve_model(name, what="ewc.model")
    require_plain_weights(path, "ewc.model")
    mine, its = (TokenizerFingerprint.of(which).vocabulary for which in (tokenizer, load_tokenizer(path)))
    if mine != its:
        raise IdentityMismatchError(
            f"ewc.model must use the tokenizer of --model, got another vocabulary in {path}; give a model of the same "
            "chain"
        )
    return path


def has_no_kl(config: TrainConfig, loss: str) -> bool:
    """Whether training with this `loss` on a cache holds to no teacher. A weight of its cross-entropy may yet be read
    from the cache (`reads_initial`).
    """
    return loss == "ce" or (loss == "both" and config.kl_coef == 0)


def teacher_of(cache: TeacherCache, lineage: list[Ancestor]) -> Ancestor:
    """The model that built a cache, under the name that the lineage has for it."""
    weights = str(cache.identity.teacher.get("weights"))
    found = next((entry for entry in lineage if entry.weights == weights), None)
    return found or Ancestor(short_name(cache.identity.teacher.get("name") or weights[:12]), weights)


def facts_of(config: TrainConfig, inputs: Inputs) -> tuple[dict[str, list[TeacherCache]], str | None]:
    """The caches by their use, and the fingerprint of a student's weights that no cache's identity holds."""
    held_out = [*inputs.held_out.values()]
    caches = {"training": [inputs.target], "mixed": inputs.mixed, "evaluation": held_out}
    built_by = inputs.target.identity.teacher.get("weights")
    other = config.allow_different_student or built_by != inputs.start.weights
    return caches, inputs.start.weights if other else None


def rows_of(config: TrainConfig, inputs: Inputs) -> Rows:
    """The caches' rows at the run's temperature; without a KL term their items have no teacher."""
    tail_draws = config.tail_draws and config.kl_direction == "forward"

    objective = resolved(bare_objective(config), inputs.target)

    def rows(opened: TeacherCache, loss: str) -> CachedDataset:
        loss = "ce" if has_no_kl(config, loss) else loss
        return CachedDataset(opened, config.temperature, loss, tail_draws=tail_draws, objective=objective)

    return Rows(
        training=rows(inputs.target, config.loss),
        mixed=[
            (rows(opened, entry.loss), amount_of(entry.share, entry.weight))
            for opened, entry in zip(inputs.mixed, config.caches, strict=True)
        ],
        first_check=rows_to_check(config, inputs, tail_draws),
        evaluation={name: CachedDataset(opened) for name, opened in inputs.held_out.items()},
        fisher=[CachedDataset(opened, loss="ce") for opened in inputs.known],
        objective=objective,
    )


def rows_to_check(config: TrainConfig, inputs: Inputs, tail_draws: bool) -> CachedDataset | None:
    """Rows for the check before the first update: those of `inputs.checked`. Where only tokens are used, the check is
    still made with the model that built the target, which must be its own teacher.
    """
    checked = inputs.checked
    if checked is not None and (inputs.with_kl or checked.manifest.num_positions):
        return CachedDataset(checked, config.temperature, tail_draws=tail_draws)
    built_by = inputs.target.identity.teacher.get("weights")
    has_teacher = inputs.target.manifest.num_positions > 0
    if built_by != inputs.start.weights or not has_teacher:
        return None
    return CachedDataset(inputs.target, config.temperature, tail_draws=tail_draws)


def load_student(config: TrainConfig, inputs: Inputs, resolved: Mapping[str, Any]) -> Student:
    """Load the initial model, find the place of its weights in the result, and attach adapters.

    Args:
        resolved: from `resolve_training`.
    """
    dtype = weights_dtype(config, resolved, StoredWeights(inputs.model_dir).float_dtypes)
    model = load_model(inputs.model_dir, dtype=dtype, attn_implementation=config.attn_implementation)
    num_outputs = int(model.get_output_embeddings().weight.shape[0]) if model.get_output_embeddings() else 0
    others = config.allow_different_student
    for cache in inputs.tokens_only:
        require_outputs(cache, num_outputs, inputs.tokenizer)
    vocab_size = shared_vocabulary(
        inputs.with_teacher, num_outputs, inputs.tokenizer, different_student=others
    )
    layout = None
    if config.lora is None or config.lora.merge:
        layout = ResultLayout.of(model, inputs.model_dir, config.save_dtype)
    freeze(model, config.freeze, layout.stored_dtypes if layout is not None else (), config.training)
    beside = encoders(model)
    if config.lora is None:
        freeze_encoders(model, beside, layout.stored_dtypes if layout is not None else ())
    else:
        model = attach_adapters(model, config.lora, int(config.training.get("seed", DEFAULTS["seed"])))
    if (quantization := WeightQuantization.parse("fake_quantize", config.fake_quantize)) is not None:
        quantization.prepare(model)
    return Student(
        model=model, vocab_size=vocab_size, layout=layout, dtype=dtype, encoders_note=encoders_note(beside)
    )
