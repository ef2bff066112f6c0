"""Cases g to k, n and o: other towers and image sizes, epsilons, and pictures as the official transforms give them."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from recompute import (
    bridged_layers,
    caption_batch,
    encode,
    features,
    mlm_outputs,
    pretraining_outputs,
    pretraining_task,
)
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from bridgetower.checkpoints.keymap import export_tensors
from bridgetower.model.towers import resize_position_embedding
from bridgetower.processor import Processor, ProcessorConfig
from bridgetower.processor.config import CLIP_MEAN, CLIP_STD
from golden import EPS, case, check, variant, wrong
from helpers.models import max_difference


def outputs_of_case(recorded, model):
    return pretraining_outputs(pretraining_task(recorded, model), recorded.inputs)


def test_separate_norms():
    """Trained checkpoints of `vit_layernorm_shared=False` are those of the official `infer`."""
    recorded = case("g_ln_separate")
    model = recorded.load()
    other = {f"fusion_{kind}_feats" for kind in ("text", "image", "cls")}
    check(outputs_of_case(recorded, model), recorded.outputs, without=("image_embedss", *other))
    ours = features(model, *encode(model, recorded.inputs), prefix="fusion_")
    assert set(wrong(ours, recorded.outputs)) == set(ours) == other
    change = (ours["fusion_cls_feats"] - recorded.outputs["fusion_cls_feats"]).abs().max().item()
    assert change == pytest.approx(recorded.meta["infer_vs_fusion_cls_max_abs"], rel=1e-3)
    norms = [
        name
        for name in recorded.checkpoint.extra_tensors
        if name.startswith("vision.separate_norms.")
    ]
    assert len(norms) == 2 * recorded.meta["arch"]["vision"]["layers"]


def test_timm():
    recorded = case("h_timm_vit")
    model = recorded.load()
    size = recorded.meta["resize_to"]
    ours = outputs_of_case(recorded, model)
    ours["image_embedss"] = bridged_layers(
        model, model.encode_image(recorded.inputs["image"]), token_type=1
    )
    larger = recorded.load(image_size=size)
    ours |= features(larger, *encode(larger, recorded.inputs, prefix="resized_"), prefix="resized_")
    official = export_tensors(recorded.table(), recorded.checkpoint.resized(size).tensors)
    ours["resized_pos_embed"] = official["vit_model.pos_embed"]
    check(ours, recorded.outputs)
    # control: the activation of CLIP
    model = variant(recorded.checkpoint, {"vision.activation": "quick_gelu"})
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
    """Positions of a resized checkpoint and of other images are the official ones, and another interpolation fails."""
    recorded = case("k_resize")
    whole = recorded.load()
    sizes = recorded.meta["evaluated_at"]
    ours = {}
    config = recorded.checkpoint.config.vision
    table = recorded.checkpoint.tensors["vision.position_embedding"]
    trained = config.image_size // config.patch_size
    patches = table[1:].unflatten(0, (trained, trained)).permute(2, 0, 1)[None]
    for size in sizes:
        for model in (whole, recorded.load(image_size=size)):
            outputs = features(model, *encode(model, recorded.inputs, suffix=f"_{size}"))
            outputs = {f"{name}_{size}": value for name, value in outputs.items()}
            assert wrong(outputs, recorded.outputs) == {}
        name = f"positional_embedding_{size}"
        side = size // config.patch_size
        ours |= outputs | {name: model.vision.position_embedding}
        if size != config.image_size:
            resized = F.interpolate(
                patches, size=(side, side), mode="bilinear", align_corners=False
            )
            bilinear = torch.cat([table[:1], resized[0].flatten(1).T])
            assert (
                wrong({name: resize_position_embedding(table, (side, side))}, recorded.outputs)
                == {}
            )
            assert wrong({name: bilinear}, recorded.outputs) != {}
    check(ours, recorded.outputs)


# Cases o: LayerNorm inputs of so small a variance that a wrong epsilon shows.
EPS_CASES = ("o_eps_clip_roberta", "o_eps_vit_bert")
# Official block -> our config field. The first LayerNorm and the bridges share one value in the paper's models.
FIELDS = {
    "vision": "vision.layer_norm_eps",
    "text_encoder": "text.layer_norm_eps",
    "cross_layers": "fusion.layer_norm_eps",
    "mlm_transform": "heads.mlm_layer_norm_eps",
    "cross_first_layernorm": "fusion.bridge_layer_norm_eps",
    "link_tower": "fusion.bridge_layer_norm_eps",
}


def eps_outputs(recorded, model):
    image, text = encode(model, recorded.inputs)
    ours = features(model, image, text)
    mlm = mlm_outputs(pretraining_task(recorded, model), image, caption_batch(recorded.inputs))
    return ours | {"mlm_logits": mlm["mlm_logits"], "itm_logits": model.itm_head(ours["cls_feats"])}


def with_wrong_eps(recorded, block):
    value = recorded.meta["wrong_eps_sensitivity"][block]["wrong"]
    if block not in ("cross_first_layernorm", "link_tower"):
        return variant(recorded.checkpoint, {FIELDS[block]: value})
    model = recorded.load()
    bridges = [bridge.norm for bridge in (*model.fusion.text_bridges, *model.fusion.image_bridges)]
    for norm in (
        bridges if block == "link_tower" else (model.fusion.text_norm, model.fusion.image_norm)
    ):
        norm.eps = value
    return model


@pytest.mark.parametrize("name", EPS_CASES)
def test_outputs(name):
    recorded = case(name)
    check(eps_outputs(recorded, recorded.load()), recorded.outputs, EPS)


@pytest.mark.parametrize("name", EPS_CASES)
def test_every_epsilon_is_read_from_the_checkpoint(name):
    recorded = case(name)
    expected = recorded.meta["layer_norm_eps"]
    config = recorded.checkpoint.config.to_dict()
    ours = {block: config[path.split(".")[0]][path.split(".")[1]] for block, path in FIELDS.items()}
    assert ours == pytest.approx(expected, rel=1e-9, abs=0)
    assert set(recorded.meta["wrong_eps_sensitivity"]) == set(FIELDS)


@pytest.mark.parametrize("block", FIELDS)
@pytest.mark.parametrize("name", EPS_CASES)
@torch.no_grad()
def test_control_a_wrong_epsilon_moves_the_outputs_as_recorded(name, block):
    recorded = case(name)
    ours = eps_outputs(recorded, with_wrong_eps(recorded, block))
    assert wrong(ours, recorded.outputs, EPS) != {}
    for name, expected in recorded.meta["wrong_eps_sensitivity"][block]["max_abs_change"].items():
        change = (ours[name] - recorded.outputs[name]).abs().max().item()
        assert change == pytest.approx(expected, rel=1e-3, abs=EPS.atol)


PROFILES = {"clip": "official-pretrain", "blip": "official-finetune"}


def prepared_image(profile, size, picture):
    processor = Processor(ProcessorConfig(profile=profile, image_size=size, max_length=8), None)
    return processor.images([picture.numpy()])[0]


def bilinear(kind, size, picture):
    sides = size if kind == "clip" else (size, size)
    resize = transforms.Resize(sides, InterpolationMode.BILINEAR)
    steps = [
        resize,
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(CLIP_MEAN, CLIP_STD),
    ]
    return transforms.Compose(steps)(Image.fromarray(picture.numpy()))


def test_every_picture_under_every_transform_is_recorded():
    recorded = case("n_preprocess")
    size = recorded.meta["size"]
    assert set(recorded.outputs) == {
        f"{kind}_{name}" for kind in PROFILES for name in recorded.meta["inputs"]
    }
    assert all(expected.shape == (3, size, size) for expected in recorded.outputs.values())


@pytest.mark.parametrize("kind", PROFILES)
def test_pictures(kind):
    recorded = case("n_preprocess")
    (other,) = set(PROFILES) - {kind}
    size = recorded.meta["size"]
    swapped = 0.0
    coarse = 0.0
    for name, picture in recorded.inputs.items():
        expected = recorded.outputs[f"{kind}_{name}"]
        torch.testing.assert_close(
            prepared_image(PROFILES[kind], size, picture), expected, atol=1e-6, rtol=0
        )
        swapped = max(
            swapped, max_difference(prepared_image(PROFILES[other], size, picture), expected)
        )
        coarse = max(coarse, max_difference(bilinear(kind, size, picture), expected))
    assert min(swapped, coarse) > 0.1  # controls: the other profile, another interpolation
