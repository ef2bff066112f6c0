"""Loading holds the weights once: the peak of the resident memory of a fresh process."""

import json
import subprocess
from pathlib import Path

import pytest

from bridgetower.checkpoints import convert, read_checkpoint
from helpers.checkpoints import make_official

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason=f"{STATUS} is Linux")

# 44 million parameters, a quarter of them in joined projections of query, key and value.
WIDE = {"hidden_size": 512, "num_heads": 8, "intermediate_size": 2048}
SIZES = {
    f"{section}.{name}": size
    for section in ("text", "vision", "fusion")
    for name, size in WIDE.items()
}
SIZES["text.vocab_size"] = 8000
OVERRIDES = {"text.num_heads": 8, "vision.num_heads": 8}

# Loads a model, then reads every weight; prints the peak of the memory after each, in bytes above what imports take.
MEASURE = """
import json, sys
from pathlib import Path
import bridgetower

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

source, options = sys.argv[1], json.loads(sys.argv[2])
bridgetower.load  # imported now, not while memory is measured
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
model = bridgetower.load(source, device="cpu", **options).model
loaded = memory("VmHWM")
sum(float(weight.sum()) for weight in model.parameters())
print(json.dumps([loaded - before, memory("VmHWM") - before]))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    made = make_official(SIZES)
    paths = {
        "ckpt": made.save(folder / "model.ckpt"),
        "bridgetower": folder / "own",
        "hf": folder / "hf",
    }
    checkpoint = read_checkpoint(paths["ckpt"], overrides=OVERRIDES)
    convert(checkpoint, paths["bridgetower"], "bridgetower")
    convert(checkpoint, paths["hf"], "hf")
    return paths


def peaks(python, source, **options):
    """Returns the peaks of loading, and of loading and reading all weights, as shares of the file's size."""
    file = source if source.is_file() else source / "model.safetensors"
    command = [python, "-c", MEASURE, str(source), json.dumps(options)]
    loaded, used = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return loaded / file.stat().st_size, used / file.stat().st_size


@pytest.mark.parametrize(
    ("case", "limit"), [("hf fp32", 1.2), ("hf bf16", 0.8), ("bridgetower bf16", 0.8)]
)
def test_loading_and_using_a_folder(forked, sources, case, limit):
    kind, precision = case.split()
    assert peaks(forked / "python", sources[kind], precision=precision)[1] < limit


def test_loading_an_official_file(forked, sources):
    """The mapped file, all of which is read, the joined quarter, and some megabytes of code that is read meanwhile."""
    assert peaks(forked / "python", sources["ckpt"], overrides=OVERRIDES)[0] < 1.4
