"""Mixed precision: which part of a computation runs in bfloat16."""

from __future__ import annotations

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context of a forward pass, whose products run in bfloat16 if `precision` is `bf16`.

    Inputs, weights and outputs keep their number format; a loss is to be computed of float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
