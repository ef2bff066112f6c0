"""Trains in forked processes that are killed at random events, continues them, and reports what happened."""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bridgetower import cli
from bridgetower.tasks.run_config import CONFIG
from helpers.checkpoints import STATE_PATTERN, change_state_tensor, saved_state, state_tensors
from helpers.processes import act_before, exit_code_of, renames_to, send_to_self, touches
from helpers.shapes import shapes_train_command

NUM_KILLS = 6
BACKGROUND = ("--async-checkpoints",)  # of every other attempt
MAX_STEPS = 10
OPTIONS = ("--max-steps", str(MAX_STEPS), "--checkpoint-every", "1", "--evaluate-every", "4")


def start_attempt(dataset, out, prepare=lambda: None, *options):
    """Starts an attempt, a resumed one if there is something to resume. Returns its process id."""
    arguments = shapes_train_command(
        dataset, out, *OPTIONS, *options, *(["--resume"] if (out / CONFIG).exists() else [])
    )
    process = os.fork()
    if process == 0:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 0
        try:
            prepare()
            cli.main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return process


def leftovers(out):
    return [path.name for path in out.rglob(".*.partial-*")]


def kill(dataset, out, saved, number, *options):
    def prepare():
        def count_from_here():
            act_before(touches(out), number, lambda: send_to_self(signal.SIGKILL))

        if saved:
            act_before(renames_to(STATE_PATTERN), saved, count_from_here)
        else:
            count_from_here()

    return {
        "ended": exit_code_of(start_attempt(dataset, out, prepare, *options)),
        "leftovers": leftovers(out),
    }


def forget_momentum(out):
    """Takes out of a state what only the optimiser knows."""
    for name, tensor in state_tensors(out).items():
        if name.startswith("exp_avg."):
            change_state_tensor(out, name, torch.zeros_like(tensor))


def step_of(out):
    return saved_state(out).step


def main(dataset, folder):
    source = random.Random(0)
    whole, killed, stopped, altered = (
        folder / name for name in ("whole", "killed", "stopped", "altered")
    )
    report = {"whole": exit_code_of(start_attempt(dataset, whole))}
    report["kills"] = [
        kill(
            dataset, killed, source.randint(0, 2), source.randint(1, 12), *BACKGROUND[: number % 2]
        )
        for number in range(NUM_KILLS)
    ]
    report["killed_at"] = step_of(killed)
    report["killed"] = exit_code_of(start_attempt(dataset, killed))
    stop = source.randint(3, 7)

    def terminate():
        """Sends the signal to the whole group, data workers included, as launchers and schedulers do."""
        os.setsid()
        act_before(renames_to(STATE_PATTERN), stop, lambda: os.killpg(0, signal.SIGTERM))

    report["terminated"] = exit_code_of(
        start_attempt(dataset, stopped, terminate, "--data.num-workers", "1")
    )
    report["stopped_at"] = step_of(stopped)
    shutil.copytree(stopped, altered)
    forget_momentum(altered)
    report["stopped"], report["altered"] = map(
        exit_code_of, [start_attempt(dataset, stopped), start_attempt(dataset, altered)]
    )
    return report


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))  # noqa: T201
