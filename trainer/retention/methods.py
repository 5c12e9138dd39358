"""From settings to methods, in the order in which they act."""

from collections.abc import Callable

from trainer.config import TrainConfig
from trainer.data.dataset import CachedDataset
from trainer.retention.ewc import Ewc
from trainer.retention.l2 import L2
from trainer.retention.method import RetentionMethod
from trainer.retention.sfa import Sfa


def methods_of(
    config: TrainConfig, fisher_text: CachedDataset | None, seed: int, say: Callable[[str], None]
) -> list[RetentionMethod]:
    """The methods that the settings ask for.

    Args:
        config: of the run.
        fisher_text: the rows of `config.ewc.cache`, where there is one.
        seed: of everything that is drawn.
        say: called on rank 0 with lines for the user.

    Raises:
        ConfigError: a method cannot work with what it was given.
    """
    methods: list[RetentionMethod] = []
    if config.l2 is not None:
        methods.append(L2(config.l2))
    if config.ewc is not None:
        assert fisher_text is not None
        methods.append(Ewc(config.ewc, fisher_text, seed=seed, say=say))
    if config.sfa is not None:
        methods.append(Sfa(config.sfa))
    return methods
