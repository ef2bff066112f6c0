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
def runs_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def kill_report(tiny_dataset, runs_folder, forked):
    command = [forked / "python", Path(__file__).with_name("killing.py"), tiny_dataset, runs_folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    logs = "\n".join(path.read_text()[-2000:] for path in runs_folder.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    return json.loads(done.stdout)


def metric_entries(run):
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


class TestKilled:
    def test_every_kill_hit_a_living_process(self, kill_report):
        assert [kill["ended"] for kill in kill_report["kills"]] == [-signal.SIGKILL] * NUM_KILLS
        assert (kill_report["whole"], kill_report["killed"]) == (0, 0)
        assert 3 < kill_report["killed_at"] < MAX_STEPS

    def test_some_hit_it_while_it_wrote_a_file(self, kill_report):
        assert any(kill["leftovers"] for kill in kill_report["kills"])

    @pytest.mark.parametrize("checkpoint", ["last", "best"])
    def test_weights_are_the_same_bit_for_bit(self, kill_report, runs_folder, checkpoint):
        assert same_weights(runs_folder / "killed" / checkpoint, runs_folder / "whole" / checkpoint)

    def test_so_are_the_state_and_the_log(self, kill_report, runs_folder):
        killed = runs_folder / "killed"
        whole = runs_folder / "whole"
        assert saved_state(killed) == saved_state(whole)
        assert same_tensors(state_tensors(killed), state_tensors(whole))
        assert metric_entries(runs_folder / "killed") == metric_entries(runs_folder / "whole")
        assert len(metric_entries(runs_folder / "whole")) == MAX_STEPS + -(-MAX_STEPS // 4)

    def test_nothing_is_left_behind(self, kill_report, runs_folder):
        assert leftovers(runs_folder / "killed") == []
        names = [
            {path.name for path in (runs_folder / name).iterdir()} for name in ("killed", "whole")
        ]
        assert names[0] == names[1]

    def test_there_was_chance_to_get_wrong(self, kill_report, runs_folder):
        config = read_run(runs_folder / "whole")
        assert config.model.text.dropout > 0
        assert config.model.fusion.dropout > 0
        assert len(config.task.phases) > 1


class TestTerminated:
    def test_stops_with_its_own_exit_code_and_says_so(self, kill_report, runs_folder):
        assert kill_report["terminated"] == 128 + signal.SIGTERM
        assert 0 < kill_report["stopped_at"] < MAX_STEPS
        log = (runs_folder / "stopped.log").read_text()
        assert "SIGTERM: stopping after this step" in log
        assert (
            f"stopped after step {kill_report['stopped_at']} of {MAX_STEPS}; --resume continues it"
            in log
        )
        assert "Traceback" not in log

    def test_weights_are_the_same_bit_for_bit(self, kill_report, runs_folder):
        assert kill_report["stopped"] == 0
        assert same_weights(runs_folder / "stopped" / "last", runs_folder / "whole" / "last")

    def test_control_a_state_without_momentum_is_noticed(self, kill_report, runs_folder):
        assert kill_report["altered"] == 0
        assert not same_weights(runs_folder / "altered" / "last", runs_folder / "whole" / "last")
