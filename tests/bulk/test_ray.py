"""Embedding on a real Ray cluster of this machine with two workers, one of which is killed."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridgetower.bulk.config import BulkConfig, EmbedConfig
from bridgetower.bulk.embedding import EmbeddedBlock
from bridgetower.bulk.outputs import NumPy
from bridgetower.bulk.run import embed_source
from bridgetower.predictor import Predictor, load
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index

pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
from bridgetower.bulk.on_ray import LOCAL, _cluster

pytestmark = pytest.mark.slow
BLOCKS = 15  # of three images


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster for all tests: starting it takes longer than they do."""
    with _cluster(LOCAL, 2):
        yield


def workers() -> list[int]:
    """Process ids of the workers that have a model."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if command.startswith(b"ray::") and b"_Worker" in command:
            found.append(int(process.name))
    return found


def slow(model: Path) -> Callable[[], Predictor]:
    """Loads a model that takes its time for a batch, so that no worker is through before another is killed."""

    def call() -> Predictor:
        import time

        predictor = load(model, device="cpu")
        predictor.model.vision.register_forward_pre_hook(lambda *_: time.sleep(0.1))
        return predictor

    return call


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the blocks that are written, of which the third one has a worker killed."""
    names: list[str] = []
    write = NumPy.write

    def killing(output: NumPy, block: EmbeddedBlock) -> None:
        write(output, block)
        names.append(block.name)
        if len(names) == 3:
            os.kill(workers()[0], signal.SIGKILL)

    monkeypatch.setattr(NumPy, "write", killing)
    return names


def test_a_killed_worker_and_a_broken_image(
    written: list[str], pictures: Path, tiny_checkpoint: Path, predictor: Predictor, tmp_path: Path
) -> None:
    (tmp_path / "photos").symlink_to(pictures)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"photos/{n:02}.png\n" for n in range(44)) + "none.png\n")
    config = EmbedConfig(block_size=3, ray=LOCAL, ray_workers=2, max_errors=1)
    report = embed_source(tmp_path / "list.csv", tmp_path / "v.npy", slow(tiny_checkpoint), config)
    assert sorted(written) == [f"000000-{number:06}" for number in range(BLOCKS)]
    assert (report.vectors, report.bad) == (44, 1)
    assert "'none.png': no image file at" in report.problems[0]
    expected = predictor.embed_images([pictures / f"{number:02}.png" for number in range(44)])
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected.numpy(), atol=1e-5)


def test_goes_on_with_what_one_process_began(
    pictures: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    write = NumPy.write

    def stopping(output: NumPy, block: EmbeddedBlock) -> None:
        write(output, block)
        names.append(block.name)
        if len(names) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(NumPy, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed_source(pictures, tmp_path / "v.npy", tiny_checkpoint, EmbedConfig(block_size=3))
    config = EmbedConfig(block_size=3, ray=LOCAL, ray_workers=2)
    assert embed_source(pictures, tmp_path / "v.npy", tiny_checkpoint, config).vectors == 45
    assert len(names) == len(set(names)) == BLOCKS


def test_an_index_gets_a_commit_for_each_block(pictures: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = IndexConfig(block_size=9, ray=LOCAL, ray_workers=2)
    assert build_index(pictures, tmp_path / "a.lance", tiny_checkpoint, config).added == 45
    assert len(list((tmp_path / "a.lance" / "data").iterdir())) == 5
    build_index(pictures, tmp_path / "b.lance", tiny_checkpoint)
    vector = next(iter(load(tiny_checkpoint, device="cpu").embed_images(pictures / "07.png")))
    found, expected = (Index(tmp_path / f"{name}.lance").nearest(vector, 45) for name in "ab")
    assert [hit.path for hit in found] == [hit.path for hit in expected]
    assert build_index(pictures, tmp_path / "a.lance", tiny_checkpoint, config).added == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ray_workers": 2}, "ray_workers 2 would be ignored without ray"),
        ({"ray": LOCAL, "ray_workers": 0}, "ray_workers is 0; expected at least 1"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BulkConfig(**settings)


def test_what_cannot_be_done(pictures: Path, predictor: Predictor, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on Ray every worker loads the model; give what to load"):
        embed_source(pictures, tmp_path / "v.npy", predictor, EmbedConfig(ray=LOCAL))
    with pytest.raises(ValueError, match="ray_workers is 9, but the cluster has 2 cores, one for each worker"):
        embed_source(pictures, tmp_path / "v.npy", tiny_checkpoint, EmbedConfig(ray=LOCAL, ray_workers=9, block_size=3))
