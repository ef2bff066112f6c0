"""Questions to look at are chosen by rule."""

import pytest

from bridgetower.analysis.examples import answer_examples
from bridgetower.tasks.grounding import Judged, TextExample

TOLD = [TextExample(topic, f"{topic} {number}?", "yes") for number in range(4) for topic in ("count", "colour")]
RIGHT = [True, False, True, False, False, False, True, True]


def judged() -> Judged:
    answers = tuple("yes" if right else "no" for right in RIGHT)
    return Judged(examples=tuple(TOLD), answers=answers, groundings={})


def test_the_first_right_and_the_first_wrong_ones_of_each_topic() -> None:
    pictures = [bytes([number]) for number in range(len(TOLD))]
    examples = answer_examples(judged(), pictures, count=2)
    assert [example.question for example in examples] == [
        *("count 0?", "count 1?", "count 2?"),  # two right ones, the only wrong one
        *("colour 3?", "colour 0?", "colour 1?"),
    ]
    assert [example.is_right for example in examples] == [True, True, False, True, False, False]
    assert [example.given for example in examples] == ["yes", "yes", "no", "yes", "no", "no"]
    assert {example.answer for example in examples} == {"yes"}
    texts = [told.text for told in TOLD]
    assert all(example.image == bytes([texts.index(example.question)]) for example in examples)


@pytest.mark.parametrize(("number", "count"), [(7, 1), (8, 0)])
def test_refuses_what_does_not_fit(number: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{number} images for 8 questions, count {count}; expected"):
        answer_examples(judged(), [b""] * number, count=count)
