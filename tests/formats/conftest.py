"""Puts the helpers of this directory (`make_teachers`, `independent_reader`) on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
