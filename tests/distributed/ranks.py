"""Runs a function in several gloo processes on this machine."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Returns what `function(*args)` returns in each of `world_size` processes of one group, by rank.

    Args:
        world_size: Number of processes.
        function: A function of a module (the processes import it), with a picklable result.
        args: Picklable arguments, the same for every process.

    Raises:
        RuntimeError: The function failed in a process; holds the traceback of every process that failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            given = (world_size, folder, dict(os.environ), function, args)
            mp.start_processes(_run, given, world_size, start_method="forkserver")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            # The first process to end may only be one that lost its peer: show where each of them failed.
            traces = [path.read_text() for path in sorted(folder.glob("error-*.txt"))]
            raise RuntimeError("\n".join(traces)) from error
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _run(
    rank: int,
    world_size: int,
    folder: Path,
    environment: Mapping[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)  # may have changed since the server of forks was started
    torch.set_num_threads(1)
    rendezvous = (folder / "rendezvous").as_uri()
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(minutes=10)
    )
    try:
        (folder / f"result-{rank}").write_bytes(pickle.dumps(function(*args)))
        dist.barrier()
    except Exception:
        (folder / f"error-{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
