"""The same run by `anneal train` and by somebody's trainer: first weights, packs, and how close the results must be."""

import pytest
import torch

STEPS = 20


def losses_of(report) -> list[float]:
    """Of every step of `anneal train`."""
    return [entry["loss"] for entry in report.log_history if "ce" in entry and "loss" in entry]


def assert_close(left: list[float], right: list[float], weights: dict, found: dict) -> None:
    """Equal losses of every step to 1e-5, equal weights to 1e-5 of their norm."""
    assert len(left) == len(right) == STEPS
    assert left[0] != pytest.approx(left[-1], rel=0.02), "nothing was learnt"
    assert left == pytest.approx(right, rel=1e-5)
    assert weights.keys() == found.keys()
    for name, tensor in weights.items():
        difference = (found[name].detach() - tensor).norm() / tensor.norm()
        assert difference <= 1e-5, (name, float(difference))


def set_adapters(model) -> None:
    """The same first weights for whoever made the adapters."""
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)


def set_adapters_of_train(monkeypatch) -> None:
    """`anneal train` begins with them too."""
    import trainer.inputs

    def attach(model, given, seed):
        adapted = attached(model, given, seed)
        set_adapters(adapted)
        return adapted

    attached = trainer.inputs.attach_adapters
    monkeypatch.setattr(trainer.inputs, "attach_adapters", attach)


def set_packs_of_train(monkeypatch, packs: list[list[int]], num_rows: int) -> None:
    """`anneal train` packs the training rows in this way, and any others in its own."""
    from trainer.loop import label_annealing_trainer

    ours_of = label_annealing_trainer.best_fit
    monkeypatch.setattr(
        label_annealing_trainer,
        "best_fit",
        lambda lengths, room: packs if len(lengths) == num_rows else ours_of(lengths, room),
    )
