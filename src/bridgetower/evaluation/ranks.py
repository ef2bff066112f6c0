"""Places of right answers in retrieval, and what was found in their stead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.checkpoints import UNMEASURED
from bridgetower.data.captions import CaptionImages
from bridgetower.evaluation.outcome import Judgement
from bridgetower.evaluation.retrieval import RetrievalResult
from bridgetower.inference import two_stage_order
from bridgetower.objectives.losses import similarity

Direction = Literal["text_to_image", "image_to_text"]


class Ranking(NamedTuple):
    """All items for a query: candidates by the score of the second stage, then the rest by cosine.

    Attributes:
        order: Their rows, best first.
        rank: Place of the best right answer, counted from 1.
        itm: Matching score of the first item; None without a matching head.
    """

    order: Int[Tensor, " m"]
    rank: int
    itm: float | None


def rankings(result: RetrievalResult, direction: Direction, queries: Iterable[int]) -> Iterator[Ranking]:
    """Ranks all items for some queries, one query after the other."""
    images = result.image_vectors, result.truth.owners
    texts = result.text_vectors, result.truth.text_image_index
    (vectors, own), (others, owners) = (texts, images) if direction == "text_to_image" else (images, texts)
    candidates_of = _candidates_of(result, direction, len(vectors))
    for query in queries:
        cosine = similarity(vectors[[query]], others, torch.ones(()))[0]
        items, scores, itm = candidates_of(query)
        order = two_stage_order(cosine, torch.full_like(cosine, torch.nan).index_put((items,), scores))
        first = itm[items == order[0]]
        yield Ranking(
            order=order,
            rank=int((owners[order] == own[query]).int().argmax()) + 1,
            itm=float(first) if len(first) else None,
        )


def _candidates_of(
    result: RetrievalResult, direction: Direction, num_queries: int
) -> Callable[[int], tuple[Int[Tensor, " k"], Float[Tensor, " k"], Float[Tensor, " k"]]]:
    if result.candidates is None:
        return lambda query: (torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0))
    found = result.candidates
    for_images, for_texts = found.pairs.sides(found.config.protocol)
    if direction == "image_to_text":
        side, queries, items = for_images, found.pairs.image, found.pairs.text
    else:
        side, queries, items = for_texts, found.pairs.text, found.pairs.image
    scores = found.scores(result.reranking.itc_weight if result.reranking else 0.0)
    chosen = side.nonzero().squeeze(1)
    chosen = chosen[queries[chosen].argsort(stable=True)]
    ends = torch.bincount(queries[chosen], minlength=num_queries).cumsum(0).tolist()

    def of(query: int) -> tuple[Tensor, Tensor, Tensor]:
        own = chosen[ends[query - 1] if query else 0 : ends[query]]
        return items[own], scores[own], found.itm[own]

    return of


def retrieval_judgements(result: RetrievalResult, images: CaptionImages, texts: Sequence[str]) -> list[Judgement]:
    """Returns every text with the image that is found first; a miss is as bad as the right image is far behind."""
    reranking = result.reranking or UNMEASURED
    ranked = rankings(result, "text_to_image", range(len(texts)))
    captions, names = images.all_captions(), images.names(range(len(images)))
    return [
        Judgement(
            id=names[own],
            images=(own,),
            text=text,
            expected="first of all" if rank == 1 else f"image {rank} of {len(order)}",
            given=captions[int(order[0])][0],
            score=float(rank == 1),
            miss=float(rank - 1),
            probability=None if itm is None else float(reranking.match(torch.tensor(itm))),
            found=int(order[0]),
        )
        for text, own, (order, rank, itm) in zip(texts, result.truth.text_image_index.tolist(), ranked, strict=True)
    ]
