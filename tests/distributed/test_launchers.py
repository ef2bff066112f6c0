"""Processes that srun, mpirun or accelerate start meet, or say why they cannot."""

import os
import socket
import subprocess
from datetime import timedelta

import pytest
import torch.distributed as dist

from bridgetower.distributed import available_cores, num_restarts, process_group
from bridgetower.training import state
from bridgetower.training.state import DATA, StateSaver

PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
LAUNCHERS = {
    "accelerate": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}

MEETING = """
import os, sys
import torch
import torch.distributed as dist
from bridgetower.distributed import all_gather, barrier, process_group, rank, world_size
try:
    with process_group("cpu", float(sys.argv[2])):
        print(world_size(), all_gather(torch.tensor([rank()])).tolist(), flush=True)
        if sys.argv[1] == "lose" and rank() == 0:
            os._exit(9)
        barrier()
except ConnectionError as error:
    print(error)
"""


def start_ranks(python, names, ranks, count, act="end", minutes=0.5):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
        }
    processes = [
        subprocess.Popen(
            [python, "-c", MEETING, act, str(minutes)],
            env=os.environ
            | dict(zip(names, (str(rank), str(count), str(rank)), strict=True))
            | variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    return [process.communicate(timeout=300)[0] for process in processes]


@pytest.mark.parametrize("launcher", ["accelerate", "srun"])
def test_four_processes_meet(forked, launcher):
    printed = start_ranks(forked / "python", LAUNCHERS[launcher], range(4), 4)
    assert all("4 [0, 1, 2, 3]" in lines for lines in printed)


def test_a_lost_first_process_is_named(forked):
    _, printed = start_ranks(forked / "python", LAUNCHERS["accelerate"], range(2), 2, "lose")
    assert "process 0 of 2 was lost or did not answer within 0.5 minutes" in printed
    assert "start the run again with --resume" in printed


def test_processes_that_never_come_are_waited_for_no_longer(forked):
    (printed,) = start_ranks(forked / "python", LAUNCHERS["mpirun"], range(1, 2), 2, minutes=0.02)
    assert "process 1 of 2 did not meet the others at 127.0.0.1:" in printed
    assert "within 0.02 minutes" in printed


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch):
    for name in (*PLACE, *(name for names in LAUNCHERS.values() for name in names)):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_a_place_to_meet(launcher, monkeypatch):
    for name, value in zip(LAUNCHERS[launcher], ("1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    message = f"{LAUNCHERS[launcher][1]} is 2, but MASTER_ADDR and MASTER_PORT are not set"
    with pytest.raises(ValueError, match=message), process_group("cpu", 1):
        pass


def test_one_process_and_a_batch_script_are_alone(monkeypatch):
    """The script of a job has its number of tasks, but it is none of them."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "8",
    }.items():
        monkeypatch.setenv(name, value)
    with process_group("cpu", 1):
        assert not dist.is_initialized()


def test_states_are_waited_for_as_long_as_is_asked(monkeypatch, tmp_path):
    timeouts = {}
    monkeypatch.setattr(state, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **options: timeouts.update(options))
    StateSaver(tmp_path, {DATA: {}}, timeout=timedelta(minutes=3))
    assert timeouts == {"backend": "gloo", "timeout": timedelta(minutes=3)}


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(7, None, 7), (7, 1, 7), (7, 3, 2), (2, 4, 1)]
)
def test_processes_of_a_machine_share_its_cores(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert available_cores() == expected


def test_restarts_are_those_that_torchrun_counts(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert num_restarts() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert num_restarts() == 2


@pytest.mark.parametrize("minutes", [0, -1.5])
def test_no_time_to_meet_is_refused_also_by_a_process_alone(minutes):
    with (
        pytest.raises(ValueError, match=f"timeout_minutes is {minutes}"),
        process_group("cpu", minutes),
    ):
        pass
