"""Trains in forked processes, kills them at random moments, continues them, and reports what happened.

Called as `python killing.py DATASET FOLDER`. The heavy imports happen once, here; every attempt is a process of its own
that runs the command line, as if it had been started from a shell.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import bridgetower.training.run  # noqa: F401 - what the attempts will need
from bridgetower import cli
from bridgetower.training.logs import METRICS, read_metrics
from bridgetower.training.run import CONFIG, STATE
from shapes import train_command

NUM_KILLS = 20
MAX_STEPS = 80
OPTIONS = ("--max-steps", str(MAX_STEPS), "--checkpoint-every", "1", "--evaluate-every", "6")
PATIENCE = 60.0  # seconds after which something hangs


def start(dataset: Path, out: Path) -> int:
    """Starts an attempt, a resumed one if there is something to resume; returns its process id."""
    arguments = train_command(dataset, out, *OPTIONS, *(["--resume"] if (out / CONFIG).exists() else []))
    process = os.fork()
    if process == 0:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 0
        try:
            cli.main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return process


def end(process: int) -> int:
    """Waits for the end; returns the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_until(process: int, happened: Callable[[], bool]) -> bool:
    """Watches until something happened; False if the process ended before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if happened():
            return True
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
    raise TimeoutError(f"an attempt did nothing for {PATIENCE} seconds")


def leftovers(out: Path) -> list[str]:
    """Temporary files in the folder of a run."""
    return [path.name for path in out.rglob(".*.partial-*")]


def size_of_log(out: Path) -> int:
    """Bytes of metrics.jsonl."""
    return (out / METRICS).stat().st_size if (out / METRICS).exists() else 0


def kill(dataset: Path, out: Path, moment: str, source: random.Random, seconds_per_step: float) -> dict[str, Any]:
    """Lets an attempt run up to some moment and kills it there.

    Args:
        dataset: What it trains on.
        out: Folder of the run.
        moment: `start`, while it loads; `step`, somewhere in the steps; `write`, while a file is written.
        source: Of the delays.
        seconds_per_step: Scale of the delays.
    """
    before = size_of_log(out)
    process = start(dataset, out)
    if moment == "start":
        time.sleep(source.uniform(0, 20 * seconds_per_step))
    else:
        wait_until(process, lambda: size_of_log(out) > before)
        time.sleep(source.uniform(0, 3 * seconds_per_step))
        if moment == "write":
            wait_until(process, lambda: bool(leftovers(out)))
    os.kill(process, signal.SIGKILL)
    return {"moment": moment, "ended": end(process), "leftovers": leftovers(out)}


def terminate(dataset: Path, out: Path, source: random.Random, seconds_per_step: float) -> int:
    """Asks an attempt to stop in the middle; returns its exit code."""
    process = start(dataset, out)
    wait_until(process, lambda: size_of_log(out) > 0)
    time.sleep(source.uniform(5, 15) * seconds_per_step)
    os.kill(process, signal.SIGTERM)
    return end(process)


def forget_momentum(out: Path) -> None:
    """Takes out of a state what only the optimiser knows."""
    content = torch.load(out / STATE, weights_only=True)
    for state in content["optimizer"]["state"].values():
        state["exp_avg"].zero_()
    torch.save(content, out / STATE)


def main(dataset: Path, folder: Path) -> dict[str, Any]:
    """Runs everything and returns what happened."""
    source = random.Random(0)
    whole, killed, stopped, altered = (folder / name for name in ("whole", "killed", "stopped", "altered"))
    report: dict[str, Any] = {"whole": end(start(dataset, whole))}
    times = [line["time"] for line in read_metrics(whole, "train")]
    seconds_per_step = (times[-1] - times[0]) / (len(times) - 1)
    moments = ["start"] * 6 + ["step"] * 7 + ["write"] * 7
    source.shuffle(moments)
    report["kills"] = [kill(dataset, killed, moment, source, seconds_per_step) for moment in moments]
    report["killed"] = end(start(dataset, killed))
    report["terminated"] = terminate(dataset, stopped, source, seconds_per_step)
    report["stopped_at"] = torch.load(stopped / STATE, weights_only=True)["state"]["step"]
    shutil.copytree(stopped, altered)
    forget_momentum(altered)
    report["stopped"], report["altered"] = end(start(dataset, stopped)), end(start(dataset, altered))
    return report


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))  # noqa: T201
