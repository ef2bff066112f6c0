"""Files of METER's and of ManagerTower's own code: the names that these codes create, and what they compute."""

import pytest
import torch
import torch.nn.functional as F

from bridgetower.checkpoints import read_checkpoint
from helpers.checkpoints import OFFICIAL_OVERRIDES
from helpers.models import max_difference

# Names and shapes as the public code of zdou0830/METER (commit f4f0934) and LooperXX/ManagerTower (86e2372) creates
# them, with sizes of a small model: text width T, fusion width D, image width V.
T = 48
D = 40
V = 128
WORDS = 60
POSITIONS = 20
FEED = 160
PATCH = 16
SIDE = 2
TEXT_DEPTH = 4
FUSION_DEPTH = 3
MANAGED = {"text": 2, "image": 3}
HEADS = 4


def linear(name, out, inside):
    return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def bert_layer(name, width, inner, *attentions):
    shapes = {}
    for attention in (f"{name}.{attention}" for attention in attentions):
        for module in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear(f"{attention}.{module}", width, width)
        shapes |= norm(f"{attention}.output.LayerNorm", width)
    shapes |= linear(f"{name}.intermediate.dense", inner, width) | linear(
        f"{name}.output.dense", width, inner
    )
    return shapes | norm(f"{name}.output.LayerNorm", width)


def common(image_depth):
    """What both have: RoBERTa, CLIP's towers with the left-overs of its text side, fusion layers, poolers."""
    text = "text_transformer.embeddings"
    clip = "vit_model.visual"
    names = {
        f"{text}.position_ids": (1, POSITIONS),
        f"{text}.word_embeddings.weight": (WORDS, T),
        f"{text}.position_embeddings.weight": (POSITIONS, T),
        f"{text}.token_type_embeddings.weight": (1, T),
        **norm(f"{text}.LayerNorm", T),
        **linear("text_transformer.pooler.dense", T, T),
        "vit_model.positional_embedding": (77, 24),
        **norm("vit_model.ln_final", 24),
        f"{clip}.class_embedding": (V,),
        f"{clip}.positional_embedding": (SIDE**2 + 1, V),
        f"{clip}.conv1.weight": (V, 3, PATCH, PATCH),
        **norm(f"{clip}.ln_pre", V),
        **norm(f"{clip}.ln_post", V),
        "token_type_embeddings.weight": (2, D),
        **linear("cross_modal_text_transform", D, T),
        **linear("cross_modal_image_transform", D, V),
    }
    for number in range(TEXT_DEPTH):
        names |= bert_layer(f"text_transformer.encoder.layer.{number}", T, 4 * T, "attention")
    for block in (f"{clip}.transformer.resblocks.{number}" for number in range(image_depth)):
        names |= {
            f"{block}.attn.in_proj_weight": (3 * V, V),
            f"{block}.attn.in_proj_bias": (3 * V,),
        }
        names |= (
            linear(f"{block}.attn.out_proj", V, V)
            | norm(f"{block}.ln_1", V)
            | norm(f"{block}.ln_2", V)
        )
        names |= linear(f"{block}.mlp.c_fc", 4 * V, V) | linear(f"{block}.mlp.c_proj", V, 4 * V)
    for stream in ("text", "image"):
        names |= linear(f"cross_modal_{stream}_pooler.dense", D, D)
        for number in range(FUSION_DEPTH):
            names |= bert_layer(
                f"cross_modal_{stream}_layers.{number}", D, FEED, "attention", "crossattention"
            )
    return names


MLM_AND_ITM = {
    **linear("mlm_score.transform.dense", D, D),
    **norm("mlm_score.transform.LayerNorm", D),
    "mlm_score.decoder.weight": (WORDS, D),
    "mlm_score.bias": (WORDS,),
    **linear("itm_score.fc", 2, 2 * D),
}


