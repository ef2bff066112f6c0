"""The example of parts of one's own runs as it is written."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_parts.py"


def test_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'accuracy': ")
    assert (tmp_path / "work" / "run" / "best" / "model.safetensors").exists()
