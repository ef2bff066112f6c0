"""Checkpoints and towers as their publishers write them, states of trainings, and content of folders."""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridgetower.checkpoints.keymap import export_tensors, name_table
from bridgetower.checkpoints.tensors import read_safetensors, read_state_json, write_safetensors
from bridgetower.model.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from bridgetower.training.state import FOLDER, TrainingState, newest
from helpers.models import build_model, off_defaults, random_images, same_tensors

PIXEL_SETTINGS = {
    "input_size": [3, 24, 24],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "interpolation": "bilinear",
}

DrawValues = Callable[[Random], dict[str, Any]]


@dataclass(frozen=True)
class VisionFamily:
    """An architecture of timm, and how sizes for it are drawn."""

    name: str
    prefix_tokens: int
    arguments: DrawValues = lambda random: {}
    head_width: int = 4
    patch: int | None = None

    def draw(self, random: Random) -> tuple[dict[str, Any], int]:
        heads = random.randint(2, 4)
        patch = self.patch or random.choice([4, 6, 8])
        arguments = {
            "embed_dim": heads * self.head_width,
            "depth": random.randint(3, 5),
            "num_heads": heads,
        }
        if self.patch is None:
            arguments["patch_size"] = patch
        return arguments | self.arguments(random), patch * random.randint(3, 5)


VISION_FAMILIES = {
    "vit": VisionFamily("vit_tiny_patch16_224", 1),
    "clip": VisionFamily("vit_base_patch16_clip_224", 1),
    "clip, quick GELU": VisionFamily("vit_base_patch16_clip_quickgelu_224", 1),
    "siglip": VisionFamily("vit_base_patch16_siglip_224", 0),
    "siglip, mean": VisionFamily("vit_base_patch16_siglip_gap_224", 0),
    "siglip 2": VisionFamily("vit_base_patch32_siglip_256", 0),
    "dinov2": VisionFamily("vit_small_patch14_dinov2", 1),
    "dinov2, registers": VisionFamily(
        "vit_small_patch14_reg4_dinov2",
        3,
        lambda random: {"reg_tokens": 2, "init_values": 0.5 + random.random()},
    ),
    "dinov3": VisionFamily("vit_small_patch16_dinov3", 5, head_width=8),
    "dinov3, SwiGLU": VisionFamily("vit_small_plus_patch16_dinov3", 5, head_width=8),
    "eva02": VisionFamily("eva02_tiny_patch14_224", 1, head_width=8),
    "eva02 clip": VisionFamily("eva02_base_patch16_clip_224", 1, head_width=8),
    "eva": VisionFamily("eva_large_patch14_196", 1),
    "deit3": VisionFamily("deit3_small_patch16_224", 1),
    "deit, distilled": VisionFamily("deit_tiny_distilled_patch16_224", 2),
    "beit": VisionFamily("beit_base_patch16_224", 1),
    "beit v2": VisionFamily("beitv2_base_patch16_224", 1),
    "registers, mean": VisionFamily("vit_medium_patch16_reg4_gap_256", 4),
    "parallel": VisionFamily("vit_small_patch16_18x2_224", 1),
    "relative positions": VisionFamily("vit_relpos_small_patch16_224", 0),
    "relative positions, shared": VisionFamily("vit_srelpos_small_patch16_224", 0),
    "relative positions, CLS": VisionFamily("vit_relpos_medium_patch16_cls_224", 1),
    "rotary": VisionFamily("vit_small_patch16_rope_224", 1, head_width=8),
    "rotary, learnt": VisionFamily("vit_small_patch16_rope_mixed_224", 1, head_width=8),
}


def _draw_text(random):
    heads = random.choice([2, 4])
    return {
        "vocab_size": random.randint(60, 90),
        "hidden_size": heads * 8,
        "num_hidden_layers": random.randint(3, 5),
        "num_attention_heads": heads,
        "intermediate_size": random.randint(20, 40),
        "max_position_embeddings": random.randint(24, 40),
        "pad_token_id": 1,
    }


def _draw_modernbert(random):
    tokens = {
        f"{role}_token_id": number
        for number, role in enumerate(["bos", "eos", "cls", "sep"], start=2)
    }
    interval = random.randint(2, 3)
    return (
        _draw_text(random)
        | tokens
        | {"local_attention": 2 * random.randint(2, 4), "global_attn_every_n_layers": interval}
    )


