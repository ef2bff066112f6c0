"""Runs on a set in an S3 store that drops connections: killed in mid-epoch, they end with the same bits."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import states
from folders import same_weights
from shapes import train_command
from stores import Store

OPTIONS = ("--max-steps", "9", "--checkpoint-every", "1", "--data.shuffle-shards", "2")
KILLS = Path(__file__).parents[1] / "kills.py"


@pytest.fixture
def place(store: Store, sharded_dataset: Path) -> str:
    url = store.upload(sharded_dataset, "bucket/set")
    store.unreliable(0.3)
    return url


def test_killed_in_the_middle_of_an_epoch(
    store: Store, place: str, forked: Path, tmp_path: Path, run: Callable[..., list[Any]]
) -> None:
    def command(out: str, cache: str, *options: str) -> list[str]:
        given = ("--data.shard-cache", str(tmp_path / cache), *OPTIONS, *options)
        return train_command(place, tmp_path / out, *given)  # type: ignore[arg-type]

    run(*command("whole", "one"))
    epoch = 39 // 8  # pairs, and those of a step
    killed = command("killed", "two", "--data.num-workers", "2")
    arguments = [forked / "python", KILLS, states.SAVED, str(epoch + 2), "SIGKILL", "self", *killed]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == -9, done.stderr
    assert states.saved(tmp_path / "killed").step == epoch + 1
    run(*command("killed", "three", "--resume"))
    assert same_weights(tmp_path / "killed" / "last", tmp_path / "whole" / "last")


def test_a_file_that_was_written_anew_is_noticed(
    store: Store,
    place: str,
    sharded_dataset: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    refused: Callable[..., str],
) -> None:
    store.reset()
    cache = ("--data.shard-cache", str(tmp_path / "cache"))
    run(*train_command(place, tmp_path / "run", *OPTIONS[2:], "--max-steps", "1", *cache))  # type: ignore[arg-type]
    import fsspec

    about = (sharded_dataset / "dataset.json").read_text()
    digest = next(line for line in about.splitlines() if "train-00003" in line).split('"')[3]
    fsspec.filesystem("s3").pipe_file("bucket/set/dataset.json", about.replace(digest, "0" * 64).encode())
    error = refused(*train_command(place, tmp_path / "run", *OPTIONS, *cache, "--resume"))  # type: ignore[arg-type]
    assert f"content of {place}/train-00003-of-00007.parquet" in error


def test_evaluation(
    place: str, sharded_dataset: Path, tiny_checkpoint: Path, tmp_path: Path, run: Callable[..., list[Any]]
) -> None:
    def evaluate(data: object, *options: object) -> Any:
        (found,) = run("evaluate", tiny_checkpoint, "retrieval", "--data", data, "--candidates", 4, *options)
        assert found.pop("data") == [str(data)]
        return found

    remote = evaluate(place, "--shard-cache", tmp_path / "cache", "--num-workers", 1)
    assert remote == evaluate(sharded_dataset)
