"""Official `.ckpt` files: every kind of model, what is left behind, and what is refused."""

from dataclasses import replace

import pytest
import torch

from bridgetower.checkpoints import read_checkpoint
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer
from helpers.checkpoints import (
    BERT_CHANGES,
    METER_CHANGES,
    OFFICIAL_OVERRIDES,
    TIMM_CHANGES,
    make_official,
)
from helpers.models import max_difference, same_tensors

KINDS = {
    "pre-training": {},
    "contrastive": {"heads.itc": "tower", "heads.itc_size": 20},
    "fine-tuned": {"heads.mlm": False, "heads.itm": False},
    "nlvr2": {"fusion.num_token_types": 3, "heads.mlm": False, "heads.itm": False}
    | {"heads.nlvr2": True, "heads.hidden_scale": 1.5},
    "vqa and snli-ve": {
        "heads.vqa": 17,
        "heads.snli_ve": True,
        "heads.mlm": False,
        "heads.itm": False,
    },
    "heads of one layer": {
        "heads.vqa": 17,
        "heads.snli_ve": True,
        "heads.nlvr2": True,
        "fusion.num_token_types": 3,
    }
    | {"heads.hidden_scale": 0.0, "heads.mlm": False, "heads.itm": False},
    "ranking": {"heads.rank": True, "heads.mlm": False},
    "other fusion width": {
        "fusion.hidden_size": 24,
        "fusion.num_heads": 4,
        "fusion.intermediate_size": 40,
    },
    "meter": METER_CHANGES,
    "bert": BERT_CHANGES,
    "timm": TIMM_CHANGES,
    "timm, bert and meter": TIMM_CHANGES | BERT_CHANGES | METER_CHANGES,
}
OVERRIDES = OFFICIAL_OVERRIDES | {"vision.num_heads": 2}
QUERY = "text_transformer.encoder.layer.1.attention.self.query.bias"


def read(folder, made, overrides=None):
    return read_checkpoint(
        made.save(folder / "model.ckpt"), overrides=OVERRIDES if overrides is None else overrides
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(tmp_path, kind, caplog):
    made = make_official(KINDS[kind], extra=["val_vqa_score.total"])
    expected = made.config
    if expected.heads.itc is None:  # a file without the head does not tell its width
        expected = expected.override({"heads.itc_size": 256})
    caplog.set_level("INFO")
    checkpoint = read(tmp_path, made)
    assert checkpoint.config == expected
    assert same_tensors(checkpoint.tensors, made.tensors)
    assert checkpoint.source == str(tmp_path / "model.ckpt")
    assert checkpoint.extra_tensors.keys() == {"text.pooler.dense.weight", "text.pooler.dense.bias"}
    dropped = {"text_transformer.embeddings.position_ids", "val_vqa_score.total"}
    if "timm" not in kind:
        dropped |= {
            f"vit_model.{name}"
            for name in ("positional_embedding", "ln_final.weight", "ln_final.bias")
        }
    if kind != "contrastive":
        dropped |= {"temperature"}
    assert set(checkpoint.dropped) == dropped
    assert f"not used: {', '.join(sorted(dropped))}" in caplog.text


class TestNames:
    def test_heads_of_one_layer_answer(self, tmp_path):
        made = make_official({"heads.vqa": 17, "heads.hidden_scale": 0.0})
        assert "vqa_classifier.0.weight" in made.state_dict
        model = read(tmp_path, made).model()
        pooled = torch.randn(2, 96)
        weight, bias = (made.state_dict[f"vqa_classifier.0.{kind}"] for kind in ("weight", "bias"))
        assert max_difference(model.head("vqa")(pooled), pooled @ weight.T + bias) < 1e-5

    def test_separate_norms_are_extra_and_warned_of(self, tmp_path, caplog):
        names = [f"vit_model.visual.ln_separate.{number}.weight" for number in range(3)]
        made = make_official({}, extra=names)
        made.run_config["vit_layernorm_shared"] = False
        extra_tensors = read(tmp_path, made).extra_tensors
        assert (
            "was trained with vit_layernorm_shared=False, but one shared LayerNorm" in caplog.text
        )
        assert {
            f"vision.separate_norms.{number}.weight" for number in range(3)
        } <= extra_tensors.keys()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda tensors: tensors.update({"mystery.weight": torch.rand(3)}),
                "model.ckpt has unknown tensors: mystery.weight",
            ),
            (lambda tensors: tensors.update(vqa=torch.rand(3)), "unknown tensors: vqa$"),
            (
                lambda tensors: tensors.pop("vqa_classifier.0.bias"),
                "lacks tensors: vqa_classifier.0.bias",
            ),
            (
                lambda tensors: tensors.pop("snli_classifier.1.weight"),
                "(lacks tensors: |lacks ')snli_classifier.1.weight",
            ),
            (lambda tensors: tensors.pop("rank_output.bias"), "lacks tensors: rank_output.bias"),
            (
                lambda tensors: [
                    tensors.pop(name) for name in [*tensors] if ".resblocks.1." in name
                ],
                r"lacks .*\.resblocks\.1\.",
            ),
            (
                lambda tensors: tensors.update({QUERY: torch.rand(47)}),
                rf"{QUERY} \[47\] \(expected \[48\]\)",
            ),
            *(
                (
                    lambda tensors, name=name: tensors.pop(f"{name}.weight"),
                    f"lacks '{name}.weight'; expected an official Bridge",
                )
                for name in (
                    "vit_model.visual.conv1",
                    "cross_modal_text_transform",
                    "token_type_embeddings",
                )
            ),
            (
                lambda tensors: tensors.update({"mlm_score.bias": "weights"}),
                r"holds mlm_score\.bias, which are no named, dense",
            ),
        ],
    )
    def test_others_are_refused(self, tmp_path, change, message):
        made = make_official({"heads.vqa": 17, "heads.snli_ve": True, "heads.rank": True})
        change(made.state_dict)
        with pytest.raises(ValueError, match=message):
            read(tmp_path, made)


