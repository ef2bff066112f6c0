"""benchmarks/attention.py: statistics held against loops over every weight, and models compared by them."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bridgetower.data.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.model.hidden_states import hidden_states
from bridgetower.predictor import Predictor, load

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
benchmark = importlib.import_module("attention")
KINDS = ("image self", "text self", "image to text", "text to image")


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint: Path) -> Predictor:
    return load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def images(predictor: Predictor, tiny_dataset: Path) -> CaptionImages:
    return CaptionImages(DataConfig(folders=(str(tiny_dataset),)), "test", predictor.processor)


class Sums:
    """Sums over positions, by loops, of one layer with two heads."""

    def __init__(self) -> None:
        self.entropy, self.distance, self.divergence = [0.0, 0.0], [0.0, 0.0], 0.0
        self.positions = self.measured = 0

    def add(self, weights: torch.Tensor, places: list[tuple[float, ...]] | None, prefix: int) -> None:
        """Adds the weights of one pair [heads, queries, keys]; places are those of keys after a prefix."""
        for query in range(weights.shape[1]):
            one, other = rows = weights[:, query].double()
            self.positions += 1
            self.entropy = [
                total - float((row * row.log()).sum()) for total, row in zip(self.entropy, rows, strict=True)
            ]
            self.divergence += float((one * (one / other).log()).sum() + (other * (other / one).log()).sum()) / 2
            if places is not None and query >= prefix:
                self.measured += 1
                far = [math.dist(places[query - prefix], place) for place in places]
                for head, row in enumerate(rows):
                    shares = (row[prefix:] / row[prefix:].sum()).tolist()
                    self.distance[head] += sum(share * one for share, one in zip(shares, far, strict=True))


def test_statistics_are_means_over_pairs_and_positions(predictor: Predictor, images: CaptionImages) -> None:
    model, sums = predictor.model, {kind: Sums() for kind in KINDS}
    size, side = model.config.vision.patch_size, model.config.vision.image_size // model.config.vision.patch_size
    grid = [(float(size * row), float(size * column)) for row in range(side) for column in range(side)]
    for image in range(len(images)):
        texts = images.processor.texts([images.captions([image])[0][0]], truncate=True)
        pixels = images.pixel_values([image])
        assert isinstance(pixels, torch.Tensor)
        with torch.no_grad():
            found = hidden_states(model, pixels, texts.input_ids, layers={"fusion": [2]}, attentions=True).attentions
        line = [(float(token),) for token in range(texts.input_ids.shape[1])]
        places = {"image self": grid, "text self": line}
        for kind in KINDS:
            sums[kind].add(found[kind][2][0], places.get(kind), kind == "image self")
    for batch_size in (1, 4):
        statistics = benchmark.attention_statistics(model, images, batch_size=batch_size)
        for kind in KINDS:
            layer, total = statistics[kind][1], sums[kind]
            assert layer.entropy == pytest.approx([value / total.positions for value in total.entropy], rel=1e-4)
            assert layer.divergence == pytest.approx(total.divergence / total.positions, rel=1e-3, abs=1e-7)
            distance = [value / total.measured for value in total.distance] if total.measured else None
            assert layer.distance == (distance if distance is None else pytest.approx(distance, rel=1e-4))


def test_one_head_does_not_diverge() -> None:
    weights = torch.rand(3, 1, 5, 5).softmax(dim=-1)
    assert float(benchmark._divergence(weights).abs().max()) < 1e-6


@pytest.mark.parametrize("numbers", [{"count": 0}, {"batch_size": 0}])
def test_refuses_numbers_below_one(predictor: Predictor, images: CaptionImages, numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        benchmark.attention_statistics(predictor.model, images, **numbers)


def test_the_script_compares_models(
    tiny_checkpoint: Path, tiny_dataset: Path, images: CaptionImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [f"one={tiny_checkpoint}", str(tiny_checkpoint)]
    options = ["--data", str(tiny_dataset), "--count", "999", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["attention.py", *models, *options])
    benchmark.main()
    found = json.loads((tmp_path / "attention.json").read_text())
    assert found["count"] == len(images) < 999
    assert set(found["models"]) == {"one", str(tiny_checkpoint)}
    assert found["models"]["one"] == found["models"][str(tiny_checkpoint)]
    assert set(found["models"]["one"]) == set(KINDS)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
