"""The parts of a teacher that need no engine: settings, refusals, types of the checkpoint."""

import json
import subprocess
import sys

import numpy as np
import pytest

from cache_builder.teachers.engines import make_teacher
from cache_builder.teachers.model_config import checkpoint_dtype, read_model_config
from cache_builder.teachers.protocol import TeacherConfig, TeacherError, check_numbers, check_row
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError
from formats.logprobs.tail_draws import TailDraws
from formats.logprobs.topk import TAIL_BETAS, TopKLogprobs


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model", "", "model must be"),
        ("dtype", "int8", "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ("head_dtype", "float16", "head_dtype must be one of float32, model"),
        ("max_length", 1, "max_length must be at least 2, got 1"),
    ],
)
def test_settings_out_of_range(setting, value, message):
    with pytest.raises(ConfigError, match=message):
        TeacherConfig(**{"model": "m", setting: value})


def test_unknown_engine():
    with pytest.raises(ConfigError, match="engine must be one of vllm, transformers, got 'jax'"):
        make_teacher("jax", TeacherConfig(model="m"))


def test_a_row_must_fit_the_model():
    row = TokenRow(np.array([1, 2, 3]), np.array([False, True, True]))
    check_row(row, 0, max_length=3, vocab_size=4)
    with pytest.raises(TeacherError, match=r"at most 2 tokens .*got 3 in row 7"):
        check_row(row, 7, max_length=2, vocab_size=4)
    with pytest.raises(TeacherError, match=r"from 0 to 2 .*got 3 in row 7"):
        check_row(row, 7, max_length=3, vocab_size=3)
    negative = TokenRow(np.array([1, -5]), np.array([False, True]))
    with pytest.raises(TeacherError, match="got -5 in row 0"):
        check_row(negative, 0, max_length=3, vocab_size=3)
    check_row(TokenRow(np.zeros(0), np.zeros(0)), 0, max_length=3, vocab_size=3)


def test_nan_is_named_with_its_row():
    tails, none = np.zeros((2, len(TAIL_BETAS))), TailDraws.none(2)
    topk = TopKLogprobs(
        np.array([0, 1, 2]), np.array([0, 1]), np.array([-1.0, np.nan]), tails, 9, none, [-1, -1]
    )
    with pytest.raises(TeacherError, match=r"NaN in row 4; .*--dtype"):
        check_numbers(topk, 4)
    fine = topk.slice(0, 1)
    assert check_numbers(fine, 4) is fine
    assert len(check_numbers(TopKLogprobs.empty(9), 4)) == 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": None}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_is_the_type_of_the_checkpoint(config, expected):
    assert checkpoint_dtype(config) == expected


def test_model_config_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"must be a model directory, got no config\.json"):
        read_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="must be readable JSON"):
        read_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    assert read_model_config(str(tmp_path)) == {"a": 1}


def test_importing_the_names_of_the_package_stays_light():
    probe = (
        "import sys, cache_builder; cache_builder.TeacherConfig; cache_builder.make_teacher; "
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_exists():
    import importlib

    import cache_builder

    for name, module in cache_builder._MODULES.items():
        assert importlib.import_module(f"cache_builder.{module}").__dict__[name] is getattr(
            cache_builder, name
        )
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cache_builder.nonsense
