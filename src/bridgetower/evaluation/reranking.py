"""What a validation split shows about matching the candidates of ITC: the weight of both, calibration, gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridgetower.checkpoints import ITC_ALONE, Gain, Reranking
from bridgetower.evaluation.calibration import calibrate, expected_calibration_error, reliability
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import (
    GroundTruth,
    QueryHits,
    RetrievalRecalls,
    fold_recalls,
    folds,
    query_hits,
    retrieval_recalls,
    two_stage_scores,
)
from bridgetower.inference import combined_scores

ITC_WEIGHTS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, ITC_ALONE)
"""The weights that a fit tries."""

LEAST_IMAGES = 8
"""Images with different captions that calibration and gain need: four in each half."""

_Z = 1.96  # of a 95 % interval


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What the second stage ranks.

    Attributes:
        itm: Matching score of the candidate pairs.
        similarity: Cosine.
        image_side, text_side: True at the candidates of each image and of each text.
        truth: Which images and texts belong together.
        config: Protocol and folds.
    """

    itm: Float[Tensor, "i t"]
    similarity: Float[Tensor, "i t"]
    image_side: Bool[Tensor, "i t"]
    text_side: Bool[Tensor, "i t"]
    truth: GroundTruth
    config: RetrievalConfig

    def recalls(self, itc_weight: float) -> RetrievalRecalls:
        """Returns the recalls of the ranking with a weight of ITC."""
        return ranked_recalls(*self._scores(itc_weight), self.truth, self.config)

    def error(self, reranking: Reranking) -> float:
        """Returns the expected calibration error of what is shown for the candidates of texts."""
        log_odds, matching, _ = self._pairs()
        return expected_calibration_error(reliability(reranking.match(log_odds), matching.float()))

    def fitted(self) -> Reranking:
        """Returns the one of `ITC_WEIGHTS` with the best mean recall, of equal ones the middle, and what else is known.

        Calibration and gain are None with fewer than `LEAST_IMAGES` different images.
        """
        hits = {weight: self._hits(weight) for weight in ITC_WEIGHTS}
        images, texts = (torch.ones(len(side), dtype=torch.bool) for side in hits[0.0])
        weight = _best_weight(hits, images, texts)
        if len(self.truth.owners.unique()) < LEAST_IMAGES:
            return Reranking(itc_weight=weight)
        return Reranking(itc_weight=weight, calibration=calibrate(*self._pairs()), gain=self._gain(hits))

    @cached_property
    def _halves(self) -> tuple[Bool[Tensor, " i"], Bool[Tensor, " t"]]:
        """Every other image with different captions, and its texts."""
        images = self.truth.owners.unique(return_inverse=True)[1] % 2 == 1
        return images, images[self.truth.text_image_index]

    def _scores(self, itc_weight: float) -> tuple[Float[Tensor, "i t"], Float[Tensor, "i t"]]:
        scores = combined_scores(self.itm, self.similarity, itc_weight) if itc_weight else self.itm
        return two_stage_scores(scores, self.image_side, self.text_side, protocol=self.config.protocol)

    def _hits(self, itc_weight: float) -> QueryHits:
        for_images, for_texts = self._scores(itc_weight)
        (index, owners), size = self.truth, self.config.fold_size
        if size is None:
            return query_hits(for_images, index, owners=owners, text_to_image_scores=for_texts)
        found = QueryHits(*(torch.empty(len(side), dtype=torch.float64) for side in (owners, index)))
        for rows, texts in folds(index, len(owners), size):
            fold = for_images[rows, texts], index[texts] - rows.start
            found.images[rows], found.texts[texts] = query_hits(*fold, text_to_image_scores=for_texts[rows, texts])
        return found

    def _pairs(self) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"], Bool[Tensor, " n"]]:
        """Returns log-odds of the candidates of texts, whether they belong to them, and the half of each text."""
        image, text = self.text_side.nonzero(as_tuple=True)
        matching = self.truth.owners[image] == self.truth.text_image_index[text]
        return self.itm[image, text], matching, self._halves[1][text]

    def _gain(self, hits: Mapping[float, QueryHits]) -> Gain:
        """Compares with the cosine on the same candidates; texts of one image count as one draw in the interval."""
        images, texts = self._halves
        difference = torch.empty(len(texts), dtype=torch.float64)
        for half in (True, False):
            weight = _best_weight(hits, images != half, texts != half)
            own = texts == half
            difference[own] = (hits[weight].texts - hits[ITC_ALONE].texts)[own]
        mean = difference.mean()
        owner = self.truth.owners.unique(return_inverse=True)[1][self.truth.text_image_index]
        sums = torch.zeros(int(owner.max()) + 1, dtype=torch.float64).index_add_(0, owner, difference - mean)
        half_width = _Z * float((sums.square().sum() * len(sums) / (len(sums) - 1)).sqrt() / len(difference))
        return Gain(
            difference=float(mean), low=float(mean) - half_width, high=float(mean) + half_width, texts=len(difference)
        )


def ranked_recalls(
    scores: Float[Tensor, "i t"],
    text_to_image: Float[Tensor, "i t"] | None,
    truth: GroundTruth,
    config: RetrievalConfig,
) -> RetrievalRecalls:
    """Returns the recalls of scores, over all images or the folds of the config."""
    index, owners = truth
    if config.fold_size is None:
        return retrieval_recalls(scores, index, owners=owners, text_to_image_scores=text_to_image)
    return fold_recalls(scores, index, fold_size=config.fold_size, text_to_image_scores=text_to_image)


def _best_weight(hits: Mapping[float, QueryHits], images: Bool[Tensor, " i"], texts: Bool[Tensor, " t"]) -> float:
    """Returns the weight with the best mean recall of some queries in both directions, of equal ones the middle."""
    found = {weight: float(of.images[images].mean() + of.texts[texts].mean()) for weight, of in hits.items()}
    best = [weight for weight, recall in found.items() if recall == max(found.values())]
    return best[len(best) // 2]
