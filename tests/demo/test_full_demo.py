"""What the full demo prints, beside lines of pages after `# ≈`; it runs unless BRIDGETOWER_DEMO names its folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DECIMAL = re.compile(r"-?\d+\.\d+")
TOLERANCE = 0.15  # of cosines and probabilities: processors round in their own way, and training carries that on


def near(shown, printed):
    """Whether a line has the words and names that are shown, `…` apart, and decimals near those."""
    words = [".*".join(map(re.escape, part.split("…"))) for part in DECIMAL.split(shown)]
    found = re.fullmatch(f"({DECIMAL.pattern})".join(words), printed)
    numbers = zip(DECIMAL.findall(shown), found.groups() if found else (), strict=False)
    return found is not None and all(abs(float(one) - float(other)) <= TOLERANCE for one, other in numbers)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_pages_show_what_the_full_demo_prints(tmp_path):
    folder = os.environ.get("BRIDGETOWER_DEMO", tmp_path)
    places = f"{ROOT / 'demo'}:{os.environ.get('PYTHONPATH', '')}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def printed(*command):
        environment = os.environ | {"PYTHONPATH": places, "PATH": path}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout

    if folder == tmp_path:
        printed("python", "-m", "bridgetower_demo")
    shown, found = [], []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            if "# ≈ " in block:
                shown += re.findall(r"# ≈ (.*)", block)
                found += printed("bash", "-ec", block).splitlines()
    assert len(shown) > 4
    assert [pair for pair in zip(shown, found, strict=True) if not near(*pair)] == []
    assert [pair for pair in zip(shown, [*found[1:], found[0]], strict=True) if near(*pair)] == []  # the control
