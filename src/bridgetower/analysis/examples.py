"""Examples to look at: searches with their hits, chosen by a fixed rule and not by how well they came out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.data.captions import CaptionImages
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import topk_candidates, two_stage_scores
from bridgetower.evaluation.retrieval import RetrievalResult
from bridgetower.evaluation.scoring import ranked_texts
from bridgetower.inference import FilledWord, Item, combined_scores, top_words, two_stage_order
from bridgetower.predictor import Predictor
from bridgetower.processor import Processor
from bridgetower.tasks.grounding import Judged

Direction = Literal["text_to_image", "image_to_text"]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One answer to a query.

    Attributes:
        caption: The text found, or the main caption of the image found.
        image: File content of the image found, or of the one that the text found belongs to.
        cosine: Of the contrastive embeddings.
        probability: That the pair matches; None for a model without matching head.
        is_own: Whether image and text belong together.
    """

    caption: str
    image: bytes
    cosine: float
    probability: float | None
    is_own: bool


@dataclass(frozen=True, kw_only=True)
class SearchExample:
    """A query and its answers.

    Attributes:
        direction: `text_to_image` looks for images with `text`, `image_to_text` for texts with `image`.
        text: The query, or the main caption of the query image.
        image: The query, or the image that the query text belongs to; file content.
        hits: The first answers, best first.
        own: The best placed right answer, wherever it is.
        rank: Its place, counted from 1.
        num_items: Images or texts that were ranked.
    """

    direction: Direction
    text: str
    image: bytes
    hits: tuple[Hit, ...]
    own: Hit
    rank: int
    num_items: int


def search_examples(
    predictor: Predictor,
    images: CaptionImages,
    result: RetrievalResult,
    config: RetrievalConfig,
    *,
    count: int,
    top: int = 5,
) -> list[SearchExample]:
    """Returns `count` searches with texts, then `count` with images, as the evaluation ranked them.

    Half of each are queries with a right answer in first place, spread evenly over the set; half are queries without,
    spread evenly from the nearest miss to the farthest. Where there are too few of one kind, the other fills up. An
    image's first caption is the only one of its captions that serves as a query.

    Args:
        predictor: The model that was evaluated.
        images: What it was evaluated on.
        result: Of the evaluation.
        config: Of the evaluation.
        count: Queries per direction.
        top: Answers per query.

    Raises:
        ValueError: `result` does not come from these images and this config, or a number is below 1.
    """
    if count < 1 or top < 1:
        raise ValueError(f"count is {count} and top {top}; expected at least 1")
    texts, truth = ranked_texts(images, config)
    if not all(map(torch.equal, truth, result.truth)):
        raise ValueError(
            f"the result ranks {len(result.similarity)} images and {len(result.truth.text_image_index)} texts, the "
            f"images given are {len(images)} with {len(texts)} texts; give those of the evaluation, and its config"
        )
    search = _Search(predictor, images, result, texts, _orders(result, config), top)
    return [
        *search.examples("text_to_image", _first_texts(truth.text_image_index), count),
        *search.examples("image_to_text", range(len(images)), count),
    ]


