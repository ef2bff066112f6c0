"""Lets these tests start several processes with the runner of the distributed tests, and explains failed comparisons."""

import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("golden")
sys.path.append(str(Path(__file__).parents[1] / "distributed"))
