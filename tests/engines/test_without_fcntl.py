"""Where Python has no file locks, as on Windows, the package is imported and a model is used all the same."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
sys.modules["fcntl"] = sys.modules["resource"] = None  # the import of either fails
import bridgetower
model = bridgetower.load(sys.argv[1], device="cpu")
print(*model.embed_texts(["a bar"]).shape)
"""


def test_a_model_is_used_without_fcntl(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(tiny_checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "1 8\n"
