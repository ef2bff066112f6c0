"""Lets these tests use the process runner of the distributed tests, and shows what a comparison compared."""

import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("golden")
sys.path.append(str(Path(__file__).parents[1] / "distributed"))
