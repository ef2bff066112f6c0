"""Official checkpoints converted for transformers: its numbers with its eps, and names and shapes of the published."""

import builtins
import collections.abc
import dataclasses
import types
import typing
from contextlib import suppress
from dataclasses import replace
from typing import get_args, get_origin

import huggingface as hf
import pytest
import torch
from transformers import BridgeTowerConfig

import bridgetower
from bridgetower.checkpoints import Checkpoint, Reranking, convert, huggingface, read_checkpoint
from bridgetower.model.config import FusionConfig, HeadsConfig, ModelConfig
from bridgetower.processor import Processor, ProcessorConfig
from helpers.checkpoints import (
    BERT_CHANGES,
    METER_CHANGES,
    OFFICIAL_CONFIG,
    OFFICIAL_OVERRIDES,
    make_official,
)
from helpers.models import build_model, max_difference, random_images, random_texts, same_tensors

# transformers has one eps (1e-5) where the official code has 1e-12 inside the fusion layers and the MLM head.
SAME_EPS = {"fusion.layer_norm_eps": 1e-5, "heads.mlm_layer_norm_eps": 1e-5}
HEAD = {
    "mlm": {"heads.itm": False},
    "itm": {"heads.mlm": False},
    "backbone": {"heads.mlm": False, "heads.itm": False},
}


def converted_folder(folder, kind, changes=None):
    file = make_official(HEAD[kind] | (changes or {})).save(folder / "model.ckpt")
    checkpoint = read_checkpoint(file, overrides=OFFICIAL_OVERRIDES)
    convert(checkpoint, folder / "hf", "hf")
    return checkpoint, folder / "hf"


def with_same_eps(checkpoint):
    return replace(checkpoint, config=checkpoint.config.override(SAME_EPS))


def made_checkpoint(changes):
    config = OFFICIAL_CONFIG.override(changes)
    return Checkpoint(source="mine", config=config, tensors=build_model(config).state_dict())


@torch.no_grad()
def difference(checkpoint, folder, kind):
    theirs = hf.reload(folder, kind)
    batch = hf.inputs(theirs)
    ours = hf.our_outputs(checkpoint.model(), batch)
    expected = hf.their_outputs(theirs, batch)
    return max(max_difference(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", HEAD)
def test_eps_is_the_only_difference(tmp_path, kind):
    checkpoint, folder = converted_folder(tmp_path, kind)
    assert difference(checkpoint, folder, kind) < 2e-4
    assert difference(with_same_eps(checkpoint), folder, kind) < 1e-5
    # control: inputs of the LayerNorms of small variance make it visible
    tensors = dict(checkpoint.tensors)
    for name in tensors:
        norm = name.endswith(("_bridges.0.norm.weight", "_bridges.0.norm.bias"))
        if name.startswith("fusion.") and (norm or ("_layers.1." in name and "out" in name)):
            tensors[name] = tensors[name] * 1e-2
    small = replace(checkpoint, tensors=tensors)
    convert(small, tmp_path / "small", "hf")
    assert difference(small, tmp_path / "small", kind) > 1e-4
    assert difference(with_same_eps(small), tmp_path / "small", kind) < 1e-5
    theirs = hf.reload(folder, kind).state_dict()
    pooler = {name: value for name, value in theirs.items() if "text_model.pooler" in name}
    assert len(pooler) == len(checkpoint.extra_tensors) == 2
    for name, value in pooler.items():
        assert torch.equal(
            value, checkpoint.extra_tensors["text." + name.partition("text_model.")[2]]
        )


def test_one_folder_serves_both_heads(tmp_path):
    """As in the published `itm-mlm` folders: each model of transformers leaves the other's head."""
    checkpoint = read_checkpoint(
        make_official().save(tmp_path / "model.ckpt"), overrides=OFFICIAL_OVERRIDES
    )
    convert(checkpoint, tmp_path / "hf", "hf")
    for kind, other in (("mlm", "itm_score"), ("itm", "mlm_score")):
        _, info = hf.KINDS[kind].from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        assert {name.split(".")[0] for name in info["unexpected_keys"]} == {other}


def test_same_numbers_after_a_detour_through_transformers(tmp_path):
    checkpoint, folder = converted_folder(tmp_path, "itm")
    back = read_checkpoint(folder)
    assert same_tensors(back.tensors, checkpoint.tensors)
    layers = {"fusion.vision_layers": (2, 3), "fusion.text_layers": (2, 3)}
    assert back.config == checkpoint.config.override(SAME_EPS | layers)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            METER_CHANGES,
            "fusion.bridge is None, there 'add'; fusion.input_norm is False, there True",
        ),
        (BERT_CHANGES, "text.positions is 'bert', there 'roberta'"),
        (
            {"heads.itc": "tower"},
            "heads.itc is 'tower', there None; drop_itc=True leaves the contrastive head out",
        ),
        ({"heads.itc": "fused"}, "vision.hidden_size is 128, but the contrastive head needs 48"),
        (
            {"vision.hidden_size": 32, "vision.num_heads": 1},
            "vision.hidden_size is 32, less than a head of 64",
        ),
        ({"vision.num_layers": 2}, "vision.num_layers is 2, there 3"),
        ({"vision.num_layers": 4}, r"fusion.vision_layers is \(3, 4\), there \(2, 3\)"),
    ],
)
def test_what_transformers_cannot_hold(tmp_path, changes, reason):
    with pytest.raises(ValueError, match=f"transformers cannot hold mine: .*{reason}"):
        convert(made_checkpoint(changes), tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def test_settings_of_images_are_refused_before_weights_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "bridgetower.checkpoints.io.write_weights", lambda *args, **options: pytest.fail("written")
    )
    config = ProcessorConfig(profile="hf", image_size=32, max_length=12, background=(0, 0, 9))
    with pytest.raises(ValueError, match=r"background is \(0, 0, 9\), there \(255, 255, 255\)"):
        convert(
            replace(made_checkpoint({}), processor=Processor(config, None)), tmp_path / "hf", "hf"
        )
    assert not (tmp_path / "hf").exists()


