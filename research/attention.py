"""Attention of fusion encoders, layer by layer: python research/attention.py NAME=MODEL … --data FOLDER.

Images with their own first captions go through each model. Of every attention, within both streams and between them:
the mean distance between positions that attend and those that they attend to (pixels of an image, tokens of a text,
within a stream only), the entropy of the weights, and the KL divergence of the weights of a head from those of another,
both in nats. It prints a table of means over heads; --out gets attention.json, and attention.png with a dot for each.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import get_args

import matplotlib
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bridgetower.cli.options import resolve_demo, split_names
from bridgetower.cli.output import emit_rows
from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.drawing import LINE_STYLES, STYLE, png
from bridgetower.files import write_bytes, write_json
from bridgetower.inference.predictor import load
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.fusion import FusionAttention
from bridgetower.model.hidden_states import hidden_states
from bridgetower.progress import counted

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """One attention of one fusion layer, as means over pairs and positions that attend.

    Attributes:
        distance: Mean distance from a position to those that it attends to, of each head: between the centres of
            patches in pixels, in tokens of a text; None for attention to the other stream. Without the image's prefix
            tokens.
        entropy: Of the weights of each head, in nats.
        divergence: KL divergence of the weights of a head from those of another, in nats, mean over pairs of heads.
    """

    distance: list[float] | None
    entropy: list[float]
    divergence: float


@torch.inference_mode()
def attention_statistics(
    model: BridgeTower,
    images: CaptionImages,
    *,
    count: int = 64,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[FusionAttention, list[LayerAttention]]:
    """Measures the attention of the fusion encoder on images with their own first captions.

    As in the analyses of the paper and of Dosovitskiy et al. (2021): a head of small distance is local, one of small
    entropy looks at few positions, and heads of small divergence do the same.

    Args:
        model: In evaluation mode.
        images: With captions.
        count: Pairs, spread evenly over the set; all of a set that has fewer.
        batch_size: Pairs at once.
        progress: Show a bar.

    Returns:
        Layers by kind, the first layer first.

    Raises:
        ValueError: There are no pairs, or an image cannot be decoded.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"count is {count} and batch_size {batch_size}; expected at least 1")
    sums = _Sums(model)
    count = min(count, len(images))
    rows = torch.arange(count) * (len(images) - 1) // max(1, count - 1)
    for batch in counted(rows.split(batch_size), "batches", enabled=progress):
        numbers = batch.tolist()
        texts = images.processor.texts(
            [captions[0] for captions in images.captions(numbers)], truncate=True
        )
        pixels = images.pixel_values(numbers)
        assert isinstance(pixels, Tensor)  # nothing is cached here
        sums.add(
            pixels.to(model.device, model.token_type_embedding.weight.dtype),
            texts.input_ids.to(model.device),
            None if texts.attention_mask is None else texts.attention_mask.bool().to(model.device),
        )
    return sums.means()


class _Sums:
    """Sums over positions that attend."""

    def __init__(self, model: BridgeTower) -> None:
        self._model, self._layers = model, range(1, model.config.fusion.num_layers + 1)
        self._sums: dict[tuple[FusionAttention, int, str], Tensor] = defaultdict(
            lambda: torch.zeros(())
        )
        self._counts: dict[tuple[FusionAttention, int, str], int] = defaultdict(int)

    def add(self, pixel_values: Tensor, input_ids: Tensor, mask: Tensor | None) -> None:
        """Adds pairs."""
        found = hidden_states(
            self._model,
            pixel_values,
            input_ids,
            mask,
            layers={"fusion": self._layers},
            attentions=True,
        )
        for kind in get_args(FusionAttention):
            for layer, weights in found.attentions[kind].items():
                # positions that are no padding
                attends = torch.ones_like(weights[:, 0, :, 0], dtype=torch.bool)
                if mask is not None and kind.startswith("text"):
                    attends = mask
                self._add(
                    kind,
                    layer,
                    "entropy",
                    -(weights * weights.clamp(min=_TINY).log()).sum(dim=-1),
                    attends,
                )
                self._add(kind, layer, "divergence", _divergence(weights)[:, None], attends)
                if kind.endswith("self"):
                    self._add_distance(kind, layer, weights, attends)

    def _add_distance(
        self, kind: FusionAttention, layer: int, weights: Tensor, attends: Tensor
    ) -> None:
        config = self._model.config
        if kind == "image self":
            prefix = config.vision.num_prefix_tokens
            weights, attends = weights[:, :, prefix:, prefix:], attends[:, prefix:]
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=_TINY)
            size = config.vision.patch_size
            side = config.vision.image_size // size
            places = size * torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
        else:
            places = torch.arange(weights.shape[-1])[:, None].float()
        distances = torch.cdist(places, places).to(weights)
        self._add(kind, layer, "distance", (weights * distances).sum(dim=-1), attends)

    def _add(
        self,
        kind: FusionAttention,
        layer: int,
        name: str,
        values: Float[Tensor, "b h q"],
        attends: Bool[Tensor, "b q"],
    ) -> None:
        chosen = values.masked_fill(~attends[:, None], 0.0)
        self._sums[kind, layer, name] = (
            self._sums[kind, layer, name] + chosen.sum(dim=(0, 2)).double().cpu()
        )
        self._counts[kind, layer, name] += int(attends.sum())

    def means(self) -> dict[FusionAttention, list[LayerAttention]]:
        """Returns the means of each layer."""

        def mean(kind: FusionAttention, layer: int, name: str) -> list[float]:
            values: list[float] = (
                self._sums[kind, layer, name] / self._counts[kind, layer, name]
            ).tolist()
            return values

        return {
            kind: [
                LayerAttention(
                    distance=mean(kind, layer, "distance") if kind.endswith("self") else None,
                    entropy=mean(kind, layer, "entropy"),
                    divergence=mean(kind, layer, "divergence")[0],
                )
                for layer in self._layers
            ]
            for kind in get_args(FusionAttention)
        }


