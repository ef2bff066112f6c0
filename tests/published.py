"""Small uni-modal models as their publishers write them, and the hidden states that they give themselves."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import tiny

PIXELS = tiny.images(2, size=32)
WIDTH, PATCH = 128, 8


@dataclass(frozen=True)
class Published:
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
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty(17, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = clip_blocks(WIDTH, depth)
        self.proj = nn.Parameter(torch.empty(WIDTH, 20))

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


def openai(path, *, depth=3):
    """The state dict of CLIP in half precision, under OpenAI's names."""
    clip = tiny.off_defaults(Clip(depth)).eval()
    torch.save(clip.half().state_dict(), path)
    return Published(path, clip.half().float().visual.hidden)


def timm_vit(path, *, distilled=False, depth=3):
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
    tiny.off_defaults(model).eval()
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

    return Published(path, hidden)


_VISION = {"image_size": 32, "patch_size": 8}
_VISION |= {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
_TEXT = {"vocab_size": 50, "max_position_embeddings": 16}
_TEXT |= {
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def transformers_model(name, **changes):
    """A small model of a class of transformers, with random weights; `changes` are values of its config."""
    import transformers

    build = getattr(transformers, name)
    if name == "CLIPModel":
        text = _TEXT | {"eos_token_id": 2}
        config = transformers.CLIPConfig(
            text_config=text, vision_config=_VISION | {"hidden_act": "gelu"}
        )
    elif name.startswith(("Roberta", "Bert")):
        values = _TEXT | {"layer_norm_eps": 1e-5 if name.startswith("Roberta") else 1e-12}
        config = build.config_class(**(values | changes))
    else:
        config = build.config_class(**(_VISION | changes))
    return tiny.off_defaults(build(config)).eval()


def transformers_vision(folder, name, **changes):
    model = transformers_model(name, **changes)
    model.save_pretrained(folder)
    tower = getattr(model, "vision_model", getattr(model, "vit", getattr(model, "deit", model)))
    norm = tower.post_layernorm if name.startswith("CLIP") else tower.layernorm

    def hidden(pixels, **options):
        outputs = tower(pixels, output_hidden_states=True, **options).hidden_states
        return [norm(output) for output in outputs[1:]]

    return Published(folder, hidden)


def transformers_text(folder, name, **changes):
    model = transformers_model(name, **changes)
    model.save_pretrained(folder)
    tower = getattr(model, "roberta", getattr(model, "bert", model))

    def hidden(ids, mask):
        return list(tower(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:])

    return Published(folder, hidden)
