"""Parameters, operations and time of a model, part by part, and of METER: python research/costs.py --preset base.

One image is matched with one text, on the CPU, with random weights of the model's architecture. METER is the same model
fed from the last tower layers only, without bridges. Operations are two per multiply-add, of matrix products and
convolutions. With --processes it prints what training keeps in the memory of each process instead, without the
activations; nothing is measured then. --json prints {"costs": {arm: {figure: {part: …}}}} or {"memory": …}.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from math import ceil

import torch
from torch import nn

from bridgetower.checkpoints import read_checkpoint
from bridgetower.cli.options import resolve_demo
from bridgetower.cli.output import emit, emit_rows
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import ModelConfig
from bridgetower.model.cpu import pack_weights
from bridgetower.model.layers import on_meta
from bridgetower.model.presets import BASE, LARGE, NANO, meter
from bridgetower_demo.costs import flops_by_part, milliseconds_by_part, parameters_by_part

PRESETS = {"base": BASE, "large": LARGE, "nano": NANO}
_COLUMNS = {
    "parameters": ("parameters [M]", 1e6),
    "flops": ("GFLOP", 1e9),
    "milliseconds": ("ms", 1.0),
}

COPIES = {"weights": 1, "gradients": 1, "optimiser": 2}  # numbers that are kept for each weight
_BYTES = 4  # of a number


def memory_plan(model: BridgeTower, processes: int) -> dict[str, dict[str, int]]:
    """Returns bytes of one process by what takes them, with `ddp` and with `fsdp`.

    With `fsdp`, `whole` is what is put together of all shares at the highest: weights and gradients of all that is in
    no layer, weights of two layers (one runs, the next is gathered) and gradients of one.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; expected at least 1")
    total = _size(model)
    layers = [_size(layer) for layer in model.layers()]
    share = sum(_share(parameter, processes) for parameter in model.parameters())
    whole = 2 * (total - sum(layers)) + 3 * max(layers, default=0)
    ddp, fsdp = (
        {name: _BYTES * count * size for name, count in COPIES.items()} for size in (total, share)
    )
    return {"ddp": ddp, "fsdp": {**fsdp, "whole": _BYTES * whole if processes > 1 else 0}}


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _share(parameter: nn.Parameter, processes: int) -> int:
    """The largest share of a process, which are rows."""
    return ceil(len(parameter) / processes) * parameter[0].numel()


def costs(
    config: ModelConfig, text_length: int, repeats: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns what the model and, where it has bridges, its METER cost."""
    arms = (
        {"bridgetower": config}
        if config.fusion.bridge is None
        else {"bridgetower": config, "meter": meter(config)}
    )
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, arm in arms.items():
        network = BridgeTower(arm, generator=torch.Generator().manual_seed(0)).eval()
        parameters, flops = parameters_by_part(network), flops_by_part(network, text_length)
        pack_weights(network)  # as it is when it is used
        milliseconds = milliseconds_by_part(network, text_length, repeats=repeats)
        found[name] = {
            "parameters": dict(parameters),
            "flops": dict(flops),
            "milliseconds": milliseconds,
        }
    return found


def main() -> None:
    """Measures the model of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--preset",
        choices=PRESETS,
        default="base",
        help="a published architecture, or the small one",
    )
    chosen.add_argument("--model", help="a model instead, of which the architecture is read")
    parser.add_argument(
        "--text-length", type=int, default=16, help="tokens of the text, start and end included"
    )
    parser.add_argument("--image-size", type=int, help="pixels; default: the model's own")
    parser.add_argument(
        "--repeats",
        type=int,
        default=10,
        help="timed passes of each part, of which the median counts",
    )
    parser.add_argument(
        "--threads", type=int, help="of the processor; default: as many as PyTorch takes"
    )
    parser.add_argument("--processes", type=int, help="of a training, whose memory is counted")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    name = given.model or given.preset
    config = (
        PRESETS[given.preset]
        if given.model is None
        else read_checkpoint(resolve_demo(given.model, "model")).config
    )
    config = config.override({"heads.itm": True})
    if given.image_size is not None:
        config = config.override({"vision.image_size": given.image_size})
    if given.processes is not None:
        with on_meta():
            memory = memory_plan(BridgeTower(config), given.processes)
        if given.json:
            emit({"model": name, "processes": given.processes, "memory": memory})
            return
        totals = {kind: {**sizes, "total": sum(sizes.values())} for kind, sizes in memory.items()}
        rows = [
            [what, *(f"{sizes.get(what, 0) / 2**30:.2f}" for sizes in totals.values())]
            for what in totals["fsdp"]
        ]
        title = f"{name}: GiB in each of {given.processes} processes, without activations"
        emit_rows(title, ("", *memory), rows)
        return
    found, size = costs(config, given.text_length, given.repeats), config.vision.image_size
    if given.json:
        emit({"model": name, "image_size": size, "text_length": given.text_length, "costs": found})
    else:
        _show(f"{name}: {size} px, {given.text_length} tokens, one pair", found)


def _show(title: str, costs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    titles = [f"{arm}\n{name}" for arm in costs for name, _ in _COLUMNS.values()]
    columns = [
        (cost[figure], unit) for cost in costs.values() for figure, (_, unit) in _COLUMNS.items()
    ]
    rows = [
        [part, *(f"{values[part] / unit:.2f}" for values, unit in columns)]
        for part in columns[0][0]
    ]
    total = ["total", *(f"{sum(values.values()) / unit:.2f}" for values, unit in columns)]
    emit_rows(title, ("", *titles), [*rows, total])


if __name__ == "__main__":
    main()
