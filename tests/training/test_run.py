"""Whole runs from their config: what they leave, refuse and start from, and how stopped ones go on."""

import resource
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import bridgetower.objectives.pretraining as pretraining_module
import bridgetower.training.state as state_module
from bridgetower.checkpoints import (
    UNMEASURED,
    convert,
    read_checkpoint,
    update_weights,
    write_checkpoint,
)
from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.sets import prepared_set
from bridgetower.evaluation.masked_words import evaluate_masked_words
from bridgetower.evaluation.retrieval import evaluate_matching, evaluate_retrieval
from bridgetower.files import locked
from bridgetower.model.config import HeadsConfig
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import CONFIG, METRICS, read_metrics
from bridgetower.tasks.table import TASKS
from bridgetower.training.run import read_run, train
from bridgetower.training.setup import starting_checkpoint
from bridgetower.training.state import newest
from helpers.checkpoints import (
    STATE_FOLDER,
    folder_snapshot,
    same_weights,
    saved_state,
    state_files,
    state_tensors,
)
from helpers.models import same_tensors
from helpers.sets import caption_record, write_set
from helpers.shapes import SHAPES_MODEL, prepare_shapes


def unmoved(config):
    return replace(config, max_steps=1, optimizer=replace(config.optimizer, lr=1e-30))


def write_spoilt(folder, config):
    checkpoint = starting_checkpoint(config)
    checkpoint.tensors["vision.patch_embedding.weight"].fill_(3e38)
    write_checkpoint(checkpoint, folder)
    return folder


def write_unreadable(folder):
    splits = {
        split: [caption_record(10 * position + n) for n in range(4)]
        for position, split in enumerate(("train", "validation"))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared_set, "_read_image", lambda image: b"no picture")
        return write_set(folder, splits)