def _draw_deberta(random):
    return _draw_text(random) | {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": random.choice([4, 8]),
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
        "conv_kernel_size": random.choice([0, 3]),
    }


def _draw_distilbert(random):
    drawn = _draw_text(random)
    names = {"hidden_size": "dim", "intermediate_size": "hidden_dim"}
    names |= {"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    return {names.get(name, name): value for name, value in drawn.items()}


TEXT_FAMILIES = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "deberta", "mpnet", "nomic_bert", "gte"),
        _draw_text,
    ),
    **dict.fromkeys(("rembert", "roformer", "ernie", "data2vec-text"), _draw_text),
    **dict.fromkeys(
        ("electra", "albert"), lambda random: _draw_text(random) | {"embedding_size": 12}
    ),
    **{"modernbert": _draw_modernbert, "deberta-v2": _draw_deberta, "distilbert": _draw_distilbert},
}


def save_timm_family(folder, family, **pretrained):
    """Writes a small model of timm, with a classifier, to a folder in the form of the hub. Returns the model."""
    import timm

    arguments, size = VISION_FAMILIES[family].draw(Random(0))
    name = VISION_FAMILIES[family].name
    arguments |= {"num_classes": 5, "img_size": size}
    model = off_defaults(timm.create_model(name, **arguments)).eval()
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": name,
        "model_args": arguments,
        "pretrained_cfg": PIXEL_SETTINGS | pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


