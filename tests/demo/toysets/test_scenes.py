"""Sets of scenes: the same for the same seed, and balanced, so that texts alone tell nothing."""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import get_args

import pytest

from bridgetower.data.sets.schema import SCHEMAS
from bridgetower.processor import open_image
from bridgetower_demo.toysets import scenes
from bridgetower_demo.toysets.scenes import SceneKind, ScenesConfig, collect

SMALL = ScenesConfig(num_train=40, num_validation=8, num_test=8, side=30)


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out the images, which are drawn after text and answer and take most of the time."""
    monkeypatch.setattr(scenes, "scenes_for", lambda *_, **__: ())


def texts_and_answers(config, split="train"):
    for record in collect(config).splits[split]:
        if config.kind == "vqa":
            (question,) = record.entries
            assert len(question.answers) == 10
            types = {"yes": "yes/no", "no": "yes/no", **dict.fromkeys("01234", "number")}
            assert question.answer_type == types.get(question.answers[0], "other")
            yield question.question_type, question.question, question.answers[0]
        else:
            (statement,) = record.entries
            yield statement.statement_id.rsplit("-", 1)[1], statement.text, statement.label


@pytest.mark.parametrize("kind", get_args(SceneKind))
def test_every_kind(kind):
    config = replace(SMALL, kind=kind, num_train=10)
    collection = collect(config)
    assert collection.schema is SCHEMAS[kind]
    splits = {split: list(records) for split, records in collection.splits.items()}
    for record in (record for records in splits.values() for record in records):
        assert len(record.images) == collection.schema.num_images
        assert {open_image(image.content).size for image in record.images} == {(30, 30)}
    larger = collect(replace(config, num_train=20)).splits  # leaves the others as they are
    assert (list(larger["train"])[:10], list(larger["test"])) == (splits["train"], splits["test"])
    training_records = [
        list(collect(replace(config, **change)).splits["test"])
        for change in ({"seed": 1}, {"level": "hard"})
    ]
    drawn = [
        [record.images[0].content for record in records]
        for records in (*training_records, splits["test"], splits["validation"])
    ]
    assert len(set(map(tuple, drawn))) == 4


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("kind", "level"), [("vqa", "easy"), ("vqa", "hard"), ("snli-ve", "easy"), ("nlvr2", "easy")]
)
def test_the_text_alone_tells_nothing(kind, level):
    """What each text's commonest answer in one half gets right in the other is what guessing gets."""
    config = replace(SMALL, kind=kind, level=level, num_train=800)
    examples = list(texts_and_answers(config))
    half = len(examples) // 2
    answer_counts: dict[str, Counter[str]] = defaultdict(Counter)
    for _, text, answer in examples[:half]:
        answer_counts[text][answer] += 1
    right = 0.0
    guessed = 0.0
    for topic, text, answer in examples[half:]:
        right += bool(answer_counts[text]) and answer_counts[text].most_common(1)[0][0] == answer
        guessed += bool(answer_counts[text]) / number_of_answers(kind, topic, text, level)
    assert abs(right - guessed) < 4 * (half / 4) ** 0.5


def number_of_answers(kind, topic, text, level):
    if kind != "vqa":
        return len(SCHEMAS[kind].labels)
    if topic == "count":
        return 5
    if text.startswith("is"):
        return 2
    kinds, colours = {"easy": (3, 4), "medium": (5, 6), "hard": (7, 8)}[level]
    return colours if topic == "colour" else kinds


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("level", ["easy", "medium", "hard"])
def test_vocabulary_has_every_answer(level):
    config = replace(SMALL, kind="vqa", level=level, num_train=400)
    vocabulary = collect(config).files["answers.json"]
    assert {answer for _, _, answer in texts_and_answers(config)} == set(vocabulary)
