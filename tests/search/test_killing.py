"""SIGKILL before any change: the index always opens, and the next run completes an index or vectors."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_embed import written

NAMES = ["00.png", "01.png"]


@pytest.fixture(scope="module")
def killed_runs(forked, tiny_checkpoint, shapes_folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("killed")
    for name, images in (("few", NAMES), ("photos", [*NAMES, "02.png"])):
        (base / name).mkdir()
        for image in images:
            shutil.copy(shapes_folder / image, base / name)
        (base / name / "03.png").write_text("not an image")
    command = [forked / "python", Path(__file__).with_name("killing.py"), tiny_checkpoint, base]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}  # LanceDB warns of forks
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("suffix", ["lance", "npy"])
def test_vectors(suffix, killed_runs, predictor, shapes_folder):
    assert len(killed_runs[suffix]) >= 7
    expected = predictor.embed_images([shapes_folder / name for name in NAMES]).numpy()
    for run in killed_runs[suffix]:
        assert (run["bad"], run["names"]) == (1, NAMES)
        assert set(run["beside"]) == written(Path(f"v.{suffix}"), bad=True)  # and nothing else
        np.testing.assert_allclose(run["vectors"], expected, atol=1e-5)


def test_an_index(killed_runs):
    assert all(run["is_whole"] for run in killed_runs["index"])
    assert len({run["left"] for run in killed_runs["index"]}) > 1  # kills came at different moments
    # the control: there was something to complete
    assert sum(not run["was_whole"] for run in killed_runs["index"]) >= 3
