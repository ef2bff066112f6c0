"""Embedding on a real Ray cluster of this machine with two workers, one of which is killed."""

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bridgetower.data.sets.store import Table
from bridgetower.inference.config import EmbedConfig, ScoreConfig, SourceConfig
from bridgetower.inference.embed import connect_to_ray
from bridgetower.inference.predictor import load
from bridgetower.inference.vector_files import embed_source
from bridgetower.search import build
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index

pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

pytestmark = pytest.mark.slow
LOCAL = "local"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with connect_to_ray(SourceConfig(ray=LOCAL, ray_workers=2)):
        yield


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(15):
        lines = (f"red bar {number} {line}" for line in range(3))
        (folder / f"{number:02}.txt").write_text("\n".join(lines))
    (folder / "broken.txt").symlink_to("nowhere.txt")
    return folder


def workers():
    numbers = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if command.startswith(b"ray::") and b"_Worker" in command:
            numbers.append(int(process.name))
    return numbers


def load_slow_model(model):
    """Loads a model that takes its time for a batch, so that no worker is through before another is killed."""

    def call():
        import time

        predictor = load(model, device="cpu")
        predictor.model.text.register_forward_pre_hook(lambda *_: time.sleep(0.1))
        return predictor

    return call


def test_goes_on_with_what_one_process_began_and_without_a_killed_worker(
    text_folder, tiny_checkpoint, predictor, monkeypatch, tmp_path
):
    append = Table.append
    commits = list[int]()

    def stopping(table, rows):
        if len(commits) == 5:
            raise KeyboardInterrupt
        append(table, rows)
        commits.append(sum(name != "" for name in rows["id"].to_pylist()))

    def killing(table, rows):
        append(table, rows)
        commits.append(len(rows))
        if len(commits) == 3:
            os.kill(workers()[0], signal.SIGKILL)

    settings = {"commit_seconds": 0, "batch_size": 3, "max_errors": 1}
    monkeypatch.setattr(Table, "append", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed_source(text_folder, tmp_path / "v.npy", predictor, EmbedConfig(**settings))
    assert sum(commits) == 15
    del commits[:]
    monkeypatch.setattr(Table, "append", killing)
    config = EmbedConfig(ray=LOCAL, ray_workers=2, **settings)
    report = embed_source(text_folder, tmp_path / "v.npy", load_slow_model(tiny_checkpoint), config)
    assert (report.vectors, report.bad) == (45, 1)
    assert len(commits) > 3
    assert sum(commits) == 31  # of the 30 that were left, and the bad one
    lines = [
        line
        for path in sorted(text_folder.glob("[0-9]*.txt"))
        for line in path.read_text().splitlines()
    ]
    np.testing.assert_allclose(
        np.load(tmp_path / "v.npy"), predictor.embed_texts(lines).numpy(), atol=1e-5
    )


def test_an_index(shapes_folder, tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_TASK_SIZE", 9)
    config = IndexConfig(ray=LOCAL, ray_workers=1)
    assert build_index(shapes_folder, tmp_path / "a.lance", tiny_checkpoint, config).added == 45
    build_index(shapes_folder, tmp_path / "b.lance", tiny_checkpoint)
    vector = next(iter(load(tiny_checkpoint, device="cpu").embed_images(shapes_folder / "07.png")))
    hits, expected = (Index(tmp_path / f"{name}.lance").nearest(vector, 45) for name in "ab")
    assert [hit.path for hit in hits] == [hit.path for hit in expected]
    assert build_index(shapes_folder, tmp_path / "a.lance", tiny_checkpoint, config).added == 0


def test_scores(shapes_folder, tiny_checkpoint, tmp_path):
    header, *lines = (shapes_folder / "shapes.csv").read_text().splitlines()
    for number in range(3):
        (tmp_path / "tables").mkdir(exist_ok=True)
        rows = [f"{shapes_folder}/{line}" for line in lines[number::3]]
        (tmp_path / "tables" / f"{number}.csv").write_text("\n".join([header, *rows]))
    for name, config in (("a", ScoreConfig(ray=LOCAL, ray_workers=2)), ("b", ScoreConfig())):
        assert (
            embed_source(
                tmp_path / "tables", tmp_path / f"{name}.parquet", tiny_checkpoint, config
            ).vectors
            == 67
        )
    scores, expected = (pq.read_table(tmp_path / f"{name}.parquet").to_pydict() for name in "ab")
    for name in ("score", "cosine"):
        np.testing.assert_allclose(scores.pop(name), expected.pop(name), atol=1e-5)
    assert scores == expected
    assert scores["row"] == [*range(23), *range(22), *range(22)]


def test_what_cannot_be_done(shapes_folder, predictor, tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="on Ray every worker loads the model; give what to load"):
        embed_source(shapes_folder, tmp_path / "v.npy", predictor, EmbedConfig(ray=LOCAL))
    with pytest.raises(
        ValueError, match="ray_workers is 9, but the cluster has 2 cores, one for each worker"
    ):
        embed_source(
            shapes_folder,
            tmp_path / "v.npy",
            tiny_checkpoint,
            EmbedConfig(ray=LOCAL, ray_workers=9),
        )
