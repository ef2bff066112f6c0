"""How the time of matching grows with batch, text length, image size and candidates, beside the operations it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bridgetower.drawing import FAINT, SERIES, STYLE, png
from bridgetower.engines.engine import TorchEngine
from bridgetower.files import write_bytes
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.presets import BASE, NANO
from side_by_side.products import recorded
from side_by_side.setting import Setting
from side_by_side.timing import alternate

TOKENS = 16
SIZES: dict[str, tuple[int, ...]] = {
    "pairs at once": (1, 2, 4, 8),
    "tokens of the text": (8, 64, 256, 512),
    "pixels of a side": (144, 288, 432, 576),
    "encoded images for one text": (4, 8, 16, 32),
}
QUICK: dict[str, tuple[int, ...]] = {
    "pairs at once": (1, 2),
    "tokens of the text": (8, 16),
    "pixels of a side": (60, 80),
    "encoded images for one text": (2, 4),
}


@dataclass(frozen=True)
class Point:
    """Seconds and operations at one size."""

    size: int
    seconds: float
    flops: int


@torch.no_grad()
def plot_growth(setting: Setting, path: Path) -> None:
    """Measures, and draws seconds beside the line of operations at the best rate of each curve."""
    measured = (QUICK if setting.quick else SIZES).items()
    curves = {axis: [_point(setting, axis, size) for size in sizes] for axis, sizes in measured}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        for axes, (name, points) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
            sizes = [point.size for point in points]
            best = max(point.flops / point.seconds for point in points)
            axes.plot(
                sizes,
                [point.flops / best for point in points],
                "--",
                color=FAINT,
                label="operations at best rate",
            )
            axes.plot(
                sizes, [point.seconds for point in points], "o-", color=SERIES[0], label="measured"
            )
            axes.set(
                xlabel=name,
                ylabel="time of matching [s]",
                xticks=sizes,
                xlim=(0, None),
                ylim=(0, None),
            )
        figure.axes[0].legend()
        write_bytes(path, png(figure))


def _point(setting: Setting, axis: str, size: int) -> Point:
    way = _way(setting, axis, size)
    timing = alternate({"way": way}, repetitions=min(3, setting.repetitions), warmup=1)["way"]
    return Point(size, timing.seconds, recorded(way).flops)


def _way(setting: Setting, axis: str, size: int) -> Callable[[], Tensor]:
    config = NANO if setting.quick else BASE
    if axis == "pixels of a side":
        config = config.override({"vision.image_size": size})
    model = BridgeTower(config, generator=torch.Generator().manual_seed(0))
    engine = TorchEngine(model.eval(), torch.device("cpu"))
    pairs = 1 if axis in ("tokens of the text", "pixels of a side") else size
    side = config.vision.image_size
    pixels = torch.randn(pairs, 3, side, side, generator=torch.Generator().manual_seed(0))
    texts, length = (
        (1 if axis == "encoded images for one text" else pairs),
        size if "tokens" in axis else TOKENS,
    )
    ids = torch.randint(
        5, config.text.vocab_size, (texts, length), generator=torch.Generator().manual_seed(0)
    )
    stored: Any = engine.cache_image(engine.encode_image(pixels)) if texts < pairs else None

    def match() -> Tensor:
        text = engine.encode_text(ids)
        if stored is not None:
            return engine.fuse(
                stored, engine.cache_text(text)[torch.zeros(pairs, dtype=torch.long)]
            ).pooled
        return engine.fuse(engine.encode_image(pixels), text).pooled

    return match
