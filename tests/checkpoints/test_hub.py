"""Hub ids, read from a local cache of the hub without a network."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

import tiny
from bridgetower.checkpoints import Checkpoint, read_checkpoint
from bridgetower.checkpoints.hub import download
from bridgetower.checkpoints.towers import read_text_tower
from published import transformers_text

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


def add(cache: Path, repo: str, folder: Path, commit: str, *refs: str) -> Path:
    """Puts a folder into the cache as the hub's client does: blobs, and a snapshot of links to them."""
    place = cache / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir(exist_ok=True)
    for file in folder.iterdir():
        blob = place / "blobs" / f"{commit}-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (place / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (place / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


class TestCached:
    @pytest.mark.parametrize("kind", ["safe", "sharded", "pickled", "own"])
    def test_every_kind_of_weights(
        self, request: pytest.FixtureRequest, cache: Path, checkpoint: Checkpoint, kind: str
    ) -> None:
        add(cache, "owner/tower", request.getfixturevalue(kind), NEW, "main")
        read = read_checkpoint("owner/tower")
        assert read.source == f"owner/tower@{NEW}"
        assert read.processor is not None
        assert tiny.equal(read.tensors, checkpoint.tensors)

    def test_an_unpinned_id_is_told_how_to_pin(self, cache: Path, safe: Path, caplog: pytest.LogCaptureFixture) -> None:
        add(cache, "owner/tower", safe, NEW, "main")
        read_checkpoint("owner/tower")
        assert f"owner/tower is at commit {NEW}; pass revision='{NEW}' to pin it" in caplog.text

    def test_a_pinned_commit(self, cache: Path, safe: Path, own: Path, caplog: pytest.LogCaptureFixture) -> None:
        add(cache, "owner/tower", own, OLD)
        add(cache, "owner/tower", safe, NEW, "main")
        assert read_checkpoint("owner/tower", revision=OLD).source == f"owner/tower@{OLD}"
        assert "to pin it" not in caplog.text
        assert read_checkpoint("owner/tower").source == f"owner/tower@{NEW}"

    def test_an_id_with_its_commit(self, cache: Path, safe: Path, own: Path) -> None:
        add(cache, "owner/tower", own, OLD)
        add(cache, "owner/tower", safe, NEW, "main")
        read = read_checkpoint(f"owner/tower@{OLD}")
        assert read.source == f"owner/tower@{OLD}"
        assert read_checkpoint(read.source).source == read.source
        with pytest.raises(ValueError, match=f"names a revision, and revision is '{NEW}'; leave one of them out"):
            read_checkpoint(f"owner/tower@{OLD}", revision=NEW)

    def test_a_tag(self, cache: Path, safe: Path, own: Path) -> None:
        add(cache, "owner/tower", own, OLD, "v1")
        add(cache, "owner/tower", safe, NEW, "main")
        assert read_checkpoint("owner/tower", revision="v1").source == f"owner/tower@{OLD}"

    def test_a_pull_request(self, cache: Path, own: Path) -> None:
        add(cache, "owner/tower", own, OLD, "refs/pr/1")
        assert read_checkpoint("owner/tower@refs/pr/1").source == f"owner/tower@{OLD}"


class TestTowers:
    @pytest.fixture
    def bert(self, cache: Path, tmp_path: Path) -> Path:
        pytest.importorskip("transformers")
        published = transformers_text(tmp_path / "bert", "BertForPreTraining")
        add(cache, "owner/bert", published.source, NEW, "main")
        return published.source

    def test_an_unpinned_id_is_told_how_to_pin(self, bert: Path, caplog: pytest.LogCaptureFixture) -> None:
        tower = read_text_tower("owner/bert")
        assert tower.source == f"owner/bert@{NEW}"
        assert tiny.equal(tower.tensors, read_text_tower(str(bert)).tensors)
        assert f"owner/bert is at commit {NEW}; owner/bert@{NEW} pins it" in caplog.text

    def test_a_pinned_commit(self, bert: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert read_text_tower(f"owner/bert@{NEW}").source == f"owner/bert@{NEW}"
        assert "pins it" not in caplog.text
        with pytest.raises(FileNotFoundError, match="owner/bert is no local path and could not be fetched"):
            read_text_tower(f"owner/bert@{OLD}")


def test_files_that_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["config.json", "spm.model", "vocab.txt", "pytorch_model.bin", "tf_model.h5", "modeling.py", "README.md"]
    patterns = []

    def snapshot_download(repo: str, *, allow_patterns: list[str], **_: object) -> str:
        patterns.append(allow_patterns)
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    download("owner/deberta-v3")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files[:4])
    assert len(patterns) == 2  # pickled weights only where there are no others


class TestNotCached:
    def test_a_missing_repository(self, cache: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nobody/nothing is no local path and could not be fetched"):
            read_checkpoint("nobody/nothing")

    def test_a_missing_revision(self, cache: Path, safe: Path) -> None:
        add(cache, "owner/tower", safe, NEW, "main")
        with pytest.raises(FileNotFoundError, match="owner/tower is no local path and could not be fetched"):
            read_checkpoint("owner/tower", revision="v9")

    def test_a_name_that_the_hub_does_not_allow(self, cache: Path) -> None:
        with pytest.raises(FileNotFoundError, match="my folder/model is no local path"):
            read_checkpoint("my folder/model")

    def test_weights_that_were_never_fetched(self, cache: Path, safe: Path) -> None:
        (safe / "model.safetensors").unlink()
        add(cache, "owner/tower", safe, NEW, "main")
        with pytest.raises(FileNotFoundError):
            read_checkpoint("owner/tower")


def test_through_the_environment(safe: Path, tmp_path: Path) -> None:
    """As a user has it: another process, the cache and the missing network told by variables."""
    add(tmp_path / "hub", "owner/tower", safe, NEW, "main")
    command = "from bridgetower.predictor import load; print(load('owner/tower', device='cpu').source)"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == f"owner/tower@{NEW}"
