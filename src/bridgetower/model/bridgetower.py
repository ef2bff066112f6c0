"""BridgeTower: encode each modality once, fuse any pair of encodings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridgetower.model.bridges import BRIDGES
from bridgetower.model.config import ModelConfig, Part, look_up
from bridgetower.model.extensions import NO_EXTENSIONS, TEXT_ARCHITECTURES, Extensions, vision_tower
from bridgetower.model.fusion import Encoded, Fused, FusionEncoder, FusionOutputs, Mask
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
Modality = Literal["image", "text"]
TEXT, IMAGE, SECOND_IMAGE = 0, 1, 2  # token types


class BridgeTower(nn.Module):
    """Two towers, the fusion encoder and the heads that the config names, each as `NAME_head` or None.

    Inputs that do not fit raise ValueError, as does a head that the model does not have; those that it has are named.
    """

    mlm_head: MlmHead | None
    itm_head: LinearHead | None
    itc_head: ItcHead | FusedItcHead | None
    rank_head: RankHead | None
    text_layer_embedding: nn.Embedding | None
    image_layer_embedding: nn.Embedding | None
    writer: Any = None
    """`checkpoints.io`, once it is imported, as the public names do."""
    origin: Any = None
    """The `Checkpoint` that it was made of, without its weights; None for a new model."""
    trained_top = 0
    """Layers of each tower that train while those below are frozen, see `train_top_layers`; 0: all or none."""
    text_multiple = 1
    """Texts are padded to a multiple of so many tokens, so that compiled layers meet few lengths."""

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
        self.config, self.extensions, fusion = config, extensions, config.fusion
        self.vision = vision_tower(config.vision, extensions)
        text = look_up(
            "text.architecture",
            config.text.architecture,
            TEXT_ARCHITECTURES | extensions.text_towers,
        )
        self.text = text(config.text)
        self.image_projections, self.text_projections = (
            nn.ModuleList(
                nn.Linear(tower.hidden_size, fusion.hidden_size)
                for _ in range(len(layers) if fusion.separate_projections else 1)
            )
            for tower, layers in (
                (config.vision, config.vision_layers),
                (config.text, config.text_layers),
            )
        )
        self.token_type_embedding = nn.Embedding(fusion.num_token_types, fusion.hidden_size)
        self.text_layer_embedding = self.image_layer_embedding = None
        if fusion.layer_embeddings:
            self.text_layer_embedding = nn.Embedding(config.text.num_layers, fusion.hidden_size)
            self.image_layer_embedding = nn.Embedding(config.vision.num_layers, fusion.hidden_size)
        self.fusion = FusionEncoder(fusion, BRIDGES | extensions.bridges)
        self.text_pooler = Pooler(fusion.hidden_size)
        self.image_pooler = Pooler(fusion.hidden_size)
        chosen = chosen_heads(config.heads)
        for name in (*HEADS, *config.heads.custom):
            spec = look_up("heads.custom", name, extensions.head_specs)
            self.add_module(f"{name}_head", spec.build(config) if name in chosen else None)
        if self.device.type != "meta":
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights from `generator` (None: PyTorch's): normal, zero biases, unit LayerNorms.

        The standard deviation is BERT's 0.02 at BERT's width of 768, and larger in a narrower text tower or fusion
        encoder; the image tower follows CLIP. Temperatures, and the weights of bridges that are no linear layer, keep
        the values that their modules set, and custom towers all of theirs.
        """
        custom = [tower for tower in (self.vision, self.text) if not isinstance(tower, Transformer)]
        left = {module for tower in custom for module in tower.modules()}
        text_tower = set(self.text.modules())
        for module in self.modules():
            if module in left:
                continue
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
                width = (
                    self.config.text if module in text_tower else self.config.fusion
                ).hidden_size
                module.weight.normal_(
                    std=0.02 * max(1.0, (768 / width) ** 0.5), generator=generator
                )
                if not isinstance(module, nn.Embedding) and module.bias is not None:
                    module.bias.zero_()
        if isinstance(self.vision, VisionTransformer):
            self.vision.reset_parameters(generator)

    def save(self, folder: str | Path) -> None:
        """Writes a folder for `bridgetower.load`, with all that the model's checkpoint had besides the weights.

        A new model has no preprocessing: write that of a `Processor` beside it, with `processor.save(folder)`.

        Args:
            folder: New or empty; it appears as a whole or not at all.

        Raises:
            FileExistsError: The folder holds something else.
        """
        self._writer().convert(self.writer.checkpoint_of(self), Path(folder), "bridgetower")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        license: str | None = None,  # noqa: A002 - as model cards call it
        datasets: Sequence[str] = (),
        metrics: Mapping[str, float] | None = None,
        command: str | None = None,
    ) -> str:
        """Uploads what `save` writes, with a model card, and returns the URL of the commit.

        Args:
            repo_id: Such as `owner/name`; it is made if it is not there.
            private: Whether it is made so; None is the owner's default.
            token: Of the hub; None is the one of `hf auth login`.
            license: Of the weights, such as `mit`.
            datasets: Ids on the hub of what it was trained on.
            metrics: Measured values by name.
            command: That trained it.
        """
        facts = {
            "license": license,
            "datasets": datasets,
            "metrics": metrics or {},
            "command": command,
        }
        return self._writer().push(self, repo_id, private=private, token=token, **facts)

    def _writer(self) -> Any:
        if self.writer is None:
            raise RuntimeError(
                "what writes models is not imported; import bridgetower.checkpoints first"
            )
        return self.writer

    def checkpoint_activations(self, parts: Collection[Part]) -> None:
        """Lets the layers of some parts keep only their inputs in training and compute the rest again for gradients."""
        self.vision.set_activation_checkpointing("vision" in parts)
        self.text.set_activation_checkpointing("text" in parts)
        self.fusion.checkpoint_activations = "fusion" in parts

    def layers(self) -> list[nn.Module]:
        """Returns those of the fusion encoder and of the towers that list theirs."""
        layers = [*self.fusion.text_layers, *self.fusion.image_layers]
        for tower in (self.vision, self.text):
            with suppress(ValueError):
                layers += tower.stacked_layers()
        return layers

    def compile_layers(self, backend: str = "inductor", *, strict: bool = True) -> None:
        """Compiles each layer on its own, so that equal ones share their code; names of parameters stay.

        Each is one graph for all batch sizes and text lengths after the first: texts are padded to multiples of eight
        tokens, as kernels for GPUs want, and always have a mask. If it is not `strict`, what cannot be compiled, such
        as a part of a custom layer, or all of it where there is no C compiler, runs as it is.
        """
        self.text_multiple = 8
        options = compiler_options(backend, strict=strict)
        for layer in self.layers():
            layer.compile(fullgraph=strict, **options)

    def train_top_layers(self, count: int) -> None:
        """Freezes each tower but for the top `count` of its layers that are read; embeddings and norms too."""
        for tower, read in (
            (self.vision, self.config.vision_layers),
            (self.text, self.config.text_layers),
        ):
            if count > read[-1]:
                raise ValueError(
                    f"{count} layers to train, but {read[-1]} layers of a tower are read; train all instead"
                )
            tower.requires_grad_(False)
            for layer in tower.stacked_layers()[read[-1] - count : read[-1]]:
                layer.requires_grad_(True)
        self.trained_top = count

    def cached_layers(self, read: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the layers whose states are kept of a frozen tower: those that are read below the ones that train."""
        last = read[-1] - self.trained_top
        return (
            tuple(sorted({last, *(layer for layer in read if layer < last)}))
            if self.trained_top
            else read
        )

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
            states: What the frozen tower made of the images before: see `cached_layers`; for `cls`, also their `cls`.
        """
        if pixel_values is None and states is None:
            raise ValueError("no pixel_values and no states are given; give one of them")
        if pixel_values is not None and (pixel_values.ndim != 4 or pixel_values.shape[1] != 3):
            raise ValueError(
                f"pixel_values have the shape {list(pixel_values.shape)}; expected [images, 3, height, width]"
            )
        return self._encoded("image", pixel_values, None, token_type, outputs, states)

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
            outputs, states: As of `encode_image`.
        """
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids have the shape {list(input_ids.shape)}; expected [texts, tokens]"
            )
        mask = None if attention_mask is None else attention_mask.bool()
        if self.text_multiple > 1:
            length = input_ids.shape[1]
            missing = max(
                0, min(-length % self.text_multiple, self.config.text.max_length - length)
            )
            mask = F.pad(
                torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask, (0, missing)
            )
            input_ids = F.pad(input_ids, (0, missing), value=self.config.text.pad_token_id)
            states = (
                states if states is None or states.ndim == 2 else F.pad(states, (0, 0, 0, missing))
            )
        return self._encoded("text", input_ids, mask, TEXT, outputs, states)

    def _encoded(
        self,
        modality: Modality,
        inputs: Tensor | None,
        mask: TokenMask,
        token_type: int,
        outputs: EncodeOutputs,
        states: Float[Tensor, "b n l w"] | Float[Tensor, "b w"] | None,
    ) -> Encoded:
        """Runs as much of a tower as the outputs need; with `states` only the layers that train."""
        if states is not None and states.ndim == 2:
            return Encoded((), states)
        tower, read = self._tower(modality)
        if states is not None and not self.trained_top:
            hidden = list(states.unbind(1))
        elif states is not None:
            hidden = tower.continued(
                dict(zip(self.cached_layers(read), states.unbind(1), strict=True)), mask, read
            )
        elif outputs == "cls" and getattr(self.config.heads, f"{modality}_pooling") == "token":
            return Encoded((), tower.cls(inputs, read[-1], mask))
        else:
            given = (inputs,) if modality == "image" else (inputs, mask)
            hidden = tower(*given, read[-1:] if outputs == "cls" else read)
        if outputs == "cls":
            return Encoded((), self._features(modality, hidden[-1], mask))
        return self.project(modality, hidden, mask, token_type)

    def _tower(self, modality: Modality) -> tuple[Any, tuple[int, ...]]:
        """Returns a tower and its layers that are read."""
        if modality == "image":
            return self.vision, self.config.vision_layers
        return self.text, self.config.text_layers

    def _features(
        self, modality: Modality, hidden: Float[Tensor, "b l w"], mask: TokenMask
    ) -> Float[Tensor, "b w"]:
        """Returns what heads on a tower read, from the hidden states of its last bridged layer."""
        if getattr(self.config.heads, f"{modality}_pooling") == "token":
            return self._tower(modality)[0].pooled(hidden)
        return mean_token(
            hidden[:, self.config.vision.num_prefix_tokens if modality == "image" else 0 :], mask
        )

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
        projected = []
        for index, (states, layer) in enumerate(zip(hidden, self._tower(modality)[1], strict=True)):
            added = (
                types[token_type]
                if embedding is None
                else types[token_type] + embedding.weight[layer - 1]
            )
            states = projections[index % len(projections)](states)
            projected.append(states + added.to(states.dtype))
        return Encoded(tuple(projected), self._features(modality, hidden[-1], mask), mask)

    def cache_image(self, image: Encoded) -> Encoded:
        """Adds what the first fusion layer computes of each image alone, for images that several texts share."""
        if self._draws():
            return image
        return replace(image, first_layer_cache=self.fusion.cached("image", image.layers))

    def cache_text(self, text: Encoded) -> Encoded:
        """Adds what the first fusion layer computes of each text alone, see `cache_image`."""
        if self._draws():
            return text
        return replace(text, first_layer_cache=self.fusion.cached("text", text.layers, text.mask))

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
        if image.cls.shape[0] != text.cls.shape[0]:  # len() would fix the number in an export
            raise ValueError(
                f"{len(image)} images and {len(text)} texts; expected one text per image: index them first"
            )
        if not (image.layers and text.layers):
            raise ValueError(
                'these encodings hold the CLS only; encode with outputs="layers" what is to be fused'
            )
        caches = image.first_layer_cache, text.first_layer_cache
        text_stream, image_stream = self.fusion(
            image.layers, text.layers, text.mask, outputs, *caches
        )
        if image_stream is None:
            return Fused(text=text_stream)
        pooled = torch.cat([self.text_pooler(text_stream), self.image_pooler(image_stream)], dim=-1)
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
        return self.fuse(
            self.encode_image(pixel_values), self.encode_text(input_ids, attention_mask), outputs
        )

    def image_embeds(self, image: Encoded) -> Float[Tensor, "b c"]:
        """Returns L2-normalised contrastive embeddings of images."""
        head = self.head("itc")
        # transformers reads the CLS that fusion gets, the official code the tower's
        if self.compares_pairs:
            bridged = (
                self.image_projections[-1](image.cls) + self.token_type_embedding.weight[IMAGE]
            )
            return _l2_normalize(head.image(bridged))
        return _l2_normalize(head.image(head.dropout(image.cls)))

    def text_embeds(self, text: Encoded) -> Float[Tensor, "b c"]:
        """Returns L2-normalised contrastive embeddings of texts."""
        head = self.head("itc")
        return _l2_normalize(head.text(text.cls if self.compares_pairs else head.dropout(text.cls)))

    @property
    def compares_pairs(self) -> bool:
        """Whether embeddings of fused pairs can be compared with those of images and of texts."""
        return self.config.heads.itc == "fused"

    def pair_embeds(self, pooled: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Returns L2-normalised embeddings of fused pairs: of the head of transformers, or the pooled output itself."""
        head: Any = self.itc_head  # whatever an adapter has put around it
        return _l2_normalize(head.pooled(pooled) if self.compares_pairs else pooled)

    def itm_logits(self, pooled: Float[Tensor, "b e"]) -> Float[Tensor, "b 2"]:
        """Returns logits of no match (0) and match (1)."""
        return self.head("itm")(pooled)

    def mlm_logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        """Returns vocabulary logits of text stream positions."""
        return self.head("mlm")(hidden)

    def head_outputs(self, name: str) -> HeadOutputs:
        """Returns what the outputs of a head mean."""
        return self.extensions.head_specs[name].outputs_of(self.config.heads)

    def head(self, name: str, *, recipe: str | None = None) -> Any:
        """Returns a head; the error names the `recipe` that trains it, by default the usual one."""
        head = getattr(self, f"{name}_head", None)
        if head is None:
            spec = look_up("head", name, self.extensions.head_specs)
            present = [
                child.removesuffix("_head")
                for child, _ in self.named_children()
                if child.endswith("_head")
            ]
            recipe = recipe or spec.recipe
            training = (
                f"bridgetower train {recipe}"
                if recipe
                else "a run whose model.heads.custom names it"
            )
            raise ValueError(
                f"this model has no {spec.title or name} head (it has {', '.join(present) or 'none'}); load a "
                f"checkpoint with one, or train one: {training}"
            )
        return head

    def _draws(self) -> bool:
        """Whether fusion depends on random numbers: of dropout, or the noise of managers."""
        fusion = self.config.fusion
        return self.training and bool(
            fusion.dropout or fusion.attention_dropout or fusion.first_bridge == 1
        )


def _l2_normalize(vectors: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """L2-normalised in float32 at least: bfloat16 has three digits, so that lengths are off and similar items tie."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