def _divergence(weights: Float[Tensor, "b h q m"]) -> Float[Tensor, "b q"]:
    """Mean over ordered pairs of different heads of KL(one ‖ other); 0 for a single head."""
    heads = weights.shape[1]
    logs = weights.clamp(min=_TINY).log()
    own = (weights * logs).sum(dim=-1)  # [B, H, Q]
    crossed = weights.transpose(1, 2) @ logs.transpose(1, 2).mT  # [B, Q, H, H]
    total = heads * own.sum(dim=1) - crossed.sum(dim=(2, 3))
    return total / max(1, heads * (heads - 1))


Statistics = Mapping[FusionAttention, Sequence[LayerAttention]]
TITLES = ("model", "attention", "layer", "distance", "entropy", "divergence of heads")


def statistics_rows(models: Mapping[str, Statistics]) -> list[list[str]]:
    """Returns the cells of a table under `TITLES`; distance and entropy are means over heads."""
    return [
        [
            name,
            kind,
            str(number + 1),
            _mean(layer.distance),
            _mean(layer.entropy),
            f"{layer.divergence:.3f}",
        ]
        for name, statistics in models.items()
        for kind, layers in statistics.items()
        for number, layer in enumerate(layers)
    ]


def draw_statistics(models: Mapping[str, Statistics]) -> bytes:
    """Returns a PNG: a row for each kind of attention, layers from left to right, a dot for each head."""
    kinds = get_args(FusionAttention)
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(10, 2.6 * len(kinds)), layout="constrained")
        grid = drawing.subplots(len(kinds), 3, sharex=True, squeeze=False)
        for kind, (distance, entropy, divergence) in zip(kinds, grid, strict=True):
            unit = "pixels" if kind.startswith("image") else "tokens"
            words = kind.replace("self", "to itself")
            distance.set(ylabel=f"distance [{unit}]", title=words)
            entropy.set(ylabel="entropy [nats]", title=words)
            divergence.set(ylabel="KL between heads [nats]", title=words)
            if not kind.endswith("self"):
                distance.set_visible(False)
            for (name, statistics), style in zip(models.items(), cycle(LINE_STYLES), strict=False):
                layers = statistics[kind]
                distances = [layer.distance for layer in layers if layer.distance is not None]
                _draw(distance, distances, name, style)
                _draw(entropy, [layer.entropy for layer in layers], name, style)
                _draw(divergence, [[layer.divergence] for layer in layers], name, style)
        grid[0][0].legend()
        for axes in grid[-1]:
            axes.set_xlabel("fusion layer")
        return png(drawing)


def _draw(axes: Axes, layers: Sequence[Sequence[float]], name: str, style: tuple[str, str]) -> None:
    """A line through the means of the layers, and a dot for each head."""
    if not layers:
        return
    ink, line = style
    numbers = range(1, len(layers) + 1)
    axes.plot(
        numbers,
        [sum(values) / len(values) for values in layers],
        line,
        color=ink,
        linewidth=2,
        label=name,
    )
    dots = [
        (number, value) for number, values in zip(numbers, layers, strict=True) for value in values
    ]
    axes.plot(*zip(*dots, strict=True), "o", color=ink, markersize=3, alpha=0.4)
    axes.set_xticks(numbers)


def _mean(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{sum(values) / len(values):.3f}"


def main() -> None:
    """Measures the models of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="NAME=MODEL",
        help="what to load; a name is needed for two models",
    )
    parser.add_argument("--data", required=True, help="prepared folder with captions")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=64, help="pairs, spread evenly over the split")
    parser.add_argument("--out", type=Path, help="folder for attention.png and attention.json")
    given = parser.parse_args()
    found, count = {}, given.count
    for name, model in split_names(given.models):
        predictor = load(resolve_demo(model, "model"))
        images = CaptionImages(DataConfig(folders=(given.data,)), given.split, predictor.processor)
        count = min(count, len(images))
        statistics = attention_statistics(
            predictor.model, images, count=count, progress=sys.stderr.isatty()
        )
        found[name or model] = statistics
    if given.out is not None:
        layers = {
            name: {kind: list(map(vars, each)) for kind, each in kinds.items()}
            for name, kinds in found.items()
        }
        about = {"data": given.data, "split": given.split, "count": count, "models": layers}
        write_bytes(given.out / "attention.png", draw_statistics(found))
        write_json(given.out / "attention.json", about)
    emit_rows(f"{given.data}, {given.split}, {count} pairs", TITLES, statistics_rows(found))


if __name__ == "__main__":
    main()
