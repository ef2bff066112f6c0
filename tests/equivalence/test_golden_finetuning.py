"""Cases c, d, e: features that the VQA, SNLI-VE and NLVR2 classifiers read.

The classifiers are no part of this package: their tensors are left behind by name, and their logits not compared.
"""

import pytest
import torch
from recompute import encode, features

from golden import case, check, wrong


class TestOneImage:
    @pytest.fixture(params=["c_vqa", "d_snli"])
    def recorded(self, request):
        return case(request.param)

    def test_features(self, recorded):
        model = recorded.load()
        classifier = [name for name in recorded.outputs if name.endswith(("_logits", "_loss"))]
        check(features(model, *encode(model, recorded.inputs)), recorded.outputs, without=classifier)

    def test_pooled_output_read_alone(self, recorded):
        model = recorded.load()
        pooled = model.fuse(*encode(model, recorded.inputs), read="pooled").pooled
        assert wrong({"cls_feats": pooled}, recorded.outputs) == {}

    def test_heads_of_both_tasks_are_reported_and_no_other_head_is_made_up(self, recorded):
        dropped = recorded.checkpoint.dropped
        for head in ("vqa_classifier", "snli_classifier"):
            assert any(name.startswith(f"{head}.") for name in dropped)
        assert recorded.load().mlm_head is None
        assert recorded.load().itm_head is None

    def test_control_another_text_fails(self, recorded):
        model = recorded.load()
        image, text = encode(model, recorded.inputs)
        flipped = text[torch.arange(len(text)).flip(0)]
        assert wrong(features(model, image, flipped), recorded.outputs) != {}


class TestTwoImages:
    PREFIXES = ("first_", "second_")

    @pytest.fixture
    def recorded(self):
        return case("e_nlvr2")

    def outputs(self, recorded, token_types):
        """The text, encoded once, with each image under its token type."""
        model, inputs = recorded.load(), recorded.inputs
        text = model.encode_text(inputs["text_ids"], inputs["text_masks"])
        ours = {}
        for prefix, image, token_type in zip(self.PREFIXES, ("image_0", "image_1"), token_types, strict=True):
            ours |= features(model, model.encode_image(inputs[image], token_type), text, prefix)
        return ours

    def test_features(self, recorded):
        check(self.outputs(recorded, (1, 2)), recorded.outputs, without=["nlvr2_logits", "nlvr2_loss"])

    @pytest.mark.parametrize(("token_types", "changed"), [((1, 1), "second_"), ((2, 2), "first_")])
    def test_control_one_token_type_for_both_images_fails(self, recorded, token_types, changed):
        different = set(wrong(self.outputs(recorded, token_types), recorded.outputs))
        assert different == {f"{changed}{name}" for name in ("text_feats", "image_feats", "cls_feats")}

    def test_third_token_type_is_there(self, recorded):
        assert recorded.checkpoint.config.fusion.num_token_types == 3
        assert any(name.startswith("nlvr2_classifier.") for name in recorded.checkpoint.dropped)
