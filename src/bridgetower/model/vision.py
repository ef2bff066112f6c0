"""The image tower: pixel values to the hidden states of the layers that are read."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.model.config import VisionConfig
from bridgetower.model.layers import PreNormLayer, activation_checkpointing


class VisionTower(nn.Module):
    """A ViT whose bridged layers all go through one shared final LayerNorm (official `ln_post`, timm `norm`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=config.patch_bias)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.distillation_embedding = nn.Parameter(torch.empty(width)) if config.distillation_token else None
        self.position_embedding = nn.Parameter(torch.empty(config.num_tokens, width))
        self.pre_norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        self.layers = nn.ModuleList(
            PreNormLayer(width, config.num_heads, config.intermediate_size, config.layer_norm_eps, config.activation)
            for _ in range(config.num_layers)
        )
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self, pixel_values: Float[Tensor, "b 3 h w"], read_layers: tuple[int, ...]
    ) -> list[Float[Tensor, "b p v"]]:
        """Returns the normalised outputs of `read_layers`, counted from 1 and increasing.

        Images of another size than the config's are encoded with interpolated position embeddings.

        Raises:
            ValueError: The image's sides are not multiples of the patch size.
        """
        hidden, outputs = self.pre_norm(self.embed(pixel_values)), []
        for number, layer in enumerate(self.layers[: read_layers[-1]], start=1):
            hidden = activation_checkpointing(layer, when=self.checkpoint_activations)(hidden)
            if number in read_layers:
                outputs.append(self.post_norm(hidden))
        return outputs

    def cls(self, pixel_values: Float[Tensor, "b 3 h w"], read_layer: int) -> Float[Tensor, "b v"]:
        """Returns the normalised CLS of one layer, which is computed at this position only.

        Raises:
            ValueError: The image's sides are not multiples of the patch size.
        """
        hidden = self.pre_norm(self.embed(pixel_values))
        for layer in self.layers[: read_layer - 1]:
            hidden = activation_checkpointing(layer, when=self.checkpoint_activations)(hidden)
        last = activation_checkpointing(self.layers[read_layer - 1], when=self.checkpoint_activations)
        return self.post_norm(last(hidden, num_queries=1)[:, 0])

    def embed(self, pixel_values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p v"]:
        """Returns embeddings of the prefix tokens and the patches with positions added."""
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        if pixel_values.shape[-2:] != (height * self.config.patch_size, width * self.config.patch_size):
            raise ValueError(
                f"image of {pixel_values.shape[-1]} x {pixel_values.shape[-2]} pixels; "
                f"expected sides that are multiples of the patch size {self.config.patch_size}"
            )
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, P-1, V]
        prefix: list[Tensor] = [self.class_embedding]
        if self.distillation_embedding is not None:
            prefix.append(self.distillation_embedding)
        prefix_tokens = torch.stack(prefix).expand(patches.shape[0], -1, -1)  # len() would fix the number in an export
        hidden = torch.cat([prefix_tokens, patches], dim=1)
        return hidden + resize_position_embedding(self.position_embedding, (height, width), len(prefix))


def resize_position_embedding(
    position_embedding: Float[Tensor, "p v"], grid: tuple[int, int], num_prefix_tokens: int = 1
) -> Float[Tensor, "q v"]:
    """Interpolates a square grid of learned positions to another grid, the rows of prefix tokens kept.

    Bicubic, `align_corners=False`, no antialiasing, identity on an equal grid: official `adapt_position_encoding` and
    transformers' `interpolate_pos_encoding`.

    Args:
        position_embedding: Prefix tokens first, then the patches row by row.
        grid: Target rows and columns of patches.
        num_prefix_tokens: The class token, and 2 with a distillation token.
    """
    prefix, patches = position_embedding[:num_prefix_tokens], position_embedding[num_prefix_tokens:]
    side = round(len(patches) ** 0.5)
    if grid == (side, side):
        return position_embedding
    square = patches.unflatten(0, (side, side)).permute(2, 0, 1)[None]  # [1, V, side, side]
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized[0].flatten(1).T])
