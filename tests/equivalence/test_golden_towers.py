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


def test_separate_norms():
    """Trained checkpoints of `vit_layernorm_shared=False` are those of the official `infer`.

    That path puts every layer through the one shared norm and leaves the unshared ones without gradient; the path
    through `infer_image` uses them untrained and gives another model. The trained path is the one reproduced.
    """
    recorded = case("g_ln_separate")
    model, other = recorded.load(), {f"fusion_{kind}_feats" for kind in ("text", "image", "cls")}
    check(outputs_of_case(recorded, model), recorded.outputs, without=("image_embedss", *other))
    ours = features(model, *encode(model, recorded.inputs), prefix="fusion_")
    assert set(wrong(ours, recorded.outputs)) == set(ours) == other
    change = (ours["fusion_cls_feats"] - recorded.outputs["fusion_cls_feats"]).abs().max().item()
    assert change == pytest.approx(recorded.meta["infer_vs_fusion_cls_max_abs"], rel=1e-3)
    norms = [name for name in recorded.checkpoint.extra_tensors if name.startswith("vision.separate_norms.")]
    assert len(norms) == 2 * recorded.meta["arch"]["vision"]["layers"]


def test_timm():
    recorded = case("h_timm_vit")
    model, size = recorded.load(), recorded.meta["resize_to"]
    ours = outputs_of_case(recorded, model)
    ours["image_embedss"] = bridged_layers(model, model.encode_image(recorded.inputs["image"]), token_type=1)
    larger = recorded.load(image_size=size)
    ours |= features(larger, *encode(larger, recorded.inputs, prefix="resized_"), prefix="resized_")
    official = export_tensors(recorded.table(), recorded.checkpoint.resized(size).tensors)
    ours["resized_pos_embed"] = official["vit_model.pos_embed"]
    check(ours, recorded.outputs)
    model = variant(recorded.checkpoint, {"vision.activation": "quick_gelu"})  # control: the activation of CLIP
    assert wrong(outputs_of_case(recorded, model), recorded.outputs) != {}


def test_bert():
    recorded = case("i_bert")
    check(outputs_of_case(recorded, recorded.load()), recorded.outputs)
    model = variant(recorded.checkpoint, {"text.positions": "roberta"})
    assert wrong(outputs_of_case(recorded, model), recorded.outputs) != {}


def test_meter():
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


def test_other_sizes():
    """Of a checkpoint that is resized, and of images, for which it is not; another interpolation fails."""
    recorded = case("k_resize")
    whole, sizes, ours = recorded.load(), recorded.meta["evaluated_at"], {}
    config, table = recorded.checkpoint.config.vision, recorded.checkpoint.tensors["vision.position_embedding"]
    trained = config.image_size // config.patch_size
    patches = table[1:].unflatten(0, (trained, trained)).permute(2, 0, 1)[None]
    for size in sizes:
        for model in (whole, recorded.load(image_size=size)):
            outputs = features(model, *encode(model, recorded.inputs, suffix=f"_{size}"))
            outputs = {f"{name}_{size}": value for name, value in outputs.items()}
            assert wrong(outputs, recorded.outputs) == {}
        name, side = f"positional_embedding_{size}", size // config.patch_size
        ours |= outputs | {name: model.vision.position_embedding}
        if size != config.image_size:
            resized = F.interpolate(patches, size=(side, side), mode="bilinear", align_corners=False)
            bilinear = torch.cat([table[:1], resized[0].flatten(1).T])
            assert wrong({name: resize_position_embedding(table, (side, side))}, recorded.outputs) == {}
            assert wrong({name: bilinear}, recorded.outputs) != {}
    check(ours, recorded.outputs)
