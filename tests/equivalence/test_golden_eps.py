"""Cases o: LayerNorm inputs of so small a variance that a wrong epsilon shows."""

import pytest
import torch
from recompute import caption_batch, encode, features, mlm_outputs, pretraining_task

from golden import EPS, case, check, variant, wrong

# Official block -> our config field. The first LayerNorm and the bridges share one value in the paper's models.
FIELDS = {
    "vision": "vision.layer_norm_eps",
    "text_encoder": "text.layer_norm_eps",
    "cross_layers": "fusion.layer_norm_eps",
    "mlm_transform": "heads.mlm_layer_norm_eps",
    "cross_first_layernorm": "fusion.bridge_layer_norm_eps",
    "link_tower": "fusion.bridge_layer_norm_eps",
}


@pytest.fixture(params=["o_eps_clip_roberta", "o_eps_vit_bert"])
def recorded(request):
    return case(request.param)


def outputs(recorded, model):
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
    for norm in bridges if block == "link_tower" else (model.fusion.text_norm, model.fusion.image_norm):
        norm.eps = value
    return model


def test_outputs(recorded):
    check(outputs(recorded, recorded.load()), recorded.outputs, EPS)


def test_every_epsilon_is_read_from_the_checkpoint(recorded):
    expected = recorded.meta["layer_norm_eps"]
    config = recorded.checkpoint.config.to_dict()
    ours = {block: config[path.split(".")[0]][path.split(".")[1]] for block, path in FIELDS.items()}
    assert ours == pytest.approx(expected, rel=1e-9, abs=0)
    assert set(recorded.meta["wrong_eps_sensitivity"]) == set(FIELDS)


@pytest.mark.parametrize("block", FIELDS)
@torch.no_grad()
def test_control_a_wrong_epsilon_moves_the_outputs_as_recorded(recorded, block):
    ours = outputs(recorded, with_wrong_eps(recorded, block))
    assert wrong(ours, recorded.outputs, EPS) != {}
    for name, expected in recorded.meta["wrong_eps_sensitivity"][block]["max_abs_change"].items():
        change = (ours[name] - recorded.outputs[name]).abs().max().item()
        assert change == pytest.approx(expected, rel=1e-3, abs=EPS.atol)
