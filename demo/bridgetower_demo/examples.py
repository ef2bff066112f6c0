"""Examples to look at: searches and answers, chosen by a fixed rule and not by how well they came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from bridgetower.data.batches.captions import CaptionImages
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.retrieval import (
    Direction,
    Ranking,
    RetrievalResult,
    ranked_texts,
    rankings,
)
from bridgetower_demo.grounding import Judged


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One answer to a query.

    Attributes:
        caption: The text found, or the main caption of the image found.
        image: File content of the image found, or of the one that the text found belongs to.
        is_own: Whether image and text belong together.
    """

    caption: str
    image: bytes
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
            f"the result ranks {len(result.image_vectors)} images and {len(result.truth.text_image_index)} texts, the "
            f"images given are {len(images)} with {len(texts)} texts; give those of the evaluation, and its config"
        )
    search = _Search(images, result, texts, top)
    return [
        *search.examples("text_to_image", _first_texts(truth.text_image_index), count),
        *search.examples("image_to_text", range(len(images)), count),
    ]


def choose(ranks: Sequence[int], count: int) -> list[int]:
    """Returns rows of half hits (rank 1) and half misses, hits first, misses from near to far."""
    hits = [row for row, rank in enumerate(ranks) if rank == 1]
    misses = sorted(
        (row for row, rank in enumerate(ranks) if rank > 1), key=lambda row: (ranks[row], row)
    )
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

    images: CaptionImages
    result: RetrievalResult
    texts: list[str]
    top: int

    def examples(
        self, direction: Direction, queries: Sequence[int], count: int
    ) -> list[SearchExample]:
        """Returns the chosen ones of the queries with their hits."""
        rows = choose(
            [ranking.rank for ranking in rankings(self.result, direction, queries)], count
        )
        chosen = [queries[row] for row in rows]
        ranked = zip(chosen, rankings(self.result, direction, chosen), strict=True)
        return [self.example(direction, query, ranking) for query, ranking in ranked]

    def example(self, direction: Direction, query: int, ranking: Ranking) -> SearchExample:
        """Returns a query with its hits."""
        order, rank, _ = ranking
        shown = [*order[: self.top].tolist(), int(order[rank - 1])]
        to_image = direction == "text_to_image"
        pairs: list[tuple[int, int]] = [
            (item, query) if to_image else (query, item) for item in shown
        ]
        *hits, own = [self._hit(*pair, direction) for pair in pairs]
        image = int(self.result.truth.text_image_index[query]) if to_image else query
        return SearchExample(
            direction=direction,
            text=self.texts[query] if to_image else self.images.captions([image])[0][0],
            image=self.images.contents([image])[0],
            hits=tuple(hits),
            own=own,
            rank=rank,
            num_items=len(order),
        )

    def _hit(self, image: int, text: int, direction: Direction) -> Hit:
        owner = int(self.result.truth.text_image_index[text])
        finds_texts = direction == "image_to_text"
        return Hit(
            caption=self.texts[text] if finds_texts else self.images.captions([image])[0][0],
            image=self.images.contents([owner if finds_texts else image])[0],
            is_own=owner == int(self.result.truth.owners[image]),
        )


def _first_texts(index: Int[Tensor, "t"]) -> list[int]:
    """Row of each image's first caption; captions of an image stand together."""
    first: list[int] = index.diff(prepend=torch.tensor([-1])).nonzero()[:, 0].tolist()
    return first


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
    """Chooses, of each topic, questions that are answered right and others that are not, about different images.

    Each is the first one from a place in the set on, and the places stand at even distances.

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
    kinds = [
        (topic, right)
        for topic in dict.fromkeys(one.topic for one in judged.examples)
        for right in (True, False)
    ]
    chosen: list[int] = []
    for place, (topic, right) in enumerate(kind for kind in kinds for _ in range(count)):
        start = place * len(examples) // (count * len(kinds))
        shown = {images[row] for row in chosen}
        rows = [
            (images[row] in shown, (row - start) % len(examples), row)
            for row, (example, text) in enumerate(zip(examples, judged.examples, strict=True))
            if (text.topic, example.is_right) == (topic, right) and row not in chosen
        ]
        chosen += [row for *_, row in sorted(rows)[:1]]
    return [examples[row] for row in chosen]
