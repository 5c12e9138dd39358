"""Label annealing in Axolotl: a plugin and a few keys in its YAML.

    plugins: [integrations.axolotl.AnnealPlugin]
    anneal_cache: cache
    anneal_kl_coef: 1.0

Every setting of `integrations.settings` is a key here, with `anneal_` before its name. The rows are Axolotl's own, by
its prompt strategies; they are joined to the cache by their tokens when the trainer is made.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast, get_type_hints

from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import create_model

from formats.cache import TeacherCache
from formats.errors import ConfigError
from integrations.annealed import Annealed, refuse_arguments
from integrations.settings import SETTINGS, checked, default_of
from trainer.config import TrainConfig

PREFIX = "anneal_"
_TYPES = get_type_hints(TrainConfig)

AnnealArgs = create_model(  # type: ignore[call-overload]
    "AnnealArgs",
    __module__=__name__,
    anneal_cache=(str | None, None),
    anneal_eval_cache=(str | None, None),
    anneal_on_missing=(str, "refuse"),
    **{PREFIX + name: (_TYPES[name], default_of(name)) for name in SETTINGS},
)
"""What Axolotl adds to its own configuration: names, types and defaults of `TrainConfig`."""

REFUSED: Mapping[str, str] = {
    "rl": "its losses compare completions; label annealing is for supervised fine-tuning",
    "reward_model": "a reward model has no output head",
    "process_reward_model": "a reward model has no output head",
    "pretraining_dataset": "a stream is packed before its rows can be told apart; tokenise it into `datasets`",
    "is_multimodal": "a cache holds text alone",
    "use_eaft": "set anneal_ce_weight: eaft",
    "kd_trainer": "its loss and ours are two; remove one of the plugins",
    "orpo_alpha": "its loss compares completions",
    "label_smoothing_factor": "set anneal_label_smoothing",
    "liger_fused_linear_cross_entropy": "the loss takes the place of the output head, as that kernel does",
    "liger_cross_entropy": "the loss is fused already",
    "cut_cross_entropy": "the loss is fused already",
    "chunked_cross_entropy": "the loss is fused already",
    "deepspeed": "its engine owns the gradients; use FSDP",
    "trainer_cls": "the plugin has a trainer of its own",
    "relora": "it restarts from weights that are not those of the teacher; not tried",
}
"""Keys of Axolotl that cannot be honoured beside `anneal_cache`, and what to do instead."""
PARALLEL = ("context_parallel_size", "tensor_parallel_size", "sequence_parallel_degree")


class _PackedCollator:
    """A flat list of rows is one packed sequence to Axolotl, a list of lists several."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        return self.collate([features] if isinstance(features[0], Mapping) else features)


class AnnealAxolotlTrainer(Annealed, AxolotlTrainer):
    """`AxolotlTrainer` whose loss, counts and evaluation are ours; `AnnealPlugin` makes it ready."""

    def _get_num_items_in_batch(self, batch_samples: list, device: Any) -> Any:
        totals = super()._get_num_items_in_batch(batch_samples, device)
        args, state = cast(Any, self.args), cast(Any, self.state)
        if args.include_tkps:  # what Axolotl's loss counts; padding is no token here
            counts = {"trainable": totals[0].cpu().float(), "total": totals[2].cpu().float()}
            before = getattr(state, "tokens", None) or {}
            state.tokens = {name: before.get(name, 0) + count for name, count in counts.items()}
        return totals


class AnnealPlugin(BasePlugin):
    """Trains with `loss = CE + kl_coef * KL` from the cache of `anneal_cache`; without that key it does nothing."""

    def get_input_args(self) -> str:
        """The plugin's keys, for Axolotl's configuration."""
        return f"{__name__}.AnnealArgs"

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Our trainer, where there is a cache.

        Raises:
            ConfigError: a key that cannot be honoured or has no effect, or a setting out of range.
            FormatError: the cache is missing, unfinished or broken.
        """
        if not cfg.anneal_cache:
            refuse_idle(cfg)
            return None
        refuse(cfg)
        settings_of(cfg)
        for path in filter(None, (cfg.anneal_cache, cfg.anneal_eval_cache)):
            TeacherCache(path)
        return AnnealAxolotlTrainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Join the rows and put the loss in place.

        Raises:
            ConfigError, IdentityMismatchError, FormatError: as `Annealed.anneal_with`.
        """
        if not cfg.anneal_cache:
            return
        trainer.args.average_tokens_across_devices = (
            True  # Axolotl sets false for its own loss; ours averages always
        )
        refuse_arguments(trainer.args)
        packing = bool(cfg.sample_packing)
        attention = str(getattr(trainer.model.config, "_attn_implementation", ""))
        trainer.anneal_with(
            settings_of(cfg),
            trainer.processing_class,
            on_missing=cfg.anneal_on_missing or "refuse",
            eval_cache=cfg.anneal_eval_cache,
            packing=packing,
            flatten="flash" in attention,
        )
        if packing:
            trainer.data_collator = _PackedCollator(trainer.data_collator)


def settings_of(cfg: Any) -> TrainConfig:
    """The settings of Axolotl's configuration; a key that is null takes its default.

    Raises:
        ConfigError: a value is out of range, or contradicts another.
    """
    given = {name: cfg.get(PREFIX + name) for name in SETTINGS}
    values = {name: default_of(name) if value is None else value for name, value in given.items()}
    return checked(SimpleNamespace(**values), cfg.anneal_cache, on_missing=cfg.anneal_on_missing or "refuse")


def refuse_idle(cfg: Any) -> None:
    """Refuse keys that do nothing without `anneal_cache`.

    Raises:
        ConfigError: names the first one.
    """
    for name, entry in AnnealArgs.model_fields.items():
        value = cfg.get(name)
        if name != "anneal_cache" and value is not None and value != entry.default:
            raise ConfigError(
                f"{name} needs anneal_cache, got {value!r} without it; name the cache, or remove it"
            )


def refuse(cfg: Any) -> None:
    """Refuse keys that the loss cannot honour.

    Raises:
        ConfigError: names the first one and what to do instead.
    """
    for name, advice in REFUSED.items():
        if cfg.get(name):
            raise ConfigError(f"{name} is not available beside anneal_cache: {advice}; got {cfg.get(name)!r}")
    for name in PARALLEL:
        if (cfg.get(name) or 1) > 1:
            raise ConfigError(f"{name} must be 1 beside anneal_cache, got {cfg.get(name)}; use DDP or FSDP")