class TestHeads:
    def test_refused(self, tmp_path):
        for changes, overrides, message in (
            ({}, {}, r"text tower of width 48; pass overrides=\{'text\.num_heads'"),
            (
                TIMM_CHANGES,
                OFFICIAL_OVERRIDES,
                r"vision tower of width 128; pass overrides=\{'vision\.num_heads'",
            ),
            ({}, {"text.heads": 3, **OFFICIAL_OVERRIDES}, r"unknown config field 'text\.heads'"),
            (
                {},
                {**OFFICIAL_OVERRIDES, "vision.patch_size": 8},
                r"wrongly shaped tensors: .*conv1\.weight",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                read(tmp_path, make_official(changes), overrides)

    def test_published_widths(self, tmp_path):
        for width, heads, vision in ((192, 3, {}), (384, 6, TIMM_CHANGES)):
            widths = {
                "text.hidden_size": width,
                "vision.hidden_size": width,
                "vision.num_heads": heads,
            }
            config = read(
                tmp_path, make_official({**widths, "text.num_heads": heads, **vision}), {}
            ).config
            assert (config.text.num_heads, config.vision.num_heads) == (heads, heads)


class TestRunConfig:
    def test_refused(self, tmp_path):
        made = make_official()
        with pytest.raises(ValueError, match="meter_fusion is not supported"):
            read(tmp_path, replace(made, run_config={**made.run_config, "meter_fusion": True}))
        for name in ("tokenizer", "num_heads", "drop_rate", "val_transform_keys", "max_text_len"):
            lacking = {field: value for field, value in made.run_config.items() if field != name}
            with pytest.raises(ValueError, match=rf"hyper_parameters.config lacks \['{name}'\]"):
                read(tmp_path, replace(made, run_config=lacking))

    def test_preprocessing(self, tmp_path):
        made = make_official()
        for key, profile in (("clip", "pretrain"), ("blip", "finetune"), ("albef", "finetune")):
            made.run_config["val_transform_keys"] = [key]
            processor = read(tmp_path, made).processor
            assert processor.config.profile == f"official-{profile}"
            assert (processor.config.image_size, processor.config.max_length) == (32, 12)
            assert processor.tokenizer is None

    def test_tokenizer_from_elsewhere(self, tmp_path):
        tokenizer = train_tokenizer(["a dog runs"] * 3, vocab_size=280)
        Processor(
            ProcessorConfig(profile="official-pretrain", image_size=32, max_length=9), tokenizer
        ).save(tmp_path)
        file = make_official({"text.vocab_size": 280}).save(tmp_path / "model.ckpt")
        processor = read_checkpoint(file, overrides=OVERRIDES, tokenizer=tmp_path).processor
        assert processor.config.max_length == 12, "settings stay the file's own"
        assert processor.token_ids(["a dog"]) == Processor(processor.config, tokenizer).token_ids(
            ["a dog"]
        )


def test_another_kind_of_file(tmp_path):
    for content in (
        {"state_dict": {}},
        {"hyper_parameters": {"config": {}}},
        {"hyper_parameters": None, "state_dict": {}},
        {"hyper_parameters": {"config": None}, "state_dict": {}},
        {"hyper_parameters": {"config": {}}, "state_dict": [1]},
        {"weight": torch.rand(2)},
    ):
        torch.save(content, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=r"has no state_dict with hyper_parameters\.config"):
            read_checkpoint(tmp_path / "model.ckpt")
