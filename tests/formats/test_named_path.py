"""`NAME=PATH` where both may hold `=`: the names that a sweep gives its runs."""

from pathlib import Path

import pytest

from formats.named_path import split_name


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("runs/direct", ("", "runs/direct")),
        ("mine=runs/direct", ("mine", "runs/direct")),
        ("runs/kl_coef=1,lr=1e-4", ("", "runs/kl_coef=1,lr=1e-4")),
        ("kl_coef=1", ("", "kl_coef=1")),
        ("kl_coef=1,lr=1e-4=runs/kl_coef=1,lr=1e-4", ("kl_coef=1,lr=1e-4", "runs/kl_coef=1,lr=1e-4")),
        ("a=kl_coef=1", ("a", "kl_coef=1")),
        ("mine=hub/model", ("mine", "hub/model")),
        ("maths=gsm8k:exact_match", ("maths", "gsm8k:exact_match")),
        ("not/there=model", ("", "not/there=model")),
        ("=model", ("", "=model")),
        ("mine=", ("mine", "")),
    ],
)
def test_names_and_paths_with_equals_signs(
    word: str, expected: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("runs/direct", "runs/kl_coef=1,lr=1e-4", "kl_coef=1"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_name(word) == expected