def other_values(annotation, value):
    """Yields values that a field of this type may have instead."""
    kind = get_origin(annotation) or annotation
    match kind:
        case types.UnionType | typing.Union | typing.Annotated:
            for choice in get_args(annotation):
                yield from other_values(choice, value)
        case typing.Literal:
            yield from get_args(annotation)
        case builtins.bool:
            yield not value
        case builtins.int:
            yield from (2 * (value or 1), (value or 1) + 1, (value or 2) // 2)
        case builtins.float:
            yield value / 2 if value else 0.3
        case builtins.str:
            yield "other"
        case builtins.tuple:
            yield from ((1, 3), ("other",))
        case collections.abc.Mapping:
            yield {"other": 1}


BASE_CONFIG = OFFICIAL_CONFIG.override(SAME_EPS)
FIELDS = [
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(ModelConfig)
    for field in dataclasses.fields(getattr(BASE_CONFIG, section.name))
]


def changed_configs(path):
    section, _, name = path.partition(".")
    config = getattr(BASE_CONFIG, section)
    annotation = typing.get_type_hints(type(config), include_extras=True)[name]
    for value in other_values(annotation, getattr(config, name)):
        for additions in ({}, {"fusion.num_token_types": 3}):  # which NLVR2 needs
            with suppress(ValueError):
                yield BASE_CONFIG.override({path: value} | additions)
                break


def outputs_of_both(model):
    config = model.config
    return model(random_images(2, config), *random_texts([5, 3], config))


@torch.no_grad()
@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_refused_or_lost_with_a_warning_or_kept(path, tmp_path, caplog):
    """A new field is either written and read, or named: the model does not become another one in silence."""
    configs = [config for config in changed_configs(path) if config != BASE_CONFIG]
    assert configs, f"no other value of {path} is known; add its type to other_values"
    for number, config in enumerate(configs):
        caplog.clear()
        tensors = made_checkpoint({}).tensors
        with suppress(ValueError, TypeError):  # where custom parts are not there
            tensors = build_model(config).state_dict()
        checkpoint = Checkpoint(source="mine", config=config, tensors=tensors)
        folder = tmp_path / str(number)
        refusal = ""
        try:
            convert(checkpoint, folder, "hf")
        except ValueError as error:
            refusal = str(error)
        if refusal:
            assert any(f"{name} is " in refusal for name in FIELDS)
            continue
        back = read_checkpoint(folder).model()
        pairs = zip(outputs_of_both(back), outputs_of_both(checkpoint.model()), strict=True)
        assert (
            "transformers has no field for" in caplog.text
            or max(max_difference(*pair) for pair in pairs) < 1e-6
        )
        heads = [name for name, _ in back.named_children() if name.endswith("_head")]
        assert heads == [
            name for name, _ in checkpoint.model().named_children() if name.endswith("_head")
        ]


def test_a_field_that_transformers_does_not_have_is_refused(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Turned(FusionConfig):
        cross_first: bool = False

    fusion = Turned(**vars(OFFICIAL_CONFIG.fusion), cross_first=True)
    checkpoint = replace(made_checkpoint({}), config=replace(OFFICIAL_CONFIG, fusion=fusion))
    with pytest.raises(ValueError, match=r"cannot hold mine: fusion\.cross_first is True"):
        convert(checkpoint, tmp_path / "hf", "hf")


def test_lost_settings_are_warned_about(tmp_path, caplog):
    changes = {
        "fusion.dropout": 0.2,
        "fusion.layer_norm_eps": 1e-12,
        "heads.mlm_layer_norm_eps": 1e-6,
    }
    lost = replace(made_checkpoint(changes), reranking=Reranking(itc_weight=16.0))
    expected = [
        "fusion.layer_norm_eps: 1e-12 becomes 1e-05",
        "fusion.dropout: 0.2 becomes 0.1",
        "fusion.attention_dropout: 0.2 becomes 0.1",
        "heads.mlm_layer_norm_eps: 1e-06 becomes 1e-05",
        "record of reranking: {'itc_weight': 16.0} becomes {'itc_weight': 0.0}",
    ]
    for checkpoint, warned in (
        (lost, expected),
        (made_checkpoint({"fusion.dropout": 0.1} | SAME_EPS), []),
    ):
        caplog.clear()
        convert(checkpoint, tmp_path / str(len(warned)), "hf")
        messages = [
            record.getMessage() for record in caplog.records if record.levelname == "WARNING"
        ]
        assert messages == [f"mine: transformers has no field for {message}" for message in warned]


@pytest.mark.parametrize("to", ["hf", "bridgetower"])
def test_contrastive_head_can_be_left_out(tmp_path, to, caplog):
    checkpoint = made_checkpoint({"heads.itc": "tower"})
    caplog.set_level("INFO")
    convert(checkpoint, tmp_path / "out", to, drop_itc=True)
    assert "mine: the contrastive head is left out" in caplog.text
    back = read_checkpoint(tmp_path / "out")
    assert back.config.heads.itc is None
    remaining = {
        name: value
        for name, value in checkpoint.tensors.items()
        if not name.startswith("itc_head.")
    }
    assert 0 < len(remaining) < len(checkpoint.tensors)
    assert same_tensors(back.tensors, remaining)
    with pytest.raises(ValueError, match="has no contrastive head to drop"):
        convert(back, tmp_path / "again", to, drop_itc=True)


def test_contrastive_head_with_equal_widths_is_held(tmp_path):
    """Control for the reason above: with equal widths the contrastive model of transformers runs."""
    changes = {"vision.hidden_size": 64, "vision.num_heads": 1, "vision.intermediate_size": 256}
    same_width = {f"{tower}.hidden_size": 64 for tower in ("text", "fusion")}
    heads = {f"{tower}.num_heads": 4 for tower in ("text", "fusion")}
    config = OFFICIAL_CONFIG.override(changes | same_width | heads | SAME_EPS)
    config = replace(config, heads=HeadsConfig(mlm=False, itm=False, itc="fused", itc_size=20))
    checkpoint = Checkpoint(source="mine", config=config, tensors=build_model(config).state_dict())
    convert(checkpoint, tmp_path / "hf", "hf")
    assert difference(checkpoint, tmp_path / "hf", "itc") < 1e-5


# Sizes in config.json of the repositories BridgeTower/NAME on the hub. Those of the large model were read in its stored
# commits 9bdaa4b and 0e15d64. The base models have transformers' defaults, which its documentation calls those of
# bridgetower-base, and of which commit f803af9 of bridgetower-base-itm-mlm shows the sizes of the text tower.
_ROBERTA = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
_SHARED = {
    "num_hidden_layers": 6,
    "layer_norm_eps": 1e-5,
    "link_tower_type": "add",
    "share_cross_modal_transformer_layers": True,
    "share_link_tower_layers": False,
    "tie_word_embeddings": False,
    "logit_scale_init_value": 2.6592,
}
BASE = _SHARED | {
    "hidden_size": 768,
    "text_config": _ROBERTA
    | {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "vision_config": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "patch_size": 16,
        "image_size": 288,
    },
}
LARGE = _SHARED | {
    "hidden_size": 1024,
    "contrastive_hidden_size": 512,
    "text_config": _ROBERTA
    | {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "vision_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "image_size": 294,
    },
}
REPOSITORIES = {
    "bridgetower-base": (BASE, ("backbone",)),
    "bridgetower-base-itm-mlm": (BASE, ("mlm", "itm")),
    "bridgetower-large-itm-mlm-itc": (LARGE, ("mlm", "itm", "itc")),
}
KINDS = [(name, kind) for name, (_, kinds) in REPOSITORIES.items() for kind in kinds]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_names_and_shapes(name, kind, monkeypatch):
    values, _ = REPOSITORIES[name]
    with torch.device("meta"):
        theirs = hf.KINDS[kind](BridgeTowerConfig(**values))
    expected = theirs.state_dict()
    # no values there
    monkeypatch.setattr("bridgetower.checkpoints.checkpoint.check_finite", lambda *_: None)
    checkpoint = huggingface.read_hf_checkpoint(name, values, expected)
    written, tensors = huggingface.export(checkpoint)
    actual_shapes, expected_shapes = (
        {tensor_name: tensor.shape for tensor_name, tensor in all_.items()}
        for all_ in (tensors, expected)
    )
    assert actual_shapes == expected_shapes
    pooler = sum(tensor.numel() for tensor in checkpoint.extra_tensors.values())
    with torch.device("meta"):
        ours = bridgetower.BridgeTower(checkpoint.config)
    assert (
        sum(parameter.numel() for parameter in ours.parameters()) + pooler
        == theirs.num_parameters()
    )
    back = BridgeTowerConfig(**written)
    for section in ("", "text_config", "vision_config"):
        described, start = (
            getattr(tensor_name, section) if section else tensor_name
            for tensor_name in (back, theirs.config)
        )
        for field in values[section] if section else _SHARED:
            assert getattr(described, field) == getattr(start, field), field
