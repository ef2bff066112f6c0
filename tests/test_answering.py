"""Answers and judgements of a loaded model: one or several, equal to the tasks', and what is refused."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batches.batch import Batch
from bridgetower.engines.engine import TorchEngine
from bridgetower.inference.predictor import Predictor, load
from bridgetower.objectives.classification import task_of_head
from helpers.shapes import SHAPE_COLOURS

QUESTIONS = ["what colour?", "is it a bar on black", "a circle"]


@pytest.fixture(scope="module")
def two_pictures():
    return [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue", "white")]


@pytest.fixture
def ask(two_pictures):
    """Asks a predictor by the name of the method. The second pictures are the first ones in reverse."""

    def call(predictor, method, number=None, **options):
        images = [two_pictures, two_pictures[::-1]] if method == "reason" else [two_pictures]
        arguments = [*images, QUESTIONS]
        return getattr(predictor, method)(
            *(arguments if number is None else [inputs[number] for inputs in arguments]), **options
        )

    return call


class TestResults:
    def test_are_those_of_the_tasks(self, answering_predictor, two_pictures, ask):
        model = answering_predictor.model
        processor = answering_predictor.processor
        text = processor.texts(QUESTIONS)
        tokens = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
        pixels = processor.images(two_pictures)
        second_pixels = processor.images(two_pictures[::-1])
        with torch.no_grad():
            single = Batch(pixel_values=pixels, **tokens)
            two = Batch(pixel_values=pixels, pixel_values_2=second_pixels, **tokens)
            expected = [
                ("answer", SHAPE_COLOURS, task_of_head(model, "vqa").predict(single)),
                (
                    "entail",
                    ("contradiction", "neutral", "entailment"),
                    task_of_head(model, "snli_ve").predict(single),
                ),
                ("reason", ("False", "True"), task_of_head(model, "nlvr2").predict(two)),
            ]
        for method, names, probabilities in expected:
            for choices, row in zip(
                ask(answering_predictor, method), probabilities.tolist(), strict=True
            ):
                by_label = {choice.label: choice.probability for choice in choices}
                assert by_label == pytest.approx(dict(zip(names, row, strict=True)), abs=1e-6)
                assert [choice.probability for choice in choices] == sorted(
                    by_label.values(), reverse=True
                )

    @pytest.mark.parametrize("method", ["answer", "entail", "reason"])
    def test_one_or_several_in_batches(self, answering_predictor, ask, method):
        together = ask(answering_predictor, method)
        batched = ask(answering_predictor, method, batch_size=2)
        assert [[choice.label for choice in row] for row in batched] == [
            [choice.label for choice in row] for row in together
        ]
        for number, row in enumerate(together):
            alone = ask(answering_predictor, method, number)
            assert [choice.probability for choice in alone] == pytest.approx(
                [c.probability for c in row], abs=1e-5
            )

    def test_second_images_iterators_and_top(self, answering_predictor, two_pictures, ask):
        forwards, other = (
            answering_predictor.reason(two_pictures[0], two_pictures[number], QUESTIONS[0])
            for number in (1, 2)
        )
        assert forwards[0].probability != pytest.approx(other[0].probability, abs=1e-6)
        results = answering_predictor.reason(
            iter(two_pictures), iter(two_pictures[::-1]), iter(QUESTIONS)
        )
        assert results == ask(answering_predictor, "reason")
        everything = ask(answering_predictor, "answer", top=99)
        assert [len(row) for row in everything] == [5, 5, 5]
        assert ask(answering_predictor, "answer", top=2) == [row[:2] for row in everything]


class TestErrors:
    def test_heads_and_names(self, tiny_checkpoint, answering_checkpoint, ask):
        without = load(tiny_checkpoint, device="cpu")
        checkpoint = read_checkpoint(answering_checkpoint)
        for method, head in (("answer", "vqa"), ("entail", "snli_ve"), ("reason", "nlvr2")):
            with pytest.raises(
                ValueError, match=rf"this model has no {head} head \(it has mlm, itm, itc\); load a"
            ):
                ask(without, method)
        nameless = Predictor(
            replace(checkpoint, labels={}), TorchEngine(checkpoint.model(), torch.device("cpu"))
        )
        with pytest.raises(
            ValueError, match=r"does not name the classes of its vqa head; .* pass answers"
        ):
            ask(nameless, "answer")
        assert len(ask(nameless, "entail")) == 3

    def test_one_goes_with_all_of_the_others(self, answering_predictor, two_pictures):
        calls = [
            (
                answering_predictor.answer,
                (two_pictures[0], QUESTIONS),
                ([two_pictures[0]] * 3, QUESTIONS),
            ),
            (
                answering_predictor.answer,
                (two_pictures, QUESTIONS[0]),
                (two_pictures, [QUESTIONS[0]] * 3),
            ),
            (
                answering_predictor.entail,
                (two_pictures[:1], QUESTIONS),
                ([two_pictures[0]] * 3, QUESTIONS),
            ),
            (
                answering_predictor.reason,
                (two_pictures[0], two_pictures, "a"),
                ([two_pictures[0]] * 3, two_pictures, ["a"] * 3),
            ),
            (
                answering_predictor.reason,
                (*two_pictures[:2], QUESTIONS),
                ([two_pictures[0]] * 3, [two_pictures[1]] * 3, QUESTIONS),
            ),
        ]
        for method, arguments, expected in calls:
            for choices, alone in zip(method(*arguments), method(*expected), strict=True):
                assert [choice.label for choice in choices] == [choice.label for choice in alone]
                assert choices[0].probability == pytest.approx(alone[0].probability, abs=1e-6)

    def test_inputs(self, answering_predictor, two_pictures):
        with pytest.raises(ValueError, match="3 images and 2 texts; expected one text per image"):
            answering_predictor.entail(two_pictures, QUESTIONS[:2])
        with pytest.raises(
            ValueError, match="3 images, 2 second images and 3 texts; expected one text per image"
        ):
            answering_predictor.reason(two_pictures, two_pictures[:2], QUESTIONS)
        with pytest.raises(ValueError, match="truncate=True"):
            answering_predictor.answer(two_pictures[0], "what colour? " * 30)
        assert (
            len(answering_predictor.answer(two_pictures[0], "what colour? " * 30, truncate=True))
            == 5
        )
