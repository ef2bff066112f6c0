"""Processes of a run: how they meet, and how they exchange tensors and objects."""

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

_MAX_UNEQUAL = 3  # values that an error spells out
_ANSWER_SECONDS = 10.0  # for which a failed process waits for the others to answer

# Variables by which torchrun or accelerate, Open MPI, MPICH and srun number processes.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@contextmanager
def process_group(device: str | None, timeout_minutes: float) -> Iterator[None]:
    """Joins the processes that a launcher started, each on its own GPU if there are any."""
    if timeout_minutes <= 0:
        raise ValueError(f"timeout_minutes is {timeout_minutes}; expected more than 0")
    if _is_initialised() or not _is_launched():
        yield
        return

    # Meet the other processes.
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store, number, count = next(rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        raise ConnectionError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout_minutes:g} minutes "
            f"({_head_line(error)}); start all of them, or raise --timeout-minutes"
        ) from error
    # After a restart, torchrun's store still has addresses of processes that are gone.
    store = PrefixStore(f"restart {num_restarts()}", store)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", store=store, rank=number, world_size=count, timeout=timeout
    )

    # Where an exchange fails, name the process that was lost.
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        lost = _lost_processes(PrefixStore("after a failure", store), number, count)
        if not lost:
            raise
        raise ConnectionError(
            f"process {', '.join(map(str, lost))} of {count} was lost or did not answer within {timeout_minutes:g} "
            f"minutes ({_head_line(error)}); start the run again with --resume"
        ) from error
    finally:
        dist.destroy_process_group()


def _head_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _lost_processes(store: PrefixStore, number: int, count: int) -> list[int]:
    """Returns the processes that do not say in time that an exchange failed for them too."""
    lost = list(range(count))
    deadline = time.monotonic() + _ANSWER_SECONDS
    try:
        store.set(str(number), "")
        while lost and time.monotonic() < deadline:
            lost = [other for other in lost if not store.check([str(other)])]
            time.sleep(0.1)
    except dist.DistError:  # the first process, which has the store, is gone
        return [0]
    return lost


