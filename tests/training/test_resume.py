"""Runs that were stopped: how they go on, what they refuse, and what a full disk leaves of them."""

import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fitting import Caplog, Finished, StopAt

import shapes
import states
from bridgetower.checkpoints import convert, read_checkpoint
from bridgetower.tasks.run_config import RunConfig, read_metrics
from bridgetower.training.run import read_run, train
from bridgetower.training.state import newest
from folders import same_weights, snapshot
from tiny import equal

CheckEnd = Callable[[Path], None]


@pytest.mark.parametrize("left", [(), ("model.safetensors",)])
def test_killed_before_its_last_checkpoint_was_whole_it_is_written(
    finished: Finished, tmp_path: Path, check_end: CheckEnd, left: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "last")
    for name in left:
        (out / "last").mkdir()
        (out / "last" / name).write_bytes(b"half")
    check_end(out)


def test_a_longer_run_that_is_killed_ends_like_one_that_was_not(
    finished: Finished, config: RunConfig, tmp_path: Path, stop_at: StopAt, caplog: Caplog
) -> None:
    """A finished run goes on as a run of the new length would."""
    killed, out, longer = tmp_path / "killed", tmp_path / "undisturbed", replace(config, max_steps=9)
    for folder in (killed, out):
        shutil.copytree(finished[0], folder)
    stop_at(2, killed, config=longer, resume=True)
    assert not (killed / "last" / "config.json").exists()
    metrics = [train(longer, folder, resume=True, progress=False) for folder in (killed, out)]
    assert metrics[0] == metrics[1]
    assert same_weights(killed / "last", out / "last")
    assert [line["step"] for line in read_metrics(out, "validation")] == [2, 4, 6, 8, 9]
    assert read_run(out) == longer
    assert not same_weights(out / "last", finished[0] / "last")
    before = snapshot(out)
    assert len(before) > 12  # the folders, state, log, TensorBoard and both checkpoints
    with caplog.at_level("INFO"):
        assert train(longer, out, resume=True, progress=False) == metrics[1]
    assert f"{out} is finished: all 9 steps are done" in caplog.text
    assert snapshot(out) == before


class TestChanged:
    def test_goes_on_and_says_what_has_changed(
        self, config: RunConfig, tmp_path: Path, stop_at: StopAt, caplog: Caplog
    ) -> None:
        out, moved = tmp_path / "run", tmp_path / "moved"
        stop_at(4, out)
        shutil.copytree(config.data.folders[0], moved)
        changed = replace(
            config,
            optimizer=replace(config.optimizer, lr=1e-4, clip_norm=0.5),
            data=replace(config.data, folders=(str(moved),), cache=not config.data.cache),
            evaluation=replace(config.evaluation, batch_size=3),
            model=config.model.override({"text.dropout": 0.25}),
            micro_batch_size=4,
            checkpoint_activations=("vision", "fusion"),
            parallel="fsdp",
            max_skipped_steps=3,
            max_steps=7,
            log_every=2,
            checkpoint_every=3,
            evaluate_every=7,
        )
        train(changed, out, resume=True, progress=False)
        assert read_run(out) == changed
        assert [line["step"] for line in read_metrics(out, "train")] == [1, 2, 4, 6, 7]
        assert [line["step"] for line in read_metrics(out, "validation")] == [2, 7]
        assert states.saved(out).step == 7
        (line,) = read_metrics(out, "changed")
        assert (line["step"], line["optimizer.clip_norm"], line["micro_batch_size"]) == (2, "None -> 0.5", "None -> 4")
        assert f"{out} goes on with other values: " in caplog.text
        assert "optimizer.clip_norm None -> 0.5" in caplog.text

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fusion.bridge": "sparse_manager"}, r"task: model\.fusion\.bridge \w+ -> sparse_manager; "),
            ({"vision.hidden_size": 16, "vision.num_heads": 4}, r"hidden_size 8 -> 16, model\.vision\.num_"),
        ],
    )
    def test_another_model_is_refused_and_loses_nothing(
        self, config: RunConfig, finished: Finished, changes: dict[str, object], message: str
    ) -> None:
        before = snapshot(finished[0])
        with pytest.raises(ValueError, match=message):
            train(replace(config, model=config.model.override(changes)), finished[0], resume=True, progress=False)
        assert snapshot(finished[0]) == before


