"""A tower of each kind, a bridge and a head from outside the package."""

import torch
from torch import Tensor, nn

from bridgetower import Extensions, HeadSpec, TextTower, VisionTower
from bridgetower.model.config import FusionConfig, TextConfig, VisionConfig


class Patches(VisionTower):
    """Without a class token: its global vector is a mean."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.blocks = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_layers)
        )

    def forward(self, pixel_values: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        hidden = self.embedding(pixel_values).flatten(2).mT
        outputs = []
        for number, block in enumerate(self.blocks, start=1):
            hidden = hidden + torch.tanh(block(hidden))
            outputs += [hidden] * (number in layers)
        return outputs

    def pooled(self, hidden: Tensor) -> Tensor:
        return hidden.mean(dim=1)


class Words(TextTower):
    """Embeddings alone, the same for every layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(
        self, input_ids: Tensor, mask: Tensor | None, layers: tuple[int, ...]
    ) -> list[Tensor]:
        return [self.embedding(input_ids)] * len(layers)


class Manager(nn.Module):
    """Weighs all tower layers by the stream, and adds the mean of the other stream."""

    def __init__(self, config: FusionConfig, layer: int, num_tower_layers: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(config.hidden_size, num_tower_layers)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self,
        stream: Tensor,
        tower_layers: tuple[Tensor, ...],
        other_stream: Tensor,
        other_mask: Tensor | None,
    ) -> Tensor:
        weights = self.weigh(stream).softmax(dim=-1)  # [B, L, 3]
        mixed = (weights[..., None, :] * torch.stack(tower_layers, dim=-1)).sum(dim=-1)
        return self.norm(stream + mixed + other_stream.mean(dim=1, keepdim=True))


CUSTOM_EXTENSIONS = Extensions(
    vision_towers={"patches": Patches},
    text_towers={"words": Words},
    bridges={"manager": Manager},
    heads={
        "mood": HeadSpec(
            build=lambda config: nn.Linear(2 * config.fusion.hidden_size, 5), inputs="pooled"
        )
    },
)
