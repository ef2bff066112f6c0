"""Questions as batches: targets of the vocabulary, and pure functions of their key."""

from pathlib import Path
from typing import Any

import pytest
import torch

import asked
from bridgetower.data.answers import soft_targets
from bridgetower.data.config import DataConfig
from bridgetower.data.pictures import Pictures
from bridgetower.data.sampling import BatchKey
from bridgetower.data.schema import SCHEMAS
from bridgetower.data.vqa import VqaQuestions
from bridgetower.processor import Processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asked.write_set(tmp_path_factory.mktemp("vqa"), "vqa")


@pytest.fixture
def load(folder: Path, tiny_processor: Processor) -> Any:
    def make(split: str = "train", *, answerable: bool = False, **config: Any) -> VqaQuestions:
        data = DataConfig(folders=(str(folder),), **config)
        pictures = Pictures(data, split, tiny_processor, schema=SCHEMAS["vqa"])
        return VqaQuestions(pictures, asked.ANSWERS, answerable=answerable)

    return make


def test_content(load: Any, tiny_processor: Processor) -> None:
    questions = load()
    entries = list(questions)
    batch = questions[BatchKey((4, 1), 3)]
    assert batch.ids == ("1020", "1001")
    text = tiny_processor.texts([entries[4]["question"], entries[1]["question"]])
    assert torch.equal(batch.input_ids, text.input_ids)
    assert torch.equal(batch.pixel_values, tiny_processor.images([asked.png("blue"), asked.png("red")]))
    found = [
        {name: score for name, score in zip(asked.ANSWERS, row, strict=True) if score} for row in batch.targets.tolist()
    ]
    assert found == [
        {"blue": pytest.approx(1.0), "green": pytest.approx(0.6)},
        {"yes": pytest.approx(1.0), "no": pytest.approx(1.0)},
    ]
    assert found[0] == pytest.approx(soft_targets(entries[4]["answers"], asked.ANSWERS))
    assert batch.seed == 3


def test_questions_without_an_answer_of_the_vocabulary(load: Any) -> None:
    everything, answerable = load(), load(answerable=True)
    left_out = [1021, 1051]
    assert len(everything) == 16
    assert [entry["question_id"] for entry in answerable] == [
        entry["question_id"] for entry in everything if entry["question_id"] not in left_out
    ]
    row = [entry["question_id"] for entry in everything].index(1021)
    assert not everything[BatchKey((row,), 0)].targets.any()


def test_questions_that_must_have_answers(folder: Path, tiny_processor: Processor) -> None:
    pictures = Pictures(DataConfig(folders=(str(folder),)), "test", tiny_processor, schema=SCHEMAS["vqa"])
    with pytest.raises(ValueError, match="question 3000 of split test has no answers; choose a split that has"):
        VqaQuestions(pictures, asked.ANSWERS, answered=True)


def test_a_test_split_has_no_targets(load: Any) -> None:
    questions = load("test")
    assert questions[BatchKey((0, 3), 0)].targets is None
    with pytest.raises(ValueError, match=r"no example in split test of .* is fit for this"):
        load("test", answerable=True)


def test_batch_is_a_function_of_its_key(load: Any) -> None:
    questions, key = load(random_crop=0.5, rand_augment="geometry", rand_magnitude=5), BatchKey((3, 0, 3), 17)
    first = questions[key]
    torch.manual_seed(99)
    again = questions[key]
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.pixel_values, questions[BatchKey(key.examples, 18)].pixel_values)