def test_a_state_is_a_checkpoint(config: RunConfig, finished: Finished, tmp_path: Path) -> None:
    """Before any evaluation too; another run starts from it."""
    state = newest(finished[0])
    assert state is not None
    read, last = read_checkpoint(state), read_checkpoint(finished[0] / "last")
    assert equal(dict(read.tensors), dict(last.tensors))
    assert (read.config, read.labels) == (last.config, last.labels)
    convert(read, tmp_path / "converted", "bridgetower")
    assert same_weights(tmp_path / "converted", finished[0] / "last")
    again = replace(config, init=str(state), model=replace(config.model, heads=read.config.heads), max_steps=1)
    train(again, tmp_path / "run", progress=False)
    (file,) = states.files(finished[0])
    damaged = tmp_path / "damaged"
    shutil.copytree(state, damaged)
    (damaged / file.name).write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"damaged/process-00000\.safetensors is not a whole safetensors file"):
        read_checkpoint(damaged)


def test_a_folder_that_is_removed_meanwhile(config: RunConfig, tmp_path: Path, stop_at: StopAt) -> None:
    out = tmp_path / "run"
    config = replace(config, checkpoint_every=100, evaluate_every=0)
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl was removed or moved away while the run wrote to it"):
        stop_at(3, out, lambda: shutil.rmtree(out), config=config, fail=False)


class TestStopped:
    def test_tidies_up_after_a_kill(self, tmp_path: Path, stop_at: StopAt, check_end: CheckEnd) -> None:
        """Half-written temporary files, and a first best checkpoint that was cut off before its config."""
        out = tmp_path / "run"
        stop_at(2, out)
        (out / "best").mkdir()
        (out / "best" / "model.safetensors").write_bytes(b"half")
        for folder in (out, out / "best"):
            (folder / ".model.safetensors.partial-abc").mkdir()
            (folder / ".model.safetensors.partial-abc" / "model.safetensors").write_bytes(b"half")
        check_end(out)
        assert not list(out.rglob("*partial*"))

    def test_leaves_files_of_others(self, config: RunConfig, tmp_path: Path, stop_at: StopAt) -> None:
        out = tmp_path / "run"
        stop_at(1, out)
        for folder in ("last", "best"):
            (out / folder).mkdir()
            (out / folder / "notes.txt").write_text("mine")
            with pytest.raises(FileExistsError, match=rf"{folder}/notes\.txt was not written by the run"):
                train(config, out, resume=True, progress=False)
        with pytest.raises(FileExistsError, match="already holds a run"):
            train(config, out, progress=False)
        assert (out / "best" / "notes.txt").read_text() == "mine"


def test_data_that_is_prepared_anew(config: RunConfig, finished: Finished, tmp_path: Path, stop_at: StopAt) -> None:
    """The same pictures do; another split is refused, and named."""
    pictures, folder, out = tmp_path / "pictures", tmp_path / "set", tmp_path / "run"
    pictures.mkdir()
    shapes.prepare_shapes(pictures, folder)
    moved = replace(config, data=replace(config.data, folders=(str(folder),)))
    stop_at(4, out, config=moved)
    shutil.rmtree(folder)
    shapes.prepare_shapes(pictures, folder, seed=1)
    before = snapshot(out)
    message = rf"data: content of {folder} \(train\) was \w{{64}}, now \w{{64}}, .* \(validation\) was"
    with pytest.raises(ValueError, match=message):
        train(moved, out, resume=True, progress=False)
    assert snapshot(out) == before
    shutil.rmtree(folder)
    shapes.prepare_shapes(pictures, folder)
    assert train(moved, out, resume=True, progress=False) == finished[1]


def test_a_state_for_which_there_is_no_room_leaves_the_one_of_before(
    config: RunConfig, tmp_path: Path, stop_at: StopAt, check_end: CheckEnd
) -> None:
    """With a limit on the size of files, which needs no rights."""
    out = tmp_path / "run"
    stop_at(4, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (states.files(out)[0].stat().st_size // 2, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written .*make room on the disk"):
            train(config, out, resume=True, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert states.saved(out).step == 2
    assert not list(out.rglob("*partial*"))
    check_end(out)
