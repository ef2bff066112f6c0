"""Heads on the model's outputs: masked words, matching, contrast, and the classifiers of the downstream tasks."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ClassifierName = Literal["vqa", "snli_ve", "nlvr2", "image", "text"]


class MlmHead(nn.Module):
    """Linear, GELU, LayerNorm, decoder to the vocabulary (not tied to the word embedding)."""

    def __init__(self, hidden_size: int, vocab_size: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.decoder = nn.Linear(hidden_size, vocab_size)

    def forward(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... vocab"]:
        """Returns vocabulary logits."""
        return self.decoder(self.norm(F.gelu(self.dense(hidden))))


class ItmHead(nn.Module):
    """Does the text belong to the image? Logits of no (0) and yes (1) from the pooled output."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * hidden_size, 2)

    def forward(self, pooled: Float[Tensor, "b e"]) -> Float[Tensor, "b 2"]:
        """Returns the two logits."""
        return self.fc(pooled)


class RankHead(nn.Module):
    """One score of a pair, to choose among several texts of an image: official `rank_output`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * hidden_size, 1)

    def forward(self, pooled: Float[Tensor, "b e"]) -> Float[Tensor, " b"]:
        """Returns the scores."""
        return self.fc(pooled)[:, 0]


class ClassifierHead(nn.Module):
    """Linear, LayerNorm, GELU, Linear on the pooled output, or on that of two images side by side."""

    def __init__(self, pooled_size: int, hidden_size: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(pooled_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder = nn.Linear(hidden_size, num_classes)

    def forward(self, pooled: Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        """Returns logits of the classes."""
        hidden = self.dropout(pooled)
        return self.decoder(F.gelu(self.norm(self.dense(hidden))))


class ImageHead(nn.Module):
    """Linear on the image tower's class token: CIFAR."""

    def __init__(self, vision_size: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(vision_size, num_classes)

    def forward(self, cls: Float[Tensor, "b v"]) -> Float[Tensor, "b k"]:
        """Returns logits of the classes."""
        return self.fc(cls)


class TextHead(nn.Module):
    """RoBERTa's classification head on the text tower's CLS: Linear, tanh, Linear, with dropout before each; GLUE."""

    def __init__(self, text_size: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(text_size, text_size)
        self.decoder = nn.Linear(text_size, num_classes)

    def forward(self, cls: Float[Tensor, "b t"]) -> Float[Tensor, "b k"]:
        """Returns logits of the classes, or one number."""
        hidden = torch.tanh(self.dense(self.dropout(cls)))
        return self.decoder(self.dropout(hidden))


class ItcHead(nn.Module):
    """Official contrastive head: each tower's last CLS to a shared space, learnable temperature."""

    MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # official `compute_itc`, clamped before each loss

    def __init__(self, vision_size: int, text_size: int, itc_size: int) -> None:
        super().__init__()
        self.image = nn.Linear(vision_size, itc_size)
        self.text = nn.Linear(text_size, itc_size)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def logit_scale(self) -> Float[Tensor, ""]:
        """1 / temperature; the parameter itself is first clamped to [0.001, 0.5], as in the official code."""
        with torch.no_grad():
            self.temperature.clamp_(self.MIN_TEMPERATURE, self.MAX_TEMPERATURE)
        return 1 / self.temperature


class FusedItcHead(nn.Module):
    """transformers' contrastive head: text CLS, projected image CLS and pooled output to a shared space."""

    def __init__(self, hidden_size: int, text_size: int, itc_size: int) -> None:
        super().__init__()
        self.image = nn.Linear(hidden_size, itc_size)
        self.text = nn.Linear(text_size, itc_size)
        self.pooled = nn.Linear(2 * hidden_size, itc_size)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def logit_scale(self) -> Float[Tensor, ""]:
        """Exp of the learned logarithm."""
        return self.log_logit_scale.exp()
