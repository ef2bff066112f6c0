"""Captions with a telling word hidden, and what a model fills in beside the right image and beside another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from bridgetower.data.captions import CaptionImages
from bridgetower.inference import FilledWord, Item, top_words
from bridgetower.predictor import Predictor
from bridgetower.processor import Processor
from bridgetower_demo.examples import spread_evenly


def _word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


COLOURS = _word_set(
    "red orange yellow green blue purple violet pink brown black white gray grey gold golden silver maroon crimson "
    "turquoise azure beige"
)
SHAPES = _word_set(
    "star stars circle circles disk disc square squares triangle triangles cross crosses heart hearts band bands "
    "stripe stripes crescent diamond diamonds ring rings arrow arrows line lines border field"
)
# Function words, places, numbers, and what every caption of a set has: they need no image.
UNINFORMATIVE = _word_set(
    "a an the and or of in on at to for from with without by is are was be as it its his her their that which this "
    "each other into over under between along near like about not no so emoji flag flags symbol side left right top "
    "bottom upper lower middle center centre centered half corner edge edges equal large small one two three four "
    "five six seven eight nine ten"
)

_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, kw_only=True)
class Guess:
    """Predictions of a model for a masked word, given one image.

    Attributes:
        image: File content.
        caption: Main caption of that image.
        candidates: The likeliest words, best first.
        truth_probability: Of the hidden word, over the whole vocabulary.
    """

    image: bytes
    caption: str
    candidates: tuple[FilledWord, ...]
    truth_probability: float


@dataclass(frozen=True, kw_only=True)
class MaskExample:
    """A caption with one word hidden.

    Attributes:
        before, truth, after: The caption in three parts; the model gets the first and the last.
        right: Beside the caption's own image.
        wrong: Beside an image none of whose captions has the word.
    """

    before: str
    truth: str
    after: str
    right: Guess
    wrong: Guess


@dataclass(frozen=True)
class HiddenWord:
    """A word that is one token.

    Attributes:
        caption: That it stands in.
        position: Of its token among those of the caption, start token included.
        start, end: Where it stands in the caption, in characters.
    """

    caption: str
    position: int
    start: int
    end: int

    @property
    def word(self) -> str:
        """The word as it is spelt."""
        return self.caption[self.start : self.end]


def mask_examples(predictor: Predictor, images: CaptionImages, *, count: int, top: int = 5) -> list[MaskExample]:
    """Hides a telling word in a caption of `count` images, spread evenly over the set.

    Of each image's captions the shortest counts that `telling_word` finds a word in. The wrong image is the first
    from half-way round the set on that does not have the word in a caption. Images without either are passed over.

    Args:
        predictor: With a masked-language head.
        images: Images with captions.
        count: Examples; fewer if the set does not hold as many.
        top: Candidates per guess.

    Raises:
        ValueError: The model has no masked-language head, or a number is below 1.
    """
    if predictor.model.mlm_head is None:
        raise ValueError(f"{predictor.source} has no masked-language head; load a checkpoint with one")
    if count < 1 or top < 1:
        raise ValueError(f"count is {count} and top {top}; expected at least 1")
    words = [_words_of(captions) for captions in images.all_captions()]
    usable: list[tuple[int, int, HiddenWord]] = []
    for image, captions in enumerate(images.all_captions()):
        hidden = _first_telling(captions, predictor.processor)
        other = None if hidden is None else _without(hidden.word.lower(), words, image)
        if hidden is not None and other is not None:
            usable.append((image, other, hidden))
    chosen = [usable[row] for row in spread_evenly(range(len(usable)), count)]
    return [_example(predictor, images, image, other, hidden, top) for image, other, hidden in chosen]


def telling_word(caption: str, processor: Processor) -> HiddenWord | None:
    """Chooses the word to hide, by rule: a colour, else a shape, else the last word that is not `UNINFORMATIVE`.

    Only words count that are one token, stand in the part that the model reads, and occur once, since a second
    occurrence would give the word away. Of several colours or shapes it is the middle one.
    """
    occurrences = Counter(_WORD.findall(caption.lower()))
    words = [hidden for hidden in _single_tokens(caption, processor) if occurrences[hidden.word.lower()] == 1]
    for kind in (COLOURS, SHAPES):
        of_kind = [hidden for hidden in words if hidden.word.lower() in kind]
        if of_kind:
            return of_kind[len(of_kind) // 2]
    things = [hidden for hidden in words if len(hidden.word) > 2 and hidden.word.lower() not in UNINFORMATIVE]
    return things[-1] if things else None


def _single_tokens(caption: str, processor: Processor) -> list[HiddenWord]:
    """Lists the words that are one token each, up to where the processor cuts."""
    (ids,) = processor.token_ids([caption], truncate=True)
    assert processor.tokenizer is not None
    encoding = processor.tokenizer.encode(caption)
    tokens_of = Counter(encoding.word_ids)
    found = []
    for position in range(1, len(ids) - 1):
        start, end = encoding.offsets[position]
        start += len(caption[start:end]) - len(caption[start:end].lstrip())  # some tokenizers count the space before
        if tokens_of[encoding.word_ids[position]] == 1 and _WORD.fullmatch(caption[start:end]):
            found.append(HiddenWord(caption, position, start, end))
    return found


def _first_telling(captions: Sequence[str], processor: Processor) -> HiddenWord | None:
    found = (telling_word(caption, processor) for caption in sorted(captions, key=len))
    return next((hidden for hidden in found if hidden is not None), None)


def _words_of(captions: Sequence[str]) -> set[str]:
    return {word for caption in captions for word in _WORD.findall(caption.lower())}


def _without(word: str, words: Sequence[set[str]], image: int) -> int | None:
    """First image from half-way round the set on whose captions lack the word."""
    order = [(image + len(words) // 2 + step) % len(words) for step in range(len(words))]
    return next((other for other in order if word not in words[other]), None)


def _example(
    predictor: Predictor, images: CaptionImages, image: int, other: int, hidden: HiddenWord, top: int
) -> MaskExample:
    processor = predictor.processor
    (ids,) = processor.token_ids([hidden.caption], truncate=True)
    truth = ids[hidden.position]
    ids[hidden.position] = processor.mask_token_id
    probabilities = _probabilities(predictor, images.contents([image, other]), ids, hidden)
    right, wrong = (
        Guess(
            image=images.contents([row])[0],
            caption=images.captions([row])[0][0],
            candidates=tuple(top_words(processor, distribution[None], top)[0]),
            truth_probability=float(distribution[truth]),
        )
        for row, distribution in zip((image, other), probabilities, strict=True)
    )
    before, after = hidden.caption[: hidden.start], hidden.caption[hidden.end :]
    return MaskExample(before=before, truth=hidden.word, after=after, right=right, wrong=wrong)


def _probabilities(
    predictor: Predictor, given: Sequence[bytes], ids: list[int], hidden: HiddenWord
) -> Iterator[Float[Tensor, " v"]]:
    """Yields the distribution over the vocabulary at the hidden word beside each image."""
    tokens, place = tuple(ids), ids[: hidden.position].count(predictor.processor.mask_token_id)
    images = [predictor.processor.resize(image) for image in given]
    for found in predictor.compute([Item(kind="mask_probabilities", image=image, ids=tokens) for image in images]):
        assert isinstance(found, Tensor)
        yield found[place]
