"""Processes of a run: ranks, gathered batches, results put together by id; and the number of cores."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from bridgetower.files import flattened

_NAMED = 3  # values that are spelt out where processes differ


_ANSWER_SECONDS = 10.0  # that the other processes get to say that they are there


_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""Variables by which torchrun or accelerate, Open MPI, MPICH and srun tell a process its place."""


@contextmanager
def process_group(device: str | None, timeout_minutes: float) -> Iterator[None]:
    """Joins the processes that a launcher started, each on a GPU of its own if there are any; leaves them at the end.

    Alone, or in a group that is there already, it does nothing.
    """
    if timeout_minutes <= 0:
        raise ValueError(f"timeout_minutes is {timeout_minutes}; expected more than 0")
    if _is_initialised() or not _is_launched():
        yield
        return
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store, number, count = next(rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at {place} within "
            f"{timeout_minutes:g} minutes ({str(error).splitlines()[0]}); start all of them, or raise --timeout-minutes"
        ) from error
    # Restarts get torchrun's store of before, with addresses of processes that are gone.
    store = PrefixStore(f"restart {num_restarts()}", store)
    dist.init_process_group("nccl" if on_gpus else "gloo", store=store, rank=number, world_size=count, timeout=timeout)
    try:
        yield
    except RuntimeError as error:
        lost: list[int] = []  # the processes that do not say in time that an exchange failed for them too
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            answers = PrefixStore("after a failure", store)
            lost, deadline = list(range(count)), time.monotonic() + _ANSWER_SECONDS
            try:
                answers.set(str(number), "")
                while lost and time.monotonic() < deadline:
                    lost = [other for other in lost if not answers.check([str(other)])]
                    time.sleep(0.1)
            except dist.DistError:  # the first process, which has the store, is gone
                lost = [0]
        if lost:
            raise ConnectionError(
                f"process {', '.join(map(str, lost))} of {count} was lost or did not answer within {timeout_minutes:g} "
                f"minutes ({str(error).splitlines()[0]}); start the run again with --resume"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _is_launched() -> bool:
    """Whether this process is one of several; `RANK`, `WORLD_SIZE` and `LOCAL_RANK` then say which."""
    if dist.is_torchelastic_launched():
        return True
    for names in _LAUNCHERS:
        number, count, local = map(os.environ.get, names)
        if number is None or count is None or int(count) < 2:
            continue
        if local is None and torch.cuda.is_available():
            raise ValueError(f"{names[1]} is {count}, but {names[2]} is not set; set it to the GPU of each process")
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if absent:
            raise ValueError(
                f"{names[1]} is {count}, but {' and '.join(absent)} are not set: set them to the address of the first "
                "process and a free port there, or start the processes with torchrun"
            )
        os.environ |= {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": local or "0"}
        return True
    return False


def num_restarts() -> int:
    """How often torchrun has started this process again after a failure; 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def rank() -> int:
    """Index of this process; 0 without an initialised process group."""
    return dist.get_rank() if _is_initialised() else 0


def available_cores() -> int:
    """Cores that this process may use, where the system gives them; else those of the machine."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def world_size() -> int:
    """Number of processes; 1 without an initialised process group."""
    return dist.get_world_size() if _is_initialised() else 1


def barrier() -> None:
    """Waits until all processes are here."""
    if _is_initialised():
        dist.barrier()


def from_first(content: Any) -> Any:
    """Returns what the first process gives, in every process; every process has to call it."""
    if world_size() == 1:
        return content
    if rank() == 0:
        tensors: list[Tensor] = []

        def emptied(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        file = BytesIO()
        torch.save(_map_tensors(content, emptied), file)
        written = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        for tensor in (torch.tensor(len(written)), written, *tensors):
            _broadcast(tensor)
        return content
    size = _broadcast(torch.tensor(0))
    written = _broadcast(torch.empty(int(size), dtype=torch.uint8))
    frame = torch.load(BytesIO(written.numpy().tobytes()), weights_only=True)
    return _map_tensors(frame, lambda tensor: _broadcast(torch.empty(tensor.shape, dtype=tensor.dtype)))


def require_same(values: Mapping[str, Any]) -> None:
    """Checks that all processes have the same values; every process has to call it."""
    text = torch.frombuffer(bytearray(json.dumps(dict(flattened(values))).encode()), dtype=torch.uint8)
    ends = _gather_uneven(torch.tensor([len(text)])).cumsum(0).tolist()
    joined = _gather_uneven(text).numpy().tobytes()
    first, *others = (json.loads(joined[start:end]) for start, end in pairwise([0, *ends]))
    for number, other in enumerate(others, 1):
        unequal = [
            f"{name} is {first.get(name)} in process 0 and {other.get(name)} in process {number}"
            for name in {**first, **other}
            if first.get(name) != other.get(name)
        ]
        if unequal:
            more = f"; and {len(unequal) - _NAMED} more differ" if len(unequal) > _NAMED else ""
            raise ValueError(f"{'; '.join(unequal[:_NAMED])}{more}; start every process with the same options and data")


def all_gather(tensor: Tensor, *, gather_with_grads: bool = True) -> Tensor:
    """Concatenates a tensor of every process along the first axis, by rank; the tensor itself in a single process.

    The gradient of this process's rows is the sum of what all processes return for them, so every process has to
    run the backward pass. If all of them compute one and the same loss of the gathered rows, that is `world_size`
    times the gradient of a single process, which the averaging of data-parallel training makes equal to it.
    """
    if tensor.ndim == 0:
        raise ValueError("a tensor without axes was given; expected [b, ...], use tensor[None]")
    if world_size() == 1:
        return tensor
    if gather_with_grads:
        gathered: Tensor = _AllGather.apply(tensor)  # type: ignore[no-untyped-call]
        return gathered
    others, start = _gather(tensor.detach()), rank() * len(tensor)
    return torch.cat([others[:start], tensor, others[start + len(tensor) :]])


@torch.no_grad()
def gather_by_id(ids: Int[Tensor, " n"], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Puts the rows of all processes together, one per id and sorted by id, the same in every process.

    A distributed sampler repeats a few samples to give every process the same number; such a repeat is dropped, and
    the row of the lowest rank stays. It never adds `world_size` rows or more, so more repeats than that are ids that
    do not name their rows, and an error.
    """
    if ids.ndim != 1:
        raise ValueError(f"ids are {list(ids.shape)}; expected one per row, [n]")
    for tensor in tensors:
        if tensor.ndim == 0 or len(tensor) != len(ids):
            raise ValueError(f"a tensor of shape {list(tensor.shape)} came with {len(ids)} ids; expected a row per id")
    if world_size() == 1 and bool((ids.diff() > 0).all()):
        return (ids, *(tensor.detach() for tensor in tensors))  # no copy: lists of pairs are large
    all_ids = _gather_uneven(ids)
    order = all_ids.argsort(stable=True)
    ordered = all_ids[order]
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    repeats = len(ordered) - int(is_first.sum())
    if repeats >= world_size():
        limit = f"at most {world_size() - 1} from the sampler's padding in {world_size()} processes"
        raise ValueError(f"{repeats} of {len(ordered)} ids are repeats; expected {limit}, use an id that names the row")
    rows = order[is_first]
    return (all_ids[rows], *(_gather_uneven(tensor)[rows] for tensor in tensors))


class _AllGather(torch.autograd.Function):
    """Differentiable gather on public collectives; PyTorch's own is deprecated or private."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A reduce-scatter would move half as much, but gloo has it only in part.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        rows = len(total) // world_size()
        return total[rank() * rows : (rank() + 1) * rows]


def _map_tensors(content: Any, change: Callable[[Tensor], Any]) -> Any:
    """Returns nested containers with every tensor changed, in order."""
    if isinstance(content, Tensor):
        return change(content)
    if isinstance(content, dict):
        return {key: _map_tensors(value, change) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_map_tensors(value, change) for value in content)
    return content


def _broadcast(tensor: Tensor) -> Tensor:
    """Returns the tensor of the first process, on the CPU; its shape and dtype must be those of all."""
    data = _sendable(tensor.detach().reshape(-1).view(torch.uint8))  # not every backend takes every dtype
    dist.broadcast(data, 0)
    return data.cpu().view(tensor.dtype).reshape(tensor.shape)


def _sendable(tensor: Tensor) -> Tensor:
    """NCCL moves GPU memory only, and results are often kept on the CPU."""
    needs_gpu = dist.get_backend() == "nccl" and tensor.device.type == "cpu"
    return (tensor.cuda() if needs_gpu else tensor).contiguous()


def _gather(tensor: Tensor) -> Tensor:
    sent = _sendable(tensor)
    gathered = sent.new_empty((world_size(), *sent.shape))
    # Into parts of one tensor: the collective that takes the whole has another name from torch 2.13 on.
    dist.all_gather(list(gathered.unbind()), sent)
    return gathered.flatten(0, 1).to(tensor.device)


def _gather_uneven(tensor: Tensor) -> Tensor:
    if world_size() == 1:
        return tensor
    lengths = _gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    longest = max(lengths)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = _gather(padded).reshape(world_size(), longest, *tensor.shape[1:])
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _is_initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