def _is_launched() -> bool:
    """Whether this process is one of several. If so, this sets `RANK`, `WORLD_SIZE` and `LOCAL_RANK`."""
    if dist.is_torchelastic_launched():
        return True
    for rank_name, count_name, local_name in _LAUNCHERS:
        number = os.environ.get(rank_name)
        count = os.environ.get(count_name)
        local = os.environ.get(local_name)
        if number is None or count is None or int(count) < 2:
            continue
        if local is None and torch.cuda.is_available():
            raise ValueError(
                f"{count_name} is {count}, but {local_name} is not set; set it to the GPU of each process"
            )
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if absent:
            raise ValueError(
                f"{count_name} is {count}, but {' and '.join(absent)} are not set: set them to the address of the "
                "first process and a free port there, or start the processes with torchrun"
            )
        os.environ |= {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": local or "0"}
        return True
    return False


def num_restarts() -> int:
    """Returns how often torchrun has started this process again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def rank() -> int:
    return dist.get_rank() if _is_initialised() else 0


def available_cores() -> int:
    """Returns the cores for this process. Processes that torchrun starts on a machine share them."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def world_size() -> int:
    return dist.get_world_size() if _is_initialised() else 1


def barrier() -> None:
    if _is_initialised():
        dist.barrier()


def broadcast_object(content: Any) -> Any:
    """Returns the object of the first process. All processes have to call this and the functions below."""
    objects = [content]
    if world_size() > 1:
        dist.broadcast_object_list(objects, 0)
    return objects[0]


def broadcast_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the first process, on the CPU."""
    if world_size() == 1:
        return dict(tensors)
    kinds = broadcast_object(
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    )
    received = {}
    for name, (shape, dtype) in kinds.items():
        tensor = tensors[name] if rank() == 0 else torch.empty(shape, dtype=dtype)
        # Bytes, as not every backend sends every dtype.
        data = _sendable(tensor.detach().reshape(-1).view(torch.uint8))
        dist.broadcast(data, 0)
        received[name] = data.cpu().view(dtype).reshape(shape)
    return received


def gather_objects(content: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns the objects of all processes, by rank."""
    objects = [content] * world_size()
    if len(objects) > 1:
        dist.all_gather_object(objects, content, group)
    return objects


def require_same(values: Mapping[str, Any]) -> None:
    """Raises an error unless nested values are the same in all processes."""
    first, *remaining = gather_objects(dict(flattened(values)))
    for number, other in enumerate(remaining, start=1):
        unequal = [
            f"{name} is {first.get(name)} in process 0 and {other.get(name)} in process {number}"
            for name in {**first, **other}
            if first.get(name) != other.get(name)
        ]
        if unequal:
            num_unnamed = len(unequal) - _MAX_UNEQUAL
            ending = f"; and {num_unnamed} more differ" if num_unnamed > 0 else ""
            raise ValueError(
                f"{'; '.join(unequal[:_MAX_UNEQUAL])}{ending}; start every process with the same options and data"
            )


def all_gather(tensor: Tensor, *, gather_with_grads: bool = True) -> Tensor:
    """Concatenates a tensor of every process along the first axis, by rank.

    All processes have to run the backward pass, which sums their gradients of the rows of each. Where all compute the
    same loss, that is `world_size` times its gradient, which the averaging of data-parallel training divides again.
    """
    if world_size() == 1:
        return tensor
    if gather_with_grads:
        gathered: Tensor = _AllGather.apply(tensor)  # type: ignore[no-untyped-call]
        return gathered
    detached = _gather(tensor.detach())
    start = rank() * len(tensor)
    return torch.cat([detached[:start], tensor, detached[start + len(tensor) :]])


@torch.no_grad()
def gather_by_id(ids: Int[Tensor, " n"], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the rows of all processes sorted by id, the same in every process.

    A sampler repeats fewer than `world_size` ids, so that every process has as many; the row of the lowest rank stays.
    """
    if world_size() == 1 and bool((ids.diff() > 0).all()):
        return (ids, *(tensor.detach() for tensor in tensors))  # no copy: lists of pairs are large
    all_ids = _gather_uneven(ids)
    unique_ids, counts = all_ids.unique(return_counts=True)
    repeats = len(all_ids) - len(unique_ids)
    if repeats >= world_size():
        limit = f"at most {world_size() - 1} from the sampler's padding in {world_size()} processes"
        raise ValueError(
            f"{repeats} of {len(all_ids)} ids are repeats; expected {limit}, use an id that names the row"
        )
    rows = all_ids.argsort(stable=True)[counts.cumsum(0) - counts]  # the first of each id
    return (unique_ids, *(_gather_uneven(tensor)[rows] for tensor in tensors))


class _AllGather(torch.autograd.Function):
    """Differentiable gather by public collectives, as PyTorch's own is deprecated or private."""

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
    """Moves a tensor to the GPU for NCCL, which sends nothing else."""
    needs_gpu = dist.get_backend() == "nccl" and tensor.device.type == "cpu"
    return (tensor.cuda() if needs_gpu else tensor).contiguous()


def _gather(tensor: Tensor) -> Tensor:
    sent = _sendable(tensor)
    gathered = sent.new_empty((world_size(), *sent.shape))
    # The collective that takes one tensor for all has another name from torch 2.13 on.
    dist.all_gather(list(gathered.unbind()), sent)
    return gathered.flatten(0, 1).to(tensor.device)


def _gather_uneven(tensor: Tensor) -> Tensor:
    if world_size() == 1:
        return tensor
    lengths = _gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    longest = max(lengths)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    gathered = _gather(padded).reshape(world_size(), longest, *tensor.shape[1:])
    return torch.cat([rows[:length] for rows, length in zip(gathered, lengths, strict=True)])


def _is_initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
