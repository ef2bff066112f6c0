"""The parts that a model is exported in: towers and fusion encoder, each computing what one use reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.fusion import Encoded
from bridgetower.model.heads import HeadInputs, chosen_heads

PartName = Literal["image", "image_cls", "text", "text_cls", "fusion_pooled", "fusion_text"]

_LARGEST_BATCH = 1 << 16
_PARTS_OF: dict[HeadInputs, tuple[PartName, ...]] = {
    "pooled": ("fusion_pooled",),
    "pooled_pair": ("fusion_pooled",),
    "text": ("fusion_text",),
    "image_cls": ("image_cls",),
    "text_cls": ("text_cls",),
    "both_cls": ("image_cls", "text_cls"),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part in PyTorch with example arguments and which of their sizes vary, ready to be exported."""

    name: PartName
    module: nn.Module
    inputs: tuple[Any, ...]
    dynamic: tuple[Any, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def examples(self) -> Iterator[tuple[Any, ...]]:
        """Yields the example arguments, and their first half without the last token."""

        def smaller(tensor: Tensor, sizes: Mapping[int, Dim]) -> Tensor:
            return tensor[:1, :-1] if 1 in sizes else tensor[:1]

        yield self.inputs
        yield tuple(
            [*map(smaller, value, dynamic)] if isinstance(value, list) else smaller(value, dynamic)
            for value, dynamic in zip(self.inputs, self.dynamic, strict=True)
        )

    def exported(self) -> ExportedProgram:
        with torch.no_grad():
            return torch.export.export(self.module, self.inputs, dynamic_shapes=self.dynamic, strict=False)


class _Image(nn.Module):
    def __init__(self, model: BridgeTower, outputs: Any) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        image = self.model.encode_image(pixel_values, outputs=self.outputs)
        return *image.layers, image.cls


class _Text(_Image):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        text = self.model.encode_text(input_ids, attention_mask, outputs=self.outputs)
        return *text.layers, text.cls


class _Fusion(_Image):
    def forward(  # type: ignore[override]
        self, image: Sequence[Tensor], text: Sequence[Tensor], attention_mask: Tensor
    ) -> tuple[Tensor]:
        # Fusion does not read the CLS of a tower; the fields are filled with what has their shape.
        encoded_image = Encoded(tuple(image), image[0][:, 0])
        encoded_text = Encoded(tuple(text), text[0][:, 0], attention_mask.bool())
        fused = self.model.fuse(encoded_image, encoded_text, self.outputs)
        return (fused.pooled if self.outputs == "pooled" else fused.text,)


def part_names(model: BridgeTower) -> tuple[PartName, ...]:
    read = [part for name in chosen_heads(model.config.heads) for part in _PARTS_OF[model.head_specs[name].inputs]]
    return tuple(dict.fromkeys(("image", "text", "fusion_pooled", *read)))


def make_part(model: BridgeTower, name: PartName) -> Part:
    """Returns a part of `model`, with random examples of its inputs: two images or texts, the second text padded."""
    config, generator = model.config.text, torch.Generator().manual_seed(0)
    side, length = model.config.vision.image_size, min(8, config.max_length)
    pixel_values = torch.randn(2, 3, side, side, generator=generator)
    input_ids = torch.randint(config.vocab_size - 1, (2, length), generator=generator)
    input_ids += input_ids >= config.pad_token_id  # so that it is any other id
    mask = torch.ones_like(input_ids)
    input_ids[1, length // 2 :], mask[1, length // 2 :] = config.pad_token_id, 0
    batch = Dim("batch", min=1, max=_LARGEST_BATCH)
    sizes = {0: batch, 1: Dim("length", min=1, max=config.max_length)}
    image_names = tuple(f"image_{number}" for number in range(len(model.config.vision_layers)))
    text_names = tuple(f"text_{number}" for number in range(len(model.config.text_layers)))
    if name in ("image", "image_cls"):
        return Part(
            name=name,
            module=_Image(model, "layers" if name == "image" else "cls"),
            inputs=(pixel_values,),
            dynamic=({0: batch},),
            input_names=("pixel_values",),
            output_names=(*(image_names if name == "image" else ()), "cls"),
        )
    if name in ("text", "text_cls"):
        return Part(
            name=name,
            module=_Text(model, "layers" if name == "text" else "cls"),
            inputs=(input_ids, mask),
            dynamic=(sizes, sizes),
            input_names=("input_ids", "attention_mask"),
            output_names=(*(text_names if name == "text" else ()), "cls"),
        )
    outputs = name.removeprefix("fusion_")
    with torch.no_grad():
        image, text = model.encode_image(pixel_values), model.encode_text(input_ids, mask)
    return Part(
        name=name,
        module=_Fusion(model, outputs),
        inputs=(list(image.layers), list(text.layers), mask),
        dynamic=([{0: batch}] * len(image.layers), [sizes] * len(text.layers), sizes),
        input_names=(*image_names, *text_names, "attention_mask"),
        output_names=(outputs,),
    )


def flat(arguments: Sequence[Any]) -> list[Tensor]:
    return [tensor for value in arguments for tensor in (value if isinstance(value, list) else [value])]
