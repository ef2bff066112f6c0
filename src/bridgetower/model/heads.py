"""Heads on the model's outputs, for masked words, matching, contrast and classification."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.model.config import Activation, HeadsConfig, ModelConfig
from bridgetower.model.layers import activate


class MlmHead(nn.Module):
    """Linear, activation (GELU), LayerNorm, decoder to the vocabulary (not tied to the word embedding)."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        layer_norm_eps: float,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.activation = activation
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.decoder = nn.Linear(hidden_size, vocab_size)

    def forward(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... vocab"]:
        hidden = self.dense(hidden)
        hidden = activate(hidden, self.activation)
        hidden = self.norm(hidden)
        return self.decoder(hidden)


class LinearHead(nn.Module):
    """Linear layer, which for matching gives logits of no (0) and yes (1)."""

    def __init__(self, input_size: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(input_size, num_classes)

    def forward(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        return self.fc(features)


class RankHead(LinearHead):
    """Score of a pair, for choosing among several texts of an image (official `rank_output`)."""

    def __init__(self, pooled_size: int) -> None:
        super().__init__(pooled_size, 1)

    def forward(self, features: Float[Tensor, "b e"]) -> Float[Tensor, " b"]:
        return super().forward(features)[:, 0]


class ClassifierHead(nn.Module):
    """Linear, LayerNorm, GELU, Linear on the pooled output, or on that of two images side by side.

    With `hidden_size` 0 the last Linear alone.
    """

    def __init__(
        self, pooled_size: int, hidden_size: int, num_classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(pooled_size, hidden_size) if hidden_size else None
        self.norm = nn.LayerNorm(hidden_size) if hidden_size else None
        self.decoder = nn.Linear(hidden_size or pooled_size, num_classes)

    def forward(self, pooled: Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        hidden = self.dropout(pooled)
        if self.dense is not None and self.norm is not None:
            hidden = self.dense(hidden)
            hidden = self.norm(hidden)
            hidden = F.gelu(hidden)
        return self.decoder(hidden)


class ItcHead(nn.Module):
    """Contrastive head, which maps features of each tower, officially its last CLS, to a shared space."""

    # As in the official `compute_itc`, which clamps before each loss.
    MIN_TEMPERATURE = 0.001
    MAX_TEMPERATURE = 0.5

    def __init__(
        self, image_size: int, text_size: int, itc_size: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.image = nn.Linear(image_size, itc_size)
        self.text = nn.Linear(text_size, itc_size)
        # FSDP shards no scalars, so the shape is [1].
        self.temperature = nn.Parameter(torch.tensor([0.07]))

    def logit_scale(self) -> Float[Tensor, ""]:
        """Returns 1 / temperature, clamped to [0.001, 0.5]. In training the parameter itself is clamped, officially."""
        if self.training:
            self.clamp_temperature()
            return 1 / self.temperature.squeeze()
        temperature = self.temperature.clamp(self.MIN_TEMPERATURE, self.MAX_TEMPERATURE)
        return 1 / temperature.squeeze()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        self.temperature.clamp_(self.MIN_TEMPERATURE, self.MAX_TEMPERATURE)


class FusedItcHead(nn.Module):
    """transformers' contrastive head: text CLS, projected image CLS and pooled output to a shared space."""

    def __init__(self, hidden_size: int, text_size: int, pooled_size: int, itc_size: int) -> None:
        super().__init__()
        self.image = nn.Linear(hidden_size, itc_size)
        self.text = nn.Linear(text_size, itc_size)
        self.pooled = nn.Linear(pooled_size, itc_size)
        self.log_logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def logit_scale(self) -> Float[Tensor, ""]:
        return self.log_logit_scale.squeeze().exp()


HeadInputs = Literal["pooled", "pooled_pair", "text", "image_cls", "text_cls", "both_cls"]
HeadOutputs = Literal["softmax", "sigmoid", "number", "other"]
"""Logits of classes of which one holds, logits of independent classes, a number, or something else."""


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """A head, which a model has as `NAME_head` if the field NAME of its `HeadsConfig` is set.

    Facts for checkpoints, optimisers and error messages are here too, so that a new head is one entry of a table.

    Attributes:
        build: Makes the head for a model.
        inputs: The `pooled` output [B, E]; `pooled_pair`, the outputs of two images side by side [B, 2E]; hidden states
            of the `text` stream [B, L, D]; the last CLS of a tower, or of both.
        outputs: Meaning of its outputs, or a function of the config that returns it. `predict` serves all but `other`.
        title: What errors call it; None is its name.
        recipe: A recipe of `bridgetower train` that trains it, which errors name.
        published: Names in official checkpoints of its modules and parameters, by ours.
        in_transformers: Whether transformers has the head, under the same names.
        tower_lr: Its modules and parameters with the learning rate of the towers; all others have that of heads.
        hidden_scale: Whether `HeadsConfig.hidden_scale` sets its width.
    """

    build: Callable[[ModelConfig], nn.Module]
    inputs: HeadInputs
    outputs: HeadOutputs | Callable[[HeadsConfig], HeadOutputs] = "softmax"
    title: str | None = None
    recipe: str | None = None
    published: Mapping[str, str] = field(default_factory=dict)
    in_transformers: bool = False
    tower_lr: tuple[str, ...] = ()
    hidden_scale: bool = False

    def outputs_of(self, config: HeadsConfig) -> HeadOutputs:
        return self.outputs(config) if callable(self.outputs) else self.outputs


def predictions(logits: Float[Tensor, "n k"], outputs: HeadOutputs) -> Float[Tensor, "n k"]:
    """Returns probabilities of classes, or numbers as they are."""
    if outputs == "softmax":
        return logits.softmax(dim=-1)
    if outputs == "sigmoid":
        return logits.sigmoid()
    return logits


def _classification_outputs(config: HeadsConfig) -> HeadOutputs:
    if config.multi_label:
        return "sigmoid"
    if config.classification == 1:
        return "number"
    return "softmax"


def chosen_heads(config: HeadsConfig) -> dict[str, object]:
    """Returns the fields of the heads that a config names, by the names of the heads."""
    fields = {name: getattr(config, name) for name in HEADS if getattr(config, name)}
    return fields | dict.fromkeys(config.custom, True)


def _itc_head(config: ModelConfig) -> ItcHead | FusedItcHead:
    heads = config.heads
    fusion = config.fusion
    text_size = config.text.hidden_size
    if heads.itc == "tower":
        return ItcHead(config.vision.hidden_size, text_size, heads.itc_size, heads.itc_dropout)
    return FusedItcHead(fusion.hidden_size, text_size, fusion.pooled_size, heads.itc_size)


def _classifier(
    recipe: str,
    num_classes: Callable[[HeadsConfig], int],
    official: str | None = None,
    *,
    num_images: int = 1,
    outputs: HeadOutputs | Callable[[HeadsConfig], HeadOutputs] = "softmax",
) -> HeadSpec:
    """Returns a classifier of one or two images with a text."""

    def build(config: ModelConfig) -> ClassifierHead:
        heads = config.heads
        pooled_size = config.fusion.pooled_size
        # The official `head_hidden_scale` is a multiple of the pooled output of one image.
        hidden_size = round(heads.hidden_scale * pooled_size)
        dropout = heads.nlvr2_dropout if num_images == 2 else 0.0
        return ClassifierHead(num_images * pooled_size, hidden_size, num_classes(heads), dropout)

    indices = {"dense": 0, "norm": 1, "decoder": 3}  # in the official `nn.Sequential`
    return HeadSpec(
        build=build,
        inputs="pooled_pair" if num_images == 2 else "pooled",
        outputs=outputs,
        recipe=recipe,
        published={name: f"{official}.{index}" for name, index in indices.items() if official},
        hidden_scale=True,
    )


HEADS: dict[str, HeadSpec] = {
    "mlm": HeadSpec(
        build=lambda config: MlmHead(
            config.fusion.hidden_size,
            config.text.vocab_size,
            config.heads.mlm_layer_norm_eps,
            config.heads.mlm_activation,
        ),
        inputs="text",
        outputs="other",
        title="masked-language (MLM)",
        recipe="pretrain-base",
        published={
            "dense": "mlm_score.transform.dense",
            "norm": "mlm_score.transform.LayerNorm",
            "decoder.weight": "mlm_score.decoder.weight",
            "decoder.bias": "mlm_score.bias",
        },
        in_transformers=True,
    ),
    "itm": HeadSpec(
        build=lambda config: LinearHead(config.fusion.pooled_size, 2),
        inputs="pooled",
        outputs="other",
        title="matching (ITM)",
        recipe="pretrain-base",
        published={"fc": "itm_score.fc"},
        in_transformers=True,
    ),
    "itc": HeadSpec(
        build=_itc_head,
        inputs="both_cls",
        outputs="other",
        title="contrastive (ITC)",
        recipe="pretrain-base-itc",
        published={
            "text": "itc_text_head.fc",
            "image": "itc_image_head.fc",
            "pooled": "itc_cross_modal_head.fc",
            "temperature": "temperature",
            "log_logit_scale": "logit_scale",
        },
        in_transformers=True,
        tower_lr=("temperature", "log_logit_scale"),
    ),
    "rank": HeadSpec(
        build=lambda config: RankHead(config.fusion.pooled_size),
        inputs="pooled",
        outputs="number",
        title="ranking",
        recipe="retrieval-flickr30k-ranking",
        published={"fc": "rank_output"},
        tower_lr=("fc",),  # the official `set_schedule` misses it
    ),
    "vqa": _classifier("vqav2-base", lambda heads: heads.vqa, "vqa_classifier", outputs="sigmoid"),
    "snli_ve": _classifier("snli-ve", lambda heads: 3, "snli_classifier"),
    "nlvr2": _classifier("nlvr2", lambda heads: 2, "nlvr2_classifier", num_images=2),
    "classification": _classifier(
        "classification", lambda heads: heads.classification, outputs=_classification_outputs
    ),
}
