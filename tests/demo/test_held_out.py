"""The held-out pictures as files with captions, and their index."""

import dense
from bridgetower.data.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.retrieval import evaluate_retrieval
from bridgetower.predictor import load
from bridgetower.search.index import Index
from bridgetower.search.searcher import Searcher
from bridgetower_demo.run import index_held_out, write_held_out
from folders import snapshot
from rows import read_rows


def test_every_test_picture_with_its_captions(tiny_dataset, tmp_path):
    write_held_out({"shapes": tiny_dataset}, tmp_path / "held-out")
    rows = read_rows(tiny_dataset, "test")
    for row in rows:
        picture = tmp_path / "held-out" / "shapes" / row["id"]
        assert [picture.read_bytes()] == row["images"]
        assert picture.with_suffix(".txt").read_text().splitlines() == row["entries"]
    assert len(list(tmp_path.rglob("*.png"))) == len(rows) == 9
    before = snapshot(tmp_path)
    write_held_out({"shapes": tiny_dataset}, tmp_path / "held-out")
    assert snapshot(tmp_path) == before


def test_the_index_is_of_the_model_at_hand_and_ranks_as_the_evaluation_does(tiny_dataset, tiny_checkpoint, tmp_path):
    predictor = load(tiny_checkpoint, device="cpu")
    write_held_out({"shapes": tiny_dataset}, tmp_path / "held-out")
    for model in (load(tiny_checkpoint, image_size=40, device="cpu"), predictor):
        index_held_out(tmp_path / "held-out", tmp_path / "held-out.lance", model)
        assert Index(tmp_path / "held-out.lance").info.fingerprint == model.fingerprint
    images = CaptionImages(DataConfig(folders=(str(tiny_dataset),)), "test", predictor.processor)
    result = evaluate_retrieval(predictor.model, images, RetrievalConfig(max_captions=1))
    paths = [f"shapes/{row['id']}" for row in read_rows(tiny_dataset, "test")]
    searcher = Searcher(tmp_path / "held-out.lance", predictor)
    orders = []
    for text, cosines in zip(images.texts(1)[0], dense.similarity(result).T, strict=True):
        hits = searcher.search(text, top=len(paths), rerank=0)
        assert [hit.path for hit in hits] == [paths[number] for number in cosines.argsort(descending=True)]
        orders.append(tuple(hit.path for hit in hits))
    assert len(set(orders)) > 1  # the control: the order is not the same for any text
