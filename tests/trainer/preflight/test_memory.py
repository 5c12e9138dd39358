"""What a step is said to hold, beside what it holds."""

import pytest
import torch
from runs import settings, trainer_of

from formats.errors import ConfigError
from trainer import dry_run, plan_training
from trainer.preflight import memory


def measured_activations(trainer) -> int:
    """Bytes of all storages that autograd keeps in a real forward pass over the largest micro-batch."""
    batch, length = memory.batch_shape(trainer)
    model, kept = trainer.model.train(), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    inputs = {"input_ids": torch.ones(batch, length, dtype=torch.int64)}
    if trainer.packing:  # two rows to a sequence
        inputs["position_ids"] = torch.arange(length).remainder(length // 2 + 1).expand(batch, -1)
    with (
        trainer.head.left_out(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        trainer.compute_loss_context_manager(),
    ):
        model(**inputs, use_cache=False)
    return sum(size for size, _ in kept.values())


BATCH = (
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=1",
    "training.max_steps=1",
)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.bf16=true",),
        ("packing=true", "pack_length=64"),
        ("lora.r=4", "lora.target_modules=all-linear"),
    ],
    ids=str,
)
def test_activations_are_those_that_autograd_keeps(overrides, tmp_path, tiny_llama_dir, llama_cache):
    trainer = trainer_of(llama_cache, tiny_llama_dir, tmp_path, *BATCH, *overrides)
    batch, length = memory.batch_shape(trainer)
    found = memory.activation_bytes(trainer, batch, length)
    assert found == pytest.approx(measured_activations(trainer), rel=0.1)
    assert trainer.head.module.forward == trainer.head._forward  # as it was


@pytest.mark.parametrize("optim", ("adamw_torch", "sgd", "adafactor"))
def test_weights_gradients_and_state_are_those_of_a_step(optim, tmp_path, tiny_llama_dir, llama_cache):
    trainer = trainer_of(llama_cache, tiny_llama_dir, tmp_path, *BATCH, f"training.optim={optim}")
    said = memory.lasting_memory(trainer)
    trainer.train()
    model = trainer.model
    assert said.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert said.gradients == sum(p.numel() * 4 for p in model.parameters())
    state = [
        value.nbytes
        for entry in trainer.optimizer.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    assert said.optimiser == pytest.approx(sum(state), rel=0.01, abs=0.02 * said.weights)


def test_an_optimiser_that_cannot_be_tried_is_taken_for_adam(
    monkeypatch, tmp_path, tiny_llama_dir, llama_cache
):
    from transformers import Trainer

    class Waits(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("tell me that training begins")

    trainer = trainer_of(llama_cache, tiny_llama_dir, tmp_path, *BATCH)
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *args: (Waits, {"lr": 0.1}))
    assert memory.lasting_memory(trainer).optimiser == 2 * memory.lasting_memory(trainer).gradients


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer(tmp_path, tiny_llama_dir, llama_cache):
    plain = trainer_of(llama_cache, tiny_llama_dir, tmp_path, *BATCH)
    shape = memory.batch_shape(plain)
    whole = memory.activation_bytes(plain, *shape)
    again = trainer_of(llama_cache, tiny_llama_dir, tmp_path, *BATCH, "training.gradient_checkpointing=true")
    layers, width = len(again.model.model.layers), again.model.config.hidden_size
    assert (
        memory.activation_bytes(again, *shape) == whole // layers + layers * shape[0] * shape[1] * width * 4
    )


def test_a_pack_is_no_longer_than_all_rows(tmp_path, tiny_llama_dir, llama_cache):
    """A length far above them made the estimate compute for minutes what no step can hold."""
    packs = ("packing=true", "pack_length=1000000000")
    trainer = trainer_of(llama_cache, tiny_llama_dir, tmp_path, *BATCH, *packs)
    assert memory.batch_shape(trainer) == (4, int(trainer.train_dataset.lengths().sum()))


def test_retention_keeps_initial_weights_and_importance(tmp_path, tiny_llama_dir, llama_cache):
    overrides = (*BATCH, "l2.coef=0.1", "ewc.coef=1", f"ewc.cache={llama_cache}")
    said = memory.lasting_memory(trainer_of(llama_cache, tiny_llama_dir, tmp_path, *overrides))
    assert said.initial == 2 * said.gradients


@pytest.mark.parametrize("version", (1, 2))
def test_what_is_not_on_the_gpu_refuses_no_run(version):
    from accelerate import FullyShardedDataParallelPlugin

    sizes = dict(weights=40, optimiser=80, initial=10, gradients=40, activations=30, loss=5)
    whole = memory.StepMemory(**sizes, carries_gradients=False)
    plugins = [
        FullyShardedDataParallelPlugin(fsdp_version=version, cpu_offload=flag) for flag in (True, False)
    ]
    assert [memory.offloads(plugin) for plugin in (*plugins, None)] == [True, False, False]
    assert memory.on_the_gpu(whole, offloaded=True, paged=False).peak == 35
    assert memory.on_the_gpu(whole, offloaded=False, paged=True).peak == 90
    assert memory.on_the_gpu(whole, offloaded=False, paged=False) == whole


def test_accumulation_carries_gradients_through_the_forward_pass():
    sizes = dict(weights=10, optimiser=20, initial=0, gradients=10, activations=30, loss=5)
    assert memory.StepMemory(**sizes, carries_gradients=False).peak == 65
    assert memory.StepMemory(**sizes, carries_gradients=True).peak == 75
    assert memory.StepMemory(**sizes | {"activations": 1}, carries_gradients=False).peak == 40


def test_a_plan_says_steps_and_memory_and_writes_nothing(tmp_path, tiny_llama_dir, llama_cache):
    plan = plan_training(settings(llama_cache, tiny_llama_dir, tmp_path / "run", *BATCH))
    assert plan.num_steps == 1 and plan.micro_batches == 1 and plan.memory.activations > 0
    assert "1 step, 6 to an epoch" in plan.text() and "at most" in plan.text() and "(cpu)" in plan.text()
    assert not (tmp_path / "run").exists()


def test_a_step_that_cannot_fit_is_refused_by_its_sizes(monkeypatch, tmp_path, tiny_llama_dir, llama_cache):
    monkeypatch.setattr(memory, "capacity_bytes", lambda device: 1 << 20)
    with pytest.raises(
        ConfigError, match=r"a step must fit into the 0.0 GiB of cpu, got .*weights .*; use"
    ) as error:
        plan_training(settings(llama_cache, tiny_llama_dir, tmp_path / "run", *BATCH))
    assert "\n" not in str(error.value)


def test_a_model_that_needs_numbers_is_planned_without_activations(
    monkeypatch, tmp_path, tiny_llama_dir, llama_cache
):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def choosing(self, input_ids=None, **kwargs):
        assert int(input_ids.sum()) >= 0
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", choosing)
    plan = dry_run.plan_training(settings(llama_cache, tiny_llama_dir, tmp_path / "run", *BATCH))
    assert plan.memory.activations == 0 and "DataDependentOutput" in plan.text()


def test_it_is_typed_as_dry_run(anneal, tmp_path, tiny_llama_dir, llama_cache):
    words = ("train", llama_cache, "--model", tiny_llama_dir, "--out", tmp_path / "run", "--dry-run")
    code, out, _ = anneal(*words)
    assert (
        code == 0 and "a step holds, GiB on each process: weights" in out and not (tmp_path / "run").exists()
    )
    code, _, err = anneal(*words, "--set", "training.learning_rat=1")
    assert code == 1 and "did you mean training.learning_rate?" in err
