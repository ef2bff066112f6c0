"""Image-text retrieval: contrastive recall, then matching of the candidates, with shared encodings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.checkpoints import ITC_WEIGHT, UNMEASURED, Reranking
from bridgetower.data.captions import CaptionImages
from bridgetower.evaluation.class_metrics import accuracy
from bridgetower.evaluation.config import DEFAULTS, EvaluationOptions, Judgement, RetrievalConfig
from bridgetower.evaluation.metrics import (
    Candidates,
    GroundTruth,
    RetrievalRecalls,
    candidate_pairs,
    chance_recalls,
    streamed_recalls,
)
from bridgetower.evaluation.scoring import pair_scorer
from bridgetower.inference import two_stage_order
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.losses import similarity


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Scores and recalls of one model on one set; what matching gives is None without a matching head."""

    image_vectors: Float[Tensor, "i c"]  # contrastive, of length one
    text_vectors: Float[Tensor, "t c"]  # the same of the texts that are ranked
    truth: GroundTruth
    itc_recalls: RetrievalRecalls
    chance: RetrievalRecalls
    candidates: Candidates | None = None  # the pairs that were matched, and their scores
    matching_recalls: RetrievalRecalls | None = None  # of their ranking by matching alone
    two_stage_recalls: RetrievalRecalls | None = None  # by both scores; by matching alone with protocol `paper`
    reranking: Reranking | None = None  # with which they were ranked; None with protocol `paper`
    ece: float | None = None  # expected calibration error of `Reranking.match` on candidates of texts; None likewise
    itm_accuracy: float | None = None  # of each text with its own image and with a random other one

    def metrics(self) -> dict[str, float]:
        """Flat metrics: recalls `itc_…`, `matching_…`, `two_stage_…` and `chance_…`, the others, the last `rsum`."""
        stages = {"itc": self.itc_recalls, "matching": self.matching_recalls, "two_stage": self.two_stage_recalls}
        metrics: dict[str, float] = {}
        for stage, recalls in {**stages, "chance": self.chance}.items():
            metrics |= {} if recalls is None else recalls.named(stage)
        weight = None if self.reranking is None else self.reranking.itc_weight
        others = {ITC_WEIGHT: weight, "ece": self.ece, "itm_accuracy": self.itm_accuracy}
        metrics |= {name: value for name, value in others.items() if value is not None}
        return metrics | {"rsum": (self.two_stage_recalls or self.itc_recalls).rsum}


@torch.inference_mode()
def evaluate_retrieval(
    model: BridgeTower,
    images: CaptionImages,
    config: RetrievalConfig,
    options: EvaluationOptions = DEFAULTS,
    *,
    reranking: Reranking | None = UNMEASURED,
) -> RetrievalResult:
    """Ranks all images for every caption and all captions for every image, or those of its fold.

    Images with the same captions count as one thing: their texts are ranked once, and each of them is right for these;
    not so with folds. Images are shared out over the processes of a distributed run; every process gets the same
    result.
    """
    model.head("itc")
    with pair_scorer(model, images, config, options) as scorer:
        (image_vectors, text_vectors), truth = scorer.vectors(), scorer.truth

        def cosines(rows: slice, texts: Int[Tensor, " b"]) -> Float[Tensor, "r b"]:
            return similarity(image_vectors[rows], text_vectors[texts], torch.ones(()))

        second: dict[str, Any] = {}
        if model.itm_head is not None and config.candidates:
            pairs = candidate_pairs(cosines, truth, config, others=_control_pairs(truth))
            match, accepted = scorer.score(pairs.image, pairs.text)
            candidates = replace(pairs, itm=match)
            own, stranger = truth.text_image_index[pairs.text], _strangers(truth)[pairs.text]
            is_control = (pairs.image == own) | (pairs.image == stranger)
            matched = accuracy(accepted[is_control].long(), pairs.belong[is_control].long())
            alone = candidates.recalls()
            second = {"candidates": candidates, "itm_accuracy": matched}
            second |= {"matching_recalls": alone, "two_stage_recalls": alone}
            if config.protocol == "standard":
                used = candidates.fitted() if reranking is None else reranking
                second |= {"reranking": used, "ece": candidates.error(used)}
                if used.itc_weight:
                    second["two_stage_recalls"] = candidates.recalls(used.itc_weight)
    return RetrievalResult(
        image_vectors=image_vectors,
        text_vectors=text_vectors,
        truth=truth,
        itc_recalls=streamed_recalls(cosines, truth, fold_size=config.fold_size),
        chance=chance_recalls(truth, fold_size=config.fold_size),
        **second,
    )


