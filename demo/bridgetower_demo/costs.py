"""Size and cost of a model: parameters, floating-point operations and time of one pair, part by part."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import LinearHead
from bridgetower_demo.results import PARTS, Arm, ModelCost


def model_cost(
    model: BridgeTower, text_length: int, *, arm: Arm, repeats: int = 30, warmup: int = 5
) -> ModelCost:
    """Measures what it takes to match one image of the model's own size with one text.

    The pass is the one of `Predictor.match`: both towers, the fusion encoder read at its two CLS positions, the
    matching head. The model is left in the mode that it was in; its device and precision are used.

    Args:
        model: With a matching head.
        text_length: Tokens of the text, start and end included.
        arm: Which model of the comparison it is.
        repeats: Timed passes of each part, of which the median counts.
        warmup: Passes before them.

    Raises:
        ValueError: The model has no matching head, or the numbers are too small.
    """
    training = model.training
    model.eval()
    try:
        parameters = parameters_by_part(model)
        milliseconds = milliseconds_by_part(model, text_length, repeats=repeats, warmup=warmup)
        return ModelCost(
            arm=arm,
            parameters=sum(parameters.values()),
            parameters_by_part=parameters,
            gflops_per_pair_by_part={
                part: flops / 1e9 for part, flops in flops_by_part(model, text_length).items()
            },
            milliseconds_per_pair=sum(milliseconds.values()),
        )
    finally:
        model.train(training)


def parameters_by_part(model: BridgeTower) -> dict[str, int]:
    """Returns numbers of parameters; what is neither tower nor head belongs to the fusion encoder."""
    towers = {"image tower": _parameters(model.vision), "text tower": _parameters(model.text)}
    heads = sum(
        _parameters(child) for name, child in model.named_children() if name.endswith("_head")
    )
    fusion = _parameters(model) - sum(towers.values()) - heads
    return {**towers, "fusion encoder": fusion, "heads": heads}


@torch.inference_mode()
def flops_by_part(model: BridgeTower, text_length: int) -> dict[str, int]:
    """Returns the floating-point operations of matching one pair, two per multiply-add.

    Matrix products and convolutions are counted, attention included; additions of biases, norms and activations are
    not. The fusion encoder includes projections and poolers.

    Raises:
        ValueError: The model has no matching head, or the text no token.
    """
    head = _matching_head(model)
    pixels, ids = _inputs(model, text_length)
    with _counting() as counter:
        pooled = model(pixels, ids, outputs="pooled").pooled
    counts = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    image_tower, text_tower = (
        counts[f"{type(model).__name__}.{tower}"] for tower in ("vision", "text")
    )
    with _counting() as of_head:
        head(pooled)
    rest = counter.get_total_flops() - image_tower - text_tower
    return dict(zip(PARTS, (image_tower, text_tower, rest, of_head.get_total_flops()), strict=True))


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    # The counter has no formula for oneDNN's product and would count it as nothing.
    formulas = (
        {torch.ops.mkldnn._linear_pointwise: _product_flops}
        if torch.backends.mkldnn.is_available()
        else {}
    )
    # Nor every fused attention of GPUs; written out as two products it is counted on every device.
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        yield counter


def _product_flops(rows: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Operations of rows · weightᵀ."""
    return 2 * prod(rows) * weight[0]


@torch.inference_mode()
def milliseconds_by_part(
    model: BridgeTower, text_length: int, *, repeats: int = 10, warmup: int = 3
) -> dict[str, float]:
    """Returns the median time of each part in matching one pair; the parts are those of `flops_by_part`.

    The fusion encoder's time is what a pass takes beyond the towers and the head.

    Args:
        model: With a matching head, in evaluation mode.
        text_length: Tokens of the text, start and end included.
        repeats: Timed passes of each part, in turn.
        warmup: Passes before them.

    Raises:
        ValueError: The model has no matching head, or the numbers are too small.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats is {repeats} and warmup {warmup}; expected at least 1 and 0")
    head = _matching_head(model)
    pixels, ids = _inputs(model, text_length)
    pooled = model(pixels, ids, outputs="pooled").pooled
    passes: tuple[Callable[[], object], ...] = (
        lambda: model.vision(pixels, model.config.vision_layers),
        lambda: model.text(ids, None, model.config.text_layers),
        lambda: model(pixels, ids, outputs="pooled"),
        lambda: head(pooled),
    )
    rounds = [
        [_timed(forward, pixels.device) for forward in passes] for _ in range(warmup + repeats)
    ]
    image, text, backbone, heads = (
        statistics.median(times) for times in zip(*rounds[warmup:], strict=True)
    )
    return dict(zip(PARTS, (image, text, max(0.0, backbone - image - text), heads), strict=True))


def _timed(forward: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one pass."""
    _wait(device)
    start = time.perf_counter()
    forward()
    _wait(device)
    return 1000 * (time.perf_counter() - start)


def _inputs(model: BridgeTower, text_length: int) -> tuple[Tensor, Tensor]:
    """Draws one image and one text without padding, the same at every call."""
    if text_length < 1:
        raise ValueError(f"text_length is {text_length}; expected at least 1")
    generator = torch.Generator().manual_seed(0)
    weight = model.token_type_embedding.weight
    size, text = model.config.vision.image_size, model.config.text
    pixels = torch.randn(1, 3, size, size, generator=generator)
    ids = torch.randint(
        text.pad_token_id + 1, text.vocab_size, (1, text_length), generator=generator
    )
    return pixels.to(weight), ids.to(weight.device)


def _matching_head(model: BridgeTower) -> LinearHead:
    if model.itm_head is None:
        raise ValueError("the model has no matching (ITM) head; measure one that has")
    return model.itm_head


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
