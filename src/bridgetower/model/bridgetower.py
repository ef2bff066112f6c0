"""BridgeTower: encode each modality once, fuse any pair of encodings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bridgetower.model.config import ModelConfig
from bridgetower.model.fusion import FusionEncoder, Read
from bridgetower.model.heads import FusedItcHead, ItcHead, ItmHead, MlmHead
from bridgetower.model.layers import Pooler
from bridgetower.model.text import TextTower
from bridgetower.model.vision import VisionTower

Index = Int[Tensor, " n"] | Bool[Tensor, " b"] | slice


@dataclass(frozen=True)
class Encoded:
    """One modality of a batch, ready to be fused with any encoding of the other modality.

    Attributes:
        layers: The handed tower layers, projected to the fusion width, token type added; each [B, L, D].
        cls: The tower's last CLS before projection [B, tower width], the contrastive head's input.
        mask: False on padding [B, L]; None if nothing is padded (always for images).
    """

    layers: tuple[Float[Tensor, "b l d"], ...]
    cls: Float[Tensor, "b w"]
    mask: Bool[Tensor, "b l"] | None = None

    def __len__(self) -> int:
        return len(self.cls)

    def __getitem__(self, index: Index) -> Encoded:
        """Selects samples; an index may repeat, so one encoding serves many pairs."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Encoded:
        """Applies `function` to every tensor, for moving, detaching or selecting."""
        mask = None if self.mask is None else function(self.mask)
        return Encoded(tuple(function(layer) for layer in self.layers), function(self.cls), mask)

    def padded(self, length: int) -> Encoded:
        """Pads to `length` tokens, with an explicit mask.

        Raises:
            ValueError: There are more tokens than `length`.
        """
        missing = length - self.layers[0].shape[1]
        if missing < 0:
            raise ValueError(f"{self.layers[0].shape[1]} tokens do not fit into {length}; pad to at least as many")
        mask = self.mask
        if mask is None:
            mask = torch.ones(self.layers[0].shape[:2], dtype=torch.bool, device=self.cls.device)
        layers = tuple(F.pad(layer, (0, 0, 0, missing)) for layer in self.layers)
        return Encoded(layers, self.cls, F.pad(mask, (0, missing)))

    @staticmethod
    def cat(parts: Sequence[Encoded]) -> Encoded:
        """Joins batches along samples, padding texts of different lengths to the longest.

        Raises:
            ValueError: There is nothing to join.
        """
        if not parts:
            raise ValueError("no encodings given; expected at least one")
        lengths = [part.layers[0].shape[1] for part in parts]
        masks = [part.mask for part in parts]
        if len(set(lengths)) > 1 or any(mask is not None for mask in masks):
            parts = [part.padded(max(lengths)) for part in parts]
            mask = torch.cat([part.mask for part in parts if part.mask is not None])
        else:
            mask = None
        layers = tuple(torch.cat(layer) for layer in zip(*(part.layers for part in parts), strict=True))
        return Encoded(layers, torch.cat([part.cls for part in parts]), mask)


class Fused:
    """Outputs of the fusion encoder, as far as they were read."""

    def __init__(self, text: Tensor | None = None, image: Tensor | None = None, pooled: Tensor | None = None) -> None:
        self._text, self._image, self._pooled = text, image, pooled

    @property
    def text(self) -> Float[Tensor, "b l d"]:
        """The text stream, with `read="text"` or `"all"`."""
        return _read(self._text, "text", '"text" or "all"')

    @property
    def image(self) -> Float[Tensor, "b p d"]:
        """The image stream, with `read="all"`."""
        return _read(self._image, "image", '"all"')

    @property
    def pooled(self) -> Float[Tensor, "b e"]:
        """Text and image pooler outputs side by side, with `read="pooled"` or `"all"`."""
        return _read(self._pooled, "pooled", '"pooled" or "all"')