class TestWhatIsLeft:
    def test_files(self, finished, config):
        out, _ = finished
        folders = {STATE_FOLDER, "best", "last", "tensorboard"}
        assert {path.name for path in out.iterdir()} == {CONFIG, METRICS, ".lock", *folders}
        assert read_run(out) == config
        names = {
            "README.md",
            "config.json",
            "model.safetensors",
            "processor.json",
            "tokenizer.json",
        }
        for folder in ("best", "last"):
            assert {path.name for path in (out / folder).iterdir()} == names
            card = (out / folder / "README.md").read_text()
            assert f"bridgetower train {config.recipe}" in card
            assert f"Training data: `{Path(config.data.folders[0]).name}`" in card
            assert "| itc_weight |" in card
        assert [path.name for path in sorted((out / STATE_FOLDER).iterdir())] == [
            "step-00000004",
            "step-00000006",
        ]

    def test_last_holds_the_weights_of_the_state_and_best_the_figures_of_its_step(
        self, finished, config
    ):
        out, metrics = finished
        saved = state_tensors(out)
        last = load_file(out / "last" / "model.safetensors")
        assert saved_state(out).step == 6
        assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in last.items())
        assert read_checkpoint(out / "last").reranking.itc_weight == metrics["itc_weight"]
        evaluations = read_metrics(out, "validation")
        assert [entry["step"] for entry in evaluations] == [2, 4, 6]
        assert {
            name: value for name, value in evaluations[-1].items() if name in metrics
        } == metrics
        best = max(evaluations, key=lambda entry: entry["rsum"])
        checkpoint = read_checkpoint(out)  # the folder of a run is its best checkpoint
        images = CaptionImages(config.data, "validation", checkpoint.processor)
        # fitted again by the same rule
        assert checkpoint.reranking.itc_weight == best["itc_weight"]
        again = evaluate_retrieval(
            checkpoint.model(), images, config.evaluation, reranking=None
        ).metrics()
        again |= evaluate_masked_words(checkpoint.model(), images, config.task.masking)
        assert {name: best[name] for name in again} == pytest.approx(again, abs=1e-6)

    def test_nothing_is_fitted_or_chosen_on_data_that_is_trained_on(self, config, tmp_path, caplog):
        data = replace(config.data, train_splits=("train", "validation"))
        both = replace(config, data=data, max_steps=2, evaluate_every=1)
        out = tmp_path / "run"
        metrics = train(both, out, progress=False)
        assert metrics["validation_is_trained_on"] == 1.0
        assert not {name for name in metrics if name.startswith(("gain_", "calibration_"))}
        assert metrics["two_stage_rsum"] == metrics["matching_rsum"]
        assert all(
            entry["validation_is_trained_on"] == 1.0 for entry in read_metrics(out, "validation")
        )
        assert not (out / "best").exists()
        assert read_checkpoint(out / "last").reranking == UNMEASURED
        assert (
            dict(read_checkpoint(out).tensors).keys()
            == load_file(out / "last" / "model.safetensors").keys()
        )
        assert sum("is trained on" in message for message in caplog.messages) == 1
        assert train(both, out, resume=True, progress=False) == metrics

    def test_epochs_with_large_weights_in_several_files(self, config, tmp_path, monkeypatch):
        for function in (write_checkpoint, update_weights):
            monkeypatch.setattr(
                state_module, function.__name__, partial(function, shard_bytes=20_000)
            )
        epochs = replace(
            config,
            max_steps=None,
            max_epochs=1,
            batch_size=16,
            micro_batch_size=4,
            evaluate_every=1,
        )
        train(epochs, tmp_path / "run", progress=False)
        processor = read_checkpoint(tmp_path / "run").processor
        steps = CaptionImages(config.data, "train", processor).num_examples // 16
        assert saved_state(tmp_path / "run").step == steps
        longer = replace(epochs, max_epochs=None, max_steps=steps + 1)
        train(longer, tmp_path / "run", resume=True, progress=False)  # best/ and last/ are its own
        assert len(list((tmp_path / "run" / "last").glob("model-*.safetensors"))) > 1
        saved = state_tensors(tmp_path / "run")
        for name, weight in read_checkpoint(tmp_path / "run" / "last").tensors.items():
            assert torch.equal(saved[f"model.{name}"], weight)

    def test_the_same_config_gives_the_same_bits(self, finished, config, tmp_path):
        out, metrics = finished
        assert (
            train(replace(config, evaluate_every=0), tmp_path / "again", progress=False) == metrics
        )
        assert same_weights(tmp_path / "again" / "last", out / "last")
        train(replace(config, seed=1, evaluate_every=None), tmp_path / "other", progress=False)
        assert not same_weights(tmp_path / "other" / "last", out / "last")

    def test_evaluation_sees_no_repeats_and_no_augmentation(self, config, tmp_path):
        folder = config.data.folders[0]
        data = replace(
            config.data,
            folders=(folder, folder),
            repeats=(1, 2),
            augmentation="affine",
            word_dropout=0.5,
        )
        evaluation_data = replace(data, repeats=(2, 1), augmentation="none", word_dropout=0.0)
        runs = (replace(unmoved(config), data=data), replace(unmoved(config), data=evaluation_data))
        first, second = (
            train(run, tmp_path / str(number), progress=False) for number, run in enumerate(runs)
        )
        assert first == second


def test_checkpointed_layers_run_twice_and_give_the_same_bits(
    finished, config, tmp_path, monkeypatch
):
    calls = []

    def build(model, task):
        model.fusion.text_layers[0].register_forward_pre_hook(
            lambda layer, inputs: calls.append(layer.training)
        )
        return PretrainingTask(model, task)

    monkeypatch.setattr(pretraining_module, "PretrainingTask", build)
    changed = replace(config, checkpoint_activations=("fusion",), evaluate_every=0)
    assert train(changed, tmp_path / "run", progress=False) == finished[1]
    assert same_weights(tmp_path / "run" / "last", finished[0] / "last")
    # for masked words and for matching, in the four steps that have them
    assert calls.count(True) == 2 * 2 * 4


