"""What the host learns of steps: whether they were finite, and whether a process has to stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bridgetower.distributed import world_size
from bridgetower.training.step import check_gradients


class StepWatch:
    """Looks at the numbers of each step; on a GPU when the next step has begun, so that none is waited for."""

    def __init__(self) -> None:
        self._open: deque[tuple[int, Tensor, torch.cuda.Event | None, Sequence[str]]] = deque()
        self._stop = False

    def note(self, step: int, means: Mapping[str, Tensor], ids: Sequence[str], *, stop: bool) -> bool:
        """Takes the numbers of a step; returns whether a process asked to stop, as far as is known.

        Args:
            step: Counted from 1.
            means: Its losses, with the norm of the gradients.
            ids: Of its examples.
            stop: Whether this process was asked to; every process has to call this.

        Raises:
            FloatingPointError: A loss or a gradient is not finite; examples are named.
        """
        norm = means["gradient_norm"]
        stops = torch.tensor(float(stop)).to(norm.device, non_blocking=True)
        if world_size() > 1:
            dist.all_reduce(stops)
        values, event = torch.stack([stops, means["loss"].float() * 0 + norm]), None
        if norm.is_cuda:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._open.append((step, values, event, ids))
        self.settle(leave=1 if norm.is_cuda else 0)
        return self._stop

    def settle(self, *, leave: int = 0) -> None:
        """Looks at all steps but the last `leave`, before something is kept of them.

        Raises:
            FloatingPointError: A loss or a gradient is not finite; examples are named.
        """
        while len(self._open) > leave:
            step, values, event, ids = self._open.popleft()
            if event is not None:
                event.synchronize()
            stops, norm = values.unbind()
            check_gradients(norm, ids, step)
            self._stop |= bool(stops > 0)
