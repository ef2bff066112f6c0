"""Lets these tests start several processes with the runner beside the distributed tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
