"""Places of right answers in retrieval, and what was found in their stead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Int
from torch import Tensor

from bridgetower.checkpoints import UNMEASURED
from bridgetower.data.captions import CaptionImages
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import topk_candidates, two_stage_scores
from bridgetower.evaluation.outcome import Judgement
from bridgetower.evaluation.retrieval import RetrievalResult
from bridgetower.inference import combined_scores, two_stage_order

Direction = Literal["text_to_image", "image_to_text"]


def orders(result: RetrievalResult, config: RetrievalConfig) -> dict[Direction, Int[Tensor, "q m"]]:
    """Ranks all items for every query: candidates by the score of the second stage, then the rest by cosine."""
    cosine, stage = result.similarity, (result.similarity, result.similarity)
    if result.itm is not None:
        image_side = topk_candidates(cosine, config.candidates, dim=1)
        text_side = topk_candidates(cosine, config.candidates, dim=0)
        scores = combined_scores(result.itm, cosine, result.reranking.itc_weight if result.reranking else 0.0)
        stage = two_stage_scores(scores, image_side, text_side, protocol=config.protocol)
    return {
        "image_to_text": two_stage_order(cosine, stage[0]),
        "text_to_image": two_stage_order(cosine.T, stage[1].T),
    }


def rank_of(result: RetrievalResult, order: Int[Tensor, " m"], direction: Direction, query: int) -> int:
    """Returns the place of the best right answer to a query in its ranking, counted from 1."""
    images, texts = result.truth.owners, result.truth.text_image_index
    is_own = images[order] == texts[query] if direction == "text_to_image" else texts[order] == images[query]
    return int(is_own.nonzero()[0]) + 1


def retrieval_judgements(
    result: RetrievalResult, images: CaptionImages, texts: Sequence[str], config: RetrievalConfig
) -> list[Judgement]:
    """Returns every text with the image that is found first; a miss is as bad as the right image is far behind.

    Args:
        result: Of the evaluation.
        images: What it was evaluated on.
        texts: That were ranked, from `ranked_texts`.
        config: Of the evaluation, without folds.
    """
    ranking, found = orders(result, config)["text_to_image"], []
    matched = None if result.itm is None else (result.reranking or UNMEASURED).match(result.itm)
    for query, (text, own) in enumerate(zip(texts, result.truth.text_image_index.tolist(), strict=True)):
        order = ranking[query]
        rank, first = rank_of(result, order, "text_to_image", query), int(order[0])
        judgement = Judgement(
            id=images.image_ids[own],
            image=own,
            text=text,
            expected="first of all" if rank == 1 else f"image {rank} of {len(order)}",
            given=images.captions[first][0],
            score=float(rank == 1),
            miss=float(rank - 1),
            probability=None if matched is None else float(matched[first, query]),
            found=first,
        )
        found.append(judgement)
    return found