@torch.inference_mode()
def evaluate_matching(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, options: EvaluationOptions = DEFAULTS
) -> float:
    """Accuracy of matching on each caption with its own image and with a random other one (the same at every call).

    It is what `evaluate_retrieval` reports as `itm_accuracy`, for models without contrastive head.
    """
    model.head("itm")
    with pair_scorer(model, images, config, options) as scorer:
        (index, owners), (image, text) = scorer.truth, _control_pairs(scorer.truth)
        _, accepted = scorer.score(image, text)
    return accuracy(accepted.long(), (owners[image] == index[text]).long())


@torch.inference_mode()
def evaluate_all_pairs(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, options: EvaluationOptions = DEFAULTS
) -> dict[str, float]:
    """Ranks all pairs, or those of each fold, by one score of the fusion encoder: retrieval without contrast.

    The score is that of the ranking head or, without one, of matching, see `PairScorer.score`. Its cost grows with
    images times texts.
    """
    if model.rank_head is None:
        model.head("itm")

    def logits(pooled: Tensor) -> Tensor:
        if model.rank_head is None:
            return model.itm_logits(pooled)
        scores = model.head("rank")(pooled)
        return torch.stack([torch.zeros_like(scores), scores], dim=1)  # as the logit of a match, against 0

    size = config.fold_size or len(images)
    with pair_scorer(model, images, config, options) as scorer:
        truth = scorer.truth
        image, text = (torch.arange(len(images))[:, None] // size == truth.text_image_index // size).nonzero().unbind(1)
        scores, _ = scorer.score(image, text, logits)
    chosen, cosine = torch.ones_like(image, dtype=torch.bool), torch.full_like(scores, torch.nan)
    sides = {"image_side": chosen, "text_side": chosen}
    pairs = Candidates(image=image, text=text, cosine=cosine, truth=truth, config=config, itm=scores, **sides)
    one_stage, chance = pairs.recalls(), chance_recalls(truth, fold_size=config.fold_size)
    return one_stage.named("one_stage") | chance.named("chance") | {"rsum": one_stage.rsum}


def _control_pairs(truth: GroundTruth) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Each text with its own image and with one that has other captions, by image."""
    image = torch.cat([truth.text_image_index, _strangers(truth)])
    order = image.argsort(stable=True)
    return image[order], order % len(truth.text_image_index)


def _strangers(truth: GroundTruth) -> Int[Tensor, " t"]:
    """An image of other captions for each text, drawn with a fixed seed; its own if there is no other."""
    different, own = truth.text_image_index.unique(return_inverse=True)
    if len(different) == 1:
        return truth.text_image_index
    shift = torch.randint(1, len(different), own.shape, generator=torch.Generator().manual_seed(0))
    return different[(own + shift) % len(different)]


Direction = Literal["text_to_image", "image_to_text"]


class Ranking(NamedTuple):
    """All items for a query: candidates by the score of the second stage, then the rest by cosine."""

    order: Int[Tensor, " m"]  # their rows, best first
    rank: int  # place of the best right answer, counted from 1
    itm: float | None  # matching score of the first item; None without a matching head


def rankings(result: RetrievalResult, direction: Direction, queries: Iterable[int]) -> Iterator[Ranking]:
    to_image, found = direction == "text_to_image", result.candidates
    images = result.image_vectors, result.truth.owners
    texts = result.text_vectors, result.truth.text_image_index
    (vectors, own), (others, owners) = (texts, images) if to_image else (images, texts)
    ends, items, scores, itm = [0] * len(vectors), torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0)
    if found is not None:
        of_query, of_item = (found.text, found.image) if to_image else (found.image, found.text)
        chosen = found.sides[to_image].nonzero().squeeze(1)
        chosen = chosen[of_query[chosen].argsort(stable=True)]
        ends = torch.bincount(of_query[chosen], minlength=len(vectors)).cumsum(0).tolist()
        weight = result.reranking.itc_weight if result.reranking else 0.0
        items, scores, itm = of_item[chosen], found.scores(weight)[chosen], found.itm[chosen]
    for query in queries:
        cosine = similarity(vectors[[query]], others, torch.ones(()))[0]
        listed = slice(ends[query - 1] if query else 0, ends[query])
        by_item = torch.full_like(cosine, torch.nan).index_put((items[listed],), scores[listed])
        order = two_stage_order(cosine, by_item)
        first = itm[listed][items[listed] == order[0]]
        yield Ranking(
            order=order,
            rank=int((owners[order] == own[query]).int().argmax()) + 1,
            itm=float(first) if len(first) else None,
        )


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
