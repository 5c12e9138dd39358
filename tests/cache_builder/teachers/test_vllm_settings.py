"""vLLM's settings from ours: typed strings, refusals by name.  No engine is started."""

import json
import re

import pytest
from tiny_models import save_tiny_model

from cache_builder import TeacherConfig, VLLMTeacher
from cache_builder.teachers import vllm_settings
from cache_builder.teachers.protocol import TeacherError
from cache_builder.teachers.vllm_plugin import (
    WRAPPERS,
    teacher_architecture,
    text_architectures,
    wrapped_architectures,
)
from cache_builder.teachers.vllm_settings import (
    QUANTISED_HEAD,
    advised,
    engine_arguments,
    platform_arguments,
    teacher_architectures,
    typed_engine_args,
)
from formats.capture_settings import CaptureSettings
from formats.errors import ConfigError


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tensor_parallel_size": "2"}, {"tensor_parallel_size": 2}),
        ({"tensor-parallel-size": "2"}, {"tensor_parallel_size": 2}),
        ({"gpu_memory_utilization": "0.5"}, {"gpu_memory_utilization": 0.5}),
        ({"enforce_eager": "false"}, {"enforce_eager": False}),
        ({"enforce_eager": "True"}, {"enforce_eager": True}),
        ({"quantization": "fp8"}, {"quantization": "fp8"}),
        ({"quantization": "none"}, {"quantization": None}),
        ({"code_revision": "1234"}, {"code_revision": "1234"}),
        ({"max_num_batched_tokens": "8192"}, {"max_num_batched_tokens": 8192}),
        ({"max_num_batched_tokens": 8192}, {"max_num_batched_tokens": 8192}),
        ({"hf_overrides": '{"rope_theta": 1e6}'}, {"hf_overrides": {"rope_theta": 1e6}}),
        ({"kv_cache_dtype": "auto"}, {"kv_cache_dtype": "auto"}),
    ],
)
def test_strings_take_the_declared_type(given, expected):
    assert typed_engine_args(given) == expected


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("mamba_backend", "triton", "TRITON"),
        ("attention-backend", "TRITON_ATTN", "TRITON_ATTN"),
        ("optimization_level", "1", "O1"),
    ],
)
def test_one_of_several_is_named(name, given, expected):
    (chosen,) = typed_engine_args({name: given}).values()
    assert chosen.name == expected


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_paralel_size": "2"}, "got 'tensor_paralel_size'; did you mean tensor_parallel_size?"),
        ({"qqq": "2"}, "engine arguments must be vLLM's EngineArgs, got 'qqq'"),
        ({"tensor_parallel_size": "two"}, "tensor_parallel_size must be int, got 'two'"),
        ({"enforce_eager": "maybe"}, "enforce_eager must be bool, got 'maybe'"),
        ({"mamba_backend": "cuda"}, "mamba_backend must be one of TRITON, FLASHINFER, CPU, got 'cuda'"),
        ({"max_model_len": "100"}, "max_model_len is set by anneal, got '100'; use --max-length"),
        ({"revision": "1234"}, "revision is set by anneal, got '1234'; use --revision"),
        ({"dtype": "half"}, "use --dtype"),
        ({"scheduler-cls": "my.Own"}, "scheduler_cls is set by anneal, got 'my.Own'; leave it out"),
        (
            {"enable_prefix_caching": "true"},
            "enable_prefix_caching is set by anneal, got 'true'; leave it out",
        ),
    ],
)
def test_engine_arguments_that_are_refused(given, message):
    with pytest.raises(ConfigError) as caught:
        typed_engine_args(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.vllm
def test_arguments_of_the_engine():
    config = TeacherConfig(
        model="m",
        capture=CaptureSettings(min_prob=0.25, max_k=7, draw_rate=5),
        max_length=99,
        engine_args={"hf_overrides": '{"rope_theta": 5.0}'},
    )
    arguments = engine_arguments(config, dtype="bfloat16", architectures=["AnnealA", "A"])
    assert arguments["hf_overrides"] == {
        "rope_theta": 5.0,
        "architectures": ["AnnealA", "A"],
        "head_dtype": "float32",
    }
    assert arguments["additional_config"] == {
        "anneal": {"positions": "all", "min_prob": 0.25, "max_k": 7, "draw_rate": 5}
    }
    assert (arguments["dtype"], arguments["max_model_len"]) == ("bfloat16", 99)
    assert arguments["enable_prefix_caching"] is False


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ({}, {"compilation_config": {"cudagraph_mode": "NONE"}}),
        (
            {"compilation_config": {"level": 2}},
            {"compilation_config": {"cudagraph_mode": "NONE", "level": 2}},
        ),
        (
            {"compilation_config": {"cudagraph_mode": "FULL"}},
            {"compilation_config": {"cudagraph_mode": "FULL"}},
        ),
        ({"compilation_config": 2}, {"compilation_config": 2}),
        ({"cudagraph_capture_sizes": [8]}, {}),
    ],
)
def test_a_prefill_on_a_gpu_records_no_graphs_unless_told_to(user, expected):
    assert platform_arguments(on_cpu=False, pooling=True, user=dict(user)) == expected
    assert platform_arguments(on_cpu=False, pooling=False, user=dict(user)) == {}, "generation replays them"