def manager_tower(kind, weight):
    names = common(TEXT_DEPTH) | MLM_AND_ITM | {"temperature": ()}
    for stream, count in MANAGED.items():
        names[f"layer_embeddings_{stream}.weight"] = (TEXT_DEPTH, D)
        for number in range(FUSION_DEPTH):
            manager = f"cross_modal_{stream}_manager_tower.{number}.manager_layer"
            previous = int(number > 0)
            width = D if weight == "vector" else 1
            for index in range(count + previous):
                names |= norm(f"{manager}.LayerNorm.{index}", D)
            names |= {
                f"{manager}.softmax_temperature": (1,),
                f"{manager}.softmax_temperature_cross": (1,),
            }
            if kind == "SAUE" or not previous:
                names[f"{manager}.layer_scores"] = (1, count + previous, 1, width)
            else:
                names[f"{manager}.layer_scores_cross"] = (1, 1, 1, width)
                names |= linear(f"{manager}.linear_controller", count, 2 * D)
                names |= norm(f"{manager}.extra_query_LayerNorm", D)
                names |= linear(f"{manager}.fusion_attention.q_proj", D, D)
                names |= linear(f"{manager}.fusion_attention.k_proj", D, D)
        names |= linear(f"cross_modal_itc_{stream}_head.fc", 20, T if stream == "text" else V)
    return names


SETTINGS = {"tokenizer": "roberta-base", "num_heads": HEADS, "drop_rate": 0.1, "max_text_len": 12}
SETTINGS |= {"val_transform_keys": ["clip"]}
METER = common(TEXT_DEPTH - 1) | MLM_AND_ITM  # its CLIP lacks the last block
FINE_TUNED = common(TEXT_DEPTH - 1) | {
    "rank_output.weight": (1, 2 * D),
    "rank_output.bias": (1,),
    **linear("vqa_classifier.0", 2 * D, 2 * D),
    **norm("vqa_classifier.1", 2 * D),
    **linear("vqa_classifier.3", 7, 2 * D),
    **linear("nlvr2_classifier.0", 2 * D, 4 * D),
    **norm("nlvr2_classifier.1", 2 * D),
    **linear("nlvr2_classifier.3", 2, 2 * D),
    "token_type_embeddings.weight": (3, D),
}


def weights(names):
    generator = torch.Generator().manual_seed(5)
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in names.items()}
    # away from where a temperature or a scale is without effect, or a softmax is one-hot
    raised = ("LayerNorm", "ln_", "norm", "temperature", "layer_scores_cross")
    return {
        name: tensor.abs() + 0.5
        if any(marker in name for marker in raised) and not name.endswith("bias")
        else tensor
        for name, tensor in tensors.items()
    }


def read(folder, tensors, **settings):
    content = {"state_dict": dict(tensors), "hyper_parameters": {"config": SETTINGS | settings}}
    torch.save(content, folder / "model.ckpt")
    return read_checkpoint(folder / "model.ckpt", overrides=OFFICIAL_OVERRIDES)


