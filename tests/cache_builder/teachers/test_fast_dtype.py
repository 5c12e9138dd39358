"""What `--dtype auto` means on which processor."""

from pathlib import Path

import pytest

from cache_builder.teachers.fast_dtype import cpu_flags, dtype_note, resolve_dtype

AVX2 = frozenset({"sse4_2", "avx2", "fma"})
AMX = AVX2 | {"avx512f", "avx512_bf16", "amx_bf16"}


@pytest.mark.parametrize(
    ("requested", "checkpoint", "on_cpu", "softcap", "flags", "expected"),
    [
        ("auto", "bfloat16", True, None, AVX2, "float32"),
        ("auto", "float16", True, None, AVX2, "float32"),
        ("auto", "float16", True, None, AMX, "float32"),  # this processor multiplies bfloat16 only
        ("auto", "bfloat16", True, None, AMX, "bfloat16"),
        ("auto", "bfloat16", True, None, frozenset({"asimd", "bf16"}), "bfloat16"),
        ("auto", "bfloat16", False, None, AVX2, "bfloat16"),  # a GPU
        ("auto", "float32", True, None, AVX2, "float32"),
        ("auto", "bfloat16", True, 50.0, AVX2, "bfloat16"),  # vLLM honours a softcap in no other type there
        ("auto", "bfloat16", True, None, frozenset(), "bfloat16"),  # nothing is known of the machine
        ("bfloat16", "float32", True, None, AVX2, "bfloat16"),
    ],
)
def test_the_type(requested, checkpoint, on_cpu, softcap, flags, expected) -> None:
    found = resolve_dtype(requested, checkpoint, on_cpu=on_cpu, softcap=softcap, flags=flags)
    assert found == expected


def test_flags_are_those_of_the_first_processor(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\n\nprocessor\t: 1\nflags\t: other\n")
    assert cpu_flags(info) == {"fpu", "avx2", "amx_bf16"}
    info.write_text("processor : 0\nFeatures : fp asimd bf16\n")
    assert cpu_flags(info) == {"fp", "asimd", "bf16"}
    assert cpu_flags(tmp_path / "none") == frozenset()


def test_a_note_only_where_the_type_was_changed() -> None:
    assert dtype_note("auto", "bfloat16", {"dtype": "bfloat16"}) is None
    assert dtype_note("float32", "bfloat16", {"dtype": "float32"}) is None
    assert dtype_note("auto", None, {"dtype": "float32"}) is None
    line = dtype_note("auto", "bfloat16", {"dtype": "float32"})
    assert line == (
        "the engine runs in float32: this CPU has no bfloat16 matrix instructions (--dtype overrides)"
    )
