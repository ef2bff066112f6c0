"""The model, which encodes each modality once and fuses any pair of encodings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridgetower.model.bridges import BRIDGES
from bridgetower.model.config import EncoderName, FusionConfig, ModelConfig, look_up
from bridgetower.model.extensions import NO_EXTENSIONS, TEXT_ARCHITECTURES, Extensions, vision_tower
from bridgetower.model.fusion import Encoded, Fused, FusionEncoder, FusionOutputs, Mask, Modality
from bridgetower.model.heads import (
    HEADS,
    FusedItcHead,
    HeadOutputs,
    ItcHead,
    LinearHead,
    MlmHead,
    RankHead,
    chosen_heads,
)
from bridgetower.model.layers import Pooler, TokenMask, compiler_options, mean_token
from bridgetower.model.towers import Transformer, VisionTransformer

EncodeOutputs = Literal["layers", "cls"]

# Token types.
TEXT = 0
IMAGE = 1
SECOND_IMAGE = 2


class BridgeTower(nn.Module):
    """Two towers, the fusion encoder and the heads that the config names, each as `NAME_head` or None.

    Inputs that do not fit raise ValueError, as does a head that the model lacks.
    """

    mlm_head: MlmHead | None
    itm_head: LinearHead | None
    itc_head: ItcHead | FusedItcHead | None
    rank_head: RankHead | None
    text_layer_embedding: nn.Embedding | None
    image_layer_embedding: nn.Embedding | None
    origin: object = None
    """`Checkpoint` that the model was built from, without its weights; None for a new model."""
    trained_top = 0
    """Layers of each tower that train above frozen ones, see `train_top_layers`; 0: all layers or none."""
    text_multiple = 1
    """Number of tokens of which texts are padded to a multiple, so that compiled layers meet few lengths."""

    def __init__(
        self,
        config: ModelConfig,
        extensions: Extensions = NO_EXTENSIONS,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Builds the modules that the config names, with random weights.

        Args:
            config: Sizes and names.
            extensions: Custom entries that it names.
            generator: Of the random weights; None is PyTorch's.
        """
        super().__init__()
        self.config = config
        self.extensions = extensions
        fusion = config.fusion

        # The towers and their projections.
        self.vision = vision_tower(config.vision, extensions)
        text_towers = TEXT_ARCHITECTURES | extensions.text_towers
        build_text = look_up("text.architecture", config.text.architecture, text_towers)
        self.text = build_text(config.text)
        self.image_projections = _projections(
            config.vision.hidden_size, config.vision_layers, fusion
        )
        self.text_projections = _projections(config.text.hidden_size, config.text_layers, fusion)
        self.token_type_embedding = nn.Embedding(fusion.num_token_types, fusion.hidden_size)
        self.text_layer_embedding = None
        self.image_layer_embedding = None
        if fusion.layer_embeddings:
            self.text_layer_embedding = nn.Embedding(config.text.num_layers, fusion.hidden_size)
            self.image_layer_embedding = nn.Embedding(config.vision.num_layers, fusion.hidden_size)

        # The fusion encoder and the heads.
        self.fusion = FusionEncoder(fusion, BRIDGES | extensions.bridges)
        self.text_pooler = Pooler(fusion.hidden_size)
        self.image_pooler = Pooler(fusion.hidden_size)
        enabled = chosen_heads(config.heads)
        for name in (*HEADS, *config.heads.custom):
            spec = look_up("heads.custom", name, extensions.head_specs)
            head = spec.build(config) if name in enabled else None
            self.add_module(f"{name}_head", head)
        if self.device.type != "meta":
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights from `generator` (None: PyTorch's): normal, zero biases, unit LayerNorms.

        The standard deviation is BERT's 0.02 at BERT's width of 768, and larger in a narrower text tower or fusion
        encoder; the image tower follows CLIP. Temperatures, and the weights of bridges that are no linear layer, keep
        the values that their modules set, and custom towers keep all values.
        """
        custom = [tower for tower in (self.vision, self.text) if not isinstance(tower, Transformer)]
        skipped = {module for tower in custom for module in tower.modules()}
        text_tower = set(self.text.modules())
        for module in self.modules():
            if module in skipped:
                continue
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
                section = self.config.text if module in text_tower else self.config.fusion
                std = 0.02 * max(1.0, (768 / section.hidden_size) ** 0.5)
                module.weight.normal_(std=std, generator=generator)
                if not isinstance(module, nn.Embedding) and module.bias is not None:
                    module.bias.zero_()
        if isinstance(self.vision, VisionTransformer):
            self.vision.reset_parameters(generator)

    def checkpoint_activations(self, encoders: Collection[EncoderName]) -> None:
        """Lets the layers of some encoders keep only their inputs in training and run again for gradients."""
        self.vision.set_activation_checkpointing("vision" in encoders)
        self.text.set_activation_checkpointing("text" in encoders)
        self.fusion.checkpoint_activations = "fusion" in encoders

    def layers(self) -> list[nn.Module]:
        """Returns the layers of the fusion encoder and of the towers that list theirs."""
        layers = [*self.fusion.text_layers, *self.fusion.image_layers]
        for tower in (self.vision, self.text):
            with suppress(ValueError):
                layers += tower.stacked_layers()
        return layers

    def compile_layers(self, backend: str = "inductor", *, strict: bool = True) -> None:
        """Compiles each layer by itself, so that equal layers share their code and names of parameters stay.

        Each is one graph for all batch sizes and text lengths after the first: texts are padded to multiples of eight
        tokens, which suits kernels for GPUs, and always have a mask. Unless it is `strict`, what cannot be compiled
        runs in PyTorch, such as parts of a custom layer, or everything where there is no C compiler.
        """
        self.text_multiple = 8
        options = compiler_options(backend, strict=strict)
        for layer in self.layers():
            layer.compile(fullgraph=strict, **options)

    def train_top_layers(self, count: int) -> None:
        """Freezes each tower but for the top `count` of its layers that are read."""
        for modality in get_args(Modality):
            tower, layers = self._tower(modality)
            top = layers[-1]
            if count > top:
                raise ValueError(
                    f"{count} layers to train, but {top} layers of a tower are read; train all instead"
                )
            tower.requires_grad_(False)
            for layer in tower.stacked_layers()[top - count : top]:
                layer.requires_grad_(True)
        self.trained_top = count

    def cached_layers(self, read: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the layers of a frozen tower whose states are cached, of those that are read."""
        if not self.trained_top:
            return read
        top_frozen = read[-1] - self.trained_top
        below = tuple(layer for layer in read if layer < top_frozen)
        return (*below, top_frozen)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self.token_type_embedding.weight.device

    def encode_image(
        self,
        pixel_values: Float[Tensor, "b 3 h w"] | None,
        token_type: int = IMAGE,
        *,
        outputs: EncodeOutputs = "layers",
        states: Float[Tensor, "b n p v"] | Float[Tensor, "b v"] | None = None,
    ) -> Encoded:
        """Encodes images.

        Args:
            pixel_values: Normalised images, whose sides are multiples of the patch size; None with `states`.
            token_type: 1, or 2 for the second image of a pair (NLVR2).
            outputs: `layers` for the fusion encoder, `cls` for contrastive embeddings only, which takes less work.
            states: Instead of images, hidden states of the frozen tower after `cached_layers` [B, N, P, V], or its
                global vectors [B, V] for outputs `cls`.
        """
        if pixel_values is None:
            if states is None:
                raise ValueError("no pixel_values and no states are given; give one of them")
        elif pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values have the shape {list(pixel_values.shape)}; expected [images, 3, height, width]"
            )
        return self._encode("image", pixel_values, None, token_type, outputs, states)

    def encode_text(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Mask = None,
        *,
        outputs: EncodeOutputs = "layers",
        states: Float[Tensor, "b n l t"] | Float[Tensor, "b t"] | None = None,
    ) -> Encoded:
        """Encodes texts.

        Args:
            input_ids: Token ids.
            attention_mask: 0 on padding; None if nothing is padded.
            outputs, states: As for `encode_image`.
        """
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids have the shape {list(input_ids.shape)}; expected [texts, tokens]"
            )
        mask = None if attention_mask is None else attention_mask.bool()
        if self.text_multiple > 1:
            # Compiled layers get padded texts, and always a mask.
            config = self.config.text
            length = input_ids.shape[1]
            padding = -length % self.text_multiple
            padding = max(0, min(padding, config.max_length - length))
            if mask is None:
                mask = torch.ones_like(input_ids, dtype=torch.bool)
            mask = F.pad(mask, (0, padding))
            input_ids = F.pad(input_ids, (0, padding), value=config.pad_token_id)
            if states is not None and states.ndim == 4:
                states = F.pad(states, (0, 0, 0, padding))
        return self._encode("text", input_ids, mask, TEXT, outputs, states)

    def _encode(
        self,
        modality: Modality,
        inputs: Tensor | None,
        mask: TokenMask,
        token_type: int,
        outputs: EncodeOutputs,
        states: Float[Tensor, "b n l w"] | Float[Tensor, "b w"] | None,
    ) -> Encoded:
        """Runs as much of a tower as the outputs need, or of its layers that train if there are `states`."""
        # States are global vectors, or hidden states from which the layers that train continue.
        if states is not None and states.ndim == 2:
            return Encoded((), states)
        tower, layers = self._tower(modality)
        if states is not None:
            hidden = list(states.unbind(1))
            if self.trained_top:
                cached_layers = self.cached_layers(layers)
                cached = dict(zip(cached_layers, hidden, strict=True))
                hidden = tower.resume(cached, mask, layers)

        # Without states, the tower runs.
        elif outputs == "cls" and self._pools_token(modality):
            return Encoded((), tower.cls(inputs, layers[-1], mask))
        else:
            if outputs == "cls":
                layers = layers[-1:]
            hidden = tower.run(inputs, mask, layers)
        if outputs == "cls":
            return Encoded((), self._features(modality, hidden[-1], mask))
        return self.project(modality, hidden, mask, token_type)

    def _tower(self, modality: Modality) -> tuple[Any, tuple[int, ...]]:
        """Returns a tower and its layers that are read."""
        if modality == "image":
            return self.vision, self.config.vision_layers
        return self.text, self.config.text_layers

    def _pools_token(self, modality: Modality) -> bool:
        return getattr(self.config.heads, f"{modality}_pooling") == "token"

    def _features(
        self, modality: Modality, hidden: Float[Tensor, "b l w"], mask: TokenMask
    ) -> Float[Tensor, "b w"]:
        """Pools the hidden states of the last bridged layer for the heads on a tower."""
        if self._pools_token(modality):
            tower, _ = self._tower(modality)
            return tower.pooled(hidden)
        if modality == "image":
            hidden = hidden[:, self.config.vision.num_prefix_tokens :]
        return mean_token(hidden, mask)

    def project(
        self,
        modality: Modality,
        hidden: Sequence[Float[Tensor, "b l w"]],
        mask: TokenMask,
        token_type: int,
    ) -> Encoded:
        """Returns the encoding of the hidden states of the bridged layers of a tower."""
        types = self.token_type_embedding.weight
        if not 0 <= token_type < len(types):
            raise ValueError(
                f"token type {token_type}; this model has {len(types)}: set fusion.num_token_types"
            )
        projections: nn.ModuleList = getattr(self, f"{modality}_projections")
        embedding: nn.Embedding | None = getattr(self, f"{modality}_layer_embedding")
        _, layers = self._tower(modality)
        projected = []
        for index, (states, layer) in enumerate(zip(hidden, layers, strict=True)):
            offset = types[token_type]
            if embedding is not None:
                offset = offset + embedding.weight[layer - 1]
            # One projection per layer, or one for all.
            projection = projections[index % len(projections)]
            states = projection(states)
            projected.append(states + offset.to(states.dtype))
        features = self._features(modality, hidden[-1], mask)
        return Encoded(tuple(projected), features, mask)

    def cache_image(self, image: Encoded) -> Encoded:
        """Adds what the first fusion layer computes of each image alone, for images that several texts share."""
        return self._cached("image", image)

    def cache_text(self, text: Encoded) -> Encoded:
        """Adds what the first fusion layer computes of each text alone, see `cache_image`."""
        return self._cached("text", text)

    def _cached(self, modality: Modality, encoded: Encoded) -> Encoded:
        if self._fuses_randomly():
            return encoded
        cache = self.fusion.cache_first_layer(modality, encoded.layers, encoded.mask)
        return replace(encoded, first_layer_cache=cache)

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        """Fuses image b with text b, computing only what is read.

        Args:
            image: From `encode_image`.
            text: From `encode_text`, as many as images.
            outputs: `pooled` for matching and classification, `text` for masked words, `all` for everything.
        """
        if outputs not in get_args(FusionOutputs):
            raise ValueError(
                f"outputs is {outputs!r}; expected one of {', '.join(get_args(FusionOutputs))}"
            )
        if image.cls.shape[0] != text.cls.shape[0]:  # in an export, len() would be a constant
            raise ValueError(
                f"{len(image)} images and {len(text)} texts; expected one text per image: index them first"
            )
        if not (image.layers and text.layers):
            raise ValueError(
                'these encodings hold the CLS only; encode with outputs="layers" what is to be fused'
            )
        text_stream, image_stream = self.fusion(
            image.layers,
            text.layers,
            text.mask,
            outputs,
            image.first_layer_cache,
            text.first_layer_cache,
        )
        if image_stream is None:
            return Fused(text=text_stream)
        pooled_text = self.text_pooler(text_stream)
        pooled_image = self.image_pooler(image_stream)
        pooled = torch.cat([pooled_text, pooled_image], dim=-1)
        if outputs == "pooled":
            return Fused(pooled=pooled)
        return Fused(text_stream, image_stream, pooled)

    def forward(
        self,
        pixel_values: Float[Tensor, "b 3 h w"],
        input_ids: Int[Tensor, "b l"],
        attention_mask: Mask = None,
        outputs: FusionOutputs = "all",
    ) -> Fused:
        """Encodes both modalities and fuses them."""
        image = self.encode_image(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        return self.fuse(image, text, outputs)

    def image_embeds(self, image: Encoded) -> Float[Tensor, "b c"]:
        """Returns L2-normalised contrastive embeddings of images."""
        head = self.head("itc")
        # transformers reads the projected CLS, the official code the tower's.
        if self.compares_pairs:
            projected = self.image_projections[-1](image.cls)
            features = projected + self.token_type_embedding.weight[IMAGE]
        else:
            features = head.dropout(image.cls)
        return _l2_normalize(head.image(features))

    def text_embeds(self, text: Encoded) -> Float[Tensor, "b c"]:
        """Returns L2-normalised contrastive embeddings of texts."""
        head = self.head("itc")
        features = text.cls if self.compares_pairs else head.dropout(text.cls)
        return _l2_normalize(head.text(features))

    @property
    def compares_pairs(self) -> bool:
        """Whether embeddings of fused pairs can be compared with those of images and of texts."""
        return self.config.heads.itc == "fused"

    def pair_embeds(self, pooled: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Returns L2-normalised embeddings of fused pairs: of transformers' head, or the pooled output itself."""
        head: Any = self.itc_head
        return _l2_normalize(head.pooled(pooled) if self.compares_pairs else pooled)

    def itm_logits(self, pooled: Float[Tensor, "b e"]) -> Float[Tensor, "b 2"]:
        """Returns logits of no match (0) and match (1)."""
        return self.head("itm")(pooled)

    def mlm_logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        """Returns vocabulary logits of text stream positions."""
        return self.head("mlm")(hidden)

    def head_outputs(self, name: str) -> HeadOutputs:
        """Returns the meaning of the outputs of a head."""
        return self.extensions.head_specs[name].outputs_of(self.config.heads)

    def head(self, name: str, *, recipe: str | None = None) -> Any:
        """Returns a head, or raises an error that names the `recipe` that trains it, by default the usual one."""
        head = getattr(self, f"{name}_head", None)
        if head is not None:
            return head
        spec = look_up("head", name, self.extensions.head_specs)
        children = [child for child, _ in self.named_children() if child.endswith("_head")]
        heads = ", ".join(child.removesuffix("_head") for child in children)
        recipe = recipe or spec.recipe
        training = "a run whose model.heads.custom names it"
        if recipe:
            training = f"bridgetower train {recipe}"
        raise ValueError(
            f"this model has no {spec.title or name} head (it has {heads or 'none'}); load a checkpoint with one, "
            f"or train one: {training}"
        )

    def _fuses_randomly(self) -> bool:
        """Whether fusion draws random numbers, for dropout or the noise of managers."""
        fusion = self.config.fusion
        has_dropout = bool(fusion.dropout or fusion.attention_dropout)
        return self.training and (has_dropout or fusion.first_bridge == 1)


def _projections(width: int, layers: tuple[int, ...], config: FusionConfig) -> nn.ModuleList:
    count = len(layers) if config.separate_projections else 1
    return nn.ModuleList(nn.Linear(width, config.hidden_size) for _ in range(count))


def _l2_normalize(vectors: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Normalises in float32 at least, as in the three digits of bfloat16 similar items tie."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return F.normalize(vectors.to(dtype), dim=-1)