def test_a_cpu_engine_keeps_a_small_cache(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    given = platform_arguments(on_cpu=True, pooling=True, user={})
    assert given == {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert platform_arguments(on_cpu=True, pooling=True, user={}) == {"enforce_eager": True}
    whole = {"enforce_eager": True, "enable_chunked_prefill": False}
    assert platform_arguments(on_cpu=True, pooling=False, user={}) == whole, (
        "prompts of a sampler are not split"
    )


@pytest.mark.vllm
def test_attention_that_a_cpu_would_ignore_is_refused():
    flash = typed_engine_args({"attention_backend": "FLASH_ATTN"})
    with pytest.raises(ConfigError, match="runs on a CPU, got FLASH_ATTN"):
        platform_arguments(on_cpu=True, pooling=True, user=dict(flash))
    assert "attention_backend" not in platform_arguments(on_cpu=False, pooling=True, user=dict(flash))
    own = typed_engine_args({"attention_backend": "CPU_ATTN"})
    assert platform_arguments(on_cpu=True, pooling=True, user=own)["enforce_eager"] is True


@pytest.mark.vllm
def test_vllm_takes_our_words_for_no_graphs(tiny_llama_dir):
    from vllm import EngineArgs
    from vllm.config import CUDAGraphMode

    arguments = platform_arguments(on_cpu=False, pooling=True, user={"compilation_config": {"mode": 0}})
    made = EngineArgs(model=str(tiny_llama_dir), **arguments).compilation_config
    assert made.cudagraph_mode == CUDAGraphMode.NONE and int(made.mode) == 0


@pytest.mark.vllm
def test_a_quantised_output_head_is_explained():
    import inspect

    from vllm.model_executor.layers import logits_processor

    words = " ".join(re.findall(r'"([^"]*)"', inspect.getsource(logits_processor)))
    assert QUANTISED_HEAD in " ".join(words.split()), "vLLM words it otherwise now"
    assert advised(f"ValueError: it is {QUANTISED_HEAD}.").endswith("pass --head-dtype model")
    assert advised("ValueError: another") == "ValueError: another"


@pytest.mark.vllm
def test_every_text_architecture_has_a_teacher():
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # the entry point of the installed package, as vLLM calls it
    supported = ModelRegistry.get_supported_archs()
    names = text_architectures()
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "TransformersForCausalLM"} <= set(
        names
    )
    assert len(names) > 100
    assert all(teacher_architecture(name) in supported for name in names)
    assert not [name for name in names if "Embedding" in name or "MultiModal" in name]


@pytest.mark.vllm
def test_a_teacher_class_is_a_real_subclass_and_built_once():
    from vllm.model_executor.models.llama import LlamaForCausalLM

    from cache_builder.teachers import vllm_pooler

    built = vllm_pooler.AnnealLlamaForCausalLM
    assert issubclass(built, LlamaForCausalLM) and built is not LlamaForCausalLM
    assert built.is_pooling_model and not getattr(LlamaForCausalLM, "is_pooling_model", False)
    assert vllm_pooler.AnnealLlamaForCausalLM is built
    with pytest.raises(AttributeError):
        _ = vllm_pooler.SomethingElse


@pytest.mark.vllm
def test_architectures_that_are_taken_or_refused():
    assert teacher_architectures({"architectures": ["LlamaForCausalLM"]}) == [
        "AnnealLlamaForCausalLM",
        "LlamaForCausalLM",
    ]
    # Known to transformers only: vLLM's Transformers backend runs it.
    assert (
        teacher_architectures({"architectures": ["BioGptForCausalLM"]})[0] == "AnnealTransformersForCausalLM"
    )
    with pytest.raises(ConfigError, match=r"LlavaForConditionalGeneration .multimodal"):
        teacher_architectures({"architectures": ["LlavaForConditionalGeneration"]})
    with pytest.raises(ConfigError, match=r"got LlamaForCausalLLM; did its config mean LlamaForCausalLM\?"):
        teacher_architectures({"architectures": ["LlamaForCausalLLM"]})
    with pytest.raises(ConfigError, match="must name the model's architecture"):
        teacher_architectures({})


@pytest.mark.vllm
def test_models_that_hold_a_text_model(monkeypatch):
    """Multimodal ones, which run without their encoders; vLLM's code for them imports torchvision."""
    name = "Gemma3ForConditionalGeneration"
    monkeypatch.setattr(vllm_settings, "find_spec", lambda module: object())
    assert teacher_architectures({"architectures": [name]}) == [teacher_architecture(name), name]
    given = engine_arguments(TeacherConfig(model="m"), dtype="float32", architectures=["Anneal" + name, name])
    assert given["language_model_only"] is True
    text = engine_arguments(TeacherConfig(model="m"), dtype="float32", architectures=["AnnealA", "A"])
    assert "language_model_only" not in text
    monkeypatch.setattr(vllm_settings, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=f"find torchvision for {name}, got none"):
        teacher_architectures({"architectures": [name]})
    assert set(wrapped_architectures()) == WRAPPERS, "vLLM names one of them otherwise now"


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"]}, "multimodal"),
        ({"architectures": []}, "must name the model's architecture"),
    ],
)
def test_a_model_that_is_refused_starts_nothing(change, message, tmp_path):
    model = save_tiny_model(tmp_path, "llama")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ConfigError, match=message):
        VLLMTeacher(TeacherConfig(model=str(model)))


@pytest.mark.vllm
def test_longer_than_the_context(tiny_llama_dir):
    with pytest.raises(ConfigError) as caught:
        VLLMTeacher(TeacherConfig(model=str(tiny_llama_dir), max_length=5000))
    assert "\n" not in str(caught.value) and "1024" in str(caught.value)


def test_an_engine_that_changes_its_way_of_reducing_is_refused():
    teacher = object.__new__(VLLMTeacher)
    teacher._description, teacher._engine = {}, None
    for _ in range(2):
        teacher._check_reduction("triton")
    assert teacher.describe() == {"reduction": "triton"}
    with pytest.raises(TeacherError, match=r"in one way, got plain after triton.*ANNEAL_TRITON=0"):
        teacher._check_reduction("plain")
