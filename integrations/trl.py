"""Label annealing in TRL's SFTTrainer: two lines of a script change.

from integrations.trl import AnnealSFTConfig, AnnealSFTTrainer

args = AnnealSFTConfig(output_dir="out", cache_dir="cache", kl_coef=1.0)
AnnealSFTTrainer("MODEL", args, train_dataset=dataset).train()
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin
from trl import SFTConfig, SFTTrainer

from formats.cache import TeacherCache
from formats.errors import ConfigError
from integrations.annealed import Annealed, refuse_arguments, say
from integrations.row_file import write_rows
from integrations.settings import checked, setting
from trainer.checks import check_optional_text

OUR_BATCH = ("data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
"""Arguments of SFTTrainer in whose place ours stand."""


@dataclass
class AnnealSFTConfig(SFTConfig):
    """`SFTConfig`, and the settings of label annealing under the names, with the defaults and checks of `TrainConfig`.

    Raises:
        ConfigError: a setting is out of range, contradicts another, or is one of TRL's that cannot be honoured.
    """

    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "The cache of the training rows. Without one nothing is trained: `write_rows` first."
        },
    )
    eval_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "The cache of the evaluation rows. Without one evaluation is of the cross-entropy alone."
        },
    )
    on_missing: str = field(
        default="refuse",
        metadata={
            "help": "What becomes of a row that the cache does not hold: `refuse`, or `skip_kl`, cross-entropy alone."
        },
    )
    kl_coef: float = setting("kl_coef")
    kl_budget: float | None = setting("kl_budget")
    temperature: float = setting("temperature")
    kl_direction: str = setting("kl_direction")
    tail_draws: bool = setting("tail_draws")
    kl_on: str = setting("kl_on")
    kl_gate: str = setting("kl_gate")
    kl_target: str = setting("kl_target")
    ce_weight: str = setting("ce_weight")
    label_smoothing: float = setting("label_smoothing")
    loss_kernel: str = setting("loss_kernel")
    step0_threshold: float = setting("step0_threshold")
    step0_rows: int = setting("step0_rows")
    allow_different_student: bool = setting("allow_different_student")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optional_text(
            "cache_dir", self.cache_dir, "a cache directory, such as one made by `anneal cache build`"
        )
        check_optional_text("eval_cache_dir", self.eval_cache_dir, "a cache directory")
        checked(self, self.cache_dir or "-", on_missing=self.on_missing)
        refuse_arguments(self)
        if self.loss_type != "nll":
            raise ConfigError(
                f"loss_type must be nll, got {self.loss_type}; ce_weight: dft weighs tokens alike"
            )
        if self.packing and self.packing_strategy == "wrapped":
            raise ConfigError(
                "packing_strategy must be bfd, got wrapped, which cuts rows where they are not cut in the cache, and "
                "lets rows see each other"
            )
        if self.pad_to_multiple_of is not None:
            raise ConfigError(
                f"pad_to_multiple_of is not available here, got {self.pad_to_multiple_of}; remove it"
            )
        if self.router_aux_loss_coef:
            raise ConfigError(
                "router_aux_loss_coef must be 0, got another: the load-balancing loss depends on how a step is split, "
                "and is not part of label annealing"
            )


class AnnealSFTTrainer(Annealed, SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` with `loss = CE + kl_coef * KL` from a cache; rows are joined to it by their tokens.

    Arguments are those of SFTTrainer, `args` an `AnnealSFTConfig`. Without `cache_dir` it only prepares the data set,
    for `write_rows`.

    Logged beside TRL's own: ce, kl, kept_mass, student_kept_mass, tokens_per_second, memory_gib, kl_coef with a
    budget; from evaluation eval_ce, eval_kl, eval_perplexity, eval_accuracy, ... `entropy` and `mean_token_accuracy` of
    the training rows are not.

    Raises:
        ConfigError: what cannot be honoured, by name; rows that the cache does not hold.
        IdentityMismatchError: the cache belongs to another model.
        FormatError: a cache is missing, unfinished or broken.
    """

    args: AnnealSFTConfig

    def __init__(self, model: Any, args: AnnealSFTConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(args, AnnealSFTConfig):
            raise ConfigError(f"args must be an AnnealSFTConfig, got {type(args).__name__}")
        for name in OUR_BATCH:
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"{name} is not available here: batches and loss come from the cache; remove it"
                )
        for directory in filter(None, (args.cache_dir, args.eval_cache_dir)):
            TeacherCache(directory)  # the cheapest mistakes first
        if isinstance(kwargs.get("processing_class"), ProcessorMixin):
            raise ConfigError(
                "processing_class must be a tokenizer, got a processor; a cache holds text alone"
            )
        super().__init__(model, args, **kwargs)
        if self._is_vision_dataset:
            raise ConfigError("the data set must be text, got images; a cache holds text alone")
        if args.cache_dir is None:
            return
        if self.aux_loss_enabled:
            self._drop_router_loss()
        config = checked(args, args.cache_dir, on_missing=args.on_missing)
        attention = str(getattr(self._config, "_attn_implementation", ""))
        self.anneal_with(
            config,
            self._tokenizer,
            on_missing=args.on_missing,
            eval_cache=args.eval_cache_dir,
            packing=self.padding_free,
            flatten="flash" in attention or not args.packing,
        )

    @property
    def _config(self) -> Any:
        model: Any = self.model
        return model.config

    def _drop_router_loss(self) -> None:
        """TRL takes the load-balancing loss that a model's configuration names, which ours has no place for."""
        self.aux_loss_enabled, self.router_aux_loss_coef = False, 0.0
        self._config.get_text_config().output_router_logits = False
        if self.args.process_index == 0:
            say("router_aux_loss_coef: the load-balancing loss is no part of label annealing, and is off")

    def write_rows(self, path: str | Path) -> str:
        """Write the prepared training rows to a Parquet file that `anneal cache build` reads as they are.

        Returns:
            The command that builds the cache.

        Raises:
            ConfigError: the file is there already, or there is no row.
        """
        num_rows, longest = write_rows(self.train_dataset, path)
        name = self._config._name_or_path or "MODEL"
        return (
            f"{num_rows:,} rows in {path}; build their cache with\n"
            f"anneal cache build {path} --model {name} --out CACHE --max-length {max(longest, 2)}"
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As SFTTrainer."""
        self._require_cache("training")
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As SFTTrainer."""
        self._require_cache("evaluation")
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As SFTTrainer."""
        self._require_cache("prediction")
        return super().predict(*args, **kwargs)

    def _require_cache(self, what: str) -> None:
        if self.args.cache_dir is None:
            raise ConfigError(
                f"{what} needs cache_dir, got none; build a cache from the rows that write_rows writes"
            )

    def _get_num_items_in_batch(self, batch_samples: list, device: Any) -> Any:
        totals = super()._get_num_items_in_batch(batch_samples, device)
        self._total_train_tokens += int(totals[2])
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return totals
