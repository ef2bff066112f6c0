"""Cases c, d, e: features, logits and losses of VQA, SNLI-VE and NLVR2, through the tasks that train them."""

from dataclasses import replace

import pytest
import torch
from recompute import encode, features, outputs_of

from bridgetower.data.batch import Batch
from bridgetower.objectives.classification import task_of_head
from golden import case, check, variant, wrong

HEADS = {"c_vqa": "vqa", "d_snli": "snli_ve", "e_nlvr2": "nlvr2"}
NAMES = {"c_vqa": "vqa", "d_snli": "snli", "e_nlvr2": "nlvr2"}


def batch_of(name, inputs):
    text = {"input_ids": inputs["text_ids"], "attention_mask": inputs["text_masks"]}
    labels = inputs["vqa_targets" if name == "c_vqa" else "labels"]
    if name == "e_nlvr2":
        return Batch(pixel_values=inputs["image_0"], pixel_values_2=inputs["image_1"], labels=labels, **text)
    return Batch(pixel_values=inputs["image"], labels=labels, **text)


def head_of(name, model):
    return getattr(model, f"{HEADS[name]}_head")


def outputs(name, model, batch):
    with outputs_of(head_of(name, model)) as logits:
        losses = task_of_head(model, HEADS[name])(batch)
    return {f"{NAMES[name]}_logits": logits[0], f"{NAMES[name]}_loss": losses.total}


@pytest.mark.parametrize("name", HEADS)
class TestTasks:
    def test_logits_and_loss(self, name):
        recorded = case(name)
        ours = outputs(name, recorded.load(), batch_of(name, recorded.inputs))
        check(ours, {key: recorded.outputs[key] for key in ours})
        prefixes = ("first_", "second_") if name == "e_nlvr2" else ("",)
        features = {f"{prefix}{kind}_feats" for prefix in prefixes for kind in ("text", "image", "cls")}
        assert set(ours) | features == set(recorded.outputs)  # everything is compared

    def test_predictions_follow_the_recorded_logits(self, name):
        recorded = case(name)
        logits = recorded.outputs[f"{NAMES[name]}_logits"]
        expected = logits.sigmoid() if name == "c_vqa" else logits.softmax(dim=-1)
        batch = replace(batch_of(name, recorded.inputs), labels=None)
        ours = task_of_head(recorded.load(), HEADS[name]).predict(batch)
        assert wrong({"predicted": ours}, {"predicted": expected}) == {}

    def test_control_shuffled_texts_dropout_or_another_epsilon_in_the_head_fail(self, name):
        recorded = case(name)
        batch, model = batch_of(name, recorded.inputs), recorded.load()
        shuffled = replace(batch, input_ids=batch.input_ids.roll(1, 0), attention_mask=batch.attention_mask.roll(1, 0))
        different = set(wrong(outputs(name, model, shuffled), recorded.outputs))
        assert different == {f"{NAMES[name]}_logits", f"{NAMES[name]}_loss"}
        head = head_of(name, model)
        eps, head.norm.eps = head.norm.eps, 1e-2
        assert wrong(outputs(name, model, batch), recorded.outputs) != {}
        head.norm.eps = eps
        head.train().dropout.p = 0.5
        torch.manual_seed(0)
        assert wrong(outputs(name, model, batch), recorded.outputs) != {}


def test_score_of_the_likeliest_answers():
    recorded = case("c_vqa")
    batch, task = batch_of("c_vqa", recorded.inputs), task_of_head(recorded.load(), "vqa")
    assert task(batch).metrics["vqa_score"].item() == pytest.approx(recorded.meta["vqa_score_metric"])
    chosen = recorded.outputs["vqa_logits"].argmax(dim=1)
    targets = torch.zeros_like(batch.labels).scatter(1, chosen[:, None], 0.6)
    assert task(replace(batch, labels=targets)).metrics["vqa_score"].item() == pytest.approx(0.6)


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_those_of_the_file_with_the_official_settings(name):
    """One file may hold the heads of several tasks, and serves each."""
    recorded = case(name)
    model, config, official = recorded.load(), recorded.checkpoint.config, recorded.meta["config"]
    heads = ("vqa", "snli_ve", "nlvr2", "mlm", "itm", "itc")
    there = {head for head in heads if getattr(model, f"{head}_head") is not None}
    assert config.heads.hidden_scale == official["head_hidden_scale"]
    if name == "e_nlvr2":
        assert config.heads.nlvr2_dropout == official["nlvr2_drop_rate"]
        assert config.fusion.num_token_types == 3
        assert there == {"nlvr2"}
    else:
        assert config.heads.vqa == official["vqav2_label_size"]
        assert there == {"vqa", "snli_ve"}


class TestFeaturesOfOneImage:
    @pytest.fixture(params=["c_vqa", "d_snli"])
    def recorded(self, request):
        return case(request.param)

    def test_features(self, recorded):
        model = recorded.load()
        image, text = encode(model, recorded.inputs)
        ours = features(model, image, text)
        check(ours, {name: recorded.outputs[name] for name in ours})
        assert wrong({"cls_feats": model.fuse(image, text, outputs="pooled").pooled}, recorded.outputs) == {}
        flipped = text[torch.arange(len(text)).flip(0)]  # control
        assert wrong(features(model, image, flipped), recorded.outputs) != {}


class TestFeaturesOfTwoImages:
    @pytest.fixture
    def recorded(self):
        return case("e_nlvr2")

    def outputs(self, recorded, token_types):
        model, inputs = recorded.load(), recorded.inputs
        text = model.encode_text(inputs["text_ids"], inputs["text_masks"])
        ours = {}
        for prefix, image, token_type in zip(("first_", "second_"), ("image_0", "image_1"), token_types, strict=True):
            ours |= features(model, model.encode_image(inputs[image], token_type), text, prefix)
        return ours

    def test_features(self, recorded):
        ours = self.outputs(recorded, (1, 2))
        check(ours, {name: recorded.outputs[name] for name in ours})

    @pytest.mark.parametrize(("token_types", "changed"), [((1, 1), "second_"), ((2, 2), "first_")])
    def test_control_one_token_type_for_both_images_fails(self, recorded, token_types, changed):
        different = set(wrong(self.outputs(recorded, token_types), recorded.outputs))
        assert different == {f"{changed}{name}" for name in ("text_feats", "image_feats", "cls_feats")}

    def test_control_exchanged_images_fail(self, recorded):
        batch = batch_of("e_nlvr2", recorded.inputs)
        exchanged = replace(batch, pixel_values=batch.pixel_values_2, pixel_values_2=batch.pixel_values)
        assert wrong(outputs("e_nlvr2", recorded.load(), exchanged), recorded.outputs) != {}

    def test_text_is_encoded_once(self, recorded):
        model, calls = recorded.load(), []
        model.text.register_forward_hook(lambda *_: calls.append(1))
        task_of_head(model, "nlvr2")(batch_of("e_nlvr2", recorded.inputs))
        assert len(calls) == 1

    def test_control_a_table_of_two_rows_is_refused(self, recorded):
        with pytest.raises(ValueError, match="its second image needs 3"):
            variant(recorded.checkpoint, {"fusion.num_token_types": 2})
