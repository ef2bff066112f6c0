"""SIGKILL before any change: the index always opens, and the next run completes an index or vectors."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_embed import written

from bridgetower.predictor import Predictor

NAMES = ["00.png", "01.png", "02.png"]
Kill = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def kill(tiny_checkpoint: Path, shapes_folder: Path, tmp_path: Path) -> Kill:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(shapes_folder / name, folder)
    (folder / "03.png").write_text("not an image")

    def call(kind: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("killing.py"), tiny_checkpoint, folder, tmp_path, kind],
            env=os.environ | {"PYTHONWARNINGS": "ignore"},  # LanceDB warns of forks
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return list(json.loads(done.stdout))

    return call


@pytest.mark.parametrize("suffix", ["lance", "npy"])
def test_vectors(suffix: str, kill: Kill, predictor: Predictor, tmp_path: Path) -> None:
    runs = kill(suffix)
    assert len(runs) >= 7
    expected = predictor.embed_images([tmp_path / "photos" / name for name in NAMES]).numpy()
    for one in runs:
        assert (one["bad"], one["names"]) == (1, NAMES)
        assert set(one["beside"]) == written(tmp_path / f"v.{suffix}", bad=True)  # and nothing else
        np.testing.assert_allclose(one["vectors"], expected, atol=1e-5)


def test_an_index(kill: Kill) -> None:
    runs = kill("index")
    assert all(one["is_whole"] for one in runs)
    assert len({one["left"] for one in runs}) > 1  # kills came at different moments
    assert sum(not one["was_whole"] for one in runs) >= 3  # the control: there was something to complete
