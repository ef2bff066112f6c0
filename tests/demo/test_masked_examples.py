"""Hidden words are chosen by rule, and the model's guesses are its own."""

import pytest
import torch

from bridgetower.checkpoints import Checkpoint
from bridgetower.data.captions import CaptionImages
from bridgetower.engines.engine import TorchEngine
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.predictor import Predictor
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer
from bridgetower_demo.mask_examples import mask_examples, telling_word

CAPTIONS = (
    "two bands of red and green with a star",
    "growing heart emoji for love",
    "the grinning face of a cat on the left side",
    "blue-square with yellow arrow",
)


@pytest.fixture(scope="module")
def words() -> Processor:
    """A processor to which every word of the captions is one token."""
    values = ProcessorConfig(profile="official-pretrain", image_size=20, max_length=12)
    return Processor(values, train_tokenizer(CAPTIONS * 3, vocab_size=600))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("two bands of red and green with a star", "green"),  # the middle colour comes before shapes
        ("a star with bands", "bands"),  # then a shape
        ("the grinning face of a cat on the left side", "cat"),  # then the last thing, places left out
        ("growing heart emoji for love", "heart"),
        ("blue-square with yellow arrow", "yellow"),
        ("green and red and green", "red"),  # green occurs twice and would give itself away
        ("the side of the left", None),
        ("unheard words", None),  # more than one token each
    ],
)
def test_telling_word(words: Processor, caption: str, expected: str | None) -> None:
    hidden = telling_word(caption, words)
    assert (None if hidden is None else hidden.word) == expected
    if hidden is not None:
        (ids,) = words.token_ids([caption])
        assert words.decode([ids[hidden.position]]).strip() == hidden.word
        assert caption[hidden.start : hidden.end] == hidden.word


def test_what_is_cut_off_is_not_hidden(words: Processor) -> None:
    hidden = telling_word("a face of a cat of a cat of a cat with red", words)
    assert hidden is not None
    assert hidden.word == "face"


class TestExamples:
    def test_guesses_are_those_of_fill_mask(self, predictor: Predictor, images: CaptionImages) -> None:
        for example in mask_examples(predictor, images, count=4):
            text = f"{example.before}{predictor.processor.mask_token}{example.after}"
            for guess in (example.right, example.wrong):
                (expected,) = predictor.fill_mask(guess.image, text)
                assert [word.word for word in guess.candidates] == [word.word for word in expected]
                probabilities = [word.probability for word in expected]
                assert [word.probability for word in guess.candidates] == pytest.approx(probabilities, abs=1e-6)

    def test_truth_probability_is_that_of_the_hidden_word(self, predictor: Predictor, images: CaptionImages) -> None:
        (example,) = mask_examples(predictor, images, count=1, top=predictor.processor.vocab_size)
        for guess in (example.right, example.wrong):
            found = [word.probability for word in guess.candidates if word.word == example.truth]
            assert guess.truth_probability in [pytest.approx(probability, abs=1e-6) for probability in found]
        assert example.right.truth_probability != example.wrong.truth_probability

    def test_wrong_picture_lacks_the_word(self, predictor: Predictor, images: CaptionImages) -> None:
        captions = dict(zip(images.contents(range(len(images))), images.all_captions(), strict=True))
        examples = mask_examples(predictor, images, count=len(images))
        assert len(examples) == len(images)
        for example in examples:
            caption = f"{example.before}{example.truth}{example.after}"
            assert caption in captions[example.right.image]
            assert not any(example.truth in other.split() for other in captions[example.wrong.image])

    def test_model_without_head_is_refused(self, predictor: Predictor, images: CaptionImages) -> None:
        config = predictor.model.config.override({"heads.mlm": False})
        tensors = BridgeTower(config).state_dict()
        checkpoint = Checkpoint(source="headless", config=config, tensors=tensors, processor=predictor.processor)
        with pytest.raises(ValueError, match="headless has no masked-language head"):
            mask_examples(Predictor(checkpoint, TorchEngine(checkpoint.model(), torch.device("cpu"))), images, count=1)
