"""How far a model's weights are from another's: ||theta - theta0||, and relative to ||theta0||.

Both are read from their files, a slice of a tensor at a time, and summed in float64. Each stored tensor counts
once: weights that are tied are stored once.
"""

from pathlib import Path

from formats.errors import ConfigError
from formats.identity.fingerprint import resolve_model
from trainer.loading import require_plain_weights
from trainer.merging.weights import tied_names
from trainer.result.stored_weights import StoredWeights
from trainer.result.weight_distance import DistanceSums, WeightDistance


def weight_distance(model: str | Path, initial: str | Path, *, what: str = "--model") -> WeightDistance:
    """The distance of a model from another of the same tensors.

    Args:
        model: theta, a directory or hub name of a whole model.
        initial: theta0.
        what: how `initial` was given, for messages.

    Raises:
        ConfigError: not a whole model of plain weights (adapters alone have no distance), or the tensors of the
            two do not fit.
        FormatError: a weight file is torn.
    """
    paths = []
    for name, given in ((model, "--model"), (initial, what)):
        path = resolve_model(name, what=given)
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"a distance is between whole models, got no config.json in {path} ({given}); adapters need "
                "lora.merge: true"
            )
        require_plain_weights(path, given)
        paths.append(path)
    theta, theta0 = (StoredWeights(path) for path in paths)
    sums = DistanceSums()
    for name, known in tied_names(theta0, theta).items():
        sums.add(theta[known], theta0[name])
    return sums.distance()
