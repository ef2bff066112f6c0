"""Masked words with the right and with a wrong picture, against a loop over single texts."""

import pytest
import torch
import torch.nn.functional as F

from bridgetower.data.config import MaskingConfig
from bridgetower.evaluation import masked_words
from bridgetower.evaluation.masked_words import MaskedPairs, evaluate_masked_words, other_image
from helpers.sets import caption_images, records_of, write_set

MASKING = MaskingConfig(probability=0.4)


def test_other_images_are_all_others():
    assert {other_image(3, row, 9) for row in range(200)} == set(range(9)) - {3}


class TestEvaluation:
    @pytest.mark.parametrize("batch_size", [64, 4])
    def test_equals_a_loop_over_single_texts(self, tiny_model, images, batch_size, monkeypatch):
        monkeypatch.setattr(masked_words, "BATCH_SIZE", batch_size)
        losses = {"": [], "wrong_image_": []}
        hits = {"": [], "wrong_image_": []}
        pairs = MaskedPairs(images, MASKING)
        batches = [pairs[number][0] for number in range(len(pairs))]
        image_rows = pairs.pairs.pairs[:, 0].tolist()
        rows = [
            (batch, row, image_rows[pair], other_image(image_rows[pair], pair, len(images)))
            for number, batch in enumerate(batches)
            for row, pair in enumerate(range(batch_size * number, batch_size * number + len(batch)))
        ]
        assert len(rows) == images.num_examples == 15
        for batch, row, image, other in rows:
            length = (
                len(batch.input_ids[row])
                if batch.attention_mask is None
                else int(batch.attention_mask[row].sum())
            )
            labels = batch.mlm_labels[row, :length]
            for kind, picture in (("", image), ("wrong_image_", other)):
                with torch.no_grad():
                    pixels = images.pixel_values([picture])
                    ids = batch.masked_input_ids[row, None, :length]
                    logits = tiny_model.mlm_logits(tiny_model(pixels, ids).text)[0]
                for position in (labels >= 0).nonzero()[:, 0].tolist():
                    losses[kind].append(F.cross_entropy(logits[position], labels[position]).item())
                    hits[kind].append(float(logits[position].argmax() == labels[position]))
        assert len(losses[""]) > 20
        by_loop = {f"{kind}loss": values for kind, values in losses.items()}
        by_loop |= {f"{kind}accuracy": values for kind, values in hits.items()}
        expected = {f"mlm_{name}": sum(values) / len(values) for name, values in by_loop.items()}
        assert evaluate_masked_words(tiny_model, images, MASKING) == pytest.approx(
            expected, abs=1e-5
        )
        assert expected["mlm_loss"] != pytest.approx(expected["mlm_wrong_image_loss"], abs=1e-4)

    def test_is_the_same_at_every_call(self, tiny_model, images, monkeypatch):
        first = evaluate_masked_words(tiny_model, images, MASKING)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        assert evaluate_masked_words(tiny_model, images, MASKING) == first
        assert torch.equal(torch.get_rng_state(), before)
        # words are hidden by the number of the pair
        monkeypatch.setattr(masked_words, "BATCH_SIZE", 5)
        assert evaluate_masked_words(tiny_model, images, MASKING) == pytest.approx(first, abs=1e-6)

    def test_a_set_of_one_picture_has_no_wrong_ones(
        self, tiny_model, images, tiny_dataset, tmp_path
    ):
        both = evaluate_masked_words(tiny_model, images, MASKING)
        folder = write_set(tmp_path / "set", {"test": records_of(tiny_dataset, "test")[:1]})
        single = caption_images(folder, "test", images.processor)
        assert (
            set(evaluate_masked_words(tiny_model, single, MASKING))
            == {"mlm_loss", "mlm_accuracy"}
            < set(both)
        )

    def test_nothing_hidden(self, tiny_model, images):
        metrics = evaluate_masked_words(tiny_model, images, MaskingConfig(probability=1e-9))
        assert set(metrics.values()) == {0.0}

    def test_missing_head(self, tiny_model, images):
        tiny_model.mlm_head = None
        with pytest.raises(ValueError, match=r"no masked-language \(MLM\) head"):
            evaluate_masked_words(tiny_model, images, MASKING)