class BridgeTower(nn.Module):
    """Two towers, the fusion encoder and the heads that the config names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        fusion, heads = config.fusion, config.heads
        self.vision = VisionTower(config.vision)
        self.text = TextTower(config.text)
        projections = fusion.num_handed_layers if fusion.separate_projections else 1
        self.image_projections = _projections(config.vision.hidden_size, fusion.hidden_size, projections)
        self.text_projections = _projections(config.text.hidden_size, fusion.hidden_size, projections)
        self.token_type_embedding = nn.Embedding(fusion.num_token_types, fusion.hidden_size)
        self.fusion = FusionEncoder(fusion)
        self.text_pooler = Pooler(fusion.hidden_size)
        self.image_pooler = Pooler(fusion.hidden_size)
        self.mlm_head = (
            MlmHead(fusion.hidden_size, config.text.vocab_size, heads.mlm_layer_norm_eps) if heads.mlm else None
        )
        self.itm_head = ItmHead(fusion.hidden_size) if heads.itm else None
        self.itc_head = _itc_head(config)

    def encode_image(self, pixel_values: Float[Tensor, "b 3 h w"], token_type: int = 1) -> Encoded:
        """Encodes images; `token_type` 2 marks the second image of a pair (NLVR2).

        Raises:
            ValueError: The image's sides are not multiples of the patch size, or there is no such token type.
        """
        hidden = self.vision(pixel_values, self.config.vision_layers)
        return Encoded(self._hand_over(hidden, self.image_projections, token_type), hidden[-1][:, 0])

    def encode_text(
        self, input_ids: Int[Tensor, "b l"], attention_mask: Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None = None
    ) -> Encoded:
        """Encodes texts; `attention_mask` is 0 on padding, None if nothing is padded.

        Raises:
            ValueError: The text is longer than the position table.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        hidden = self.text(input_ids, mask, self.config.text_layers)
        return Encoded(self._hand_over(hidden, self.text_projections, token_type=0), hidden[-1][:, 0], mask)

    def fuse(self, image: Encoded, text: Encoded, read: Read = "pooled") -> Fused:
        """Fuses image b with text b, computing only what is read.

        Args:
            image: From `encode_image`.
            text: From `encode_text`, as many as images.
            read: `pooled` for matching and classification, `text` for masked words, `all` for everything.

        Raises:
            ValueError: The numbers of images and texts differ, or there is no such `read`.
        """
        if read not in get_args(Read):
            raise ValueError(f"read is {read!r}; expected one of {', '.join(get_args(Read))}")
        if len(image) != len(text):
            raise ValueError(
                f"{len(image)} images and {len(text)} texts; expected one text per image: index them first"
            )
        text_stream, image_stream = self.fusion(image.layers, text.layers, text.mask, read)
        if image_stream is None:
            return Fused(text=text_stream)
        pooled = torch.cat([self.text_pooler(text_stream), self.image_pooler(image_stream)], dim=-1)
        if read == "pooled":
            return Fused(pooled=pooled)
        return Fused(text_stream, image_stream, pooled)

    def forward(
        self,
        pixel_values: Float[Tensor, "b 3 h w"],
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None = None,
        read: Read = "all",
    ) -> Fused:
        """Encodes both modalities and fuses them."""
        return self.fuse(self.encode_image(pixel_values), self.encode_text(input_ids, attention_mask), read)

    def image_embeds(self, image: Encoded) -> Float[Tensor, "b c"]:
        """Returns L2-normalised contrastive embeddings of images.

        Raises:
            ValueError: The model has no contrastive head.
        """
        head = self.contrastive_head()
        # transformers reads the projected CLS with its token type, the official code the tower's own CLS.
        cls = image.layers[-1][:, 0] if isinstance(head, FusedItcHead) else image.cls
        return F.normalize(head.image(cls), dim=-1)

    def text_embeds(self, text: Encoded) -> Float[Tensor, "b c"]:
        """Returns L2-normalised contrastive embeddings of texts.

        Raises:
            ValueError: The model has no contrastive head.
        """
        return F.normalize(self.contrastive_head().text(text.cls), dim=-1)

    def pair_embeds(self, pooled: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Returns L2-normalised embeddings of fused pairs.

        The contrastive model of transformers has a head for them; elsewhere it is the pooled output itself.
        """
        head = self.itc_head
        return F.normalize(head.pooled(pooled) if isinstance(head, FusedItcHead) else pooled, dim=-1)

    def itm_logits(self, pooled: Float[Tensor, "b e"]) -> Float[Tensor, "b 2"]:
        """Returns logits of no match (0) and match (1).

        Raises:
            ValueError: The model has no matching head.
        """
        if self.itm_head is None:
            raise ValueError("this model has no matching (ITM) head; load a checkpoint with one")
        logits: Tensor = self.itm_head(pooled)
        return logits

    def mlm_logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        """Returns vocabulary logits of text stream positions.

        Raises:
            ValueError: The model has no masked-language head.
        """
        if self.mlm_head is None:
            raise ValueError("this model has no masked-language (MLM) head; load a checkpoint with one")
        logits: Tensor = self.mlm_head(hidden)
        return logits

    def contrastive_head(self) -> ItcHead | FusedItcHead:
        """Returns the contrastive head.

        Raises:
            ValueError: The model has none.
        """
        if self.itc_head is None:
            raise ValueError(
                "this model has no contrastive (ITC) head, so its image and text vectors cannot be compared; "
                "load a checkpoint with one (its name usually ends in -itc) or score pairs with match"
            )
        return self.itc_head

    def _hand_over(
        self, hidden: list[Tensor], projections: nn.ModuleList, token_type: int
    ) -> tuple[Float[Tensor, "b l d"], ...]:
        token_types = self.token_type_embedding.weight
        if not 0 <= token_type < len(token_types):
            raise ValueError(f"token type {token_type}; this model has {len(token_types)}: set fusion.num_token_types")
        shared = len(projections) == 1
        return tuple(
            projections[0 if shared else index](layer) + token_types[token_type] for index, layer in enumerate(hidden)
        )


def _read(output: Tensor | None, name: str, reads: str) -> Tensor:
    if output is None:
        raise ValueError(f"{name} was not computed; call fuse with read={reads}")
    return output


def _projections(tower_size: int, fusion_size: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(tower_size, fusion_size) for _ in range(count))


def _itc_head(config: ModelConfig) -> ItcHead | FusedItcHead | None:
    heads = config.heads
    if heads.itc == "tower":
        return ItcHead(config.vision.hidden_size, config.text.hidden_size, heads.itc_size)
    if heads.itc == "fused":
        return FusedItcHead(config.fusion.hidden_size, config.text.hidden_size, heads.itc_size)
    return None
