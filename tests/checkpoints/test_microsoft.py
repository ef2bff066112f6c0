"""Official `.ckpt` files: every kind of model, what is left behind, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import official
import tiny
from bridgetower.checkpoints import Checkpoint, read_checkpoint
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "pre-training": {},
    "contrastive": {"heads.itc": "tower", "heads.itc_size": 20},
    "fine-tuned": {"heads.mlm": False, "heads.itm": False},
    "nlvr2": {"fusion.num_token_types": 3, "heads.mlm": False, "heads.itm": False}
    | {"heads.nlvr2": True, "heads.hidden_scale": 1.5},
    "vqa and snli-ve": {"heads.vqa": 17, "heads.snli_ve": True, "heads.mlm": False, "heads.itm": False},
    "heads of one layer": {"heads.vqa": 17, "heads.snli_ve": True, "heads.nlvr2": True, "fusion.num_token_types": 3}
    | {"heads.hidden_scale": 0.0, "heads.mlm": False, "heads.itm": False},
    "ranking": {"heads.rank": True, "heads.mlm": False},
    "other fusion width": {"fusion.hidden_size": 24, "fusion.num_heads": 4, "fusion.intermediate_size": 40},
    "meter": official.METER,
    "bert": official.BERT,
    "timm": official.TIMM,
    "timm, bert and meter": official.TIMM | official.BERT | official.METER,
}
OVERRIDES = official.OVERRIDES | {"vision.num_heads": 2}


def read(folder: Path, made: official.Official, overrides: dict[str, Any] | None = None) -> Checkpoint:
    return read_checkpoint(made.save(folder / "model.ckpt"), overrides=OVERRIDES if overrides is None else overrides)


@pytest.mark.parametrize("kind", KINDS)
class TestKinds:
    def test_config_is_told_from_the_file(self, tmp_path: Path, kind: str) -> None:
        made = official.make(KINDS[kind])
        expected = made.config
        if expected.heads.itc is None:  # a file without the head does not tell its width
            expected = expected.override({"heads.itc_size": 256})
        assert read(tmp_path, made).config == expected

    def test_tensors(self, tmp_path: Path, kind: str) -> None:
        made = official.make(KINDS[kind])
        checkpoint = read(tmp_path, made)
        assert tiny.equal(checkpoint.tensors, made.tensors)
        assert checkpoint.source == str(tmp_path / "model.ckpt")

    def test_the_rest_is_extra_or_reported(self, tmp_path: Path, kind: str) -> None:
        checkpoint = read(tmp_path, official.make(KINDS[kind]))
        assert checkpoint.extra_tensors.keys() == {"text.pooler.dense.weight", "text.pooler.dense.bias"}
        dropped = {"text_transformer.embeddings.position_ids"}
        if "timm" not in kind:
            dropped |= {f"vit_model.{name}" for name in ("positional_embedding", "ln_final.weight", "ln_final.bias")}
        if kind != "contrastive":
            dropped |= {"temperature"}
        assert set(checkpoint.dropped) == dropped


class TestNames:
    def test_heads_of_one_layer_answer(self, tmp_path: Path) -> None:
        """Official `task_head_layers=1`."""
        made = official.make({"heads.vqa": 17, "heads.hidden_scale": 0.0})
        assert "vqa_classifier.0.weight" in made.state_dict
        model, pooled = read(tmp_path, made).model(), torch.randn(2, 96)
        weight, bias = (made.state_dict[f"vqa_classifier.0.{kind}"] for kind in ("weight", "bias"))
        assert tiny.off(model.class_logits("vqa", pooled), pooled @ weight.T + bias) < 1e-5

    def test_they_are_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        read(tmp_path, official.make({}, extra=["val_vqa_score.total"]))
        assert "not used: " in caplog.text
        assert "val_vqa_score.total" in caplog.text

    @pytest.mark.parametrize("name", ["vqa_classifier.0.bias", "snli_classifier.1.weight", "rank_output.bias"])
    def test_a_head_that_is_not_whole(self, tmp_path: Path, name: str) -> None:
        made = official.make({"heads.vqa": 17, "heads.snli_ve": True, "heads.rank": True})
        del made.state_dict[name]
        with pytest.raises(ValueError, match=f"(lacks tensors: |lacks '){name}"):
            read(tmp_path, made)

    @pytest.mark.parametrize("name", ["mystery.weight", "vit_model.visual.extra", "cross_modal_text_layers.0.x", "vqa"])
    def test_unknown_ones_are_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=f"model.ckpt has unknown tensors: {name}"):
            read(tmp_path, official.make({}, extra=[name]))

    def test_separate_norms_are_extra_and_warned_of(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        names = [f"vit_model.visual.ln_separate.{number}.weight" for number in range(3)]
        made = official.make({}, extra=names)
        made.run_config["vit_layernorm_shared"] = False
        extra_tensors = read(tmp_path, made).extra_tensors
        assert "was trained with vit_layernorm_shared=False, but one shared LayerNorm" in caplog.text
        assert {f"vision.separate_norms.{number}.weight" for number in range(3)} <= extra_tensors.keys()

    def test_missing_ones(self, tmp_path: Path) -> None:
        made = official.make()
        del made.state_dict["cross_modal_image_pooler.dense.bias"]
        del made.state_dict["mlm_score.transform.dense.bias"]
        with pytest.raises(ValueError, match=r"lacks tensors: cross_modal_image_pooler\.dense\.bias, mlm_score\."):
            read(tmp_path, made)

    def test_a_renamed_one(self, tmp_path: Path) -> None:
        made = official.make()
        made.state_dict["mlm_score.decoder.weights"] = made.state_dict.pop("mlm_score.decoder.weight")
        with pytest.raises(ValueError, match=r"lacks tensors: mlm_score\.decoder\.weight"):
            read(tmp_path, made)

    def test_a_missing_layer(self, tmp_path: Path) -> None:
        made = official.make()
        for name in [name for name in made.state_dict if ".resblocks.1." in name]:
            del made.state_dict[name]
        with pytest.raises(ValueError, match=r"lacks tensors: vit_model\.visual\.transformer\.resblocks\.1\."):
            read(tmp_path, made)

    def test_other_shapes(self, tmp_path: Path) -> None:
        made = official.make()
        made.state_dict["text_transformer.encoder.layer.1.attention.self.query.bias"] = torch.rand(47)
        with pytest.raises(ValueError, match=r"query\.bias \[47\] \(expected \[48\]\)"):
            read(tmp_path, made)

    @pytest.mark.parametrize(
        "name", ["vit_model.visual.conv1.weight", "cross_modal_text_transform.weight", "token_type_embeddings.weight"]
    )
    def test_no_bridgetower_at_all(self, tmp_path: Path, name: str) -> None:
        made = official.make()
        del made.state_dict[name]
        with pytest.raises(ValueError, match=f"lacks '{name}'; expected an official BridgeTower, METER "):
            read(tmp_path, made)


class TestHeads:
    """The number of attention heads stands in no official file."""

    def test_unpublished_text_tower(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"text tower of width 48; pass overrides=\{'text\.num_heads'"):
            read(tmp_path, official.make(), {})

    def test_unpublished_timm_tower(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"vision tower of width 128; pass overrides=\{'vision\.num_heads'"):
            read(tmp_path, official.make(official.TIMM), official.OVERRIDES)

    @pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6)])
    def test_published_widths(self, tmp_path: Path, width: int, heads: int) -> None:
        changes = {"text.hidden_size": width, "text.num_heads": heads, "vision.hidden_size": width}
        for vision in ({}, official.TIMM):
            made = official.make(changes | {"vision.num_heads": heads} | vision)
            checkpoint = read(tmp_path, made, {})
            assert (checkpoint.config.text.num_heads, checkpoint.config.vision.num_heads) == (heads, heads)

    def test_clip_follows_the_width(self, tmp_path: Path) -> None:
        assert read(tmp_path, official.make(), official.OVERRIDES).config.vision.num_heads == 2

    def test_unknown_override(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"unknown config field 'text\.heads'"):
            read(tmp_path, official.make(), {"text.heads": 3, **official.OVERRIDES})

    def test_an_override_that_does_not_fit(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"wrongly shaped tensors: .*conv1\.weight"):
            read(tmp_path, official.make(), {**official.OVERRIDES, "vision.patch_size": 8})


class TestRunConfig:
    def test_meter_fusion_is_refused(self, tmp_path: Path) -> None:
        made = official.make()
        made.run_config["meter_fusion"] = True
        with pytest.raises(ValueError, match="meter_fusion is not supported"):
            read(tmp_path, made)

    @pytest.mark.parametrize("name", ["tokenizer", "num_heads", "drop_rate"])
    def test_a_lacking_setting_of_the_model(self, tmp_path: Path, name: str) -> None:
        made = official.make()
        del made.run_config[name]
        with pytest.raises(ValueError, match=rf"hyper_parameters.config lacks \['{name}'\]"):
            read(tmp_path, made)

    @pytest.mark.parametrize("name", ["val_transform_keys", "max_text_len"])
    def test_a_lacking_setting_of_preprocessing(self, tmp_path: Path, name: str) -> None:
        made = official.make()
        del made.run_config[name]
        with pytest.raises(ValueError, match=rf"hyper_parameters.config lacks \['{name}'\]"):
            read(tmp_path, made)

    @pytest.mark.parametrize(
        ("key", "profile"),
        [("clip", "official-pretrain"), ("blip", "official-finetune"), ("albef", "official-finetune")],
    )
    def test_preprocessing(self, tmp_path: Path, key: str, profile: str) -> None:
        made = official.make()
        made.run_config["val_transform_keys"] = [key]
        processor = read(tmp_path, made).processor
        assert processor is not None
        assert processor.config.profile == profile
        assert (processor.config.image_size, processor.config.max_length) == (32, 12)
        assert processor.tokenizer is None

    def test_tokenizer_from_elsewhere(self, tmp_path: Path) -> None:
        tokenizer = train_tokenizer(["a dog runs"] * 3, vocab_size=280)
        Processor(ProcessorConfig(profile="official-pretrain", image_size=32, max_length=9), tokenizer).save(tmp_path)
        file = official.make({"text.vocab_size": 280}).save(tmp_path / "model.ckpt")
        processor = read_checkpoint(file, overrides=OVERRIDES, tokenizer=tmp_path).processor
        assert processor is not None
        assert processor.config.max_length == 12, "settings stay the file's own"
        assert processor.token_ids(["a dog"]) == Processor(processor.config, tokenizer).token_ids(["a dog"])


class TestOtherFiles:
    @pytest.mark.parametrize(
        "content",
        [
            {"state_dict": {}},
            {"hyper_parameters": {"config": {}}},
            {"hyper_parameters": None, "state_dict": {}},
            {"hyper_parameters": {"config": None}, "state_dict": {}},
            {"hyper_parameters": {"config": {}}, "state_dict": [1]},
            {"weight": torch.rand(2)},
        ],
    )
    def test_another_kind_of_file(self, tmp_path: Path, content: dict[str, Any]) -> None:
        torch.save(content, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=r"has no state_dict with hyper_parameters\.config"):
            read_checkpoint(tmp_path / "model.ckpt")

    def test_values_that_are_no_tensors(self, tmp_path: Path) -> None:
        made = official.make()
        made.state_dict["mlm_score.bias"] = "weights"  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"holds mlm_score\.bias, which are no named, dense tensors"):
            read(tmp_path, made)