def choose(ranks: Sequence[int], count: int) -> list[int]:
    """Returns rows of half hits (rank 1) and half misses, hits first, misses from near to far."""
    hits = [row for row, rank in enumerate(ranks) if rank == 1]
    misses = sorted((row for row, rank in enumerate(ranks) if rank > 1), key=lambda row: (ranks[row], row))
    num_misses = min(len(misses), max(count // 2, count - len(hits)))
    return spread_evenly(hits, count - num_misses) + spread_evenly(misses, num_misses)


def spread_evenly(rows: Sequence[int], count: int) -> list[int]:
    """Returns `count` of the rows at even distances, the first and the last among them; all if there are fewer."""
    if count >= len(rows):
        return list(rows)
    if count == 1:
        return [rows[len(rows) // 2]]
    return [rows[round(place * (len(rows) - 1) / (count - 1))] for place in range(count)]


@dataclass(frozen=True)
class _Search:
    """A ranked set, ready to be looked up; images are rows and texts columns everywhere."""

    predictor: Predictor
    images: CaptionImages
    result: RetrievalResult
    texts: list[str]
    orders: dict[Direction, Int[Tensor, "q m"]]
    top: int

    def examples(self, direction: Direction, queries: Sequence[int], count: int) -> list[SearchExample]:
        """Returns the chosen ones of the queries with their hits."""
        rows = choose([self.rank(direction, query) for query in queries], count)
        return [self.example(direction, queries[row]) for row in rows]

    def rank(self, direction: Direction, query: int) -> int:
        """Place of the best right answer, counted from 1."""
        images, texts = self.result.truth.owners, self.result.truth.text_image_index
        order = self.orders[direction][query]
        is_own = images[order] == texts[query] if direction == "text_to_image" else texts[order] == images[query]
        return int(is_own.nonzero()[0]) + 1

    def example(self, direction: Direction, query: int) -> SearchExample:
        """Returns a query with its hits; only the pairs that are shown are scored again, for their probability."""
        rank = self.rank(direction, query)
        order = self.orders[direction][query]
        shown = [*order[: self.top].tolist(), int(order[rank - 1])]
        to_image = direction == "text_to_image"
        pairs: list[tuple[int, int]] = [(item, query) if to_image else (query, item) for item in shown]
        probabilities = self._probabilities(pairs)
        *hits, own = [self._hit(*pair, direction, chance) for pair, chance in zip(pairs, probabilities, strict=True)]
        image = int(self.result.truth.text_image_index[query]) if to_image else query
        return SearchExample(
            direction=direction,
            text=self.texts[query] if to_image else self.images.captions[image][0],
            image=self.images.image_bytes(image),
            hits=tuple(hits),
            own=own,
            rank=rank,
            num_items=len(order),
        )

    def _hit(self, image: int, text: int, direction: Direction, probability: float | None) -> Hit:
        owner = int(self.result.truth.text_image_index[text])
        finds_texts = direction == "image_to_text"
        return Hit(
            caption=self.texts[text] if finds_texts else self.images.captions[image][0],
            image=self.images.image_bytes(owner if finds_texts else image),
            cosine=float(self.result.similarity[image, text]),
            probability=probability,
            is_own=owner == int(self.result.truth.owners[image]),
        )

    def _probabilities(self, pairs: Sequence[tuple[int, int]]) -> Sequence[float | None]:
        if self.result.itm is None:
            return [None] * len(pairs)
        images, texts = [self.images.image_bytes(image) for image, _ in pairs], [self.texts[text] for _, text in pairs]
        probabilities: list[float] = self.predictor.match(images, texts, truncate=True).tolist()
        return probabilities


def _orders(result: RetrievalResult, config: RetrievalConfig) -> dict[Direction, Int[Tensor, "q m"]]:
    """Ranks all items for every query: candidates by the score of the second stage, then the rest by cosine."""
    cosine, stage = result.similarity, (result.similarity, result.similarity)
    if result.itm is not None:
        image_side = topk_candidates(cosine, config.candidates, dim=1)
        text_side = topk_candidates(cosine, config.candidates, dim=0)
        scores = combined_scores(result.itm, cosine, result.itc_weight or 0.0)
        stage = two_stage_scores(scores, image_side, text_side, protocol=config.protocol)
    return {
        "image_to_text": two_stage_order(cosine, stage[0]),
        "text_to_image": two_stage_order(cosine.T, stage[1].T),
    }


def _first_texts(index: Int[Tensor, "t"]) -> list[int]:
    """Row of each image's first caption; captions of an image stand together."""
    first: list[int] = index.diff(prepend=torch.tensor([-1])).nonzero()[:, 0].tolist()
    return first


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
    words = [_words_of(captions) for captions in images.captions]
    usable: list[tuple[int, int, HiddenWord]] = []
    for image, captions in enumerate(images.captions):
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
    encoding = processor.token_offsets(caption)
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
    probabilities = _probabilities(predictor, [images.image_bytes(image), images.image_bytes(other)], ids, hidden)
    right, wrong = (
        Guess(
            image=images.image_bytes(row),
            caption=images.captions[row][0],
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


@dataclass(frozen=True, kw_only=True)
class AnswerExample:
    """A question, the right answer and the model's.

    Attributes:
        image: File content.
        question: The words.
        answer: The right answer.
        given: What the model answers.
    """

    image: bytes
    question: str
    answer: str
    given: str

    @property
    def is_right(self) -> bool:
        """Whether the model answers right."""
        return self.given == self.answer


def answer_examples(judged: Judged, images: Sequence[bytes], *, count: int) -> list[AnswerExample]:
    """Chooses, of each topic, the first questions that are answered right and the first that are not.

    Args:
        judged: Of a set with one question to each image.
        images: Files of the images, in order.
        count: Of either per topic; fewer if there are no more.

    Raises:
        ValueError: There is not one image for each question, or the count is below 1.
    """
    if len(images) != len(judged.examples) or count < 1:
        raise ValueError(
            f"{len(images)} images for {len(judged.examples)} questions, count {count}; expected as many images as "
            "questions and a count of at least 1"
        )
    examples = [
        AnswerExample(image=image, question=text.text, answer=text.answer, given=given)
        for image, text, given in zip(images, judged.examples, judged.answers, strict=True)
    ]
    chosen = []
    for topic in dict.fromkeys(text.topic for text in judged.examples):
        about = [example for example, text in zip(examples, judged.examples, strict=True) if text.topic == topic]
        for right in (True, False):
            chosen += [example for example in about if example.is_right is right][:count]
    return chosen
