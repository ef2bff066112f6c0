"""The held-out pictures as files with captions, and their index."""

from bridgetower.inference.predictor import load
from bridgetower.search.index import Index
from bridgetower_demo.run import index_held_out, write_held_out
from helpers.checkpoints import folder_snapshot
from helpers.sets import read_rows


def test_every_test_picture_with_its_captions(tiny_dataset, tmp_path):
    write_held_out({"shapes": tiny_dataset}, tmp_path / "held-out")
    rows = read_rows(tiny_dataset, "test")
    for row in rows:
        picture = tmp_path / "held-out" / "shapes" / row["id"]
        assert [picture.read_bytes()] == row["images"]
        assert picture.with_suffix(".txt").read_text().splitlines() == row["entries"]
    assert len(list(tmp_path.rglob("*.png"))) == len(rows) == 9
    before = folder_snapshot(tmp_path)
    write_held_out({"shapes": tiny_dataset}, tmp_path / "held-out")
    assert folder_snapshot(tmp_path) == before


def test_the_index_is_of_the_model_at_hand(tiny_dataset, tiny_checkpoint, tmp_path):
    write_held_out({"shapes": tiny_dataset}, tmp_path / "held-out")
    for model in (
        load(tiny_checkpoint, image_size=40, device="cpu"),
        load(tiny_checkpoint, device="cpu"),
    ):
        index_held_out(tmp_path / "held-out", tmp_path / "held-out.lance", model)
        assert Index(tmp_path / "held-out.lance").info.fingerprint == model.fingerprint
