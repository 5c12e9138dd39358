"""docs/training.md lists every setting, and no other."""

import re
from dataclasses import fields
from pathlib import Path

from trainer.config import TrainConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_every_documented_setting_exists_and_every_setting_is_documented():
    table = PAGE.read_text().split("## Settings")[1].split("Defaults under")[0]
    documented = set(
        re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    assert documented == {entry.name for entry in fields(TrainConfig)} - {"cache", "model", "out"}
