"""Case b: contrastive features and losses, and matching with negatives that they chose."""

import pytest
import torch
from recompute import caption_batch, encode, itm_outputs, pretraining_outputs

from bridgetower.objectives.losses import hard_pairs, itc_loss, pairs_with_negatives
from golden import check, wrong

CASE = "b_itc"


def starting(recorded, *prefixes):
    return {name: value for name, value in recorded.outputs.items() if name.startswith(prefixes)}


def recorded_similarities(task, encoded):
    image = task.model.image_embeds(encoded[0])
    text = task.model.text_embeds(encoded[1])
    scale = task.model.head("itc").logit_scale()
    return image, text, scale, scale * image @ text.T


def negatives(recorded, prefix):
    images, texts = (recorded.inputs[f"{prefix}neg_{kind}_idx"] for kind in ("image", "text"))
    return pairs_with_negatives(images, texts, slice(0, len(images)))


class TestContrast:
    def test_features_and_logits(self, recorded, task, encoded):
        image, text, scale, logits = recorded_similarities(task, encoded)
        ours = {"unimodal_feats_image": image, "unimodal_feats_text": text, "logit_scale": scale}
        ours |= {"itc_logits_i2t": logits, "itc_logits_t2i": logits.T}
        check(ours, starting(recorded, "unimodal_feats_", "itc_logits_", "logit_scale"))
        assert task.model.itc_head.temperature.item() == pytest.approx(recorded.meta["temperature"])

    def test_training_step(self, recorded, task, encoded):
        variants = [
            *starting(recorded, "unimodal_feats_", "itc_logits_", "logit_scale", "hard_", "ft_")
        ]
        check(pretraining_outputs(task, recorded.inputs), recorded.outputs, without=variants)
        image, text = encoded  # control: shuffled texts
        loss = task.itc(
            image, text[torch.arange(len(text)).roll(1)], caption_batch(recorded.inputs)
        )
        assert wrong({"itc_loss": loss}, recorded.outputs) != {}


class TestHardNegatives:
    @pytest.mark.parametrize("prefix", ["hard_", "hard_global_"])
    def test_recorded_draws(self, recorded, task, encoded, prefix):
        """In one process the negatives of all ranks are those of the batch."""
        pairs = negatives(recorded, prefix)
        ours = itm_outputs(task, *encoded, pairs, prefix=prefix)
        ours[f"{prefix}itc_loss"] = task.itc(*encoded, caption_batch(recorded.inputs))
        expected = {f"{prefix}{name}" for name in ("itm_logits", "itm_loss", "itc_loss")}
        check(ours, {name: recorded.outputs[name] for name in expected})
        assert torch.equal(pairs.labels, recorded.inputs["hard_itm_labels"])

    def test_control_exchanged_draws_fail(self, recorded, task, encoded):
        images = recorded.inputs["hard_neg_image_idx"]
        texts = recorded.inputs["hard_neg_text_idx"]
        pairs = pairs_with_negatives(texts.roll(1), images.roll(1), slice(0, len(images)))
        assert wrong(itm_outputs(task, *encoded, pairs, prefix="hard_"), recorded.outputs) != {}

    def test_own_draws_have_the_recorded_layout(self, recorded, task, encoded):
        *_, logits = recorded_similarities(task, encoded)
        index = torch.arange(len(logits))
        pairs = hard_pairs(
            logits, logits.T, index, index, slice(0, len(logits)), torch.Generator().manual_seed(0)
        )
        layout = negatives(recorded, "hard_")
        count = len(logits)
        assert torch.equal(pairs.labels, layout.labels)
        # Each text with a negative image, then each image with a negative text: one side of a pair is given.
        assert torch.equal(pairs.image_rows[:count], layout.image_rows[:count])
        assert torch.equal(pairs.text_rows[: 2 * count], layout.text_rows[: 2 * count])
        assert torch.equal(pairs.image_rows[2 * count :], layout.image_rows[2 * count :])
        assert bool((pairs.image_rows[count:] != pairs.text_rows[count:]).all())


def test_soft_targets_over_the_texts_of_an_image(recorded, task):
    """Of several captions of one image: rows of equal index use the image of the first of them."""
    index = recorded.inputs["ft_img_index"]
    first = (index[:, None] == index[None]).int().argmax(dim=1)
    image, text = encode(task.model, recorded.inputs | {"image": recorded.inputs["image"][first]})
    ours = itm_outputs(task, image, text, negatives(recorded, "ft_"), prefix="ft_")
    embeds = (task.model.image_embeds(image), task.model.text_embeds(text))
    scale = task.model.head("itc").logit_scale()
    ours["ft_itc_loss"] = itc_loss(embeds, index, scale)
    check(ours, starting(recorded, "ft_"))
    # Hard targets would not do as a control: where images are equal, so are their rows, and the sums coincide.
    assert 1 < len(index.unique()) < len(index)
    assert (
        wrong({"ft_itc_loss": itc_loss(embeds, torch.zeros_like(index), scale)}, recorded.outputs)
        != {}
    )
