"""Names and sizes in an engine's own settings, either spelling."""

import pytest

from cache_builder import BuildConfig, TeacherConfig
from cache_builder.teachers.engine_args import by_name, gpus_per_engine
from formats.errors import ConfigError


def test_either_spelling_is_one_setting():
    given = {"tensor-parallel-size": "2", "max_num_seqs": 8}
    named = {"tensor_parallel_size": "2", "max_num_seqs": 8}
    assert by_name(given) == named
    assert TeacherConfig(model="m", engine_args=given).engine_args == named
    assert BuildConfig(corpus="c", model="m", out="o", engine_args=given).engine_args == named
    with pytest.raises(ConfigError, match="given once, got max_num_seqs and max-num-seqs"):
        by_name({"max-num-seqs": 8, "max_num_seqs": 8})
    with pytest.raises(ConfigError, match="must map names to values"):
        by_name({3: 8})


@pytest.mark.parametrize(
    ("named", "gpus"),
    [
        ({}, 1),
        ({"tensor_parallel_size": "4"}, 4),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": "3"}, 6),
        ({"pipeline_parallel_size": 2, "prefill_context_parallel_size": 2, "max_num_seqs": 9}, 4),
        ({"data_parallel_size": "1"}, 1),
    ],
)
def test_gpus_of_one_engine(named, gpus):
    assert gpus_per_engine(named) == gpus


@pytest.mark.parametrize("size", ["0", "two", -1, "1.5"])
def test_sizes_that_are_none(size):
    with pytest.raises(ConfigError, match="pipeline_parallel_size must be a whole number of at least 1"):
        gpus_per_engine({"pipeline_parallel_size": size})


@pytest.mark.parametrize("name", ["data_parallel_size", "data_parallel_size_local", "data_parallel_rank"])
def test_an_engine_split_by_data_is_refused(name):
    with pytest.raises(ConfigError, match=rf"got engine argument {name} = '2'; run the same command"):
        gpus_per_engine({name: "2"})
