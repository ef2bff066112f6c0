"""The towers' part of an architecture, and the checks of sizes that all parts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import Fixed, Suppress

from bridgetower.model.plain import check_choice, check_numbers

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "relu"]
Positions = Literal["roberta", "bert"]
Settings = Annotated[Mapping[str, Any] | None, Fixed, Suppress]
"""What another library builds a tower from, ready for JSON; it comes with the weights, so it is no option."""

EPS = (1e-20, 1.0)
WIDTH, CLASSES = 65_536, 10_000_000
_SIZES: dict[str, tuple[float, float]] = {
    "hidden_size": (1, WIDTH),
    "num_layers": (1, 1_000),
    "num_heads": (1, WIDTH),
    "intermediate_size": (1, 4 * WIDTH),
    "layer_norm_eps": EPS,
}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower: a ViT in CLIP's form (the defaults) or timm's, which DeiT shares.

    Attributes:
        image_size: Side of the square input in pixels; a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        hidden_size: Width of the tower.
        num_layers: Transformer blocks.
        num_heads: Attention heads; they divide `hidden_size`.
        intermediate_size: Width of the feed-forward layers.
        layer_norm_eps: Of all LayerNorms of the tower; CLIP 1e-5, timm 1e-6.
        activation: `quick_gelu` is x·σ(1.702x), as CLIP was trained; `gelu` is the exact one, `gelu_tanh` its
            approximation by tanh.
        pre_norm: LayerNorm after the embeddings (CLIP's `ln_pre`).
        patch_bias: Bias in the patch convolution (timm has one, CLIP has none).
        distillation_token: A second learned token after the class token, as in a distilled DeiT; the fusion encoder
            gets it like a patch.
        architecture: `vit`; `timm`, which `settings` describe; or the name of a custom tower, to which the sizes
            apply as far as it has them.
        prefix_tokens: Tokens before the patches in a timm or custom tower; None: those of a ViT.
        settings: Of `timm`: its `architecture` and the `arguments` that it is created with.
    """

    image_size: int = 288
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"
    pre_norm: bool = True
    patch_bias: bool = False
    distillation_token: bool = False
    architecture: str = "vit"
    prefix_tokens: int | None = None
    settings: Settings = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_part("vision", self, image_size=(1, 8_192), patch_size=(1, 8_192))
        check_image_size(self.image_size, self.patch_size)

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        if self.prefix_tokens is not None:
            return self.prefix_tokens
        return 2 if self.distillation_token else 1


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower: RoBERTa (the defaults) or BERT.

    Attributes:
        vocab_size: Token ids, special ones included.
        hidden_size: Width of the tower.
        num_layers: Transformer layers.
        num_heads: Attention heads; they divide `hidden_size`.
        intermediate_size: Width of the feed-forward layers.
        max_positions: Rows of the position table; RoBERTa leaves the first `pad_token_id` + 1 of them unused.
        type_vocab_size: Rows of the token type table, of which only the first is used.
        pad_token_id: Id that fills short texts.
        positions: `roberta` counts the tokens that are not padding, starting at `pad_token_id` + 1;
            `bert` counts columns from 0.
        layer_norm_eps: Of all LayerNorms of the tower; RoBERTa 1e-5, BERT 1e-12.
        activation: In the feed-forward layers; RoBERTa and BERT have `gelu`.
        dropout: Probability, in training only, for embeddings, attention and feed-forward alike.
        attention_dropout: That of attention weights, if it differs.
        architecture: `bert`; `transformers`, which `settings` describe; or the name of a custom tower, to which
            the sizes apply as far as it has them.
        settings: Of `transformers`: its config, with the `model_type`.
    """

    vocab_size: int = 50265
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 514
    type_vocab_size: int = 1
    pad_token_id: int = 1
    positions: Positions = "roberta"
    layer_norm_eps: float = 1e-5
    activation: Activation = "gelu"
    dropout: float = 0.1
    attention_dropout: float | None = None
    architecture: str = "bert"
    settings: Settings = field(default=None, hash=False)

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("vocab_size", "type_vocab_size", "max_positions"), (1, CLASSES))
        check_part("text", self, pad_token_id=(0, CLASSES), **counts)
        if self.pad_token_id >= self.vocab_size or self.max_length < 1:
            raise ValueError(
                f"text.pad_token_id {self.pad_token_id} with vocab_size {self.vocab_size} and max_positions "
                f"{self.max_positions}; expected one of the ids, and room for a token"
            )
        check_choice("text.positions", self.positions, Positions)

    @property
    def max_length(self) -> int:
        return self.max_positions - (self.pad_token_id + 1 if self.positions == "roberta" else 0)

    def check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(f"text of {length} tokens; the position table holds {self.max_length}: shorten it")


def check_image_size(image_size: int, patch_size: int) -> None:
    if image_size % patch_size or image_size <= 0:
        lower = max(image_size // patch_size, 1) * patch_size
        raise ValueError(
            f"image size {image_size} is not a multiple of the patch size {patch_size}; "
            f"use {lower} or {lower + patch_size}"
        )


def check_part(part: str, config: Any, **bounds: tuple[float, float]) -> None:
    """Checks the fields of a part that others have too, and its numbers."""
    check_numbers(config, f"{part}.", **bounds, **_SIZES)
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"{part}.hidden_size {config.hidden_size} is not a multiple of {part}.num_heads {config.num_heads}"
        )
    check_choice(f"{part}.activation", config.activation, Activation)
    if part != "vision":
        check_dropouts(part, config, "dropout", "attention_dropout")


def check_dropouts(part: str, config: Any, *names: str) -> None:
    for name in names:
        dropout = getattr(config, name)
        if dropout is not None and not 0 <= dropout < 1:
            raise ValueError(f"{part}.{name} is {dropout}; expected a probability in [0, 1)")
