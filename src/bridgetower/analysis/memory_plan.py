"""Memory that training takes in each process beside activations, from the structure of a model alone."""

from __future__ import annotations

from math import ceil

from torch import nn

from bridgetower.model.bridgetower import BridgeTower

COPIES = {"weights": 1, "gradients": 1, "optimiser": 2}
"""Numbers that are kept for each weight, in float32."""

_BYTES = 4


def memory_plan(model: BridgeTower, processes: int) -> dict[str, dict[str, int]]:
    """Returns bytes of one process by what takes them, with `ddp` and with `fsdp`.

    With `fsdp`, `whole` is what is put together of all shares at the highest: weights and gradients of all that is in
    no layer, weights of two layers (one runs, the next is gathered) and gradients of one.

    Args:
        model: May be on the meta device.
        processes: That share the weights.

    Raises:
        ValueError: There are no processes.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; expected at least 1")
    total = _size(model)
    layers = [_size(layer) for layer in model.layers()]
    share = sum(_share(parameter, processes) for parameter in model.parameters())
    whole = 2 * (total - sum(layers)) + 3 * max(layers, default=0)
    ddp, fsdp = ({name: _BYTES * count * size for name, count in COPIES.items()} for size in (total, share))
    return {"ddp": ddp, "fsdp": {**fsdp, "whole": _BYTES * whole if processes > 1 else 0}}


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _share(parameter: nn.Parameter, processes: int) -> int:
    """The largest share of a process, which are rows; a scalar is whole everywhere."""
    if parameter.ndim == 0:
        return 1
    return ceil(len(parameter) / processes) * parameter[0].numel()
