"""Cases c, d, e: features, logits and losses of VQA, SNLI-VE and NLVR2, through the tasks that train them."""

from dataclasses import replace

import pytest
import torch
from recompute import encode, features, outputs_of

from bridgetower.data.batch import Batch
from bridgetower.objectives.classification import task_of_head
from golden import case, check, variant, wrong

CASES = ("c_vqa", "d_snli", "e_nlvr2")
NAMES = {"c_vqa": "vqa", "d_snli": "snli", "e_nlvr2": "nlvr2"}


def batch_of(name, inputs):
    """The recorded inputs as a data loader would hand them over."""
    text = {"input_ids": inputs["text_ids"], "attention_mask": inputs["text_masks"]}
    match name:
        case "c_vqa":
            return Batch(pixel_values=inputs["image"], labels=inputs["vqa_targets"], **text)
        case "d_snli":
            return Batch(pixel_values=inputs["image"], labels=inputs["labels"], **text)
        case "e_nlvr2":
            images = {"pixel_values": inputs["image_0"], "pixel_values_2": inputs["image_1"]}
            return Batch(labels=inputs["labels"], **images, **text)


def task_of(name, model):
    return (
        task_of_head(model, "vqa")
        if name == "c_vqa"
        else task_of_head(model, {"d_snli": "snli_ve", "e_nlvr2": "nlvr2"}[name])
    )


def head_of(name, model):
    return {"c_vqa": model.vqa_head, "d_snli": model.snli_ve_head, "e_nlvr2": model.nlvr2_head}[name]


def outputs(name, model, batch):
    """Logits and loss of a task, under the official names."""
    with outputs_of(head_of(name, model)) as logits:
        losses = task_of(name, model)(batch)
    return {f"{NAMES[name]}_logits": logits[0], f"{NAMES[name]}_loss": losses.total}


def changed(batch, **changes):
    return replace(batch, **changes)


@pytest.mark.parametrize("name", CASES)
class TestTasks:
    def test_logits_and_loss(self, name):
        recorded = case(name)
        ours = outputs(name, recorded.load(), batch_of(name, recorded.inputs))
        check(ours, {key: recorded.outputs[key] for key in ours})

    def test_predictions_follow_the_recorded_logits(self, name):
        recorded = case(name)
        logits = recorded.outputs[f"{NAMES[name]}_logits"]
        expected = logits.sigmoid() if name == "c_vqa" else logits.softmax(dim=-1)
        batch = changed(batch_of(name, recorded.inputs), labels=None)
        ours = task_of(name, recorded.load()).predict(batch)
        assert wrong({"predicted": ours}, {"predicted": expected}) == {}

    def test_every_output_is_compared(self, name):
        recorded = case(name)
        compared = set(outputs(name, recorded.load(), batch_of(name, recorded.inputs)))
        prefixes = ("first_", "second_") if name == "e_nlvr2" else ("",)
        compared |= {f"{prefix}{kind}_feats" for prefix in prefixes for kind in ("text", "image", "cls")}
        assert compared == set(recorded.outputs)

    def test_control_shuffled_texts_fail(self, name):
        recorded = case(name)
        batch = batch_of(name, recorded.inputs)
        shuffled = changed(batch, input_ids=batch.input_ids.roll(1, 0), attention_mask=batch.attention_mask.roll(1, 0))
        assert set(wrong(outputs(name, recorded.load(), shuffled), recorded.outputs)) == {
            f"{NAMES[name]}_logits",
            f"{NAMES[name]}_loss",
        }

    def test_control_dropout_in_the_head_fails(self, name):
        recorded = case(name)
        model = recorded.load()
        head = head_of(name, model)
        head.train().dropout.p = 0.5
        torch.manual_seed(0)
        assert wrong(outputs(name, model, batch_of(name, recorded.inputs)), recorded.outputs) != {}

    def test_control_another_epsilon_in_the_head_fails(self, name):
        recorded = case(name)
        model = recorded.load()
        head_of(name, model).norm.eps = 1e-2
        assert wrong(outputs(name, model, batch_of(name, recorded.inputs)), recorded.outputs) != {}


class TestLosses:
    def test_control_without_the_number_of_answers_fails(self):
        recorded = case("c_vqa")
        ours = outputs("c_vqa", recorded.load(), batch_of("c_vqa", recorded.inputs))
        assert wrong({"vqa_loss": ours["vqa_loss"] / ours["vqa_logits"].shape[1]}, recorded.outputs) != {}

    def test_targets_are_the_recorded_scores_of_the_recorded_labels(self):
        recorded = case("c_vqa")
        targets = torch.zeros_like(recorded.inputs["vqa_targets"])
        pairs = zip(recorded.meta["vqa_labels"], recorded.meta["vqa_scores"], strict=True)
        for row, (labels, scores) in enumerate(pairs):
            targets[row, labels] = torch.tensor(scores)
        assert torch.equal(targets, recorded.inputs["vqa_targets"])

    def test_mean_score_of_the_likeliest_answers(self):
        recorded = case("c_vqa")
        losses = task_of_head(recorded.load(), "vqa")(batch_of("c_vqa", recorded.inputs))
        assert losses.metrics["vqa_score"].item() == pytest.approx(recorded.meta["vqa_score_metric"])

    def test_the_best_answers_score_best(self):
        recorded = case("c_vqa")
        batch = batch_of("c_vqa", recorded.inputs)
        chosen = recorded.outputs["vqa_logits"].argmax(dim=1)
        targets = torch.zeros_like(batch.labels).scatter(1, chosen[:, None], 0.6)
        losses = task_of_head(recorded.load(), "vqa")(changed(batch, labels=targets))
        assert losses.metrics["vqa_score"].item() == pytest.approx(0.6)


class TestHeads:
    """One file may hold the heads of several tasks, and serves each."""

    @pytest.mark.parametrize("name", ["c_vqa", "d_snli"])
    def test_both_are_there_and_no_other_is_made_up(self, name):
        model = case(name).load()
        assert model.vqa_head is not None
        assert model.snli_ve_head is not None
        assert (model.mlm_head, model.itm_head, model.itc_head, model.nlvr2_head) == (None, None, None, None)

    @pytest.mark.parametrize("name", CASES)
    def test_their_widths_are_the_official_settings(self, name):
        recorded = case(name)
        config, official = recorded.checkpoint.config, recorded.meta["config"]
        assert config.heads.hidden_scale == official["head_hidden_scale"]
        if name == "e_nlvr2":
            assert config.heads.nlvr2_dropout == official["nlvr2_drop_rate"]
            assert config.fusion.num_token_types == 3
        else:
            assert config.heads.vqa == official["vqav2_label_size"]


class TestFeaturesOfOneImage:
    @pytest.fixture(params=["c_vqa", "d_snli"])
    def recorded(self, request):
        return case(request.param)

    def test_features(self, recorded):
        model = recorded.load()
        ours = features(model, *encode(model, recorded.inputs))
        check(ours, {name: recorded.outputs[name] for name in ours})

    def test_pooled_output_read_alone(self, recorded):
        model = recorded.load()
        pooled = model.fuse(*encode(model, recorded.inputs), outputs="pooled").pooled
        assert wrong({"cls_feats": pooled}, recorded.outputs) == {}

    def test_control_another_text_fails(self, recorded):
        model = recorded.load()
        image, text = encode(model, recorded.inputs)
        flipped = text[torch.arange(len(text)).flip(0)]
        assert wrong(features(model, image, flipped), recorded.outputs) != {}


class TestFeaturesOfTwoImages:
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
