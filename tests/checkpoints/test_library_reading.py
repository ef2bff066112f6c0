"""Towers of timm and transformers from their folders and files: sizes, weights and preprocessing come with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from bridgetower.checkpoints.towers import TowerWeights, read_text_tower, read_vision_tower
from bridgetower.model.extensions import TEXT_ARCHITECTURES, vision_tower
from bridgetower.processor.text import special_tokens
from families import VISION_FAMILIES, save_text, save_timm

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
SPECIAL = {"pad": "PAD", "bos": "CLS", "eos": "SEP", "unk": "UNK"}
LINES = ("a red circle on a black ground", "a green square on a white ground", "two yellow bars and a blue circle")


@torch.no_grad()
def images_off(weights: TowerWeights, model: Any) -> float:
    """The difference of the last layer from that of timm's model."""
    tower, size = vision_tower(weights.config).eval(), weights.config.image_size
    tower.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in weights.tensors.items()})
    pixels = tiny.images(2, size=size)
    return tiny.off(tower(pixels, (weights.config.num_layers,))[0], model.forward_features(pixels))


class TestImages:
    @pytest.mark.parametrize("family", ["siglip", "dinov2", "dinov3", "eva02", "beit"])
    @pytest.mark.parametrize("prefix", ["", "timm:"])
    def test_a_folder(self, tmp_path: Path, family: str, prefix: str) -> None:
        model = save_timm(tmp_path, family)
        weights = read_vision_tower(f"{prefix}{tmp_path}")
        assert weights.config.architecture == "timm"
        assert weights.config.num_layers == len(model.blocks)
        assert images_off(weights, model) < 1e-5
        with torch.no_grad():  # control
            weights.tensors["vision.model.blocks.1.mlp.fc1.weight"].mul_(1.1)
        assert images_off(weights, model) > 1e-3

    def test_a_file(self, tmp_path: Path) -> None:
        model = timm.create_model("test_vit", num_classes=5).eval()
        torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
        weights = read_vision_tower(f"timm:test_vit={tmp_path / 'weights.pth'}")
        assert weights.config.image_size == model.default_cfg["input_size"][1]
        assert images_off(weights, model) < 1e-5
        with pytest.raises(ValueError, match=r"weights\.pth lacks tensors"):
            read_vision_tower(f"timm:test_vit4={tmp_path / 'weights.pth'}")

    def test_a_file_of_another_width(self, tmp_path: Path) -> None:
        weights = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
        weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].flatten(1)  # as some authors have it
        torch.save(weights, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=r"weights\.pth does not fit timm's vit_small_patch16_224 "):
            read_vision_tower(f"timm:vit_small_patch16_224={tmp_path / 'weights.pth'}")

    @pytest.mark.parametrize("prefix", ["", "timm:"])
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
    def test_a_folder_that_timm_saved(self, name: str, prefix: str, tmp_path: Path) -> None:
        arguments = {"depth": 2, "img_size": [112, 112]}
        model = timm.create_model(name, **arguments).eval()
        timm.models.save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
        assert json.loads((tmp_path / "config.json").read_text())["model_args"]["img_size"] == [112, 112]
        weights = read_vision_tower(f"{prefix}{tmp_path}")
        assert weights.config.image_size == 112
        if weights.config.architecture == "timm":
            assert images_off(weights, model) < 1e-5
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace("112,\n      112", "112,\n      224"))
        if weights.config.architecture == "timm":
            with pytest.raises(ValueError, match=r"takes images of \[112, 224\] pixels; expected a square"):
                read_vision_tower(f"{prefix}{tmp_path}")

    def test_a_plain_vit_of_a_folder_is_a_tower_of_this_package(self, tmp_path: Path) -> None:
        name, sizes = "vit_tiny_patch16_224", {"depth": 3, "img_size": 32}
        save_file(timm.create_model(name, **sizes).state_dict(), tmp_path / "model.safetensors")
        config = {"architecture": name, "model_args": sizes, "pretrained_cfg": {}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        architectures = [read_vision_tower(f"{prefix}{tmp_path}").config.architecture for prefix in ("", "timm:")]
        assert architectures == ["vit", "timm"]

    @pytest.mark.parametrize("family", ["siglip", "dinov2, registers", "dinov3", "beit"])
    def test_another_size_is_timms(self, tmp_path: Path, family: str) -> None:
        save_timm(tmp_path, family)
        weights = read_vision_tower(str(tmp_path))
        size = weights.config.image_size + weights.config.patch_size
        name, arguments = VISION_FAMILIES[family].name, weights.config.settings["arguments"]  # type: ignore[index]
        theirs = timm.create_model(name, img_size=size, **arguments).eval()
        theirs.load_state_dict(_resized(theirs, tmp_path))
        assert images_off(weights.resized(size), theirs) < 1e-5

    def test_preprocessing(self, tmp_path: Path) -> None:
        save_timm(tmp_path, "siglip", crop_mode="squash")
        expected = {
            "profile": "official-finetune",
            "image_mean": (0.1, 0.2, 0.3),
            "image_std": (0.4, 0.5, 0.6),
            "interpolation": "bilinear",
        }
        assert read_vision_tower(str(tmp_path)).preprocessing == expected

    def test_refused(self, tmp_path: Path) -> None:
        save_timm(tmp_path, "siglip")
        with pytest.raises(ValueError, match=r"contradicts the run's settings: model\.vision\.num_layers 9 \(it has"):
            read_vision_tower(str(tmp_path), {"num_layers": 9})
        with pytest.raises(ValueError, match="timm has no weights called 'vit_of_mine'"):
            read_vision_tower("timm:vit_of_mine")
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config["pretrained_cfg"]}))
        with pytest.raises(ValueError, match=r"has no config\.json of timm with its architecture; give timm:NAME=FILE"):
            read_vision_tower(f"timm:{tmp_path}")


