"""A model saved by its own methods, after one's own training too, and pushed to a stub of the hub."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

import tiny
from bridgetower import BridgeTower, load, read_checkpoint
from bridgetower.checkpoints import Checkpoint, convert
from bridgetower.checkpoints.reranking import Reranking

TEXTS = ["a red square", "two blue circles"]


def step(model: BridgeTower) -> None:
    """A step of training on random pairs."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    model.itm_logits(model.fuse(*tiny.encodings(model)).pooled).square().sum().backward()
    optimizer.step()
    model.eval()


class TestSave:
    def test_after_training(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        checkpoint = read_checkpoint(tiny_checkpoint)
        model = checkpoint.model()
        step(model)
        model.save(tmp_path / "mine")
        saved, before = load(tmp_path / "mine", device="cpu"), load(tiny_checkpoint, device="cpu")
        assert tiny.equal(saved.model.state_dict(), model.state_dict())
        assert saved.processor.config == before.processor.config
        assert tiny.off(saved.embed_texts(TEXTS), before.embed_texts(TEXTS)) > 1e-4
        assert read_checkpoint(tmp_path / "mine").labels == checkpoint.labels

    def test_all_that_came_along(self, tmp_path: Path) -> None:
        extra = {"text.pooler.dense.weight": torch.rand(32, 32), "text.pooler.dense.bias": torch.rand(32)}
        checkpoint = Checkpoint(
            source="mine",
            config=tiny.changed(heads__vqa=2),
            tensors=tiny.build(tiny.changed(heads__vqa=2)).state_dict(),
            extra_tensors=extra,
            labels={"vqa": ("yes", "no")},
            reranking=Reranking(itc_weight=0.5),
        )
        checkpoint.model().save(tmp_path / "saved")
        convert(checkpoint, tmp_path / "converted", "bridgetower")
        for file in (tmp_path / "converted").iterdir():
            assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes(), file.name

    def test_a_new_model_replaces_nothing(self, tmp_path: Path) -> None:
        model = BridgeTower(tiny.CONFIG)
        model.save(tmp_path / "new")
        assert tiny.equal(read_checkpoint(tmp_path / "new").model().state_dict(), model.state_dict())
        with pytest.raises(FileExistsError, match="is not empty"):
            model.save(tmp_path / "new")

    def test_a_used_predictor(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        predictor = load(tiny_checkpoint, device="cpu")
        vectors = predictor.embed_texts(TEXTS)
        predictor.save(tmp_path / "again")
        again = load(tmp_path / "again", device="cpu")
        assert again.fingerprint == predictor.fingerprint
        assert torch.equal(again.embed_texts(TEXTS), vectors)


@dataclass
class Hub:
    """What was sent to the hub."""

    folder: Path
    repo: dict[str, Any] | None = None
    uploaded: str | None = None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "repository")

    @dataclass
    class Answer:
        repo_id: str
        commit_url: str

    def create_repo(self: HfApi, repo_id: str, *, private: bool | None, exist_ok: bool) -> Answer:
        found.repo = {"repo_id": repo_id, "private": private, "exist_ok": exist_ok, "token": self.token}
        return Answer(f"owner/{repo_id}", "")

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, commit_message: str) -> Answer:
        found.uploaded = repo_id
        shutil.copytree(folder_path, found.folder)
        return Answer(repo_id, f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return found


def test_pushed_to_the_hub(tiny_checkpoint: Path, hub: Hub) -> None:
    predictor = load(tiny_checkpoint, device="cpu")
    url = predictor.model.push_to_hub(
        "mine",
        private=True,
        token="hf_secret",
        license="mit",
        datasets=["owner/shapes"],
        metrics={"recall@1": 0.5},
        command="bridgetower train nano",
    )
    assert url == "https://hub/owner/mine/commit/1"
    assert hub.repo == {"repo_id": "mine", "private": True, "exist_ok": True, "token": "hf_secret"}
    assert hub.uploaded == "owner/mine"
    assert load(hub.folder, device="cpu").fingerprint == predictor.fingerprint
    card = ModelCard.load(hub.folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "bridgetower"
    assert card.data.datasets == ["owner/shapes"]
    parts = (
        'load("owner/mine")',
        "| recall@1 | 0.5 |",
        "bridgetower train nano",
        tiny_checkpoint.name,
        "million param",
    )
    assert all(part in card.text for part in parts)
    assert str(tiny_checkpoint) not in card.text, "no path of this machine"
    assert "hf_secret" not in card.content
