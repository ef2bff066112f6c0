"""Reading in worker processes: the same items in the same order, and the errors of reading in this process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from bridgetower.distributed import available_cores
from bridgetower.processor import load_items, loaded, loading


def doubled(key):
    if key == 7:
        raise OSError("seven cannot be read")
    if key == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    if key == 9:
        os._exit(3)
    return torch.full((2,), 2 * key)


@pytest.mark.parametrize("num_workers", [0, 2])
class TestWorkers:
    def test_items_come_in_order_and_nothing_is_drawn(self, num_workers):
        before = torch.get_rng_state()
        numbers = [
            int(item[0]) for item in load_items(doubled, [3, 1, 2, 3, 5], num_workers=num_workers)
        ]
        assert numbers == [6, 2, 4, 6, 10]
        assert torch.equal(torch.get_rng_state(), before)

    def test_batches(self, num_workers):
        batches = list(loaded(doubled, [range(2), [4]], num_workers=num_workers))
        assert [batch.tolist() for batch in batches] == [[[0, 0], [2, 2]], [[8, 8]]]
        assert list(loaded(doubled, [], num_workers=num_workers)) == []

    def test_an_error_is_that_of_the_item_and_comes_in_its_place(self, num_workers):
        items = load_items(doubled, [1, 7, 2], num_workers=num_workers)
        assert next(items).tolist() == [2, 2]
        with pytest.raises(OSError, match=r"^seven cannot be read$"):
            next(items)


@pytest.mark.parametrize(
    ("key", "ending"), [(8, "was killed by signal 9"), (9, r"ended with status \[3\]")]
)
def test_a_process_that_ends_is_one_line_that_says_what_to_do(key, ending, monkeypatch):
    # not five seconds
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    with pytest.raises(
        ChildProcessError,
        match=f"^a process that .* {ending}; perhaps .* Start the same command",
    ):
        list(load_items(doubled, [1, key, 2], num_workers=1))


def test_a_script_without_a_guard_is_told_to_have_one(tmp_path):
    script = tmp_path / "script.py"
    lines = [
        "from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter",
        "from bridgetower.processor import load_items",
        "_MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.1,)  # not five seconds",
        "{guard}print(list(load_items(str, [1, 2], num_workers=1)))",
    ]
    results = {}
    for guard in ("", "if __name__ == '__main__': "):
        script.write_text("\n".join(lines).format(guard=guard))
        results[guard] = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, check=False
        )
    bare, guarded = results.values()
    assert bare.returncode == 1
    assert "ChildProcessError: " in bare.stderr.splitlines()[-1]
    assert (
        'put what the script does under `if __name__ == "__main__":`'
        in bare.stderr.splitlines()[-1]
    )
    assert bare.stderr.count("Traceback") == 1
    assert guarded.stdout == "['1', '2']\n"


SIGNALLED = """
import multiprocessing, os, signal, sys
from multiprocessing import forkserver
sys.path.insert(0, sys.argv[1])
from test_loading import doubled
from bridgetower.processor import load_items
items = load_items(doubled, [1] * 1000, num_workers=1)  # more than are read until a process has ended
next(items)
server = forkserver._forkserver._forkserver_pid
workers = [int(pid) for pid in open(f"/proc/{server}/task/{server}/children").read().split()]
assert len(workers) == 1
for number in (signal.SIGTERM, signal.SIGHUP):
    for pid in (server, *workers):
        os.kill(pid, number)
print(sum(1 for item in items))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_signals_to_all_processes_leave_the_reading_ones_alone():
    # with a server of workers of its own
    command = [
        sys.executable,
        "-c",
        SIGNALLED,
        Path(__file__).parent,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "999\n", done.stderr


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_loading import doubled
from bridgetower.processor import load_items
items = load_items(doubled, [3] * 100, num_workers=1)
print(int(next(items)[0]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_reading_processes_end_with_a_process_that_is_killed():
    command = [sys.executable, "-c", KILLED, Path(__file__).parent]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=60)  # until none has standard output open
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert output == "6\n"


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(64, "8", 8), (64, "1", 12), (4, "8", 1), (3, "1", 3)]
)
def test_no_more_processes_than_cores_which_those_of_torchrun_share(
    monkeypatch, cores, processes, workers
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(loading, "DataLoader", lambda *_, num_workers, **__: [num_workers])
    assert (
        list(load_items(doubled, [1], num_workers=12)) == [workers] == [min(12, available_cores())]
    )