def test_without_contrastive_head_matching_is_evaluated(config, tmp_path):
    task = PretrainingConfig(phases=(Phase(mlm=1.0, itm=1.0),))
    model = replace(config.model, heads=HeadsConfig(itc=None))
    changed = replace(config, task=task, model=model, select_by="itm_accuracy", max_steps=2)
    metrics = train(changed, tmp_path / "run", progress=False)
    names = {
        "mlm_loss",
        "mlm_accuracy",
        "mlm_wrong_image_loss",
        "mlm_wrong_image_accuracy",
        "itm_accuracy",
    }
    assert metrics.keys() == names
    last = read_checkpoint(tmp_path / "run" / "last")
    images = CaptionImages(config.data, "validation", last.processor)
    assert metrics["itm_accuracy"] == evaluate_matching(last.model(), images, config.evaluation)


class TestRefusals:
    @pytest.mark.parametrize(
        ("heads", "select_by", "message"),
        [
            (
                HeadsConfig(itc=None),
                "rsum",
                "the model has no itc head; use one of itm_accuracy, mlm_accuracy",
            ),
            (
                HeadsConfig(itm=False),
                "two_stage_rsum",
                "the model has no itc and no itm head; use one of mlm_accuracy",
            ),
            (
                SHAPES_MODEL.heads,
                "itm_accuracy",
                "evaluation.candidates is 0, .*; use one of rsum, itc_rsum, mlm_acc",
            ),
        ],
    )
    def test_a_selection_that_cannot_be_evaluated(
        self, config, tmp_path, heads, select_by, message
    ):
        changed = replace(
            config,
            task=PretrainingConfig(phases=(Phase(mlm=1.0, itm=float(heads.itm)),)),
            model=replace(config.model, heads=heads),
            evaluation=replace(config.evaluation, candidates=0),
            select_by=select_by,
        )
        with pytest.raises(ValueError, match=f"select_by is '{select_by}', but {message}"):
            train(changed, tmp_path / "run", progress=False)
        assert not (tmp_path / "run" / METRICS).exists()

    @pytest.mark.parametrize("captions", ["all", "one"])
    def test_examples_are_counted_as_the_task_has_them(self, config, tiny_processor, captions):
        (folder,) = config.data.folders
        data = replace(config.data, train_only=(folder,), repeats=(2, 3), captions=captions)
        pairs = CaptionImages(data, "train", tiny_processor).pairs()
        assert TASKS["pretraining"].count_examples(data) == len(pairs)

    def test_a_folder_with_a_run_or_in_which_another_process_trains(
        self, finished, config, tmp_path
    ):
        with pytest.raises(FileExistsError, match="already holds a run; continue it with --resume"):
            train(config, finished[0], progress=False)
        with locked(tmp_path), pytest.raises(FileExistsError, match="another process works in"):
            train(config, tmp_path, progress=False)
        assert not (tmp_path / CONFIG).exists()

    @pytest.mark.parametrize("spoilt", ["picture", "loss"])
    def test_a_run_that_failed_before_its_second_step_may_be_started_anew(
        self, finished, config, tmp_path, spoilt
    ):
        out = tmp_path / "run"
        failing = replace(config, init=str(write_spoilt(tmp_path / "checkpoint", config)))
        if spoilt == "picture":
            folder = write_unreadable(tmp_path / "data")
            failing = replace(
                config, data=replace(config.data, folders=(str(folder),)), batch_size=2
            )
        for mistake in ({"batch_size": 400}, {"data": replace(config.data, folders=("nowhere",))}):
            with pytest.raises((ValueError, FileNotFoundError), match=r"use batch_size|nowhere"):
                train(replace(config, **mistake), out, progress=False)
        assert not out.exists()
        out.mkdir()
        (out / f".{CONFIG}.partial-abc.json").touch()
        with pytest.raises(
            (FloatingPointError, ValueError),
            match=r"is not finite at step 1|image train/\d\.png of",
        ):
            train(failing, out, progress=False)
        assert (out / METRICS).exists()  # else this shows nothing
        assert train(config, out, progress=False) == finished[1]
        assert same_weights(out / "last", finished[0] / "last")

    @pytest.mark.parametrize("name", ["best", "last", "notes.txt", METRICS])
    def test_a_folder_with_files_of_others(self, config, tmp_path, name):
        mine = tmp_path / name
        if "." not in name:
            mine.mkdir()
            mine = mine / "model.safetensors"
        mine.write_text("mine")
        with pytest.raises(FileExistsError, match=rf"other files \({name}\); choose another --out"):
            train(config, tmp_path, progress=False)
        assert mine.read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize(
        ("changes", "report_to", "message"),
        [
            (
                {"optimizer.rule": "offical"},
                "wandb",
                "optimizer.rule is 'offical'; expected one of adamw, hf_adamw",
            ),
            (
                {"optimizer.schedule": "line"},
                "wandb",
                "schedule is 'line'; expected one of polynomial, cosine",
            ),
            ({}, "neptune", "report_to is 'neptune'; expected one of tensorboard, wandb, trackio"),
            (
                {"micro_batch_size": 3},
                "tensorboard",
                "does not split into 1 processes x 3 micro-batches",
            ),
            ({"image_size": 25}, "tensorboard", "not a multiple of the patch size 10"),
            (
                {"data.max_length": 33},
                "tensorboard",
                r"data\.max_length is 33; the text tower takes at most 32 tokens",
            ),
        ],
    )
    def test_values_that_do_not_fit(self, config, tmp_path, changes, report_to, message):
        for name, value in changes.items():
            section, _, field = name.rpartition(".")
            changed_value = (
                replace(getattr(config, section), **{field: value}) if section else value
            )
            config = replace(config, **{section or field: changed_value})
        with pytest.raises(ValueError, match=message):
            train(config, tmp_path / "run", report_to=[report_to], progress=False)
        assert report_to == "tensorboard" or not (tmp_path / "run").exists()


