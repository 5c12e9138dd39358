"""Gaussian noise on the weights: how much loss it costs, and how that grows with its strength.

Springer et al. 2025 (arXiv 2503.19206), Eq. 1: theta + gamma * sigma * eps with eps ~ N(0, I), sigma the standard
deviation with which each tensor was initialised, so that gamma means the same for models of any size. For small gamma

    E[CE(theta + gamma sigma eps)] - CE(theta) = c gamma^2,   c = Tr(H diag(sigma^2)) / 2

(their Proposition D.1), H the Hessian. Every draw is taken with both signs: the gradient's part cancels between them,
and so few draws are enough.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formats.errors import ConfigError
from formats.progress import Progress
from trainer.loading import require_whole_model
from trainer.loop.measure import perplexity_of
from trainer.probe.loaded_model import LoadedModel
from trainer.result.stored_weights import StoredWeights

QUADRATIC = 1.1
"""Above this ratio to c gamma^2 the loss is not quadratic any more."""


@dataclass(frozen=True, kw_only=True)
class NoisePoint:
    """One model at one strength, on one text."""

    gamma: float
    delta_ce: float
    """Mean of the loss with noise, less the loss without, in nats."""
    stderr: float | None
    """Over draws; None for one draw."""
    perplexity: float
    """exp of the mean loss with noise."""


@dataclass(frozen=True, kw_only=True)
class NoiseCurve:
    """One model on one text."""

    ce: float
    """Without noise."""
    points: Sequence[NoisePoint]

    @property
    def curvature(self) -> float | None:
        """c of the quadratic, from the smaller half of the strengths, weighted as gamma^4; None without a strength."""
        points = sorted((p for p in self.points if p.gamma > 0), key=lambda p: p.gamma)
        points = points[: max(1, len(points) // 2)]
        total = sum(p.gamma**4 for p in points)
        return sum(p.delta_ce * p.gamma**2 for p in points) / total if total else None

    @property
    def breaks_at(self) -> float | None:
        """The first strength at which the loss is more than a tenth above the quadratic, beyond its standard error."""
        c = self.curvature
        for point in sorted(self.points, key=lambda p: p.gamma):
            if c is None or point.gamma == 0 or c <= 0:
                continue
            beyond = point.delta_ce - QUADRATIC * c * point.gamma**2
            if beyond > 2 * (point.stderr or 0.0):
                return point.gamma
        return None


def spreads(model: nn.Module, *, initial: Path | None = None, only: str | None = None) -> dict[str, float]:
    """Name of a parameter -> sigma; tied ones once, those without noise left out.

    Args:
        model: as it is loaded.
        initial: a model of the same tensors with its weights before training: sigma is the standard deviation of each
            tensor there, about its mean. None takes `initializer_range` for matrices, and no noise for vectors (gains
            and biases, which start at a constant).
        only: a regular expression: parameters in whose names it is found.

    Raises:
        ConfigError: no parameter is left, the expression is none, the model has no initializer_range, or `initial` has
            other tensors.
    """
    try:
        chosen = re.compile(only or "")
    except re.error as error:
        raise ConfigError(f"--only must be a regular expression, got {only!r}: {error}") from None
    parameters = {name: p for name, p in model.named_parameters() if chosen.search(name)}
    if initial is not None:
        found = _spreads_at(initial, parameters)
    else:
        scale = initializer_range(model)
        found = {name: scale if p.ndim >= 2 else 0.0 for name, p in parameters.items()}
    found = {name: sigma for name, sigma in found.items() if sigma > 0}
    if not found:
        raise ConfigError(
            f"noise needs a parameter that starts at random, got none{f' matching --only {only}' if only else ''}; "
            "name the model before training with --init"
        )
    return found


def initializer_range(model: nn.Module) -> float:
    """The standard deviation with which the model's matrices are initialised."""
    config: Any = model.config
    value = getattr(config.get_text_config(), "initializer_range", None)
    if not isinstance(value, int | float) or value <= 0:
        raise ConfigError(
            "noise is measured in units of initialisation, but the model's config.json has no initializer_range; name "
            "the model before training with --init"
        )
    return float(value)