def _resized(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a folder as timm itself makes them fit a model."""
    from timm.models import beit, eva, vision_transformer
    from timm.models._helpers import load_state_dict

    module = {"Beit": beit, "Eva": eva}.get(type(model).__name__, vision_transformer)
    return dict(module.checkpoint_filter_fn(load_state_dict(str(folder / "model.safetensors")), model))


class TestTexts:
    @pytest.mark.parametrize("prefix", ["", "hf:"])
    @pytest.mark.parametrize(
        ("family", "name"),
        [("modernbert", "AutoModelForMaskedLM"), ("deberta-v2", "AutoModel"), ("mpnet", "AutoModelForMaskedLM")],
    )
    @torch.no_grad()
    def test_a_folder(self, tmp_path: Path, family: str, name: str, prefix: str) -> None:
        model = save_text(tmp_path, family, name)
        weights = read_text_tower(f"{prefix}{tmp_path}")
        assert weights.config.architecture == "transformers"
        assert str(tmp_path) not in json.dumps(weights.config.settings)
        tower = TEXT_ARCHITECTURES["transformers"](weights.config).eval()
        tower.load_state_dict({name.removeprefix("text."): tensor for name, tensor in weights.tensors.items()})
        ids, mask = tiny.texts([6, 3])
        layers = tuple(range(1, weights.config.num_layers + 1))
        ours = tower(ids, mask.bool(), layers)
        theirs = model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        pairs = zip(ours, theirs, strict=True)
        assert max(tiny.off(one[mask.bool()], other[mask.bool()]) for one, other in pairs) < 1e-5

    @pytest.mark.parametrize("prefix", ["", "hf:"])
    def test_bert_is_a_tower_of_this_package(self, tmp_path: Path, prefix: str) -> None:
        save_text(tmp_path, "bert")
        assert read_text_tower(f"{prefix}{tmp_path}").config.architecture == "bert"

    def test_a_vocabulary_of_sentencepiece(self, tmp_path: Path) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        special = {f"{role}_piece": f"[{name}]" for role, name in SPECIAL.items()}
        ids = {f"{role}_id": number for number, role in enumerate(SPECIAL)}
        with (tmp_path / "spm.model").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(LINES), model_writer=file, vocab_size=30, minloglevel=2, **special, **ids
            )
        save_text(tmp_path, "deberta-v2", pad_token_id=0)
        # Code in the folder is not run.
        (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
        tokenizer = read_text_tower(str(tmp_path)).tokenizer
        assert tokenizer is not None
        assert special_tokens(tokenizer)[1] == (1, 0, 2, 3, 30)
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
        for line in LINES:
            assert tokenizer.encode(line).ids == [1, *theirs.encode(line), 2]
        assert not (tmp_path / "ran").exists()
        (tmp_path / "spm.model").write_bytes(b"cut off")
        with pytest.raises(ValueError, match=r"transformers cannot read the tokenizer in .* \(.*cut off"):
            read_text_tower(str(tmp_path))
        (tmp_path / "spm.model").rename(tmp_path / "other.model")
        with pytest.raises(ValueError, match=r"has no spm\.model for transformers' DebertaV2Tokenizer; add a"):
            read_text_tower(str(tmp_path))
        (tmp_path / "other.model").unlink()
        assert read_text_tower(str(tmp_path)).tokenizer is None

    def test_a_vocabulary_with_its_own_special_tokens(self, tmp_path: Path) -> None:
        save_text(tmp_path, "mpnet")
        (tmp_path / "vocab.txt").write_text("\n".join(["<s>", "<pad>", "</s>", "[UNK]", "red", "bar", "<mask>"]))
        tokenizer = read_text_tower(str(tmp_path)).tokenizer
        assert tokenizer is not None
        assert tokenizer.encode("Red bar").ids == [0, 4, 5, 2]

    def test_refused(self, tmp_path: Path) -> None:
        model = save_text(tmp_path, "mpnet")
        with pytest.raises(ValueError, match="which has image towers only"):
            read_text_tower(f"timm:{tmp_path}")
        tensors = {name: tensor for name, tensor in model.state_dict().items() if "layer.1.output" not in name}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks tensors: encoder\.layer\.1\.output"):
            read_text_tower(str(tmp_path))
        (tmp_path / "model.safetensors").write_bytes(b"cut off")
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            read_text_tower(str(tmp_path))
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 7}))
        with pytest.raises(ValueError, match="transformers cannot read"):
            read_text_tower(str(tmp_path))


def test_code_in_a_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked whether it may be, as transformers does by default."""
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    classes = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mystery", "auto_map": classes}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"transformers cannot read .*"):
        read_text_tower(f"hf:{tmp_path}")
    assert not ran.exists()