class Official:
    """What METER and ManagerTower compute after the towers, in plain formulas over the names of their files."""

    def __init__(self, tensors):
        self.of = tensors

    def linear(self, name, hidden):
        return hidden @ self.of[f"{name}.weight"].T + self.of[f"{name}.bias"]

    def norm(self, name, hidden, eps):
        centred = hidden - hidden.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.of[f"{name}.weight"] + self.of[f"{name}.bias"]

    def attend(self, name, hidden, other, mask):
        query, key, value = (
            self.linear(f"{name}.self.{projection}", source)
            .unflatten(-1, (HEADS, -1))
            .transpose(1, 2)
            for projection, source in (("query", hidden), ("key", other), ("value", other))
        )
        scores = query @ key.mT / (D / HEADS) ** 0.5 + mask[:, None, None, :]
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.norm(
            f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", context) + hidden, 1e-12
        )

    def layer(self, name, hidden, other, mask, other_mask):
        hidden = self.attend(f"{name}.attention", hidden, hidden, mask)
        hidden = self.attend(f"{name}.crossattention", hidden, other, other_mask)
        inner = self.linear(f"{name}.intermediate.dense", hidden)
        gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        return self.norm(
            f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", gelu) + hidden, 1e-12
        )

    def manager(self, name, layers, stream, other):
        name = f"{name}.manager_layer"
        normed = torch.stack(
            [
                self.norm(f"{name}.LayerNorm.{index}", layer, 1e-5)
                for index, layer in enumerate(layers)
            ]
        )
        count = len(layers)
        if stream is not None:
            stream = self.norm(f"{name}.LayerNorm.{count}", stream, 1e-5)
        if f"{name}.layer_scores" in self.of:
            scores = self.of[f"{name}.layer_scores"][0][:, None]  # [layers (+ 1), 1, 1, width]
            last = scores[count:]
            scores = scores[:count]
        else:
            other = self.norm(f"{name}.extra_query_LayerNorm", other, 1e-5)
            query = self.linear(f"{name}.fusion_attention.q_proj", stream)
            key = self.linear(f"{name}.fusion_attention.k_proj", other)
            context = (query @ key.mT / D**0.5).softmax(-1) @ other
            scores = self.linear(f"{name}.linear_controller", torch.cat([context, stream], -1))
            scores = scores.permute(2, 0, 1)[..., None]
            last = self.of[f"{name}.layer_scores_cross"]
        shares = (scores / self.of[f"{name}.softmax_temperature"]).softmax(0)
        managed = (shares * normed).sum(0)
        return managed if stream is None else managed + last[0] * stream

    def fuse(self, text, image, mask):
        masks = (1 - mask) * -10000.0, torch.zeros(image[0].shape[:2])
        streams = []
        for kind, (name, layers) in enumerate((("text", text), ("image", image))):
            managed = f"cross_modal_{name}_manager_tower.0.manager_layer.layer_scores" in self.of
            numbers = (
                range(len(layers) - MANAGED[name], len(layers)) if managed else [len(layers) - 1]
            )
            projected_layers = []
            for number in numbers:
                projected = self.linear(f"cross_modal_{name}_transform", layers[number])
                projected = projected + self.of["token_type_embeddings.weight"][kind]
                projected_layers.append(
                    projected + self.of[f"layer_embeddings_{name}.weight"][number]
                    if managed
                    else projected
                )
            streams.append(projected_layers)
        x = streams[0][0]
        y = streams[1][0]
        for number in range(FUSION_DEPTH):
            if "layer_embeddings_text.weight" in self.of:
                before = (x, y) if number else (None, None)
                x = self.manager(
                    f"cross_modal_text_manager_tower.{number}", streams[0], before[0], before[1]
                )
                y = self.manager(
                    f"cross_modal_image_manager_tower.{number}", streams[1], before[1], before[0]
                )
            x, y = (
                self.layer(f"cross_modal_text_layers.{number}", x, y, *masks),
                self.layer(f"cross_modal_image_layers.{number}", y, x, *masks[::-1]),
            )
        return x, y

    def logits(self, x, y):
        streams = {"text": x, "image": y}.items()
        pooled = [
            self.linear(f"cross_modal_{name}_pooler.dense", stream[:, 0]).tanh()
            for name, stream in streams
        ]
        dense = self.linear("mlm_score.transform.dense", x)
        hidden = self.norm(
            "mlm_score.transform.LayerNorm", dense * 0.5 * (1 + torch.erf(dense / 2**0.5)), 1e-12
        )
        words = hidden @ self.of["mlm_score.decoder.weight"].T + self.of["mlm_score.bias"]
        return words, self.linear("itm_score.fc", torch.cat(pooled, -1))


