"""Attention maps, held against what the model itself computes, and against words and pixels by hand."""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from bridgetower.checkpoints import read_checkpoint, write_checkpoint
from bridgetower.inference.attention import explain, view_of, words_of
from bridgetower.inference.predictor import load
from bridgetower.model.hidden_states import hidden_states
from bridgetower.processor import Processor
from helpers.shapes import SHAPES_MODEL, write_tiny_checkpoint

TEXT = "a red circle on black"


@pytest.fixture
def circle_picture():
    picture = Image.new("RGB", (60, 30), "blue")
    ImageDraw.Draw(picture).ellipse((14, 5, 34, 25), fill="red")
    return picture


class TestExplain:
    def test_every_map_sums_to_one(self, predictor, circle_picture):
        explanation = explain(predictor, circle_picture, TEXT)
        assert explanation.words == ("a", "red", "circle", "on", "black")
        assert explanation.maps.shape == (2, 5, 2, 2)
        torch.testing.assert_close(
            explanation.maps.sum(dim=(2, 3)), torch.ones(2, 5), atol=1e-6, rtol=0
        )
        assert explanation.score == pytest.approx(
            float(predictor.match(circle_picture, TEXT)), abs=1e-6
        )

    def test_shares_and_maps_are_the_whole_attention(self, predictor, circle_picture):
        model = predictor.model
        processor = predictor.processor
        ids = processor.token_ids([TEXT])
        with torch.no_grad():
            explanation = hidden_states(
                model,
                processor.images([circle_picture]),
                processor.pad(ids).input_ids,
                attentions=True,
            )
        weights = torch.stack(list(explanation.attentions["text to image"].values()))
        whole = weights[:, 0].mean(dim=1)  # [K, L, P]
        torch.testing.assert_close(
            whole.sum(dim=-1), torch.ones(whole.shape[:2]), atol=1e-6, rtol=0
        )
        explanation = explain(predictor, circle_picture, TEXT)
        scaled = explanation.maps.flatten(2) * (1 - explanation.prefix_shares[..., None])
        ours = torch.cat([explanation.prefix_shares[..., None], scaled], dim=-1)
        # "a"
        first = next(
            index for index, token in enumerate(ids[0]) if token not in processor.special_ids
        )
        torch.testing.assert_close(ours[:, 0], whole[:, first], atol=1e-6, rtol=0)
        assert (explanation.prefix_shares > 0).all()

    def test_words_of_several_tokens(self, predictor, circle_picture):
        ids = predictor.processor.token_ids(["zebra-crossing, red"])[0]
        explanation = explain(predictor, circle_picture, "zebra-crossing, red")
        assert len(ids) > 4
        assert explanation.words == ("zebra-crossing,", "red")

    def test_a_distillation_token_is_no_patch(self, tiny_checkpoint, circle_picture, tmp_path):
        checkpoint = read_checkpoint(tiny_checkpoint)
        tensors = dict(checkpoint.tensors)
        position = tensors["vision.position_embedding"]
        tensors["vision.position_embedding"] = torch.cat([position[:1], position])
        tensors["vision.distillation_embedding"] = tensors["vision.class_embedding"].clone()
        config = checkpoint.config.override({"vision.distillation_token": True})
        write_checkpoint(replace(checkpoint, config=config, tensors=tensors), tmp_path / "model")
        assert explain(load(tmp_path / "model", device="cpu"), circle_picture, TEXT).maps.shape == (
            2,
            5,
            2,
            2,
        )

    def test_in_bfloat16_and_without_matching_head(
        self, tiny_checkpoint, predictor, circle_picture
    ):
        coarse = explain(
            load(tiny_checkpoint, device="cpu", precision="bf16"), circle_picture, TEXT
        )
        assert (coarse.maps - explain(predictor, circle_picture, TEXT).maps).abs().max() < 0.05

    def test_refuses_a_text_without_words(self, predictor, circle_picture):
        for text in ("", "   ", "<mask>"):
            with pytest.raises(ValueError, match="the text has no word"):
                explain(predictor, circle_picture, text)

    def test_a_text_that_is_too_long(self, predictor, circle_picture):
        with pytest.raises(ValueError, match="the limit is 24"):
            explain(predictor, circle_picture, "red bar on black " * 9)
        assert (
            len(explain(predictor, circle_picture, "red bar on black " * 9, truncate=True).words)
            > 9
        )