def test_from_a_checkpoint(config, tiny_checkpoint, tmp_path):
    data = replace(config.data, max_length=20, background=(255, 255, 255))
    changed = replace(unmoved(config), init=str(tiny_checkpoint), data=data, image_size=40)
    train(changed, tmp_path / "run", progress=False)
    before = read_checkpoint(tiny_checkpoint)
    after = read_checkpoint(tmp_path / "run" / "last")
    for name, tensor in before.resized(40).tensors.items():
        assert torch.equal(tensor, after.tensors[name])
    values = replace(
        before.processor.config, max_length=20, background=(255, 255, 255), image_size=40
    )
    assert after.processor.config == values
    assert after.processor.texts(["red bar"]).input_ids.equal(
        before.processor.texts(["red bar"]).input_ids
    )
    again = starting_checkpoint(replace(config, init=str(tmp_path / "run"), image_size=40))
    assert again.processor.config.background == (255, 255, 255)  # which stays


def test_the_image_size_that_was_used_is_recorded(config, tiny_checkpoint, tmp_path, caplog):
    # patches have 10 pixels
    run = replace(unmoved(config), recipe="small", init=str(tiny_checkpoint), image_size=45)
    spec = replace(TASKS["pretraining"], fine_tuning=(run,))
    metrics = train(run, tmp_path / "run", task=spec, progress=False)
    assert read_run(tmp_path / "run", spec).image_size == 20
    assert train(run, tmp_path / "run", task=spec, resume=True, progress=False) == metrics
    assert read_run(tmp_path / "run", spec).image_size == 20
    assert "other values" not in caplog.text


