"""Activation checkpointing: a layer keeps its inputs only and runs again for its gradients (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
Output = TypeVar("Output")


def activation_checkpointing(layer: Callable[P, Output], *, when: bool) -> Callable[P, Output]:
    """Returns `layer`, or if `when` a form of it that computes twice and keeps nothing in between.

    The second time, dropout draws what it drew the first time, and autocast is as it was.
    """
    if when and torch.is_grad_enabled():
        return partial(checkpoint, layer, use_reentrant=False)
    return layer
