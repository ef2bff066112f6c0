"""A run that is killed again and again ends with the same bits as one that is left alone."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from killing import MAX_STEPS, NUM_KILLS, leftovers

from bridgetower.tasks.run_config import METRICS
from bridgetower.training.run import read_run
from helpers.checkpoints import same_weights, saved_state, state_tensors
from helpers.models import same_tensors

pytestmark = pytest.mark.slow

CLOCK = ("time", "seconds", "data_seconds", "pairs_per_second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def report(tiny_dataset, folder, forked):
    command = [forked / "python", Path(__file__).with_name("killing.py"), tiny_dataset, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    return json.loads(done.stdout)


def entries(run):
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


class TestKilled:
    def test_every_kill_hit_a_living_process(self, report):
        assert [kill["ended"] for kill in report["kills"]] == [-signal.SIGKILL] * NUM_KILLS
        assert (report["whole"], report["killed"]) == (0, 0)
        assert 3 < report["killed_at"] < MAX_STEPS

    def test_some_hit_it_while_it_wrote_a_file(self, report):
        assert any(kill["leftovers"] for kill in report["kills"])

    @pytest.mark.parametrize("checkpoint", ["last", "best"])
    def test_weights_are_the_same_bit_for_bit(self, report, folder, checkpoint):
        assert same_weights(folder / "killed" / checkpoint, folder / "whole" / checkpoint)

    def test_so_are_the_state_and_the_log(self, report, folder):
        killed, whole = folder / "killed", folder / "whole"
        assert saved_state(killed) == saved_state(whole)
        assert same_tensors(state_tensors(killed), state_tensors(whole))
        assert entries(folder / "killed") == entries(folder / "whole")
        assert len(entries(folder / "whole")) == MAX_STEPS + -(-MAX_STEPS // 4)

    def test_nothing_is_left_behind(self, report, folder):
        assert leftovers(folder / "killed") == []
        names = [{path.name for path in (folder / name).iterdir()} for name in ("killed", "whole")]
        assert names[0] == names[1]

    def test_there_was_chance_to_get_wrong(self, report, folder):
        config = read_run(folder / "whole")
        assert config.model.text.dropout > 0
        assert config.model.fusion.dropout > 0
        assert len(config.task.phases) > 1


class TestTerminated:
    def test_stops_with_its_own_exit_code_and_says_so(self, report, folder):
        assert report["terminated"] == 128 + signal.SIGTERM
        assert 0 < report["stopped_at"] < MAX_STEPS
        log = (folder / "stopped.log").read_text()
        assert "SIGTERM: stopping after this step" in log
        assert (
            f"stopped after step {report['stopped_at']} of {MAX_STEPS}; --resume continues it"
            in log
        )
        assert "Traceback" not in log

    def test_weights_are_the_same_bit_for_bit(self, report, folder):
        assert report["stopped"] == 0
        assert same_weights(folder / "stopped" / "last", folder / "whole" / "last")

    def test_control_a_state_without_momentum_is_noticed(self, report, folder):
        assert report["altered"] == 0
        assert not same_weights(folder / "altered" / "last", folder / "whole" / "last")
