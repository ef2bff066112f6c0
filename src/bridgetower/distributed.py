"""Processes of a run: ranks, gathered batches, results put together by id; and the number of cores."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
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

# Variables by which torchrun or accelerate, Open MPI, MPICH and srun tell a process its place.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@contextmanager
def process_group(device: str | None, timeout_minutes: float) -> Iterator[None]:
    """Joins the processes that a launcher started, each on a GPU of its own if there are any; alone it does nothing."""
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
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", store=store, rank=number, world_size=count, timeout=timeout
    )
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        answers = PrefixStore("after a failure", store)
        # The processes that do not say in time that an exchange failed for them too.
        lost, deadline = list(range(count)), time.monotonic() + _ANSWER_SECONDS
        try:
            answers.set(str(number), "")
            while lost and time.monotonic() < deadline:
                lost = [other for other in lost if not answers.check([str(other)])]
                time.sleep(0.1)
        except dist.DistError:  # the first process, which has the store, is gone
            lost = [0]
        if not lost:
            raise
        raise ConnectionError(
            f"process {', '.join(map(str, lost))} of {count} was lost or did not answer within {timeout_minutes:g} "
            f"minutes ({str(error).splitlines()[0]}); start the run again with --resume"
        ) from error
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
            raise ValueError(
                f"{names[1]} is {count}, but {names[2]} is not set; set it to the GPU of each process"
            )
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
    """How often torchrun has started this process again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def rank() -> int:
    return dist.get_rank() if _is_initialised() else 0


def available_cores() -> int:
    """Of this process: those that torchrun starts on a machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def world_size() -> int:
    return dist.get_world_size() if _is_initialised() else 1


def barrier() -> None:
    if _is_initialised():
        dist.barrier()


def from_first(content: Any) -> Any:
    """What the first process gives; every process has to call this, and what follows."""
    found = [content]
    if world_size() > 1:
        dist.broadcast_object_list(found, 0)
    return found[0]


def tensors_from_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Does the same with named tensors, one after the other; they arrive on the CPU."""
    if world_size() == 1:
        return dict(tensors)
    found = {}
    for name, (shape, dtype) in from_first(
        {name: (each.shape, each.dtype) for name, each in tensors.items()}
    ).items():
        tensor = tensors[name] if rank() == 0 else torch.empty(shape, dtype=dtype)
        # not every backend takes every dtype
        data = _sendable(tensor.detach().reshape(-1).view(torch.uint8))
        dist.broadcast(data, 0)
        found[name] = data.cpu().view(dtype).reshape(shape)
    return found


def from_all(content: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each process gives, by rank."""
    found = [content] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, content, group)
    return found


def require_same(values: Mapping[str, Any]) -> None:
    first, *others = from_all(dict(flattened(values)))
    for number, other in enumerate(others, 1):
        unequal = [
            f"{name} is {first.get(name)} in process 0 and {other.get(name)} in process {number}"
            for name in {**first, **other}
            if first.get(name) != other.get(name)
        ]
        if unequal:
            more = f"; and {len(unequal) - _NAMED} more differ" if len(unequal) > _NAMED else ""
            raise ValueError(
                f"{'; '.join(unequal[:_NAMED])}{more}; start every process with the same options and data"
            )


def all_gather(tensor: Tensor, *, gather_with_grads: bool = True) -> Tensor:
    """Concatenates a tensor of every process along the first axis, by rank; all have to run the backward pass.

    The gradient of this process's rows is the sum of what all return for them: of a loss that all compute alike,
    `world_size` times that of a single process, which the averaging of data-parallel training makes equal to it.
    """
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

    Of what a sampler repeats to give every process as many, less than `world_size`, the row of the lowest rank stays.
    """
    if world_size() == 1 and bool((ids.diff() > 0).all()):
        return (ids, *(tensor.detach() for tensor in tensors))  # no copy: lists of pairs are large
    all_ids = _gather_uneven(ids)
    each, counts = all_ids.unique(return_counts=True)
    repeats = len(all_ids) - len(each)
    if repeats >= world_size():
        limit = f"at most {world_size() - 1} from the sampler's padding in {world_size()} processes"
        raise ValueError(
            f"{repeats} of {len(all_ids)} ids are repeats; expected {limit}, use an id that names the row"
        )
    rows = all_ids.argsort(stable=True)[counts.cumsum(0) - counts]  # the first of each id
    return (each, *(_gather_uneven(tensor)[rows] for tensor in tensors))


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
        return total.chunk(world_size())[rank()]


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