def both(model, tensors, lengths):
    ids = torch.randint(3, WORDS, (2, max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask.bool(), ids, torch.ones_like(ids))
    pixels = torch.randn(
        2, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        fused = model(pixels, ids, mask)
        ours = [model.mlm_logits(fused.text), model.itm_logits(fused.pooled)]
        text = model.text(ids, mask.bool(), tuple(range(1, len(model.text.layers) + 1)))
        image = model.vision(pixels, tuple(range(1, len(model.vision.layers) + 1)))
        official = Official(tensors)
        return ours, list(official.logits(*official.fuse(text, image, mask.float())))


def off(ours, theirs):
    return max(
        max_difference(our_tensor, their_tensor)
        for our_tensor, their_tensor in zip(ours, theirs, strict=True)
    )


def test_meter(tmp_path):
    tensors = weights(METER)
    checkpoint = read(tmp_path, tensors)
    assert checkpoint.config.fusion.bridge is None
    assert not checkpoint.config.fusion.input_norm
    assert (checkpoint.config.vision.num_layers, checkpoint.config.text.num_layers) == (3, 4)
    assert set(checkpoint.dropped) == {
        "text_transformer.embeddings.position_ids",
        *(
            f"vit_model.{name}"
            for name in ("positional_embedding", "ln_final.weight", "ln_final.bias")
        ),
    }
    assert checkpoint.extra_tensors.keys() == {"text.pooler.dense.weight", "text.pooler.dense.bias"}
    unread = {
        *checkpoint.dropped,
        *(f"text_transformer.pooler.dense.{kind}" for kind in ("weight", "bias")),
    }
    count = sum(tensor.numel() for name, tensor in tensors.items() if name not in unread)
    assert sum(tensor.numel() for tensor in checkpoint.tensors.values()) == count
    assert off(*both(checkpoint.model(), tensors, [9, 5])) < 2e-5
    changed = tensors | {"cross_modal_image_layers.2.crossattention.self.key.bias": torch.ones(D)}
    changed |= {"token_type_embeddings.weight": tensors["token_type_embeddings.weight"].flip(0)}
    assert off(*both(checkpoint.model(), changed, [9, 5])) > 1e-2


def test_fine_tuned_meter_and_swin(tmp_path):
    """Without dropout before the head of NLVR2, which the code of BridgeTower added."""
    tensors = weights(FINE_TUNED)
    heads = read(tmp_path, tensors).config.heads
    assert (heads.vqa, heads.nlvr2, heads.rank, heads.mlm, heads.itm) == (
        7,
        True,
        True,
        False,
        False,
    )
    assert (heads.hidden_scale, heads.nlvr2_dropout) == (1.0, 0.0)
    swin = {name: tensor for name, tensor in tensors.items() if not name.startswith("vit_model.")}
    with pytest.raises(
        ValueError, match=r"model\.ckpt has a Swin image tower, which is not supported"
    ):
        read(tmp_path, swin | {"vit_model.layers.0.blocks.0.norm1.weight": torch.ones(V)})


@pytest.mark.parametrize("weight", ["vector", "scalar"])
@pytest.mark.parametrize(
    ("kind", "bridge"), [("SAUE", "static_manager"), ("AAUE", "adaptive_manager")]
)
def test_manager_tower(tmp_path, kind, bridge, weight):
    tensors = weights(manager_tower(kind, weight))
    checkpoint = read(tmp_path, tensors, model_type="MT", manager_type=kind, nlvr2_drop_rate=0.1)
    fusion = checkpoint.config.fusion
    assert (fusion.bridge, fusion.text_layers, fusion.vision_layers) == (bridge, (3, 4), (2, 3, 4))
    assert fusion.layer_embeddings
    assert (checkpoint.config.heads.itc, checkpoint.config.heads.itc_size) == ("tower", 20)
    assert {name for name in checkpoint.dropped if "_manager_tower." in name} == {
        f"cross_modal_{stream}_manager_tower.{number}.softmax_temperature_cross"
        for stream in ("text", "image")
        for number in range(FUSION_DEPTH)
    }
    model = checkpoint.model()
    assert off(*both(model, tensors, [9, 9])) < 2e-5
    # Padding of the text: the official adaptive managers of the image stream attend to it, ours do not.
    padded = off(*both(model, tensors, [9, 5]))
    assert padded < 2e-5 if kind == "SAUE" else padded > 1e-4
    for name in (
        "layer_embeddings_image.weight",
        "cross_modal_text_manager_tower.0.manager_layer.softmax_temperature",
        f"cross_modal_image_manager_tower.2.manager_layer.layer_scores{'' if kind == 'SAUE' else '_cross'}",
    ):
        assert off(*both(model, tensors | {name: tensors[name] * 2}, [9, 9])) > 1e-3, name
    ids = torch.randint(3, WORDS, (3, 6), generator=torch.Generator().manual_seed(1))
    head = "cross_modal_itc_text_head"
    with torch.no_grad():
        cls = model.text(ids, None, (TEXT_DEPTH,))[0][:, 0]
        expected = F.normalize(
            cls @ tensors[f"{head}.fc.weight"].T + tensors[f"{head}.fc.bias"], dim=-1
        )
        assert max_difference(model.text_embeds(model.encode_text(ids)), expected) < 1e-5


def test_another_manager_is_refused(tmp_path):
    with pytest.raises(ValueError, match="manager_type is 'new'; expected one of SAUE, AAUE"):
        read(
            tmp_path, weights(manager_tower("SAUE", "vector")), model_type="MT", manager_type="new"
        )