def save_text_family(folder, family, name="AutoModel", **changes):
    """Writes a small model of a class of transformers to a folder. Returns the model."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **TEXT_FAMILIES[family](Random(0)) | changes)
    model = off_defaults(getattr(transformers, name).from_config(config)).eval()
    model.save_pretrained(folder)
    return model


TOWER_PIXELS = random_images(2, size=32)
CLIP_WIDTH = 128
CLIP_PATCH = 8


@dataclass(frozen=True)
class PublishedTower:
    """A model at some place, with what it computes."""

    source: Path
    hidden: Callable[..., list[Tensor]]


class QuickGelu(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (1.702 * hidden).sigmoid()


class ClipBlock(nn.Module):
    """One layer of CLIP, with OpenAI's names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = [
            ("c_fc", nn.Linear(width, 3 * width)),
            ("gelu", QuickGelu()),
            ("c_proj", nn.Linear(3 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.ln_1(hidden)
        hidden = hidden + self.attn(normed, normed, normed, need_weights=False)[0]
        return hidden + self.mlp(self.ln_2(hidden))


def clip_blocks(width, depth):
    blocks = nn.Sequential(*(ClipBlock(width) for _ in range(depth)))
    return nn.Sequential(OrderedDict(resblocks=blocks))


class ClipVisual(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CLIP_WIDTH, CLIP_PATCH, CLIP_PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(CLIP_WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty(17, CLIP_WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(CLIP_WIDTH), nn.LayerNorm(CLIP_WIDTH)
        self.transformer = clip_blocks(CLIP_WIDTH, depth)
        self.proj = nn.Parameter(torch.empty(CLIP_WIDTH, 20))

    def hidden(self, pixels: Tensor) -> list[Tensor]:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        start = self.class_embedding.expand(len(pixels), 1, -1)
        hidden = self.ln_pre(
            torch.cat([start, patches], dim=1) + self.positional_embedding
        ).transpose(0, 1)
        outputs = []
        for block in self.transformer.resblocks:
            hidden = block(hidden)
            outputs.append(self.ln_post(hidden.transpose(0, 1)))
        return outputs


class Clip(nn.Module):
    """CLIP with OpenAI's names: both sides, and the three numbers that its archives keep as buffers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.visual, self.transformer = ClipVisual(depth), clip_blocks(64, 1)
        self.token_embedding, self.ln_final = nn.Embedding(30, 64), nn.LayerNorm(64)
        self.positional_embedding = nn.Parameter(torch.empty(7, 64))
        self.text_projection = nn.Parameter(torch.empty(64, 20))
        self.logit_scale = nn.Parameter(torch.ones(()))
        for name, number in (("input_resolution", 32), ("context_length", 7), ("vocab_size", 30)):
            self.register_buffer(name, torch.tensor(number))


def save_openai_clip(path, *, depth=3):
    """The state dict of CLIP in half precision, under OpenAI's names."""
    clip = off_defaults(Clip(depth)).eval()
    torch.save(clip.half().state_dict(), path)
    return PublishedTower(path, clip.half().float().visual.hidden)


def save_timm_vit(path, *, distilled=False, depth=3):
    """A ViT of timm or, distilled, a DeiT, in the wrapper of DeiT's own files."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    build = VisionTransformerDistilled if distilled else VisionTransformer
    model = build(
        img_size=32,
        patch_size=8,
        embed_dim=192,
        depth=depth,
        num_heads=3,
        mlp_ratio=2,
        num_classes=5,
    )
    off_defaults(model).eval()
    torch.save({"model": model.state_dict()}, path)

    def hidden(pixels):
        outputs = []
        hooks = [
            block.register_forward_hook(lambda *call: outputs.append(call[-1]))
            for block in model.blocks
        ]
        model.forward_features(pixels)
        for hook in hooks:
            hook.remove()
        return [model.norm(output) for output in outputs]

    return PublishedTower(path, hidden)


_VISION_VALUES = {"image_size": 32, "patch_size": 8}
_VISION_VALUES |= {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
_TEXT_VALUES = {"vocab_size": 50, "max_position_embeddings": 16}
_TEXT_VALUES |= {
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def build_transformers_model(name, **changes):
    """A small model of a class of transformers, with random weights. `changes` are values of its config."""
    import transformers

    build = getattr(transformers, name)
    if name == "CLIPModel":
        text = _TEXT_VALUES | {"eos_token_id": 2}
        config = transformers.CLIPConfig(
            text_config=text, vision_config=_VISION_VALUES | {"hidden_act": "gelu"}
        )
    elif name.startswith(("Roberta", "Bert")):
        values = _TEXT_VALUES | {"layer_norm_eps": 1e-5 if name.startswith("Roberta") else 1e-12}
        config = build.config_class(**(values | changes))
    else:
        config = build.config_class(**(_VISION_VALUES | changes))
    return off_defaults(build(config)).eval()


def save_transformers_vision(folder, name, **changes):
    model = build_transformers_model(name, **changes)
    model.save_pretrained(folder)
    tower = getattr(model, "vision_model", getattr(model, "vit", getattr(model, "deit", model)))
    norm = tower.post_layernorm if name.startswith("CLIP") else tower.layernorm

    def hidden(pixels, **options):
        outputs = tower(pixels, output_hidden_states=True, **options).hidden_states
        return [norm(output) for output in outputs[1:]]

    return PublishedTower(folder, hidden)


def save_transformers_text(folder, name, **changes):
    model = build_transformers_model(name, **changes)
    model.save_pretrained(folder)
    tower = getattr(model, "roberta", getattr(model, "bert", model))

    def hidden(ids, mask):
        return list(tower(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:])

    return PublishedTower(folder, hidden)


# As CLIP, RoBERTa and transformers would have it: heads of width 64 in the image tower, a fusion encoder like the text
# tower.
OFFICIAL_CONFIG = ModelConfig(
    vision=VisionConfig(
        image_size=32,
        patch_size=16,
        hidden_size=128,
        num_layers=3,
        num_heads=2,
        intermediate_size=512,
    ),
    text=TextConfig(
        vocab_size=60,
        hidden_size=48,
        num_layers=3,
        num_heads=3,
        intermediate_size=56,
        max_positions=20,
        dropout=0.1,
    ),
    fusion=FusionConfig(hidden_size=48, num_layers=2, num_heads=3, intermediate_size=56),
)
OFFICIAL_OVERRIDES = {
    "text.num_heads": 3
}  # an official file tells the heads of published widths only
METER_CHANGES = {"fusion.bridge": None, "fusion.input_norm": False}
BERT_CHANGES = {
    "text.positions": "bert",
    "text.pad_token_id": 0,
    "text.layer_norm_eps": 1e-12,
    "text.type_vocab_size": 2,
}
TIMM_CHANGES = {
    "vision.activation": "gelu",
    "vision.pre_norm": False,
    "vision.patch_bias": True,
    "vision.layer_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class OfficialCheckpoint:
    config: ModelConfig
    tensors: dict[str, Tensor]
    state_dict: dict[str, Tensor]
    run_config: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        content = {
            "epoch": 3,
            "global_step": 1234,
            "pytorch-lightning_version": "1.5.10",
            "state_dict": self.state_dict,
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"config": self.run_config},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
        return path


def make_official(changes=None, *, extra=(), seed=0):
    config = OFFICIAL_CONFIG.override(changes or {})
    naming = "timm" if config.vision.patch_bias else "clip"
    tensors = build_model(config, seed).state_dict()
    width = config.text.hidden_size
    generator = torch.Generator().manual_seed(seed)
    extra_tensors = {
        "text.pooler.dense.weight": torch.rand(width, width, generator=generator),
        "text.pooler.dense.bias": torch.rand(width, generator=generator),
    }
    state_dict = {"temperature": torch.tensor(0.07)}
    state_dict |= export_tensors(
        name_table([*tensors, *extra_tensors], naming), tensors | extra_tensors
    )
    if not config.heads.hidden_scale:  # official `task_head_layers=1`
        state_dict = {
            name.replace("_classifier.3.", "_classifier.0."): tensor
            for name, tensor in state_dict.items()
        }
    state_dict["text_transformer.embeddings.position_ids"] = torch.arange(
        config.text.max_positions
    )[None]
    if naming == "clip":
        left_over = ("positional_embedding", "ln_final.weight", "ln_final.bias")
        state_dict |= {
            f"vit_model.{name}": torch.rand(4, generator=generator) for name in left_over
        }
    state_dict |= {name: torch.rand(3, generator=generator) for name in extra}
    return OfficialCheckpoint(config, tensors, state_dict, official_run_config(config))


def official_run_config(config):
    clip = not config.vision.patch_bias
    patch = config.vision.patch_size
    return {
        "exp_name": "BT",
        "loss_names": {
            "mlm": int(config.heads.mlm),
            "itm": int(config.heads.itm),
            "itc": int(bool(config.heads.itc)),
        },
        "train_transform_keys": ["clip"],
        "val_transform_keys": ["clip"],
        "image_size": config.vision.image_size,
        "patch_size": patch,
        "resolution_before": 224,
        "max_text_len": 12,
        "tokenizer": "roberta-base" if config.text.positions == "roberta" else "bert-base-uncased",
        "vocab_size": config.text.vocab_size,
        "input_image_embed_size": config.vision.hidden_size,
        "input_text_embed_size": config.text.hidden_size,
        "vit": f"CLIP-ViT-B/{patch}" if clip else f"vit_base_patch{patch}_224",
        "hidden_size": config.fusion.hidden_size,
        "num_heads": config.fusion.num_heads,
        "num_layers": config.fusion.num_layers,
        "mlp_ratio": 4,
        "drop_rate": config.fusion.dropout,
        "meter_fusion": False,
        "vit_remove_last": False,
        "model_type": "METER" if config.fusion.bridge is None else "BT",
        "nlvr2_drop_rate": config.heads.nlvr2_dropout,
        "vit_layernorm_shared": True,
        "contrastive_hidden_size": config.heads.itc_size,
        "temperature": 0.07,
    }


class FilePayload:
    """Creates a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


STATE_FOLDER = FOLDER
STATE_PATTERN = f"*/{STATE_FOLDER}/step-*"
"""Matches what is renamed when a state is whole."""


def saved_state(out):
    """Returns the state that a run saved last. Without any the run is at its beginning."""
    path = newest(out)
    return TrainingState() if path is None else TrainingState(**read_state_json(path)["state"])


def state_files(out):
    path = newest(out)
    return sorted(path.glob("*.safetensors"))


def state_tensors(out):
    """What a run of one process saved of weights (`model.NAME`) and moments (`exp_avg.NAME`, …)."""
    (path,) = state_files(out)
    return dict(read_safetensors(path))


def change_state_tensor(out, name, value):
    (path,) = state_files(out)
    write_safetensors(path, {**state_tensors(out), name: value})


def folder_snapshot(folder):
    """Returns when everything in a folder was written and, of the files, the content."""
    paths = [folder, *folder.rglob("*")]
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in paths
    }


def same_weights(first, second):
    return same_tensors(
        load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    )
