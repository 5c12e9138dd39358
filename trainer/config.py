"""The settings of a training run: frozen, keyword-only, checked when they are made.

Everything that `transformers.TrainingArguments` already names stays under that name in `training`; the fields
here are what label annealing adds. `trainer.config_file` reads them from YAML and from the command line.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from formats.errors import ConfigError
from trainer.checks import (
    check_at_least,
    check_flag,
    check_label,
    check_number,
    check_one_of,
    check_optional_text,
    check_output,
    check_path,
    check_texts,
)
from trainer.objective import Objective
from trainer.quantization import WeightQuantization
from trainer.retention.settings import EwcSettings, L2Settings, SfaSettings

KL_DIRECTIONS = ("forward", "reverse")
LOSS_KERNELS = ("auto", "torch", "triton")
ROW_LOSSES = ("both", "ce", "kl")
DTYPES = ("float32", "bfloat16", "float16")
TRAINING_DTYPES = ("auto", *DTYPES)
SAVE_DTYPES = ("same", *DTYPES)
SMALLEST_TEMPERATURE = 0.5
"""The coldest temperature at which caches hold the exact tail mass (formats.logprobs.tail_function)."""


@dataclass(frozen=True, kw_only=True)
class MixedCache:
    """One more cache whose rows are mixed into the training rows: replayed data, or text to retain.

    Raises:
        ConfigError: a field is out of range.
    """

    path: str
    """Directory of the cache. Its teacher must be the same initial model."""
    weight: float | None = None
    """Rows (or packs) drawn from it per row of the target cache, in every epoch; 0.1 adds a tenth, what rounds to none
    is refused. 1 when neither it nor `share` is given."""
    share: float | None = None
    """Instead of `weight`: its share of all tokens of the mixture, in (0, 1); with 0.1 every tenth token is its."""
    loss: str = "both"
    """`both` learns and retains its text, `ce` is plain replay, `kl` retains without learning the text."""

    def __post_init__(self) -> None:
        check_path("caches.path", self.path, "a cache directory")
        if self.share is not None:
            check_number("caches.share", self.share)
            if not 0 < self.share < 1:
                raise ConfigError(
                    f"caches.share must lie between 0 and 1, got {self.share:g}; 0.1 is a tenth"
                )
            if self.weight is not None:
                raise ConfigError(
                    f"caches.share and caches.weight say the same in two ways, got share {self.share:g} and weight "
                    f"{self.weight!r} for {self.path}; keep one of them"
                )
        else:
            object.__setattr__(self, "weight", 1.0 if self.weight is None else self.weight)
            check_at_least(
                "caches.weight", self.weight, 0.0, "a weight of 0.1 adds one row to ten of the target cache"
            )
        check_one_of("caches.loss", self.loss, ROW_LOSSES)

    @property
    def used(self) -> bool:
        """Whether any of its rows are drawn."""
        return self.share is not None or bool(self.weight)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters (through `peft`) instead of full fine-tuning.

    Raises:
        ConfigError: a field is out of range.
    """

    r: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """Scale: the adapter's product is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapters' input, in [0, 1)."""
    target_modules: str | Sequence[str] = "all-linear"
    """Modules that get an adapter: `all-linear` (all but the output head), a name ending, a list of them, or a regular
    expression that matches whole names."""
    merge: bool = True
    """Merge the adapter into the saved model, which any engine can serve, and keep it in `adapter/` as well.
    False saves the adapter alone."""

    def __post_init__(self) -> None:
        check_at_least("lora.r", self.r, 1, "16 is a usual rank", integer=True)
        check_number("lora.alpha", self.alpha)
        if self.alpha == 0:
            raise ConfigError("lora.alpha must not be 0, which would train nothing; 2 * r is a usual scale")
        check_at_least("lora.dropout", self.dropout, 0.0, "0 turns dropout off")
        if self.dropout >= 1:
            raise ConfigError(f"lora.dropout must be below 1, got {self.dropout:g}")
        check_flag("lora.merge", self.merge)
        check_texts("lora.target_modules", self.target_modules)
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Objective):
    """One run: which cache, which model, where to, and how strongly to hold on to the initial model.

    The loss is `CE + kl_coef * KL`, each a mean over its own masked tokens of the whole optimizer step; what single
    tokens count in it are the settings of `Objective`.

    Raises:
        ConfigError: a field is out of range or contradicts another; the message says what to use instead.
    """

    cache: str
    """Directory of the target cache: the text to learn, with the initial model's logprobs."""
    model: str
    """The model that the run starts from: the one that built the cache, or a descendant of it (directory or hub
    name)."""
    out: str
    """Directory for the result: new, empty, or an interrupted run of the same settings, to continue."""
    revision: str | None = None
    """Revision of a hub model."""
    loss: str = "both"
    """What the target cache is for: `both` learns and retains its text, `ce` only learns it (KL is then that of the
    mixed `caches`), `kl` only holds the model to its teacher there, which is distillation."""

    kl_coef: float = 1.0
    """Weight of the KL term, the paper's lambda. 0 is direct fine-tuning through the same code."""
    kl_budget: float | None = None
    """Nats: let the coefficient, which starts at `kl_coef`, follow the mean KL of each step so that it stays near."""
    temperature: float = 1.0
    """Softmax temperature T of teacher and student in the KL term, at least 0.5."""
    kl_direction: str = "forward"
    """`forward` is KL(initial || model), the paper's appendix A.3; `reverse` is its Eq. 2."""

    tail_draws: bool = True
    """Use the cache's tail draws, where it has some (forward KL only): they make the KL and its gradient
    unbiased. False leaves the shape of the tail to the student."""

    step0_threshold: float = 0.02
    """Nats. Training is refused when KL(initial || model) exceeds it before the first update: the model
    then is not the teacher. docs/training.md gives the measured noise floor behind the default."""
    step0_rows: int = 32
    """Rows on which the KL before the first update is measured."""
    allow_different_student: bool = False
    """Distil into another model of the same vocabulary: lifts the identity and the step-0 refusal."""
    fake_quantize: str = "none"
    """`int4:SIZE` or `int8:SIZE`: train with linear weights rounded to integers in groups of SIZE inputs, so that the
    result can be quantised so (docs/quantization.md); needs torchao. Lifts the step-0 refusal."""

    packing: bool = False
    """Put several rows into one sequence (best fit), with positions reset and no attention across rows."""
    pack_length: int | None = None
    """Tokens per packed sequence; by default the longest row of the caches."""
    group_by_length: bool = False
    """Batch rows of similar length together: less padding, slightly less random order."""
    caches: Sequence[MixedCache] = ()
    """Further caches mixed into the training rows."""

    eval_caches: Mapping[str, str] = field(default_factory=dict)
    """Name -> cache directory: evaluated after training, and whenever `training.eval_strategy` says so."""
    lora: LoraSettings | None = None
    """Train adapters instead of all weights."""
    freeze: Sequence[str] = ()
    """Regular expressions: parameters in whose names one is found are not trained, such as `embed_tokens` or
    `^model\\.` for all but the output head."""
    l2: L2Settings | None = None
    """Pull every weight towards its value in `model`."""
    ewc: EwcSettings | Sequence[EwcSettings] | None = None
    """Pull weights towards their values in `model`, each as strongly as that model depends on it; or a list, of
    earlier tasks of a chain with models of their own."""
    sfa: SfaSettings | None = None
    """Average with the weights of `model`, in a chain the last task's model, every so often, and at the end."""
    dtype: str = "auto"
    """Dtype of the weights while training. `auto` is float32; under adapters that compute in bfloat16 on a GPU it is
    bfloat16 for a model that is stored so, whose weights stay as they are. At fine-tuning rates trained bfloat16
    weights swallow most updates."""
    save_dtype: str = "same"
    """Dtype of the saved model; `same` is the dtype in which the initial model is stored. Of whole models; adapters
    alone are float32."""
    verify_saved: bool = True
    """Load the saved model once, on the CPU in float32, and publish it only if it computes what the trained
    one does. False saves the time, and the memory of one more copy of the model."""
    loss_kernel: str = "auto"
    """Who does the work on whole rows of logits in the loss: `triton` on CUDA, `torch` anywhere, the same function.
    `auto` is triton where it runs and the objective lets it, else torch."""
    attn_implementation: str | None = None
    """Attention kernel, as in `from_pretrained`: sdpa, eager, flash_attention_2, ..."""
    keep_checkpoints: bool = False
    """Keep the checkpoint directories when the run has finished."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """`transformers.TrainingArguments`, names unchanged; what is absent takes `trainer.recipe.DEFAULTS`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("cache", self.cache, "a cache directory, such as one made by `anneal cache build`")
        check_path("model", self.model, "the initial model, the one that built the cache (--model)")
        check_output("out", self.out, "the directory for the result (--out)")
        check_optional_text("revision", self.revision, "a branch, tag or commit of a hub model")
        check_optional_text(
            "attn_implementation", self.attn_implementation, "the name of an attention kernel"
        )
        check_at_least("kl_coef", self.kl_coef, 0.0, "0 is direct fine-tuning, 1 is the usual start")
        if self.kl_budget is not None:
            check_number("kl_budget", self.kl_budget)
            if self.kl_budget <= 0:
                raise ConfigError(f"kl_budget must be above 0 nats, got {self.kl_budget:g}; 0.02 is a little")
        check_number("temperature", self.temperature)
        if self.temperature < SMALLEST_TEMPERATURE:
            raise ConfigError(
                f"temperature must be at least {SMALLEST_TEMPERATURE:g}, the coldest a cache can serve, "
                f"got {self.temperature:g}; 1 is the usual choice"
            )
        check_one_of("kl_direction", self.kl_direction, KL_DIRECTIONS)
        check_one_of("loss", self.loss, ROW_LOSSES)
        WeightQuantization.parse("fake_quantize", self.fake_quantize)
        check_at_least("step0_threshold", self.step0_threshold, 0.0, "the default is 0.02 nats")
        check_at_least("step0_rows", self.step0_rows, 1, "the default is 32", integer=True)
        if self.pack_length is not None:
            check_at_least(
                "pack_length", self.pack_length, 2, "leave it out to take the longest row", integer=True
            )
        for name in (
            "tail_draws",
            "allow_different_student",
            "packing",
            "group_by_length",
            "keep_checkpoints",
            "verify_saved",
        ):
            check_flag(name, getattr(self, name))
        check_one_of("loss_kernel", self.loss_kernel, LOSS_KERNELS)
        check_one_of("dtype", self.dtype, TRAINING_DTYPES)
        check_one_of("save_dtype", self.save_dtype, SAVE_DTYPES)
        object.__setattr__(self, "caches", tuple(self.caches))
        object.__setattr__(self, "eval_caches", dict(self.eval_caches))
        object.__setattr__(self, "training", dict(self.training))
        self._check_ewc()
        for cache in self.caches:
            if not isinstance(cache, MixedCache):
                raise ConfigError(
                    f"caches must hold entries of path, weight or share, and loss, got {cache!r}"
                )
        shares = sum(cache.share or 0.0 for cache in self.caches)
        if shares >= 1:
            raise ConfigError(
                f"caches.share must leave something to the target cache, got shares that sum to {shares:g}; lower them"
            )
        for name, path in self.eval_caches.items():
            check_label("eval_caches", name)
            check_path(f"eval_caches.{name}", path, "a cache directory")
        if self.pack_length is not None and not self.packing:
            raise ConfigError("pack_length needs packing, got packing: false; add packing: true")
        self._check_freeze()
        for name in ("l2", "ewc", "sfa"):
            if self.lora is not None and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} needs full fine-tuning, got lora: the distance of adapters is not that of the "
                    f"merged weights; remove lora or {name}"
                )
        if self.lora is not None and self.fake_quantize != "none":
            raise ConfigError(
                "fake_quantize trains the weights that are quantised, got lora, which leaves them; remove one of them"
            )
        if self.lora is not None and not self.lora.merge and self.save_dtype not in ("same", "float32"):
            raise ConfigError(
                f"save_dtype is of whole models, got {self.save_dtype} with lora.merge: false, which saves adapters "
                "alone, in float32 as they are trained; remove one of them"
            )
        if self.sfa is not None and self.training.get("load_best_model_at_end"):
            raise ConfigError(
                "sfa ends with an average, got training.load_best_model_at_end: true, which may replace it "
                "by a checkpoint that was not averaged; remove one of them"
            )

    def _check_ewc(self) -> None:
        tasks: Any = self.ewc
        if tasks is None or isinstance(tasks, EwcSettings):
            return
        given = list(tasks) if isinstance(tasks, list | tuple) else []
        if not given or not all(isinstance(task, EwcSettings) for task in given):
            raise ConfigError(f"ewc must be a mapping of coef, cache, ... or a list of them, got {tasks!r}")
        object.__setattr__(self, "ewc", tuple(given))

    def _check_freeze(self) -> None:
        given: Any = [] if self.freeze is None else self.freeze
        if given not in ((), []):
            check_texts("freeze", given)
        object.__setattr__(self, "freeze", (given,) if isinstance(given, str) else tuple(given))
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"freeze must hold regular expressions, got {pattern!r}: {error}; a dot in a name is written \\."
                ) from None
        if self.freeze and self.lora is not None:
            raise ConfigError(
                "freeze needs full fine-tuning, got lora, which freezes every weight but the adapters; remove one of "
                "them, or choose lora.target_modules"
            )

    @property
    def ewc_tasks(self) -> tuple[EwcSettings, ...]:
        """Those of `ewc`, one or many."""
        if self.ewc is None:
            return ()
        return (self.ewc,) if isinstance(self.ewc, EwcSettings) else tuple(self.ewc)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as written to `anneal.yaml`."""

        def plain(value: Any) -> Any:
            if is_dataclass(value):
                return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
            if isinstance(value, Mapping):
                return {str(key): plain(entry) for key, entry in value.items()}
            if isinstance(value, list | tuple):
                return [plain(entry) for entry in value]
            return value

        inherited = {entry.name for entry in fields(Objective)}
        names = sorted(
            (entry.name for entry in fields(self)), key=inherited.__contains__
        )  # what is read first, first
        return {name: plain(getattr(self, name)) for name in names}
