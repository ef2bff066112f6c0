"""The contact sheet of a prepared set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgetower.data.overview import _lines, write_overview
from bridgetower.data.prepare import prepare_set
from miniature import write_coco, write_nlvr2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_coco(folder / "originals")
    write_nlvr2(folder / "originals")
    for name in ("coco", "nlvr2"):
        prepare_set(name, folder / "originals", folder / name)
    return folder


def drawn(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("name", ["coco", "nlvr2"])
def test_every_split_has_a_section(folder: Path, tmp_path: Path, name: str) -> None:
    write_overview(folder / name, tmp_path / "a.png", num_samples=1)
    write_overview(folder / name, tmp_path / "b.png", num_samples=5)
    one, five = drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png")
    assert one.shape[0] > 3 * 220
    assert five.shape[0] >= one.shape[0]
    assert five.shape[1] > one.shape[1]
    assert len(np.unique(one.reshape(-1, 3), axis=0)) > 100  # pictures, not only paper and ink


def test_the_seed_chooses(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_overview(folder / "coco", tmp_path / f"{name}.png", num_samples=2, seed=seed)
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == again != other


def test_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_samples is 0"):
        write_overview(folder / "coco", tmp_path / "a.png", num_samples=0)
    with pytest.raises(ValueError, match="has no suffix of a kind of pictures"):
        write_overview(folder / "coco", tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"no dataset\.json"):
        write_overview(folder, tmp_path / "a.png")


class TestLines:
    def test_texts_that_fit(self) -> None:
        assert _lines(["a", "b"], "captions") == [("• a", True), ("• b", True)]

    def test_a_long_one_goes_on_in_the_next_line(self) -> None:
        lines = _lines(["word " * 15], "captions")
        assert [begins for _, begins in lines] == [True, False]

    def test_the_rest_is_counted(self) -> None:
        lines = _lines([f"text {n}" for n in range(20)], "captions")
        assert len(lines) == 9
        assert lines[-1] == ("… and 12 more", True)
        assert len(_lines(["word " * 200, "b"], "captions")) == 9

    def test_answers_and_labels(self) -> None:
        question = {"question": "Who?", "answers": ["me", "you", "me"]}
        assert _lines([question, {"question": "What?", "answers": []}], "vqa") == [
            ("• Who? — me (2), you", True),
            ("• What? — unknown", True),
        ]
        assert _lines([{"text": "Yes.", "label": ""}], "nlvr2") == [("• Yes. — unknown", True)]
