"""The tests take sizes from the recording: they pass on one that has others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bridgetower.checkpoints.tensors import read_torch_archive
from golden import FOLDER_VARIABLE, folder

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

NUM_ANSWERS = 23
POSITIONS = 21
GROWN = {
    "vqa_classifier.3.weight": NUM_ANSWERS,
    "vqa_classifier.3.bias": NUM_ANSWERS,
    "text_transformer.embeddings.position_embeddings.weight": POSITIONS,
}


def write_larger(source: Path, target: Path) -> None:
    """Copies the case c, with a head for more answers and a longer position table."""
    shutil.copytree(source, target)
    content = read_torch_archive(source / "checkpoint.ckpt")
    settings = content["hyper_parameters"]["config"]
    tensors = content["state_dict"]
    for name, rows in GROWN.items():
        assert rows > len(tensors[name])
        tensors[name] = torch.cat([tensors[name], tensors[name][: rows - len(tensors[name])]])
    meta = json.loads((source / "meta.json").read_text())
    for values in (settings, meta["config"]):
        values["vqav2_label_size"] = NUM_ANSWERS
    (target / "meta.json").write_text(json.dumps(meta))
    torch.save(content, target / "checkpoint.ckpt")


def test_the_tasks_pass_on_a_recording_with_other_sizes(tmp_path):
    write_larger(folder() / "c_vqa", tmp_path / "c_vqa")
    shutil.copytree(folder() / "e_nlvr2", tmp_path / "e_nlvr2")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(Path(__file__).with_name("test_official_tasks.py")),
    ]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {FOLDER_VARIABLE: str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
