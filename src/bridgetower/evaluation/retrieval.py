"""Image-text retrieval: contrastive recall, then matching of the candidates; every tower runs once per item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.data.captions import CaptionImages
from bridgetower.distributed import gather_by_id, rank, world_size
from bridgetower.evaluation.config import Protocol, RetrievalConfig
from bridgetower.evaluation.metrics import (
    RetrievalRecalls,
    chance_recalls,
    itm_accuracy,
    retrieval_recalls,
    topk_candidates,
    two_stage_scores,
)
from bridgetower.model.bridgetower import BridgeTower, Encoded


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Scores and recalls of one model on one set.

    Attributes:
        similarity: Cosine of the contrastive embeddings, image by text.
        itm: Match logit of the candidate pairs, NaN elsewhere; None without a matching head.
        text_image_index: Row of the image that each text belongs to.
        itc_recalls, two_stage_recalls, chance: By stage; chance is a uniformly random ranking.
        itm_accuracy: Of each text with its own image and with a random other one; None without a matching head.
    """

    similarity: Float[Tensor, "i t"]
    itm: Float[Tensor, "i t"] | None
    text_image_index: Int[Tensor, " t"]
    itc_recalls: RetrievalRecalls
    two_stage_recalls: RetrievalRecalls | None
    chance: RetrievalRecalls
    itm_accuracy: float | None
    protocol: Protocol

    def figures(self) -> dict[str, float]:
        """Flat figures: `itc_…` and `two_stage_…` recalls, `chance_…`, `itm_accuracy`, and the final stage's `rsum`."""
        stages = {"itc": self.itc_recalls, "two_stage": self.two_stage_recalls, "chance": self.chance}
        figures = {
            f"{stage}_{name}": value
            for stage, recalls in stages.items()
            if recalls is not None
            for name, value in recalls.to_dict().items()
            if not name.startswith("num_")
        }
        if self.itm_accuracy is not None:
            figures["itm_accuracy"] = self.itm_accuracy
        return figures | {"rsum": (self.two_stage_recalls or self.itc_recalls).rsum}


@torch.inference_mode()
def evaluate_retrieval(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, *, device: torch.device | None = None
) -> RetrievalResult:
    """Ranks all images for every caption and all captions for every image.

    Images are shared out over the processes of a distributed run; every process gets the same result.

    Raises:
        ValueError: The model has no contrastive head, or a picture cannot be decoded.
    """
    device = device or next(model.parameters()).device
    texts, text_image_index = images.texts(config.max_captions)
    image = _cat_images(model, images, config.batch_size, device)
    text = _cat_texts(model, images, texts, config.batch_size, device)
    own = torch.empty(0, model.config.heads.itc_size) if image is None else model.image_embeds(image).float().cpu()
    _, image_embeds = gather_by_id(_own_rows(len(images)), own)
    similarity = image_embeds @ model.text_embeds(text).float().cpu().T
    itm = two_stage = accuracy = None
    if model.itm_head is not None:
        image_side = topk_candidates(similarity, config.candidates, dim=1)
        text_side = topk_candidates(similarity, config.candidates, dim=0)
        controls = _control_pairs(text_image_index, len(images))
        logits = _pair_logits(model, image, text, image_side | text_side | controls, config.batch_size)
        itm = logits[..., 1]
        ranked = two_stage_scores(itm, image_side, text_side, protocol=config.protocol)
        two_stage = retrieval_recalls(ranked[0], text_image_index, text_to_image_scores=ranked[1])
        accuracy = _control_accuracy(logits, controls, text_image_index)
    return RetrievalResult(
        similarity=similarity,
        itm=itm,
        text_image_index=text_image_index,
        itc_recalls=retrieval_recalls(similarity, text_image_index),
        two_stage_recalls=two_stage,
        chance=chance_recalls(text_image_index, len(images)),
        itm_accuracy=accuracy,
        protocol=config.protocol,
    )