class TestView:
    @pytest.mark.parametrize("profile", ["official-pretrain", "official-finetune"])
    def test_what_cannot_be_enlarged_is_shown_as_the_model_gets_it(self, predictor, profile):
        """An image that was resized before, and one that is too long at the size of the view."""
        processor = Processor(
            replace(predictor.processor.config, profile=profile), predictor.processor.tokenizer
        )
        stripes = np.zeros((4, 3000, 3), dtype=np.uint8)
        stripes[:, ::2] = 255
        for image in (stripes, processor.prepare(stripes)):
            view = view_of(processor, image)
            assert view.width == view.height >= 480
            seen = processor.resize(image).permute(1, 2, 0).numpy()
            small = np.asarray(view.resize(seen.shape[:2], Image.Resampling.BOX), dtype=float)
            assert np.abs(small - seen).mean() < 12

    def test_a_prepared_image_is_explained_as_itself(self, predictor, circle_picture):
        explanation = explain(predictor, predictor.processor.prepare(circle_picture), TEXT)
        plain = explain(predictor, circle_picture, TEXT)
        assert torch.equal(explanation.maps, plain.maps)

    @pytest.mark.parametrize("profile", ["official-pretrain", "official-finetune", "hf"])
    def test_shows_what_the_model_sees(self, predictor, circle_picture, profile):
        settings = {"size_divisor": 4} if profile == "hf" else {}
        config = replace(predictor.processor.config, profile=profile, **settings)
        predictor.processor, before = (
            Processor(config, predictor.processor.tokenizer),
            predictor.processor,
        )
        try:
            view = explain(predictor, circle_picture, TEXT).view
            seen = predictor.processor.resize(circle_picture).permute(1, 2, 0).numpy()
        finally:
            predictor.processor = before
        assert view.width == view.height >= 480
        small = np.asarray(view.resize((20, 20), Image.Resampling.BOX), dtype=float)
        assert np.abs(small - seen).mean() < 12
        assert np.abs(small - seen[:, ::-1]).mean() > 24  # the control: mirrored


class TestGradCam:
    def test_is_the_gradient_of_the_match_with_respect_to_the_attention(
        self, tiny_dataset, tmp_path, circle_picture
    ):
        """Held against differences of the log-odds when one weight of one layer and head is raised."""
        deep = SHAPES_MODEL.override(
            {f"{section}.num_layers": 3 for section in ("vision", "text", "fusion")}
        )
        predictor = load(
            write_tiny_checkpoint(tiny_dataset, tmp_path / "model", deep), device="cpu"
        )
        explanation = explain(predictor, circle_picture, TEXT, method="gradcam")
        model = deepcopy(predictor.model).double()
        step = 1e-4
        ids = predictor.processor.token_ids([TEXT])[0]
        assert (explanation.words[0], len(explanation.words)) == ("<s>", 6)

        def log_odds(layer=0, head=0, query=0, key=0, change=0.0):
            attention = model.fusion.text_layers[layer].cross_attention.attention

            def raised(module, inputs, output):
                width = output.shape[-1] // module.num_heads
                output[:, query, head * width : (head + 1) * width] += (
                    change * module.split_heads(inputs[2])[:, head, key]
                )
                return output

            with attention.register_forward_hook(raised), torch.no_grad():
                states = hidden_states(
                    model, *inputs, layers={"fusion": [1, 2, 3]}, attentions=True
                )
            logits = model.itm_logits(states.pooled)
            return float(logits[0, 1] - logits[0, 0]), states.attentions["text to image"]

        inputs = (
            predictor.processor.images([circle_picture]).double(),
            predictor.processor.pad([ids]).input_ids,
        )
        weights = log_odds()[1]
        heads = model.fusion.text_layers[0].cross_attention.attention.num_heads
        red = words_of(predictor.processor, ids)[1][1]  # its tokens
        for layer, word, tokens in ((0, 0, [0]), (0, 2, red), (1, 2, red), (2, 0, [0])):
            expected = torch.zeros(5)
            for key, head, query in product(range(5), range(heads), tokens):
                up, down = (
                    log_odds(layer, head, query, key, change)[0] for change in (step, -step)
                )
                slope = max(0.0, (up - down) / (2 * step))
                expected[key] += (
                    slope * float(weights[layer + 1][0, head, query, key]) / heads / len(tokens)
                )
            torch.testing.assert_close(
                explanation.maps[layer, word].flatten(), expected[1:], atol=2e-6, rtol=2e-2
            )
            assert float(explanation.prefix_shares[layer, word]) == pytest.approx(
                float(expected[0] / expected.sum()), abs=1e-3
            )
        assert explanation.maps[0].abs().max() > 1e-6
        assert (explanation.maps[2, 1:] == 0).all()  # the head reads the class token only
        assert explain(predictor, circle_picture, TEXT).score == pytest.approx(
            explanation.score, abs=1e-6
        )
