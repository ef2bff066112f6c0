"""Masked words with the right and with a wrong picture, against a loop over single texts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.evaluation import masked_words
from bridgetower.evaluation.masked_words import caption_batches, evaluate_masked_words, other_images
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.processor import Processor

MASKING = MaskingConfig(probability=0.4)


@pytest.fixture
def images(tiny_dataset: Path, tiny_processor: Processor) -> CaptionImages:
    return CaptionImages(DataConfig(folders=(str(tiny_dataset),)), "test", tiny_processor)


class TestOtherImages:
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(4, 6), st.integers(0, 9))
    def test_never_the_same_picture(self, index: list[int], num_images: int, seed: int) -> None:
        image_index = torch.tensor(index)
        others = other_images(image_index, num_images, seed)
        assert bool((others != image_index).all())
        assert set(others.tolist()) <= set(range(num_images))

    def test_all_others_are_drawn(self) -> None:
        assert set(other_images(torch.full((200,), 3), 9, seed=0).tolist()) == set(range(9)) - {3}

    def test_one_picture_has_no_other(self) -> None:
        with pytest.raises(ValueError, match="the set has 1 pictures; expected at least 2"):
            other_images(torch.tensor([0]), 1, seed=0)


class TestEvaluation:
    @pytest.mark.parametrize("batch_size", [64, 4])
    def test_equals_a_loop_over_single_texts(
        self, tiny_model: BridgeTower, images: CaptionImages, batch_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(masked_words, "BATCH_SIZE", batch_size)
        losses, hits = {"": [], "wrong_image_": []}, {"": [], "wrong_image_": []}
        rows = [
            (batch, row, other)
            for batch in caption_batches(CaptionPairs(images, MASKING))
            for row, other in enumerate(other_images(batch.image_index, len(images), batch.seed).tolist())
        ]
        assert len(rows) == sum(map(len, images.captions)) == 14
        for batch, row, other in rows:
            length = len(batch.input_ids[row]) if batch.attention_mask is None else int(batch.attention_mask[row].sum())
            labels = batch.mlm_labels[row, :length]
            for kind, picture in (("", int(batch.image_index[row])), ("wrong_image_", other)):
                with torch.no_grad():
                    pixels, ids = images.pixel_values([picture]), batch.masked_input_ids[row, None, :length]
                    logits = tiny_model.mlm_logits(tiny_model(pixels, ids).text)[0]
                for position in (labels >= 0).nonzero()[:, 0].tolist():
                    losses[kind].append(F.cross_entropy(logits[position], labels[position]).item())
                    hits[kind].append(float(logits[position].argmax() == labels[position]))
        assert len(losses[""]) > 20
        expected = {
            f"mlm_{kind}{name}": sum(values[kind]) / len(values[kind])
            for name, values in (("loss", losses), ("accuracy", hits))
            for kind in ("", "wrong_image_")
        }
        assert evaluate_masked_words(tiny_model, images, MASKING) == pytest.approx(expected, abs=1e-5)
        assert expected["mlm_loss"] != pytest.approx(expected["mlm_wrong_image_loss"], abs=1e-4)

    def test_is_the_same_at_every_call(self, tiny_model: BridgeTower, images: CaptionImages) -> None:
        first = evaluate_masked_words(tiny_model, images, MASKING)
        torch.manual_seed(5)
        assert evaluate_masked_words(tiny_model, images, MASKING) == first

    def test_a_set_of_one_picture_has_no_wrong_ones(self, tiny_model: BridgeTower, images: CaptionImages) -> None:
        both = evaluate_masked_words(tiny_model, images, MASKING)
        images.rows, images.captions = images.rows[:1], images.captions[:1]
        assert set(evaluate_masked_words(tiny_model, images, MASKING)) == {"mlm_loss", "mlm_accuracy"} < set(both)

    def test_nothing_hidden(self, tiny_model: BridgeTower, images: CaptionImages) -> None:
        figures = evaluate_masked_words(tiny_model, images, MaskingConfig(probability=1e-9))
        assert set(figures.values()) == {0.0}

    def test_missing_head(self, tiny_model: BridgeTower, images: CaptionImages) -> None:
        tiny_model.mlm_head = None
        with pytest.raises(ValueError, match=r"no masked-language \(MLM\) head"):
            evaluate_masked_words(tiny_model, images, MASKING)
