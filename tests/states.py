"""What a run saved last to continue from."""

from bridgetower.checkpoints.tensors import read_about, read_safetensors, write_safetensors
from bridgetower.training.state import FOLDER, TrainingState, newest

STATE = FOLDER
SAVED = f"*/{STATE}/step-*"
"""Matches what is renamed when a state is whole."""


def saved(out):
    """Where a run is; at its beginning where nothing is saved."""
    path = newest(out)
    return TrainingState() if path is None else TrainingState(**read_about(path)["state"])


def files(out):
    path = newest(out)
    return sorted(path.glob("*.safetensors"))


def tensors(out):
    """What a run of one process saved of weights (`model.NAME`) and moments (`exp_avg.NAME`, …)."""
    (path,) = files(out)
    return dict(read_safetensors(path))


def change(out, name, value):
    (path,) = files(out)
    write_safetensors(path, {**tensors(out), name: value})
