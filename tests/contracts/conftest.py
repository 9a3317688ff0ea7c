"""What contracts are tried with that lies elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "collect"))  # so that tests can import `masked`
