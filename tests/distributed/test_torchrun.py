"""`torchrun … -m bridgetower train` runs two processes as one run, which continues with the same bits."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bridgetower import cli
from bridgetower.tasks.run_config import read_metrics
from bridgetower.training.run import train
from helpers import processes
from helpers.checkpoints import same_weights, saved_state
from helpers.sets import write_entry_set
from helpers.shapes import shapes_run_config, shapes_train_command

pytestmark = pytest.mark.slow


STEPS = 8
PATIENCE = 900.0  # seconds after which something hangs
TWO = ("--standalone", "--nproc-per-node", "2")

# Runs the command in a folder of the process's own, and with the option that is for this process.
ON_NODES = """
import os, sys
from bridgetower import cli
rank, (folders, options, *command) = int(os.environ["RANK"]), sys.argv[1:]
os.chdir(folders.split(",")[rank])
cli.main([*command, *options.split(",")[rank].split()])
"""


def start_torchrun(torchrun, dataset, out, *options, program=("-m", "bridgetower")):
    command = shapes_train_command(
        dataset, out, "--max-steps", str(STEPS), "--evaluate-every", "3", *options
    )
    return subprocess.Popen(
        [*torchrun, *TWO, *program, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    try:
        out, error = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, without_gloo(out), error


def without_gloo(out):
    """Output without what the processes' gloo prints, at once, in some releases of PyTorch, such as 2.10."""
    return "\n".join(
        line for line in out.splitlines() if line and not re.search(r"\[Gloo\]|peer ranks", line)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("torchrun")


@pytest.fixture(scope="module")
def torchrun(forked):
    return [forked / "torchrun"]


@pytest.fixture(scope="module")
def uninterrupted(torchrun, tiny_dataset, folder):
    return finish(start_torchrun(torchrun, tiny_dataset, folder / "whole"))


@pytest.fixture(scope="module")
def stopped_and_continued(torchrun, tiny_dataset, folder):
    """A run that torchrun was asked to stop when it was about to save what it evaluated first."""
    waiting = folder / "waiting"
    program = (processes.__file__, "*/best/config.json", "1", "SIGTERM", str(waiting))
    process = start_torchrun(torchrun, tiny_dataset, folder / "stopped", program=program)
    while not waiting.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    return finish(process)


def test_one_result_and_one_log(uninterrupted, stopped_and_continued, folder):
    code, out, error = stopped_and_continued
    assert code != 0
    assert out == ""
    assert f"of {STEPS}; --resume continues it" in error
    code, out, error = uninterrupted
    assert code == 0, error
    (line,) = out.splitlines()
    assert json.loads(line)["run"] == str(folder / "whole")
    assert [entry["step"] for entry in read_metrics(folder / "whole", "train")] == list(
        range(1, STEPS + 1)
    )
    assert [entry["step"] for entry in read_metrics(folder / "whole", "validation")] == [
        3,
        6,
        STEPS,
    ]
    assert len(list((folder / "whole").rglob("*.jsonl"))) == 1


# Kills the second process once, at its sixth step, or stops it there without an end.
LOSING = """
import os, signal, sys, time
from bridgetower import cli, distributed
from bridgetower.training import trainer as loop
original, distributed._ANSWER_SECONDS = loop.run_step, 2.0
def run_step(task, context, optimizer, batches, step, skipped):
    if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "kill" else time.sleep(1000)
    return original(task, context, optimizer, batches, step, skipped)
loop.run_step = run_step
cli.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def losing(folder):
    (folder / "losing.py").write_text(LOSING)
    return str(folder / "losing.py")


def test_killed_and_started_again_by_torchrun_it_ends_with_the_same_bits(
    torchrun, tiny_dataset, folder, losing, uninterrupted
):
    out = folder / "again"
    restarting = (*torchrun, "--max-restarts", "1")
    program = (losing, "kill")
    code, _, error = finish(
        start_torchrun(restarting, tiny_dataset, out, "--checkpoint-every", "4", program=program)
    )
    assert code == 0, error
    assert same_weights(folder / "whole" / "last", out / "last")
    assert [entry["step"] for entry in read_metrics(out, "train")] == list(range(1, STEPS + 1))


def test_a_process_that_does_not_answer_ends_the_others_and_is_named(
    torchrun, tiny_dataset, folder, losing
):
    out = folder / "hung"
    options = ("--checkpoint-every", "4", "--timeout-minutes", "0.05")
    code, _, error = finish(
        start_torchrun(torchrun, tiny_dataset, out, *options, program=(losing, "hang"))
    )
    assert code != 0
    assert "bridgetower: process 1 of 2 was lost or did not answer within 0.05 minutes" in error
    assert saved_state(out).step == 4


@pytest.fixture
def nodes(torchrun, tmp_path):
    (tmp_path / "nodes.py").write_text(ON_NODES)

    def call(dataset, out, *options, node_options=("", "")):
        for name in ("first", "second"):
            (tmp_path / name).mkdir(exist_ok=True)
        program = (
            str(tmp_path / "nodes.py"),
            f"{tmp_path}/first,{tmp_path}/second",
            ",".join(node_options),
        )
        return start_torchrun(torchrun, dataset, out, *options, program=program)

    return call


def test_continued_it_ends_with_the_same_bits_though_one_process_does_not_see_its_folder(
    uninterrupted, stopped_and_continued, tiny_dataset, folder, tmp_path, nodes
):
    assert 0 < saved_state(folder / "stopped").step < STEPS
    shutil.copytree(folder / "stopped", tmp_path / "first" / "run")
    code, _, error = finish(nodes(tiny_dataset, Path("run"), "--resume"))
    assert code == 0, error
    assert list((tmp_path / "second").iterdir()) == []
    for checkpoint in ("last", "best"):
        assert same_weights(folder / "whole" / checkpoint, tmp_path / "first" / "run" / checkpoint)
    steps = [entry["step"] for entry in read_metrics(tmp_path / "first" / "run", "train")]
    assert steps == list(range(1, STEPS + 1))


def test_arguments_that_differ_are_refused(tiny_dataset, tmp_path, nodes):
    node_options = "--out one", "--out two --optimizer.lr 0.25 --resume"
    code, out, error = finish(nodes(tiny_dataset, Path("run"), node_options=node_options))
    assert code != 0
    assert out == ""
    assert (
        "bridgetower: out is one in process 0 and two in process 1; resume is False in process 0 and True"
        in error
    )
    assert not [path for name in ("first", "second") for path in (tmp_path / name).iterdir()]


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="this PyTorch is built for CUDA and would call its driver, which is not there",
)
def test_processes_on_cpus_leave_gpus_alone(tiny_dataset, folder, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "1",
    }
    for name, value in {
        **world,
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    backends = []
    original = torch.distributed.init_process_group

    def init_process_group(backend, **options):
        backends.append(backend)
        original(backend, **options)

    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train(
        shapes_run_config(tiny_dataset, device="cpu", max_steps=1), folder / "cpu", progress=False
    )
    assert backends == ["gloo"]


def test_evaluation_in_two_processes_is_that_of_one(torchrun, answering_checkpoint, tmp_path):
    write_entry_set(tmp_path / "set", "nlvr2")
    command = [
        "evaluate",
        str(answering_checkpoint),
        "nlvr2",
        "--data",
        str(tmp_path / "set"),
        "--split",
        "validation",
    ]
    options = ["--device", "cpu", "--batch-size", "2", "--out"]
    cli.main([*command, *options, str(tmp_path / "one")])
    program = [*torchrun, *TWO, "-m", "bridgetower", *command, *options, str(tmp_path / "two")]
    settings = {
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
        "capture_output": True,
        "text": True,
        "timeout": PATIENCE,
    }
    done = subprocess.run(program, **settings, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = without_gloo(done.stdout).splitlines()
    reports = [
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    ]
    assert json.loads(line) == reports[1] == reports[0]
    for name in ("submission.csv", "predictions.jsonl"):
        by_one, by_two = ((tmp_path / folder / name).read_text() for folder in ("one", "two"))
        assert by_one.count("\n") == by_two.count("\n") == 5
        assert name.endswith("jsonl") or by_one == by_two