@torch.inference_mode()
def evaluate_matching(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, *, device: torch.device | None = None
) -> float:
    """Accuracy of matching on each caption with its own picture and with a random other one (the same at every call).

    It is what `evaluate_retrieval` reports as `itm_accuracy`, for models without contrastive head.

    Raises:
        ValueError: The model has no matching head, or a picture cannot be decoded.
    """
    device = device or next(model.parameters()).device
    texts, text_image_index = images.texts(config.max_captions)
    image = _cat_images(model, images, config.batch_size, device)
    text = _cat_texts(model, images, texts, config.batch_size, device)
    controls = _control_pairs(text_image_index, len(images))
    logits = _pair_logits(model, image, text, controls, config.batch_size)
    return _control_accuracy(logits, controls, text_image_index)


def score_pairs(
    model: BridgeTower, image: Encoded, text: Encoded, wanted: Bool[Tensor, "i t"], batch_size: int
) -> Float[Tensor, "i t 2"]:
    """Returns the matching logits of the wanted pairs, NaN elsewhere; encodings are shared, never recomputed."""
    logits = torch.full((*wanted.shape, 2), torch.nan)
    pairs = wanted.nonzero()
    for start in range(0, len(pairs), batch_size):
        rows, columns = pairs[start : start + batch_size].unbind(dim=1)
        pooled = model.fuse(image[rows.to(image.cls.device)], text[columns.to(text.cls.device)], read="pooled").pooled
        logits[rows, columns] = model.itm_logits(pooled).float().cpu()
    return logits


def _pair_logits(
    model: BridgeTower, image: Encoded | None, text: Encoded, wanted: Bool[Tensor, "i t"], batch_size: int
) -> Float[Tensor, "i t 2"]:
    """Scores this process's images with `score_pairs` and puts the rows of all processes together."""
    own_rows = _own_rows(len(wanted))
    own = torch.empty(0, wanted.shape[1], 2)
    if image is not None:
        own = score_pairs(model, image, text, wanted[own_rows], batch_size)
    return gather_by_id(own_rows, own)[1]


def _own_rows(num_images: int) -> Int[Tensor, " n"]:
    """Images that this process encodes."""
    return torch.arange(rank(), num_images, world_size())


def _control_pairs(text_image_index: Int[Tensor, " t"], num_images: int) -> Bool[Tensor, "i t"]:
    """Each text with its own image and with one other, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    pairs = _is_own(text_image_index, num_images)
    if num_images > 1:
        shift = torch.randint(1, num_images, text_image_index.shape, generator=generator)
        pairs[(text_image_index + shift) % num_images, torch.arange(len(text_image_index))] = True
    return pairs


def _control_accuracy(
    logits: Float[Tensor, "i t 2"], controls: Bool[Tensor, "i t"], text_image_index: Int[Tensor, " t"]
) -> float:
    return itm_accuracy(logits[controls], _is_own(text_image_index, len(logits))[controls].long())


def _is_own(text_image_index: Int[Tensor, " t"], num_images: int) -> Bool[Tensor, "i t"]:
    return torch.arange(num_images)[:, None] == text_image_index[None]


def _cat_images(model: BridgeTower, images: CaptionImages, batch_size: int, device: torch.device) -> Encoded | None:
    """Encodes this process's share; None where there are fewer images than processes."""
    chunks = _chunks(_own_rows(len(images)).tolist(), batch_size)
    parts = [model.encode_image(images.pixel_values(chunk).to(device)) for chunk in chunks]
    return Encoded.cat(parts) if parts else None


def _cat_texts(
    model: BridgeTower, images: CaptionImages, texts: Sequence[str], batch_size: int, device: torch.device
) -> Encoded:
    batches = (images.processor.texts(chunk, truncate=True) for chunk in _chunks(texts, batch_size))
    return Encoded.cat(
        [
            model.encode_text(
                batch.input_ids.to(device), None if batch.attention_mask is None else batch.attention_mask.to(device)
            )
            for batch in batches
        ]
    )


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
