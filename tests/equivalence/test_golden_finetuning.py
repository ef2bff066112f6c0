"""Cases c, d, e: features, logits and losses of VQA, SNLI-VE and NLVR2, through the tasks that train them."""

from dataclasses import replace

import pytest
import torch
from recompute import encode, features, outputs_of

from bridgetower.data.batches.batch import Batch
from bridgetower.objectives.classification import task_of_head
from golden import case, check, variant, wrong

# ours, official
HEADS = {
    "c_vqa": ("vqa", "vqa"),
    "d_snli": ("snli_ve", "snli"),
    "e_nlvr2": ("nlvr2", "nlvr2"),
}


@pytest.fixture
def recorded(request):
    return case(getattr(request, "param", "e_nlvr2"))


@pytest.fixture
def task_batch(recorded):
    return batch_of(recorded)


def batch_of(recorded):
    inputs = recorded.inputs
    text = {"input_ids": inputs["text_ids"], "attention_mask": inputs["text_masks"]}
    labels = inputs["vqa_targets" if recorded.meta["case"] == "c_vqa" else "labels"]
    if "image_1" in inputs:
        return Batch(
            pixel_values=inputs["image_0"], pixel_values_2=inputs["image_1"], labels=labels, **text
        )
    return Batch(pixel_values=inputs["image"], labels=labels, **text)


def task_outputs(recorded, model, batch):
    head, official = HEADS[recorded.meta["case"]]
    with outputs_of(getattr(model, f"{head}_head")) as logits:
        losses = task_of_head(model, head)(batch)
    return {f"{official}_logits": logits[0], f"{official}_loss": losses.total}


@pytest.mark.parametrize("recorded", HEADS, indirect=True)
class TestTasks:
    def test_logits_and_loss(self, recorded, task_batch):
        ours = task_outputs(recorded, recorded.load(), task_batch)
        check(ours, {key: recorded.outputs[key] for key in ours})
        prefixes = ("first_", "second_") if task_batch.pixel_values_2 is not None else ("",)
        features = {
            f"{prefix}{kind}_feats" for prefix in prefixes for kind in ("text", "image", "cls")
        }
        assert set(ours) | features == set(recorded.outputs)  # everything is compared

    def test_predictions_follow_the_recorded_logits(self, recorded, task_batch):
        head, official = HEADS[recorded.meta["case"]]
        logits = recorded.outputs[f"{official}_logits"]
        expected = logits.sigmoid() if head == "vqa" else logits.softmax(dim=-1)
        ours = task_of_head(recorded.load(), head).predict(replace(task_batch, labels=None))
        assert wrong({"predicted": ours}, {"predicted": expected}) == {}

    def test_control_shuffled_texts_dropout_or_another_epsilon_in_the_head_fail(
        self, recorded, task_batch
    ):
        model = recorded.load()
        shuffled = replace(
            task_batch,
            input_ids=task_batch.input_ids.roll(1, 0),
            attention_mask=task_batch.attention_mask.roll(1, 0),
        )
        assert set(wrong(task_outputs(recorded, model, shuffled), recorded.outputs)) == set(
            task_outputs(recorded, model, task_batch)
        )
        head = getattr(model, f"{HEADS[recorded.meta['case']][0]}_head")
        eps = head.norm.eps
        head.norm.eps = 1e-2
        assert wrong(task_outputs(recorded, model, task_batch), recorded.outputs) != {}
        head.norm.eps = eps
        head.train().dropout.p = 0.5
        torch.manual_seed(0)
        assert wrong(task_outputs(recorded, model, task_batch), recorded.outputs) != {}

    def test_heads_are_those_of_the_file_with_the_official_settings(self, recorded, task_batch):
        model = recorded.load()
        config = recorded.checkpoint.config
        official = recorded.meta["config"]
        heads = ("vqa", "snli_ve", "nlvr2", "mlm", "itm", "itc")
        present = {head for head in heads if getattr(model, f"{head}_head") is not None}
        assert config.heads.hidden_scale == official["head_hidden_scale"]
        if task_batch.pixel_values_2 is not None:
            assert config.heads.nlvr2_dropout == official["nlvr2_drop_rate"]
            assert config.fusion.num_token_types == 3
            assert present == {"nlvr2"}
        else:
            assert config.heads.vqa == official["vqav2_label_size"]
            assert present == {"vqa", "snli_ve"}


def test_score_of_the_likeliest_answers():
    recorded = case("c_vqa")
    batch = batch_of(recorded)
    task = task_of_head(recorded.load(), "vqa")
    assert task(batch).metrics["vqa_score"].item() == pytest.approx(
        recorded.meta["vqa_score_metric"]
    )
    likeliest = recorded.outputs["vqa_logits"].argmax(dim=1)
    targets = torch.zeros_like(batch.labels).scatter(1, likeliest[:, None], 0.6)
    assert task(replace(batch, labels=targets)).metrics["vqa_score"].item() == pytest.approx(0.6)


@pytest.mark.parametrize("name", ["c_vqa", "d_snli"])
def test_features_of_one_image(name):
    recorded = case(name)
    model = recorded.load()
    image, text = encode(model, recorded.inputs)
    ours = features(model, image, text)
    check(ours, {name: recorded.outputs[name] for name in ours})
    assert (
        wrong({"cls_feats": model.fuse(image, text, outputs="pooled").pooled}, recorded.outputs)
        == {}
    )
    flipped = text[torch.arange(len(text)).flip(0)]  # control
    assert wrong(features(model, image, flipped), recorded.outputs) != {}


class TestFeaturesOfTwoImages:
    def test_features(self, recorded):
        def features_under(token_types):
            ours = {}
            for number, prefix in enumerate(("first_", "second_")):
                image = model.encode_image(inputs[f"image_{number}"], token_types[number])
                ours |= features(model, image, text, prefix)
            return ours

        model = recorded.load()
        inputs = recorded.inputs
        text = model.encode_text(inputs["text_ids"], inputs["text_masks"])
        ours = features_under((1, 2))
        check(ours, {name: recorded.outputs[name] for name in ours})
        # controls: one for both
        for token_types, changed in (
            ((1, 1), "second_"),
            ((2, 2), "first_"),
        ):
            different = set(wrong(features_under(token_types), recorded.outputs))
            assert different == {
                f"{changed}{name}" for name in ("text_feats", "image_feats", "cls_feats")
            }

    def test_the_text_is_encoded_once_and_images_are_not_exchanged(self, recorded, task_batch):
        model = recorded.load()
        calls = []
        model.text.register_forward_hook(lambda *_: calls.append(1))
        exchanged = replace(
            task_batch,
            pixel_values=task_batch.pixel_values_2,
            pixel_values_2=task_batch.pixel_values,
        )
        assert wrong(task_outputs(recorded, model, exchanged), recorded.outputs) != {}
        assert len(calls) == 1

    def test_control_a_table_of_two_rows_is_refused(self, recorded):
        with pytest.raises(ValueError, match="its second image needs 3"):
            variant(recorded.checkpoint, {"fusion.num_token_types": 2})