@pytest.mark.parametrize("leftover", [(), ("model.safetensors",)])
def test_killed_before_its_last_checkpoint_was_whole_it_is_written(
    finished, tmp_path, check_end, leftover
):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "last")
    for name in leftover:
        (out / "last").mkdir()
        (out / "last" / name).write_bytes(b"half")
    check_end(out)


def test_a_longer_run_that_is_killed_ends_like_one_that_was_not(
    finished, config, tmp_path, stop_at, caplog
):
    killed = tmp_path / "killed"
    out = tmp_path / "undisturbed"
    longer = replace(config, max_steps=9)
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
    before = folder_snapshot(out)
    assert len(before) > 12  # the folders, state, log, TensorBoard and both checkpoints
    with caplog.at_level("INFO"):
        assert train(longer, out, resume=True, progress=False) == metrics[1]
    assert f"{out} is finished: 9 steps are done" in caplog.text
    assert folder_snapshot(out) == before


class TestChanged:
    def test_goes_on_and_says_what_has_changed(self, config, tmp_path, stop_at, caplog):
        out = tmp_path / "run"
        moved = tmp_path / "moved"
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
        assert saved_state(out).step == 7
        (line,) = read_metrics(out, "changed")
        assert (line["step"], line["optimizer.clip_norm"], line["micro_batch_size"]) == (
            2,
            "None -> 0.5",
            "None -> 4",
        )
        assert f"{out} goes on with other values: " in caplog.text
        assert "optimizer.clip_norm None -> 0.5" in caplog.text

    def test_evaluations_may_be_left_out_and_come_back(self, config, finished, tmp_path, stop_at):
        out = tmp_path / "run"
        stop_at(4, out)
        stop_at(
            2, out, config=replace(config, evaluate_every=None, checkpoint_every=1), resume=True
        )
        assert saved_state(out).step == 3
        assert train(config, out, resume=True, progress=False) == finished[1]
        assert [line["step"] for line in read_metrics(out, "validation")] == [2, 4, 6]

    def test_other_preprocessing_comes_with_its_weights(
        self, config, tmp_path, stop_at, monkeypatch
    ):
        """Killed while it writes them, no folder of weights and preprocessing that do not belong together is left."""
        out = tmp_path / "run"
        data = replace(config.data, max_length=7)
        stop_at(3, out)  # with best/ of step 2
        assert read_checkpoint(out / "best").processor.config.max_length == 24
        # by which best/ is written again
        changed = replace(config, data=data, max_steps=4, select_by="itc_rsum")
        with monkeypatch.context() as patch:
            patch.setattr(
                "bridgetower.checkpoints.io.write_description", Mock(side_effect=KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                train(changed, out, resume=True, progress=False)
        assert not (out / "best" / "config.json").exists()
        train(changed, out, resume=True, progress=False)
        assert read_checkpoint(out / "best").processor.config.max_length == 7
        assert same_weights(out / "best", out / "last")

    def test_other_splits_to_train_on_are_refused_and_lose_nothing(self, config, finished):
        before = folder_snapshot(finished[0])
        data = replace(config.data, train_splits=("train", "test"))
        message = (
            r"of other data: \S+ \(train\) was trained on, now \S+ \(train, test\); put them back"
        )
        with pytest.raises(ValueError, match=message):
            train(replace(config, data=data), finished[0], resume=True, progress=False)
        assert folder_snapshot(finished[0]) == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"fusion.bridge": "sparse_manager"},
                r"task: model\.fusion\.bridge \w+ -> sparse_manager; ",
            ),
            (
                {"vision.hidden_size": 16, "vision.num_heads": 4},
                r"hidden_size 8 -> 16, model\.vision\.num_",
            ),
        ],
    )
    def test_another_model_is_refused_and_loses_nothing(self, config, finished, changes, message):
        before = folder_snapshot(finished[0])
        with pytest.raises(ValueError, match=message):
            train(
                replace(config, model=config.model.override(changes)),
                finished[0],
                resume=True,
                progress=False,
            )
        assert folder_snapshot(finished[0]) == before


