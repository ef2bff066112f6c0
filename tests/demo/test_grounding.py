"""What a model sees and what its words alone give, on generated scenes, counted here a second time."""

from collections import Counter

import pytest

from bridgetower.inference.predictor import Predictor
from bridgetower_demo.grounding import (
    ALL,
    WithOtherImages,
    judge,
    majority_answer,
    text_only_answers,
)
from bridgetower_demo.toysets import prepare_toyset
from bridgetower_demo.toysets.scenes import ScenesConfig, topic_of
from helpers.sets import read_rows

NUM_TEST = 24


@pytest.fixture(scope="module", params=["vqa", "snli-ve", "nlvr2"])
def grounded(request, answering_predictor, tmp_path_factory):
    kind = request.param
    folder = tmp_path_factory.mktemp("scenes")
    config = ScenesConfig(kind=kind, num_train=40, num_validation=4, num_test=NUM_TEST, side=30)
    prepare_toyset("scenes", folder, config, progress=False)
    return kind, folder, judge(answering_predictor, kind, folder, topic_of=topic_of, batch_size=5)


def predicted_answer(predictor: Predictor, kind: str, pictures: list[bytes], text: str) -> str:
    match kind:
        case "vqa":
            return predictor.answer(pictures[0], text, top=1, truncate=True)[0].label
        case "snli-ve":
            return predictor.entail(pictures[0], text, truncate=True)[0].label
        case _:
            return predictor.reason(pictures[0], pictures[1], text, truncate=True)[0].label


def test_own_and_other_images(grounded, answering_predictor):
    kind, folder, judgement = grounded
    pictures = [row["images"] for row in read_rows(folder, "test")]
    model_answers = [
        predicted_answer(answering_predictor, kind, pictures[number], example.text)
        for number, example in enumerate(judgement.examples)
    ]
    other_answers = [
        predicted_answer(
            answering_predictor, kind, pictures[(number + NUM_TEST // 2) % NUM_TEST], example.text
        )
        for number, example in enumerate(judgement.examples)
    ]
    assert list(judgement.answers) == model_answers
    for topic, grounding in judgement.groundings.items():
        numbers = [
            number
            for number, example in enumerate(judgement.examples)
            if topic in (example.topic, ALL)
        ]
        assert grounding.number == len(numbers) == (NUM_TEST if topic == ALL else NUM_TEST // 4)
        for share, answers in (
            (grounding.model, model_answers),
            (grounding.other_image, other_answers),
        ):
            right = sum(answers[number] == judgement.examples[number].answer for number in numbers)
            assert share == pytest.approx(right / len(numbers))


def test_words_alone(grounded):
    kind, folder, judgement = grounded
    rows = read_rows(folder, "train")
    name = "answers" if kind == "vqa" else "label"
    answered = [rows[number]["entries"][0] for number in range(40)]
    counts = Counter(entry[name][0] if kind == "vqa" else entry[name] for entry in answered)
    commonest = min(counts, key=lambda answer: (-counts[answer], answer))
    right = sum(example.answer == commonest for example in judgement.examples)
    assert judgement.groundings[ALL].majority == pytest.approx(right / NUM_TEST)
    assert 0 <= judgement.groundings[ALL].text_only <= 1
    assert len(judgement.groundings) == 5


def test_statements_without_topics(answering_predictor, grounded):
    kind, folder, judgement = grounded
    if kind == "vqa":
        assert set(judgement.groundings) == {"exists", "colour", "count", "relation", ALL}
    else:
        assert judge(answering_predictor, kind, folder).groundings == {
            ALL: judgement.groundings[ALL]
        }


def test_commonest_answers():
    assert (majority_answer(["yes", "no", "yes"]), majority_answer(["b", "a"])) == ("yes", "a")
    training = [
        ("is it red?", "yes"),
        ("is it red?", "yes"),
        ("is it red?", "no"),
        ("how many?", "2"),
    ]
    assert text_only_answers(training, ["how many?", "is it red?", "where?"]) == ["2", "yes", "yes"]
    for refused in (lambda: majority_answer([]), lambda: text_only_answers([], ["how many?"])):
        with pytest.raises(ValueError, match="no answers"):
            refused()
    with pytest.raises(ValueError, match="1 example has no other image"):
        WithOtherImages([None])  # type: ignore[arg-type]
