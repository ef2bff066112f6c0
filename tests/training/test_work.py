"""Every kind of task is trained, evaluated, and continued with the same bits."""

import shutil
from dataclasses import replace
from functools import cache

import pytest
from fitting import KINDS, prepared, run

from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.config import DataConfig
from bridgetower.files import read_json, write_json
from bridgetower.inference.predictor import load
from bridgetower.model.config import HeadsConfig
from bridgetower.tasks.entries import VqaConfig
from bridgetower.tasks.table import RECIPES
from bridgetower.training.run import train
from bridgetower.training.setup import build_task, starting_checkpoint
from bridgetower.training.state import newest
from helpers.checkpoints import same_weights
from helpers.sets import ANSWERS, ENTRY_KINDS, png_of_colour, write_entry_set
from helpers.shapes import shapes_run_config


@pytest.fixture(scope="module")
def trained_runs(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return cache(lambda kind: (folder / kind, train(runs[kind], folder / kind, progress=False)))


@pytest.mark.parametrize("kind", KINDS)
def test_is_continued_with_the_same_bits(kind, runs, trained_runs, tmp_path):
    (whole, metrics) = trained_runs(kind)
    out = tmp_path / "run"
    assert runs[kind].select_by in metrics
    assert kind != "ranking" or {"rsum", "one_stage_rsum", "chance_rsum"} <= metrics.keys()
    shutil.copytree(whole, out)
    last = newest(out)
    assert last is not None
    for folder in (last, out / "last", out / "best"):
        shutil.rmtree(folder)
    before = newest(out)
    assert before is not None
    step = int(before.name[5:])
    with pytest.raises(
        FileNotFoundError, match=rf"at step {step} of {runs[kind].max_steps} steps: .* --resume"
    ):
        read_checkpoint(out)
    read_checkpoint(before)  # as the message says
    assert train(runs[kind], out, resume=True, progress=False) == metrics
    for name in ("last", "best"):
        assert same_weights(out / name, whole / name)


def test_a_trained_head_keeps_its_answers(runs, trained_runs, tmp_path):
    """They travel from the set into the checkpoint, and its order counts then, not that of another set."""
    first = runs["vqa"]
    (out, _) = trained_runs("vqa")
    answers = load(out, device="cpu").answer(png_of_colour("red"), "What colour is this?", top=99)
    assert {choice.label for choice in answers} == set(ANSWERS)
    folder = write_entry_set(tmp_path / "set", "vqa")
    write_json(folder / "answers.json", list(ANSWERS[::-1]))
    second = replace(first, init=str(out), data=replace(first.data, folders=(str(folder),)))
    assert starting_checkpoint(second).labels == {"vqa": ANSWERS}


def test_a_number_of_answers_that_is_the_recipes_gives_way_to_that_of_the_data(runs, tmp_path):
    model = replace(runs["vqa"].model, heads=RECIPES["vqav2-base"].model.heads)
    config = replace(runs["vqa"], recipe="vqav2-base", model=model)
    out = tmp_path / "run"
    metrics = train(config, out, progress=False)
    assert read_json(out / "run.json")["model"]["heads"]["vqa"] == len(ANSWERS)
    assert train(config, out, resume=True, progress=False) == metrics


def test_paper_leaves_questions_out_and_trains_on_both_splits(runs):
    config = runs["vqa"]
    both = replace(config.data, train_splits=("train", "validation"))
    checkpoint = starting_checkpoint(config)
    papers = replace(config, task=VqaConfig(protocol="paper"), data=both)
    standard, paper = (build_task(run, checkpoint, checkpoint.model()) for run in (config, papers))
    assert (len(standard.examples), len(paper.examples)) == (14, 23)
    unsure = standard.evaluate()["vqa_score_yes_no"]
    assert paper.evaluate()["vqa_score_yes_no"] == pytest.approx(unsure * 5 / 4, abs=1e-4)


@pytest.mark.parametrize("kind", ENTRY_KINDS)
def test_from_nothing_with_a_tokenizer_of_the_texts(kind, runs):
    processor = starting_checkpoint(replace(runs[kind], init=None)).processor
    assert len(processor.token_ids(["colour" if kind == "vqa" else "red"])[0]) < 6


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("nlvr2", {"data.train_splits": ("test",), "batch_size": 2}, "of split test has no label"),
        ("nlvr2", {"data.validation_split": "test"}, "of split test has no label"),
        (
            "vqa",
            {"model.heads": HeadsConfig(mlm=False, itm=False, vqa=5)},
            r"model\.heads\.vqa is 5; leave it out",
        ),
        ("vqa", {"data": "snli-ve"}, "use a set of kind vqa"),
        ("snli-ve", {"data": "vqa"}, "use a set of kind snli-ve"),
    ],
)
def test_refused_before_training(runs, tmp_path, kind, changes, message):
    config = runs[kind]
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        changed_value = runs[value].data if field == "data" else value
        changed_value = (
            replace(getattr(config, section), **{field: changed_value})
            if section
            else changed_value
        )
        config = replace(config, **{section or field: changed_value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config, tmp_path / "run", progress=False)


class Recorded:
    def __init__(self, examples, *, hidden=False):
        self.examples = examples
        self.seen = list[tuple[int, ...]]()
        if not hidden:
            self.set_numbers = examples.set_numbers

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        self.seen.append(key.examples)
        return self.examples[key]


@pytest.fixture
def one_set(tiny_dataset):
    folders = (str(tiny_dataset),) * 2
    data = DataConfig(folders=folders, max_length=24, one_set_per_batch=True)
    return shapes_run_config(tiny_dataset, data=data, evaluate_every=None)


def read_run(config, folder, **options):
    checkpoint = starting_checkpoint(config)
    context = build_task(config, checkpoint, checkpoint.model().train())
    if config.freeze_towers:
        context = prepared(config, folder / "cache")
    examples = Recorded(context.examples, **options)
    run(
        replace(context, examples=examples, checkpoint=None),
        folder / str(config.data.one_set_per_batch),
    )
    return examples


@pytest.mark.parametrize("frozen", [False, True])
def test_examples_of_a_batch_are_of_one_set(one_set, tmp_path, frozen):
    config = replace(one_set, freeze_towers=frozen)
    mixed = replace(config, data=replace(config.data, one_set_per_batch=False))  # control
    batches = []
    for run_config in (config, mixed):
        examples = read_run(run_config, tmp_path)
        batches.append(
            [{bool(examples.set_numbers[example]) for example in seen} for seen in examples.seen]
        )
    assert all(len(sets) == 1 for sets in batches[0])
    assert len(set.union(*batches[0])) == 2
    assert any(len(sets) == 2 for sets in batches[1])


def test_examples_that_do_not_tell_their_images_are_refused(one_set, tmp_path):
    with pytest.raises(ValueError, match="the examples of pretraining have no set_numbers"):
        read_run(one_set, tmp_path, hidden=True)
