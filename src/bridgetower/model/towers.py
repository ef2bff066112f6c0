"""The towers, which map pixel values or token ids to the hidden states of some layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridgetower.model.config import TextConfig, VisionConfig
from bridgetower.model.layers import (
    PatchStates,
    Pixels,
    PostNormLayer,
    PreNormLayer,
    TokenIds,
    TokenMask,
    TokenStates,
    TowerStates,
    TowerVector,
    activation_checkpointing,
)


class Tower(nn.Module, ABC):
    """Base class of image and text towers."""

    checkpoint_activations = False
    """Whether layers keep only their inputs in training. Towers may ignore it."""

    def stacked_layers(self) -> list[nn.Module]:
        """Returns the layers, first to last. A custom tower needs this for `train_top` only."""
        raise ValueError(
            f"{type(self).__name__} does not list its layers, so that some cannot be trained apart"
        )

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Chooses whether layers keep only their inputs in training."""
        self.checkpoint_activations = enabled

    def states(self, inputs: Tensor, mask: TokenMask, layers: tuple[int, ...]) -> list[TowerStates]:
        """Returns the hidden states after some layers, from which `resume` of a `Transformer` continues."""
        raise ValueError(
            f"{type(self).__name__} cannot go on from cached states; leave out train_top or freeze_towers"
        )

    def pooled(self, hidden: TowerStates) -> TowerVector:
        """Returns the global vector of the last layer that is read, which is its CLS in most towers."""
        return hidden[:, 0]

    def run(self, inputs: Tensor, mask: TokenMask, layers: tuple[int, ...]) -> list[TowerStates]:
        """Calls the tower, which takes a mask if it is a text tower."""
        if isinstance(self, VisionTower):
            return self(inputs, layers)
        return self(inputs, mask, layers)

    def cls(self, inputs: Tensor, number: int, mask: TokenMask = None) -> TowerVector:
        """Returns the global vector of one layer."""
        (hidden,) = self.run(inputs, mask, (number,))
        return self.pooled(hidden)


class VisionTower(Tower):
    """An image tower: `VisionTransformer`, or a custom one.

    Its width is `hidden_size` of the `VisionConfig`, its layers are counted from 1 to `num_layers`, and of its tokens
    the first `num_prefix_tokens` are no patches.
    """

    @abstractmethod
    def forward(self, pixel_values: Pixels, layers: tuple[int, ...]) -> list[PatchStates]:
        """Returns the hidden states [B, P, V] of some layers, counted from 1 and increasing, as projections read them.

        `pixel_values` have the shape [B, 3, height, width].
        """

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the parameters of this tower at another image size made to fit this one's, or raises ValueError."""
        return dict(tensors)


class TextTower(Tower):
    """A text tower: `TextTransformer`, or a custom one.

    Its width is `hidden_size` of the `TextConfig`, and its layers are counted from 1 to `num_layers`.
    """

    @abstractmethod
    def forward(
        self, input_ids: TokenIds, mask: TokenMask, layers: tuple[int, ...]
    ) -> list[TokenStates]:
        """Returns the hidden states [B, L, T] of some layers, counted from 1 and increasing.

        `input_ids` have the shape [B, L], and `mask` is False on padding.
        """


class Transformer(Tower):
    """Base class of this package's towers, whose hidden states can be cached between layers."""

    layers: nn.ModuleList
    post_norm: nn.Module
    """Final norm, applied to the hidden states of each layer before projection."""

    @abstractmethod
    def embed(self, inputs: Tensor) -> TowerStates: ...

    def stacked_layers(self) -> list[nn.Module]:
        return list(self.layers)

    def attention(self, number: int) -> nn.Module:
        """Returns the `DotProductAttention` of a layer, counted from 1."""
        layer: Any = self.layers[number - 1]
        return layer.attention.attention

    def states(self, inputs: Tensor, mask: TokenMask, layers: tuple[int, ...]) -> list[TowerStates]:
        return self._run(self.embed(inputs), 0, mask, layers)

    def resume(
        self, states: Mapping[int, TowerStates], mask: TokenMask, layers: tuple[int, ...]
    ) -> list[TowerStates]:
        """Returns the outputs of some layers, from `states` by layer up to the last cached one."""
        start = max(states)
        cached = [states[layer] for layer in layers if layer <= start]
        missing = tuple(layer for layer in layers if layer > start)
        computed = self._run(states[start], start, mask, missing)
        return [self.post_norm(hidden) for hidden in cached + computed]

    def _run(
        self, hidden: Tensor, start: int, mask: Tensor | None, layers: tuple[int, ...]
    ) -> list[Tensor]:
        """Returns the hidden states after some layers, from those after layer `start`."""
        outputs = [hidden] if start in layers else []
        stop = max(layers, default=start)
        for number, layer in enumerate(self.layers[start:stop], start=start + 1):
            hidden = activation_checkpointing(layer, when=self.checkpoint_activations)(hidden, mask)
            if number in layers:
                outputs.append(hidden)
        return outputs

    def cls(self, inputs: Tensor, number: int, mask: TokenMask = None) -> TowerVector:
        """Returns the CLS of one layer, which is computed at this position only."""
        (hidden,) = self.states(inputs, mask, (number - 1,))
        last = activation_checkpointing(self.layers[number - 1], when=self.checkpoint_activations)
        cls = last(hidden, mask, num_queries=1)[:, 0]
        return self.post_norm(cls)