def test_a_state_is_a_checkpoint(config, finished, tmp_path):
    state = newest(finished[0])
    read = read_checkpoint(state)
    last = read_checkpoint(finished[0] / "last")
    assert same_tensors(dict(read.tensors), dict(last.tensors))
    assert (read.config, read.labels) == (last.config, last.labels)
    convert(read, tmp_path / "converted", "bridgetower")
    assert same_weights(tmp_path / "converted", finished[0] / "last")
    again = replace(
        config, init=str(state), model=replace(config.model, heads=read.config.heads), max_steps=1
    )
    train(again, tmp_path / "run", progress=False)
    (file,) = state_files(finished[0])
    damaged = tmp_path / "damaged"
    shutil.copytree(state, damaged)
    (damaged / file.name).write_bytes(file.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"damaged/process-00000\.safetensors is not a whole safetensors file"
    ):
        read_checkpoint(damaged)


def test_a_folder_that_is_removed_meanwhile(config, tmp_path, stop_at):
    out = tmp_path / "run"
    config = replace(config, checkpoint_every=100, evaluate_every=0)
    with pytest.raises(
        FileNotFoundError,
        match=r"metrics\.jsonl was removed or moved away while the run wrote to it",
    ):
        stop_at(3, out, lambda: shutil.rmtree(out), config=config, fail=False)


class TestStopped:
    def test_tidies_up_after_a_kill(self, tmp_path, stop_at, check_end):
        out = tmp_path / "run"
        stop_at(2, out)
        (out / "best").mkdir()
        (out / "best" / "model.safetensors").write_bytes(b"half")
        for folder in (out, out / "best"):
            (folder / ".model.safetensors.partial-abc").mkdir()
            (folder / ".model.safetensors.partial-abc" / "model.safetensors").write_bytes(b"half")
        check_end(out)
        assert not list(out.rglob("*partial*"))

    def test_leaves_files_of_others(self, config, tmp_path, stop_at):
        out = tmp_path / "run"
        stop_at(1, out)
        for folder in ("last", "best"):
            (out / folder).mkdir()
            (out / folder / "notes.txt").write_text("mine")
            with pytest.raises(
                FileExistsError, match=rf"{folder}/notes\.txt was not written by the run"
            ):
                train(config, out, resume=True, progress=False)
        with pytest.raises(FileExistsError, match="already holds a run"):
            train(config, out, progress=False)
        assert (out / "best" / "notes.txt").read_text() == "mine"


def test_data_that_is_prepared_anew(config, finished, tmp_path, stop_at):
    pictures = tmp_path / "pictures"
    folder = tmp_path / "set"
    out = tmp_path / "run"
    pictures.mkdir()
    prepare_shapes(pictures, folder)
    moved = replace(config, data=replace(config.data, folders=(str(folder),)))
    stop_at(4, out, config=moved)
    shutil.rmtree(folder)
    prepare_shapes(pictures, folder, seed=1)
    before = folder_snapshot(out)
    with pytest.raises(
        ValueError, match=rf"content of {folder} \(train\) was \w{{64}}, now .* \(validation\) was"
    ):
        train(moved, out, resume=True, progress=False)
    assert folder_snapshot(out) == before
    shutil.rmtree(folder)
    prepare_shapes(pictures, folder)
    assert train(moved, out, resume=True, progress=False) == finished[1]


def test_a_state_for_which_there_is_no_room_leaves_the_one_of_before(
    config, tmp_path, stop_at, check_end
):
    out = tmp_path / "run"
    stop_at(4, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (state_files(out)[0].stat().st_size // 2, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written .*make room on the disk"):
            train(config, out, resume=True, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved_state(out).step == 2
    assert not list(out.rglob("*partial*"))
    check_end(out)
