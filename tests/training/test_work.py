"""Every kind of task is trained, evaluated, and continued with the same bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fitting import KINDS

import asked
from bridgetower.files import write_json
from bridgetower.predictor import load
from bridgetower.tasks.entries import VqaConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.run import train
from bridgetower.training.setup import build_task
from bridgetower.training.start import starting_checkpoint
from folders import same_weights


@pytest.mark.parametrize("kind", KINDS)
def test_is_continued_with_the_same_bits(
    kind: str, runs: dict[str, RunConfig], tmp_path: Path, stop_at: Callable[..., None]
) -> None:
    metrics = train(runs[kind], tmp_path / "whole", progress=False)
    assert runs[kind].select_by in metrics
    assert kind != "ranking" or {"rsum", "one_stage_rsum", "chance_rsum"} <= metrics.keys()
    stop_at(4, tmp_path / "stopped", config=runs[kind])  # in the second of three steps of two micro-batches
    assert train(runs[kind], tmp_path / "stopped", resume=True, progress=False) == metrics
    assert same_weights(tmp_path / "stopped" / "last", tmp_path / "whole" / "last")


def test_a_trained_head_keeps_its_answers(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    """They travel from the set into the checkpoint, and its order counts then, not that of another set."""
    first = replace(runs["vqa"], max_steps=1)
    train(first, tmp_path / "first", progress=False)
    answers = load(tmp_path / "first", device="cpu").answer(asked.png("red"), "What colour is this?", top=99)
    assert {choice.label for choice in answers} == set(asked.ANSWERS)
    folder = asked.write_set(tmp_path / "set", "vqa")
    write_json(folder / "answers.json", list(asked.ANSWERS[::-1]))
    second = replace(first, init=str(tmp_path / "first"), data=replace(first.data, folders=(str(folder),)))
    assert starting_checkpoint(second).labels == {"vqa": asked.ANSWERS}
    heads = replace(runs["vqa"].model.heads, vqa=5)
    config = replace(runs["vqa"], model=replace(runs["vqa"].model, heads=heads))
    with pytest.raises(
        ValueError, match=r"vqa has 11 answers or classes here, but model\.heads\.vqa is 5; set it to 11"
    ):
        starting_checkpoint(config)


def test_paper_leaves_questions_out_and_trains_on_both_splits(runs: dict[str, RunConfig]) -> None:
    config = replace(runs["vqa"], max_steps=1)
    both = replace(config.data, train_splits=("train", "validation"))
    paper = replace(config, task=VqaConfig(protocol="paper"), data=both)
    checkpoint = starting_checkpoint(config)
    standard_work, paper_work = (build_task(run, checkpoint, checkpoint.model()) for run in (config, paper))
    assert (len(standard_work.examples), len(paper_work.examples)) == (14, 23)
    unsure = standard_work.evaluate()["vqa_score_yes_no"]
    assert paper_work.evaluate()["vqa_score_yes_no"] == pytest.approx(unsure * 5 / 4, abs=1e-4)


def test_statements_without_labels_are_refused_before_training(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    for split in ({"train_splits": ("test",)}, {"validation_split": "test"}):
        config = replace(runs["nlvr2"], data=replace(runs["nlvr2"].data, **split))
        with pytest.raises(ValueError, match="of split test has no label"):
            train(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize("kind", asked.KINDS)
def test_from_nothing_with_a_tokenizer_of_the_texts(kind: str, runs: dict[str, RunConfig]) -> None:
    processor = starting_checkpoint(replace(runs[kind], init=None)).processor
    assert processor is not None
    assert len(processor.token_ids(["colour" if kind == "vqa" else "red"])[0]) < 6


def test_another_kind_of_set(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    config = replace(runs["vqa"], data=runs["snli-ve"].data)
    with pytest.raises(FileNotFoundError, match=r"no answers\.json in .*; give a VQA set"):
        train(config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="use a set of kind snli-ve"):
        train(replace(runs["snli-ve"], data=runs["vqa"].data), tmp_path / "run", progress=False)
