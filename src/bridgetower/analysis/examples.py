"""Examples to look at: searches with their hits, chosen by a fixed rule and not by how well they came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.data.captions import CaptionImages
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import topk_candidates, two_stage_scores
from bridgetower.evaluation.retrieval import RetrievalResult
from bridgetower.predictor import Predictor

Direction = Literal["text_to_image", "image_to_text"]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One answer to a query.

    Attributes:
        caption: The text found, or the main caption of the picture found.
        picture: File content of the picture found, or of the one that the text found belongs to.
        cosine: Of the contrastive embeddings.
        probability: That the pair matches; None for a model without matching head.
        is_own: Whether picture and text belong together.
    """

    caption: str
    picture: bytes
    cosine: float
    probability: float | None
    is_own: bool


@dataclass(frozen=True, kw_only=True)
class SearchExample:
    """A query and its answers.

    Attributes:
        direction: `text_to_image` looks for pictures with `text`, `image_to_text` for texts with `picture`.
        text: The query, or the main caption of the query picture.
        picture: The query, or the picture that the query text belongs to; file content.
        hits: The first answers, best first.
        own: The best placed right answer, wherever it is.
        rank: Its place, counted from 1.
        num_items: Pictures or texts that were ranked.
    """

    direction: Direction
    text: str
    picture: bytes
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
    """Returns `count` searches with texts, then `count` with pictures, as the evaluation ranked them.

    Half of each are queries with a right answer in first place, spread evenly over the set; half are queries without,
    spread evenly from the nearest miss to the farthest. Where there are too few of one kind, the other fills up. A
    picture's first caption is the only one of its captions that serves as a query.

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
    texts, index = images.texts(config.max_captions)
    if len(result.similarity) != len(images) or not torch.equal(index, result.text_image_index):
        raise ValueError(
            f"the result ranks {len(result.similarity)} images and {len(result.text_image_index)} texts, the images "
            f"given are {len(images)} with {len(texts)} texts; give those of the evaluation, and its config"
        )
    search = _Search(predictor, images, result, texts, _orders(result, config), top)
    return [
        *search.examples("text_to_image", _first_texts(index), count),
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
        """Chooses among the queries and looks them up."""
        rows = choose([self.rank(direction, query) for query in queries], count)
        return [self.example(direction, queries[row]) for row in rows]

    def rank(self, direction: Direction, query: int) -> int:
        """Place of the best right answer, counted from 1."""
        owners = self.result.text_image_index
        order = self.orders[direction][query]
        is_own = order == owners[query] if direction == "text_to_image" else owners[order] == query
        return int(is_own.nonzero()[0]) + 1

    def example(self, direction: Direction, query: int) -> SearchExample:
        """Looks a query up; only the pairs that are shown are scored again, for their probability."""
        rank = self.rank(direction, query)
        order = self.orders[direction][query]
        shown = [*order[: self.top].tolist(), int(order[rank - 1])]
        pairs = [(item, query) if direction == "text_to_image" else (query, item) for item in shown]
        *hits, own = self._hits(pairs, direction)
        image = int(self.result.text_image_index[query]) if direction == "text_to_image" else query
        return SearchExample(
            direction=direction,
            text=self.texts[query] if direction == "text_to_image" else self.images.captions[image][0],
            picture=self.images.image_bytes(image),
            hits=tuple(hits),
            own=own,
            rank=rank,
            num_items=len(order),
        )

    def _hits(self, pairs: Sequence[tuple[int, int]], direction: Direction) -> list[Hit]:
        probabilities = self._probabilities(pairs)
        return [self._hit(*pair, direction, chance) for pair, chance in zip(pairs, probabilities, strict=True)]

    def _hit(self, image: int, text: int, direction: Direction, probability: float | None) -> Hit:
        owner = int(self.result.text_image_index[text])
        finds_texts = direction == "image_to_text"
        return Hit(
            caption=self.texts[text] if finds_texts else self.images.captions[image][0],
            picture=self.images.image_bytes(owner if finds_texts else image),
            cosine=float(self.result.similarity[image, text]),
            probability=probability,
            is_own=owner == image,
        )

    def _probabilities(self, pairs: Sequence[tuple[int, int]]) -> Sequence[float | None]:
        if self.result.itm is None:
            return [None] * len(pairs)
        pictures = [self.images.image_bytes(image) for image, _ in pairs]
        probabilities: list[float] = self.predictor.match(
            pictures, [self.texts[text] for _, text in pairs], truncate=True
        ).tolist()
        return probabilities


def _orders(result: RetrievalResult, config: RetrievalConfig) -> dict[Direction, Int[Tensor, "q m"]]:
    """Ranks all items for every query: candidates by match logit, then the rest by cosine."""
    cosine, stage = result.similarity, (result.similarity, result.similarity)
    if result.itm is not None:
        image_side = topk_candidates(cosine, config.candidates, dim=1)
        text_side = topk_candidates(cosine, config.candidates, dim=0)
        stage = two_stage_scores(result.itm, image_side, text_side, protocol=config.protocol)
    return {"image_to_text": _order(stage[0], cosine), "text_to_image": _order(stage[1].T, cosine.T)}


def _order(scores: Float[Tensor, "q m"], cosine: Float[Tensor, "q m"]) -> Int[Tensor, "q m"]:
    by_cosine = cosine.argsort(dim=1, descending=True, stable=True)
    return by_cosine.gather(1, scores.gather(1, by_cosine).argsort(dim=1, descending=True, stable=True))


def _first_texts(index: Int[Tensor, "t"]) -> list[int]:
    """Row of each picture's first caption; captions of a picture stand together."""
    counts = torch.bincount(index)
    first: list[int] = (counts.cumsum(0) - counts).tolist()
    return first
