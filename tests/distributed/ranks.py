"""Runs functions in several gloo processes on this machine, which stay for the next function."""

import atexit
import multiprocessing
import os
import pickle
import tempfile
import traceback
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = 300.0  # seconds that the other processes get after one has failed


class Group:
    """Processes of one group, each at the end of a pipe."""

    def __init__(self, world_size):
        context = multiprocessing.get_context("forkserver")
        self.folder = tempfile.TemporaryDirectory()
        rendezvous = (Path(self.folder.name) / "rendezvous").as_uri()
        self.pipes = []
        self.processes = []
        for rank in range(world_size):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, rendezvous, theirs))
            process.start()
            theirs.close()
            self.pipes.append(pipe)
            self.processes.append(process)

    def run(self, request):
        for pipe in self.pipes:
            pipe.send_bytes(request)
        answers = {}
        while len(answers) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waiting, None if all(done for done, _ in answers.values()) else PATIENCE)
            for pipe in ready or waiting:
                rank = self.pipes.index(pipe)
                answers[rank] = False, "it hung or ended without a word"
                if ready:
                    with suppress(EOFError):
                        answers[rank] = pickle.loads(pipe.recv_bytes())
        return [answers[rank] for rank in range(len(self.pipes))]

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()
        self.folder.cleanup()


_GROUPS = {}


@atexit.register
def _close():
    while _GROUPS:
        _GROUPS.popitem()[1].close()


def run_on_ranks(world_size, function, *args):
    """Returns what `function(*args)` returns in each of `world_size` processes of one group, by rank."""
    if world_size not in _GROUPS:
        _GROUPS[world_size] = Group(world_size)
    answers = _GROUPS[world_size].run(pickle.dumps((dict(os.environ), function, args)))
    failed = [f"rank {rank}:\n{trace}" for rank, (done, trace) in enumerate(answers) if not done]
    if failed:
        _GROUPS.pop(world_size).close()
        raise RuntimeError("\n".join(failed))
    return [result for _, result in answers]


def _serve(rank, world_size, rendezvous, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    with suppress(EOFError):
        while True:
            environment, function, args = pickle.loads(pipe.recv_bytes())
            os.environ.clear()
            os.environ.update(environment)
            try:
                answer = True, function(*args)
                dist.barrier()
            except Exception:  # noqa: BLE001 - then nothing more can be exchanged
                pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
                return
            pipe.send_bytes(pickle.dumps(answer))
