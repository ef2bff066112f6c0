"""Name tables: nothing is lost, nothing falls together, and well-known tensors are found under their names."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import official
import tiny
from bridgetower.checkpoints.checkpoint import extra_tensor_names, parameter_shapes
from bridgetower.checkpoints.keymap import Naming, Source, export_tensors, import_tensors, name_table
from bridgetower.model.config import ModelConfig

DEEP = {"vision.num_layers": 12, "text.num_layers": 11, "fusion.num_layers": 11}


NO_HEADS = {"heads.mlm": False, "heads.itm": False, "heads.itc": None}
FUSED, THEIRS = {"heads.itc": "fused"}, ("huggingface", "bridgetower.")
TABLES: dict[str, tuple[Any, ...]] = {  # what differs from the small config, naming, prefix
    "clip": ({}, "clip"),
    "clip, two digits": (DEEP, "clip"),
    "clip, nlvr2": ({"fusion.num_token_types": 3}, "clip"),
    "clip, meter": (official.METER, "clip"),
    "clip, no heads": (NO_HEADS, "clip"),
    "timm": (official.TIMM, "timm"),
    "timm, distilled": (official.TIMM | {"vision.distillation_token": True}, "timm"),
    "timm, two digits": (DEEP | official.TIMM, "timm"),
    "timm, bert, meter": (official.TIMM | official.BERT | official.METER, "timm"),
    "hf backbone": (NO_HEADS, "huggingface"),
    "hf with heads": (FUSED, *THEIRS),
    "hf, two digits": (DEEP | FUSED, *THEIRS),
    "hf, scaled": ({"fusion.bridge": "scaled_add"}, *THEIRS),
    "hf, interpolated": ({"fusion.bridge": "interpolate"}, *THEIRS),
    "hf, separate projections": (DEEP | {"fusion.separate_projections": True}, *THEIRS),
}


def random_tensors(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) for name, shape in parameter_shapes(config).items()}


@pytest.mark.parametrize("kind", TABLES)
def test_all_come_back_under_names_that_serve_once(kind: str) -> None:
    changes, naming, *prefix = TABLES[kind]
    config = tiny.CONFIG.override(changes)

    def table(names: Any) -> dict[str, Source]:
        return name_table(names, naming, config.fusion.separate_projections, *prefix)

    ours = random_tensors(config)
    names = table(ours)
    foreign = export_tensors(names, ours)
    assert tiny.equal(import_tensors(names, foreign), ours)
    others = {name: torch.rand_like(value) for name, value in foreign.items()}
    assert tiny.equal(export_tensors(names, import_tensors(names, others)), others)
    assert sum(value.numel() for value in foreign.values()) == sum(value.numel() for value in ours.values())
    for name, source in names.items():
        assert {foreign[other].shape for other in source.names} == {source.foreign_shape(ours[name].shape)}
    extra = [] if naming == "timm" else extra_tensor_names(config, extra_vision_layers=2)
    uses = Counter(name for source in table([*ours, *extra]).values() for name in source.names)
    assert [name for name, count in uses.items() if count > 1] == []
    # Control: exchanged parts do not come back.
    exchanged = {name: Source(source.names[::-1], source.leading_ones) for name, source in names.items()}
    assert not tiny.equal(import_tensors(exchanged, foreign), ours)


KNOWN = [
    ("clip", "vision.layers.10.attention.qkv.weight", "vit_model.visual.transformer.resblocks.10.attn.in_proj_weight"),
    ("clip", "vision.class_embedding", "vit_model.visual.class_embedding"),
    ("clip", "vision.patch_embedding.weight", "vit_model.visual.conv1.weight"),
    ("clip", "mlm_head.decoder.bias", "mlm_score.bias"),
    ("clip", "itc_head.temperature", "temperature"),
    ("clip", "fusion.text_bridges.4.norm.bias", "cross_modal_text_link_tower.4.LayerNorm.bias"),
    (
        *("clip", "text.layers.3.attention.qkv.bias"),
        *(f"text_transformer.encoder.layer.3.attention.self.{part}.bias" for part in ("query", "key", "value")),
    ),
    ("timm", "vision.layers.1.attention.qkv.weight", "vit_model.blocks.1.attn.qkv.weight"),
    ("timm", "vision.position_embedding", "vit_model.pos_embed"),
    ("timm", "vision.patch_embedding.bias", "vit_model.patch_embed.proj.bias"),
    (
        *("huggingface", "fusion.image_layers.5.cross_attention.key_value.weight"),
        *(f"cross_modal_image_layers.5.crossattention.self.{part}.weight" for part in ("key", "value")),
    ),
    ("huggingface", "vision.position_embedding", "vision_model.visual.embeddings.position_embedding.weight"),
    ("huggingface", "text.embedding_norm.weight", "text_model.embeddings.LayerNorm.weight"),
    ("huggingface", "itc_head.pooled.weight", "itc_cross_modal_head.fc.weight"),
    ("huggingface", "itc_head.log_logit_scale", "logit_scale"),
    ("huggingface", "text_projections.0.weight", "cross_modal_text_transform.weight"),
]


class TestNames:
    def test_known(self) -> None:
        for naming, ours, *foreign in KNOWN:
            assert name_table([ours], naming)[ours].names == tuple(foreign)  # type: ignore[arg-type]

    def test_prefix_is_for_the_backbone_only_and_separate_projections_are_numbered(self) -> None:
        ours = ("text_pooler.dense.bias", "vision.post_norm.bias", "image_projections.3.bias", "itm_head.fc.bias")
        names = name_table(ours, "huggingface", separate_projections=True, backbone_prefix="bridgetower.")
        assert [source.names[0] for source in names.values()] == [
            "bridgetower.cross_modal_text_pooler.dense.bias",
            "bridgetower.vision_model.visual.ln_post.bias",
            "bridgetower.cross_modal_image_transform.3.bias",
            "itm_score.fc.bias",
        ]

    @pytest.mark.parametrize(
        ("naming", "name"),
        [
            *((naming, name) for naming in ("clip", "timm", "huggingface") for name in ("nothing", "xvision.x", "")),
            ("clip", "vision.layers.0.attention.qkw.weight"),
            ("timm", "vision.pre_norm.weight"),
            ("clip", "vision.patch_embedding.bias"),
            ("huggingface", "vision.patch_embedding.bias"),
            ("clip", "text_projections.1.weight"),
        ],
    )
    def test_what_the_other_side_does_not_have(self, naming: Naming, name: str) -> None:
        with pytest.raises(KeyError, match=f"no foreign name is known for {name}"):
            name_table([name], naming)
