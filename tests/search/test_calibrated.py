"""Searches by a small trained model: what it says of nonsense, and what validation decides about reranking."""

from dataclasses import replace
from pathlib import Path

import pytest

import shapes
from bridgetower.checkpoints import Gain, Reranking
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.predictor import Predictor, load
from bridgetower.search.build import build_index
from bridgetower.search.searcher import Searcher
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.training.run import train

NONSENSE = ("asdf qwer zxcv", "two dogs in the snow", "purple elephant")
_WIDTHS = {"hidden_size": 32, "num_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A model after 60 steps, too few to match pictures that it has not seen."""
    towers = {f"{part}.{name}": size for part in ("vision", "text", "fusion") for name, size in _WIDTHS.items()}
    config = replace(
        shapes.run_config(tiny_dataset, max_steps=60, evaluate_every=0, checkpoint_every=60),
        model=shapes.MODEL.override({**towers, "heads.mlm": False, "text.dropout": 0.0, "fusion.dropout": 0.0}),
        task=PretrainingConfig(phases=(Phase(until=0.3, mlm=0, itm=0, itc=1), Phase(until=1.0, mlm=0, itm=1, itc=1))),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.01, head_multiplier=1, fusion_multiplier=1),
        evaluation=RetrievalConfig(candidates=shapes.NUM_HELD_OUT),
    )
    out = tmp_path_factory.mktemp("trained") / "run"
    train(config, out, progress=False)
    return load(out / "last", device="cpu")


@pytest.fixture
def searcher(trained: Predictor, shapes_folder: Path, tmp_path: Path) -> Searcher:
    build_index(shapes_folder, tmp_path / "shapes.lance", trained)
    return Searcher(tmp_path / "shapes.lance", trained)


def test_nonsense_is_not_likely(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    found = searcher.predictor.reranking
    assert found.calibration is not None
    assert found.calibration.ece_after < found.calibration.ece_before / 2
    calibrated = [hit for text in NONSENSE for hit in searcher.search(text, rerank=9, top=9)]
    assert {hit.score for hit in calibrated} == {None}
    monkeypatch.setattr(searcher.predictor, "reranking", replace(found, calibration=None))
    plain = [hit for text in NONSENSE for hit in searcher.search(text, rerank=9, top=9)]
    assert [hit.path for hit in plain] == [hit.path for hit in calibrated]  # a calibration changes no order
    assert {hit.probability for hit in plain} == {None}
    assert max(hit.score or 0 for hit in plain) > 0.45
    assert max(hit.probability or 0 for hit in calibrated) < 0.3


@pytest.mark.parametrize(
    ("low", "high", "matched"), [(0.01, 0.05, True), (-0.01, 0.03, False), (-0.05, -0.01, False), (None, None, True)]
)
def test_validation_decides_whether_candidates_are_matched(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch, low: float | None, high: float, *, matched: bool
) -> None:
    gain = None if low is None else Gain(difference=(low + high) / 2, low=low, high=high, texts=9)
    monkeypatch.setattr(searcher.predictor, "reranking", Reranking(gain=gain))
    assert [hit.score is not None for hit in searcher.search("red circle", top=3)] == [matched] * 3
    assert [hit.score is not None for hit in searcher.search("red circle", top=3, rerank=4)] == [True] * 3
    assert [hit.score is not None for hit in searcher.search("red circle", top=3, rerank=0)] == [False] * 3
