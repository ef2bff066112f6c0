"""Cases g to k: unshared norms, timm's ViT, BERT, METER, and checkpoints loaded at other image sizes."""

import pytest
import torch
import torch.nn.functional as F
from recompute import bridged_layers, encode, features, pretraining_outputs, pretraining_task

from bridgetower.checkpoints.keymap import export_tensors
from bridgetower.model.towers import resize_position_embedding
from golden import case, check, variant, wrong


def outputs_of_case(recorded, model):
    return pretraining_outputs(pretraining_task(recorded, model), recorded.inputs)


class TestSeparateNorms:
    """Trained checkpoints of `vit_layernorm_shared=False` are those of the official `infer`.

    That path puts every layer through the one shared norm and leaves the unshared ones without gradient; the path
    through `infer_image` uses them untrained and gives another model. The trained path is the one reproduced.
    """

    UNTRAINED = ("image_embedss", "fusion_text_feats", "fusion_image_feats", "fusion_cls_feats")

    @pytest.fixture
    def recorded(self):
        return case("g_ln_separate")

    def test_outputs_of_the_trained_path(self, recorded):
        check(outputs_of_case(recorded, recorded.load()), recorded.outputs, without=self.UNTRAINED)

    def test_control_the_other_path_is_another_model(self, recorded):
        ours = features(recorded.load(), *encode(recorded.load(), recorded.inputs), prefix="fusion_")
        assert set(wrong(ours, recorded.outputs)) == set(ours)
        change = (ours["fusion_cls_feats"] - recorded.outputs["fusion_cls_feats"]).abs().max().item()
        assert change == pytest.approx(recorded.meta["infer_vs_fusion_cls_max_abs"], rel=1e-3)

    def test_unused_norms_are_carried_along(self, recorded):
        norms = [name for name in recorded.checkpoint.extra_tensors if name.startswith("vision.separate_norms.")]
        assert len(norms) == 2 * recorded.meta["arch"]["vision"]["layers"]


class TestTimm:
    @pytest.fixture
    def recorded(self):
        return case("h_timm_vit")

    def test_outputs(self, recorded):
        model = recorded.load()
        ours = outputs_of_case(recorded, model)
        ours["image_embedss"] = bridged_layers(model, model.encode_image(recorded.inputs["image"]), token_type=1)
        check(ours, recorded.outputs, without=[name for name in recorded.outputs if name.startswith("resized_")])

    def test_outputs_at_another_size(self, recorded):
        model = recorded.load(image_size=recorded.meta["resize_to"])
        ours = features(model, *encode(model, recorded.inputs, prefix="resized_"), prefix="resized_")
        resized = recorded.checkpoint.resized(recorded.meta["resize_to"])
        official = export_tensors(recorded.table(), resized.tensors)
        ours["resized_pos_embed"] = official["vit_model.pos_embed"]
        recorded_resized = {name: value for name, value in recorded.outputs.items() if name.startswith("resized_")}
        check(ours, recorded_resized)

    def test_control_the_activation_of_clip_fails(self, recorded):
        model = variant(recorded.checkpoint, {"vision.activation": "quick_gelu"})
        assert wrong(outputs_of_case(recorded, model), recorded.outputs) != {}


class TestBert:
    def test_outputs(self):
        recorded = case("i_bert")
        check(outputs_of_case(recorded, recorded.load()), recorded.outputs)
        model = variant(recorded.checkpoint, {"text.positions": "roberta"})
        assert wrong(outputs_of_case(recorded, model), recorded.outputs) != {}


class TestMeter:
    def test_outputs(self):
        recorded = case("j_meter")
        model = recorded.load()
        image, text = encode(model, recorded.inputs)
        ours = outputs_of_case(recorded, model)
        ours["image_embeds"] = bridged_layers(model, image, 1)[0]
        ours["text_embeds"] = bridged_layers(model, text, 0)[0]
        check(ours, recorded.outputs)
        below = (recorded.checkpoint.config.text.num_layers - 1,)
        model = variant(recorded.checkpoint, {"fusion.text_layers": below})
        assert wrong(outputs_of_case(recorded, model), recorded.outputs) != {}


class TestResize:
    @pytest.fixture
    def recorded(self):
        return case("k_resize")

    @pytest.fixture
    def sizes(self, recorded):
        return recorded.meta["evaluated_at"]

    def test_outputs_and_embeddings_at_each_size(self, recorded, sizes):
        ours = {}
        for size in sizes:
            model = recorded.load(image_size=size)
            outputs = features(model, *encode(model, recorded.inputs, suffix=f"_{size}"))
            ours |= {f"{name}_{size}": value for name, value in outputs.items()}
            ours[f"positional_embedding_{size}"] = model.vision.position_embedding
        check(ours, recorded.outputs)

    def test_image_of_another_size_gives_the_same_without_resizing_the_checkpoint(self, recorded, sizes):
        model = recorded.load()
        for size in sizes:
            ours = features(model, *encode(model, recorded.inputs, suffix=f"_{size}"))
            assert wrong({f"{name}_{size}": value for name, value in ours.items()}, recorded.outputs) == {}

    def test_control_another_interpolation_fails(self, recorded, sizes):
        config, table = recorded.checkpoint.config.vision, recorded.checkpoint.tensors["vision.position_embedding"]
        trained = config.image_size // config.patch_size
        patches = table[1:].unflatten(0, (trained, trained)).permute(2, 0, 1)[None]
        for size in set(sizes) - {config.image_size}:
            side, name = size // config.patch_size, f"positional_embedding_{size}"
            resized = F.interpolate(patches, size=(side, side), mode="bilinear", align_corners=False)
            bilinear = torch.cat([table[:1], resized[0].flatten(1).T])
            assert wrong({name: resize_position_embedding(table, (side, side))}, recorded.outputs) == {}
            assert wrong({name: bilinear}, recorded.outputs) != {}
