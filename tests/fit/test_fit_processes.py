"""A fit by several processes, and one that is killed, against one that is left alone."""

import json
import os
import re
import subprocess

import pytest
from test_fit import write_table

import bridgetower
from bridgetower.tasks.run_config import read_metrics
from helpers import processes
from helpers.checkpoints import same_weights

pytestmark = pytest.mark.slow

EPOCHS = 2
COMMAND = ("--json", "--max-epochs", str(EPOCHS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="module")
def labels_table(folder):
    return write_table(folder, "labels", 60)


@pytest.fixture(scope="module")
def whole(folder, labels_table, tiny_checkpoint):
    return bridgetower.fit(
        labels_table, folder / "whole", str(tiny_checkpoint), max_epochs=EPOCHS, progress=False
    )


def finish_fit(program, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*map(str, program), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_make_one_model_and_one_result(num_processes, tmp_path, tiny_checkpoint, forked):
    labels_table = write_table(tmp_path, "labels", 60, splits=True)
    alone = bridgetower.fit(
        labels_table, tmp_path / "alone", str(tiny_checkpoint), max_epochs=EPOCHS, progress=False
    )
    out = tmp_path / "together"
    torchrun = (forked / "torchrun", "--standalone", "--nproc-per-node", num_processes)
    done = finish_fit(
        (*torchrun, "-m", "bridgetower", "fit"),
        *(labels_table, "--out", out, "--init", tiny_checkpoint, *COMMAND),
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    report = json.loads(line)
    assert report["model"] == str(out / "run/best")
    assert report["result"]["num_examples"] == alone.result.num_examples == 12
    # They train on the same batches: the losses differ by dropout alone.
    entries = {
        folder: read_metrics(folder / "run", "train") for folder in (out, tmp_path / "alone")
    }
    assert [entry["step"] for entry in entries[out]] == [
        entry["step"] for entry in entries[tmp_path / "alone"]
    ]


@pytest.mark.parametrize("moment", ["*/folds/fold-2/last/config.json", "*/result.json"])
def test_killed_it_goes_on_by_the_same_command_and_ends_with_the_same_bits(
    moment, folder, labels_table, tiny_checkpoint, whole, forked
):
    out = folder / re.sub(r"\W", "", moment)
    command = ("fit", labels_table, "--out", out, "--init", tiny_checkpoint, *COMMAND)
    killing = (forked / "python", processes.__file__, moment, "1", "SIGKILL", "self")
    done = finish_fit(killing, *command)
    assert done.returncode == -9, done.stderr
    assert not (out / "result.json").exists()
    done = finish_fit((forked / "bridgetower",), *command)
    assert done.returncode == 0, done.stderr
    for run_folder in ("folds/fold-1", "folds/fold-2", "folds/fold-5", "run"):
        assert same_weights(out / run_folder / "last", folder / "whole" / run_folder / "last")
    assert json.loads(done.stdout)["result"] == json.loads(json.dumps(whole.result.to_dict()))
