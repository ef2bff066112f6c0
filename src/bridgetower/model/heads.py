"""Heads on the model's outputs: masked language modelling, matching, contrastive."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