def _spreads_at(initial: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    stored, found = StoredWeights(initial), {}
    for name, parameter in parameters.items():
        try:
            tensor = stored[name]
        except KeyError:
            raise ConfigError(
                f"--init must have the tensors of the model, got no {name} in {initial}"
            ) from None
        if tensor.shape != parameter.shape:
            raise ConfigError(
                f"--init must have the tensors of the model, got {name} of shape {tuple(tensor.shape)} in {initial} "
                f"instead of {tuple(parameter.shape)}"
            )
        found[name] = float(tensor.double().std(correction=0))
    return found


def noise_like(parameter: torch.Tensor, name: str, seed: int, draw: int) -> torch.Tensor:
    """eps for one parameter: the same numbers on every device and whatever else is drawn, by name, seed and draw."""
    digest = hashlib.sha256(f"{seed}:{draw}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(parameter.shape, generator=generator, dtype=torch.float32)


@contextmanager
def perturbed(
    model: nn.Module, sigmas: Mapping[str, float], strength: float, seed: int, draw: int
) -> Iterator[None]:
    """In this block the weights are theta + strength * sigma * eps; afterwards theta again, bit for bit.

    Memory: one more copy of the weights that get noise.
    """
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in sigmas}
    try:
        with torch.no_grad():
            for name, sigma in sigmas.items():
                noise = noise_like(parameters[name], name, seed, draw).to(parameters[name].device)
                moved = before[name].float() + strength * sigma * noise
                parameters[name].copy_(moved.to(parameters[name].dtype))
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


def noise_curves(
    loaded: LoadedModel,
    sigmas: Mapping[str, float],
    *,
    gammas: Sequence[float],
    draws: int,
    seed: int = 0,
    on_pair: Callable[[], None] = lambda: None,
) -> dict[str, NoiseCurve]:
    """What noise costs, on every text.

    Args:
        loaded: the model and its texts.
        sigmas: of `spreads`.
        gammas: strengths; 0 costs exactly nothing.
        draws: pairs (+eps, -eps) per strength; the same eps at every strength.
        seed: of eps.
        on_pair: called after each pair.
    """
    base = loaded.ce()
    losses: dict[str, dict[float, list[float]]] = {name: {g: [] for g in gammas} for name in base}
    for gamma in gammas:
        for draw in range(draws):
            pair = []
            for sign in (1.0, -1.0):
                with perturbed(loaded.model, sigmas, sign * gamma, seed, draw):
                    pair.append(loaded.ce())
            for name in base:
                losses[name][gamma].append(0.5 * (pair[0][name] + pair[1][name]))
            on_pair()
    return {
        name: NoiseCurve(
            ce=base[name], points=[_point(gamma, found, base[name]) for gamma, found in of_text.items()]
        )
        for name, of_text in losses.items()
    }


def _point(gamma: float, losses: Sequence[float], base: float) -> NoisePoint:
    mean = math.fsum(losses) / len(losses)
    stderr = None
    if len(losses) > 1:
        variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
        stderr = math.sqrt(variance / len(losses))
    # Equal terms give exactly themselves as mean, so gamma 0 is exactly 0.
    delta = math.fsum(loss - base for loss in losses) / len(losses)
    return NoisePoint(gamma=gamma, delta_ce=delta, stderr=stderr, perplexity=perplexity_of(mean))


def probe_noise(
    models: Mapping[str, Path],
    texts: Mapping[str, str],
    *,
    gammas: Sequence[float],
    draws: int,
    seed: int = 0,
    initial: Path | None = None,
    only: str | None = None,
    dtype: str = "float32",
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, NoiseCurve]]:
    """Label -> text -> what noise costs, one model after another.

    Raises:
        ConfigError: no strength, a negative one, one twice, adapters alone, or as `spreads`.
        AnnealError: as `LoadedModel`.
    """
    if not gammas or any(not math.isfinite(gamma) or gamma < 0 for gamma in gammas):
        raise ConfigError(
            f"--gamma must be strengths of at least 0, got {list(gammas)}; for example 0.025:0.8"
        )
    if len(set(gammas)) < len(gammas):
        raise ConfigError(f"--gamma must name each strength once, got {list(gammas)}")
    if draws < 1:
        raise ConfigError(f"--draws must be at least 1, got {draws}; 4 pairs are usual")
    for directory in models.values():
        require_whole_model(directory, "MODEL")  # the noise would be on their factors
    if initial is not None:
        require_whole_model(initial, "--init")
    progress = progress or Progress()
    found = {}
    for label, directory in models.items():
        loaded = LoadedModel(directory, texts, dtype=dtype, limit=limit)
        sigmas = spreads(loaded.model, initial=initial, only=only)
        progress.start(f"{label}: noise", len(gammas) * draws, unit="pair")
        progress.running()
        found[label] = noise_curves(
            loaded, sigmas, gammas=gammas, draws=draws, seed=seed, on_pair=lambda: progress.advance(1)
        )
        progress.finish()
        del loaded
    return found
