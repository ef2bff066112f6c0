"""Bridges, by which tower layers enter a stream of the fusion encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.model.config import MIXING_BRIDGES, FusionConfig
from bridgetower.model.layers import DotProductAttention, Hidden, KeyMask, Keys

TowerLayers = Sequence[Hidden]


class Bridge(nn.Module):
    """LayerNorm of a tower layer x and the stream z, which `kind` mixes as `FusionConfig.bridge` says."""

    def __init__(
        self, config: FusionConfig, layer: int, num_tower_layers: int, *, kind: str = "add"
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.kind = kind
        self.layer = layer
        self.norm = nn.LayerNorm(width, eps=config.bridge_layer_norm_eps)
        if kind == "scaled_add":
            self.scale = nn.Parameter(torch.ones(1))
        elif kind == "interpolate":
            self.beta = nn.Parameter(torch.full((1,), 0.5))
        elif kind in ("concatenate", "gated"):
            self.linear = nn.Linear(2 * width, width)

    def forward(
        self, stream: Hidden, tower_layers: TowerLayers, other_stream: Keys, other_mask: KeyMask
    ) -> Hidden:
        if self.kind == "norm":
            return self.norm(stream)
        tower = tower_layers[self.layer - 1]
        if self.kind == "add":
            mixed = tower + stream
        elif self.kind == "scaled_add":
            mixed = tower * self.scale.squeeze() + stream
        elif self.kind == "interpolate":
            beta = self.beta.squeeze()
            mixed = tower * (1 - beta) + stream * beta
        else:
            mixed = self.linear(torch.cat([tower, stream], dim=-1))
        if self.kind == "gated":
            gate = torch.sigmoid(mixed)
            # Unlike torch.lerp, this takes tensors of several dtypes.
            mixed = stream + gate * (tower - stream)
        return self.norm(mixed)


class Manager(nn.Module):
    """Base class of both managers: a softmax over the tower layers weighs their LayerNorms."""

    def __init__(self, config: FusionConfig, num_tower_layers: int) -> None:
        super().__init__()
        width = config.hidden_size
        eps = config.bridge_layer_norm_eps
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=eps) for _ in range(num_tower_layers))
        self.temperature = nn.Parameter(torch.ones(1))

    def weighted_sum(
        self, tower_layers: TowerLayers, scores: Float[Tensor, "n #b #l #d"]
    ) -> Hidden:
        normalised = [norm(layer) for norm, layer in zip(self.norms, tower_layers, strict=True)]
        layers = torch.stack(normalised)
        if self.training:
            scores = scores + torch.randn_like(layers) / len(layers)
        weights = torch.softmax(scores / self.temperature.squeeze(), dim=0)
        return (weights * layers).sum(dim=0)


class StaticManager(Manager):
    """Σᵢ softmaxᵢ(Wᵢ / τ) ⊙ LNᵢ(xᵢ) + c ⊙ LN(z) over all bridged layers xᵢ of the tower (ManagerTower, "SAUE").

    W (a weight per layer and channel, at first 1/N), c and the temperature τ (at first 1) are learned. In training,
    noise with standard deviation 1/N is added to W. Into the first fusion layer there is no z. Source: Xu et al.,
    "ManagerTower: Aggregating the Insights of Uni-Modal Experts for Vision-Language Representation Learning", ACL 2023.
    """

    def __init__(self, config: FusionConfig, layer: int, num_tower_layers: int) -> None:
        super().__init__(config, num_tower_layers)
        width = config.hidden_size
        self.stream_norm = None
        self.weights = nn.Parameter(torch.full((num_tower_layers, width), 1 / num_tower_layers))
        if layer > 1:
            self.stream_norm = nn.LayerNorm(width, eps=config.bridge_layer_norm_eps)
            self.stream_weight = nn.Parameter(torch.ones(width))

    def forward(
        self,
        stream: Hidden | None,
        tower_layers: TowerLayers,
        other_stream: Keys | None,
        other_mask: KeyMask,
    ) -> Hidden:
        tower = self.weighted_sum(tower_layers, self.weights[:, None, None, :])
        if self.stream_norm is None:
            return tower
        return tower + self.stream_weight * self.stream_norm(stream)


class AdaptiveManager(Manager):
    """The manager whose weights depend on both streams (ManagerTower, "AAUE"): Σᵢ softmaxᵢ(sᵢ / τ) xᵢ' + c ⊙ z'.

    s = V[softmax((Qz')(Ko')ᵀ / √d) o'; z'] has a score for each position and bridged layer. x', z' and o' are the
    layers, the stream and the other stream, each after its LayerNorm. All else is as in `StaticManager`, which
    the published code has into the first layer. Unlike there, padding of the other stream gets no attention.
    """

    def __init__(self, config: FusionConfig, layer: int, num_tower_layers: int) -> None:
        super().__init__(config, num_tower_layers)
        width = config.hidden_size
        eps = config.bridge_layer_norm_eps
        self.stream_norm = nn.LayerNorm(width, eps=eps)
        self.other_norm = nn.LayerNorm(width, eps=eps)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.attention = DotProductAttention(num_heads=1, dropout=0.0)
        self.scores = nn.Linear(2 * width, num_tower_layers)
        self.stream_weight = nn.Parameter(torch.ones(width))

    def forward(
        self, stream: Hidden, tower_layers: TowerLayers, other_stream: Keys, other_mask: KeyMask
    ) -> Hidden:
        stream = self.stream_norm(stream)
        other = self.other_norm(other_stream)
        query = self.query(stream)
        key = self.key(other)
        # Under autocast, a LayerNorm gives float32.
        context = self.attention(query, key, other.to(key.dtype), other_mask)
        scores = self.scores(torch.cat([context, stream], dim=-1))
        tower = self.weighted_sum(tower_layers, scores.movedim(-1, 0)[..., None])
        return tower + self.stream_weight * stream


def adaptive_manager(config: FusionConfig, layer: int, num_tower_layers: int) -> Manager:
    if layer == 1:
        return StaticManager(config, layer, num_tower_layers)
    return AdaptiveManager(config, layer, num_tower_layers)


BridgeBuilder = Callable[[FusionConfig, int, int], nn.Module]
BRIDGES: dict[str, BridgeBuilder] = {
    **{kind: partial(Bridge, kind=kind) for kind in MIXING_BRIDGES},
    "static_manager": StaticManager,
    "adaptive_manager": adaptive_manager,
}