class VisionTransformer(Transformer, VisionTower):
    """A ViT whose bridged layers all go through one shared final LayerNorm (official `ln_post`, timm `norm`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(
            3, width, kernel_size=patch, stride=patch, bias=config.patch_bias
        )
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.distillation_embedding = (
            nn.Parameter(torch.zeros(width)) if config.distillation_token else None
        )
        self.position_embedding = nn.Parameter(torch.zeros(config.num_tokens, width))
        self.pre_norm = (
            nn.LayerNorm(width, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        )
        self.layers = nn.ModuleList(PreNormLayer(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Pixels, layers: tuple[int, ...]) -> list[PatchStates]:
        """Returns the normalised outputs, with interpolated position embeddings for images of another size."""
        return [self.post_norm(hidden) for hidden in self.states(pixel_values, None, layers)]

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the parameters with position embeddings interpolated to the config's image size."""
        side = self.config.image_size // self.config.patch_size
        position = tensors["position_embedding"]
        resized = resize_position_embedding(
            position.float(), (side, side), self.config.num_prefix_tokens
        )
        return {**tensors, "position_embedding": resized.to(position.dtype)}

    def embed(self, inputs: Pixels) -> PatchStates:
        patch_size = self.config.patch_size
        height, width = inputs.shape[-2:]
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"image of {width} x {height} pixels; expected sides that are multiples of the patch size {patch_size}"
            )
        patches = self.patch_embedding(inputs).flatten(2).transpose(1, 2)  # [B, P-1, V]
        prefix: list[Tensor] = [self.class_embedding]
        if self.distillation_embedding is not None:
            prefix.append(self.distillation_embedding)
        # In an export, len(patches) would be a constant.
        prefix_tokens = torch.stack(prefix).expand(patches.shape[0], -1, -1)
        hidden = torch.cat([prefix_tokens, patches], dim=1)
        grid = (height // patch_size, width // patch_size)
        positions = resize_position_embedding(self.position_embedding, grid, len(prefix))
        return self.pre_norm(hidden + positions)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the weights as CLIP does."""
        config = self.config
        width_std = config.hidden_size**-0.5
        residual_std = width_std * (2 * config.num_layers) ** -0.5

        # Embeddings.
        self.class_embedding.normal_(std=width_std, generator=generator)
        if self.distillation_embedding is not None:
            self.distillation_embedding.normal_(std=width_std, generator=generator)
        self.position_embedding.normal_(std=width_std, generator=generator)
        patch_std = (3 * config.patch_size**2) ** -0.5
        self.patch_embedding.weight.normal_(std=patch_std, generator=generator)

        # Layers.
        up_std = (2 * config.hidden_size) ** -0.5
        for layer in self.layers:
            assert isinstance(layer, PreNormLayer)
            layer.attention.qkv.weight.normal_(std=width_std, generator=generator)
            layer.attention.out.weight.normal_(std=residual_std, generator=generator)
            layer.mlp.up.weight.normal_(std=up_std, generator=generator)
            layer.mlp.down.weight.normal_(std=residual_std, generator=generator)


class TextTransformer(Transformer, TextTower):
    """RoBERTa or BERT without its pooler, which no BridgeTower objective reads."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_positions, width)
        self.token_type_embedding = nn.Embedding(config.type_vocab_size, width)
        self.embedding_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(PostNormLayer(config) for _ in range(config.num_layers))
        self.post_norm = nn.Identity()

    def forward(
        self, input_ids: TokenIds, mask: TokenMask, layers: tuple[int, ...]
    ) -> list[TokenStates]:
        return self.states(input_ids, mask, layers)

    def embed(self, inputs: TokenIds) -> TokenStates:
        """Returns normalised sums of word, position and segment-0 embeddings."""
        self.config.check_length(inputs.shape[1])
        try:
            words = self.word_embedding(inputs)
        except IndexError as error:  # on a CPU
            raise ValueError(
                f"input_ids are from {inputs.min().item()} to {inputs.max().item()}; expected 0 to "
                f"{self.config.vocab_size - 1}, as the model's own tokenizer gives"
            ) from error
        positions = self.position_embedding(self.position_ids(inputs))
        hidden = words + self.token_type_embedding.weight[0] + positions
        return self.dropout(self.embedding_norm(hidden))

    def position_ids(self, input_ids: TokenIds) -> Int[Tensor, "*b l"]:
        """Returns cumsum(ids ≠ pad)·(ids ≠ pad) + pad, as RoBERTa, from ids and not the mask, or columns, as BERT."""
        if self.config.positions == "bert":
            return torch.arange(input_ids.shape[1], device=input_ids.device)
        is_token = (input_ids != self.config.pad_token_id).long()
        return is_token.cumsum(dim=1) * is_token + self.config.pad_token_id


def resize_position_embedding(
    position_embedding: Float[Tensor, "p v"], grid: tuple[int, int], num_prefix_tokens: int = 1
) -> Float[Tensor, "q v"]:
    """Interpolates positions to another grid as official `adapt_position_encoding`: bicubic, without antialiasing."""
    prefix = position_embedding[:num_prefix_tokens]
    patches = position_embedding[num_prefix_tokens:]
    side = round(len(patches) ** 0.5)
    if grid == (side, side):
        return position_embedding
    square = patches.unflatten(0, (side, side)).permute(2, 0, 1)[None]  # [1, V, side, side]
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized[0].flatten(1).T])
