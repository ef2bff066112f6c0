"""Image-text retrieval: contrastive recall, then matching of the candidates, with shared encodings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.data.captions import CaptionImages
from bridgetower.distributed import gather_by_id, rank, world_size
from bridgetower.evaluation.blocks import BlockEncoder
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import (
    RetrievalRecalls,
    chance_recalls,
    fold_recalls,
    itm_accuracy,
    retrieval_recalls,
    topk_candidates,
    two_stage_scores,
)
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.encodings import Encoded
from bridgetower.tasks.config import Protocol

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Scores and recalls of one model on one set.

    Attributes:
        similarity: Cosine of the contrastive embeddings, image by text.
        itm: Match logit of the candidate pairs, NaN elsewhere; None without a matching head.
        text_image_index: Row of the image that each text belongs to.
        itc_recalls, two_stage_recalls, chance: By stage; chance is a uniformly random ranking. Means over
            the folds if there are any.
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
        figures = _flat({"itc": self.itc_recalls, "two_stage": self.two_stage_recalls, "chance": self.chance})
        if self.itm_accuracy is not None:
            figures["itm_accuracy"] = self.itm_accuracy
        return figures | {"rsum": (self.two_stage_recalls or self.itc_recalls).rsum}


@torch.inference_mode()
def evaluate_retrieval(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, *, device: torch.device | None = None
) -> RetrievalResult:
    """Ranks all images for every caption and all captions for every image, or those of its fold.

    Images are shared out over the processes of a distributed run; every process gets the same result.

    Raises:
        ValueError: The model has no contrastive head, a picture cannot be decoded, or the folds are not equal.
    """
    _check_folds(images, config)
    model.contrastive_head()
    texts, text_image_index = images.texts(config.max_captions)
    image, text = _encoders(model, images, texts, config, device)
    width = model.config.heads.itc_size
    _, image_embeds = gather_by_id(_own_rows(len(images)), image.vectors(model.image_embeds, width))
    similarity = image_embeds @ text.vectors(model.text_embeds, width).T
    itm = two_stage = accuracy = None
    if model.itm_head is not None:
        sides = [_candidates(similarity, text_image_index, config, dim=dim) for dim in (1, 0)]
        controls = _control_pairs(text_image_index, len(images))
        logits = _pair_logits(model, image, text, sides[0] | sides[1] | controls, config.batch_size)
        itm = logits[..., 1]
        ranked = two_stage_scores(itm, *sides, protocol=config.protocol)
        two_stage = _recalls(ranked[0], text_image_index, config, ranked[1])
        accuracy = _control_accuracy(logits, controls, text_image_index)
    return RetrievalResult(
        similarity=similarity,
        itm=itm,
        text_image_index=text_image_index,
        itc_recalls=_recalls(similarity, text_image_index, config),
        two_stage_recalls=two_stage,
        chance=_chance(text_image_index, len(images), config),
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
    model.matching_head()
    texts, text_image_index = images.texts(config.max_captions)
    image, text = _encoders(model, images, texts, config, device)
    controls = _control_pairs(text_image_index, len(images))
    logits = _pair_logits(model, image, text, controls, config.batch_size)
    return _control_accuracy(logits, controls, text_image_index)


@torch.inference_mode()
def evaluate_all_pairs(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, *, device: torch.device | None = None
) -> dict[str, float]:
    """Ranks all pairs, or those of each fold, by one score of the fusion encoder: retrieval without contrast.

    The score is that of the ranking head or, without one, the logit of a match. Its cost grows with images times texts.

    Returns:
        Flat figures: `one_stage_…` and `chance_…` recalls, and `rsum`.

    Raises:
        ValueError: The model has neither head, a picture cannot be decoded, or the folds are not equal.
    """
    _check_folds(images, config)
    if model.rank_head is None:
        model.matching_head()
    head = model.itm_logits if model.rank_head is None else _ranking_logits(model)
    texts, text_image_index = images.texts(config.max_captions)
    image, text = _encoders(model, images, texts, config, device)
    size = config.fold_size or len(images)
    wanted = torch.arange(len(images))[:, None] // size == text_image_index[None] // size
    scores = _pair_logits(model, image, text, wanted, config.batch_size, head)[..., 1]
    one_stage = _recalls(scores, text_image_index, config)
    chance = _chance(text_image_index, len(images), config)
    return _flat({"one_stage": one_stage, "chance": chance}) | {"rsum": one_stage.rsum}


def score_pairs(
    model: BridgeTower,
    image: Encoded,
    text: Encoded,
    wanted: Bool[Tensor, "i t"],
    batch_size: int,
    head: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "i t 2"]:
    """Returns the matching logits of the wanted pairs, NaN elsewhere; encodings are shared, never recomputed.

    Args:
        model: Fuses the pairs.
        image, text: Encodings.
        wanted: Pairs to score.
        batch_size: Pairs at once.
        head: Gives the logits of a pooled output; None takes the matching head.
    """
    head = head or model.itm_logits
    logits = torch.full((*wanted.shape, 2), torch.nan)
    pairs = wanted.nonzero()
    for start in range(0, len(pairs), batch_size):
        rows, columns = pairs[start : start + batch_size].unbind(dim=1)
        pooled = model.fuse(image[rows.to(image.cls.device)], text[columns.to(text.cls.device)], read="pooled").pooled
        logits[rows, columns] = head(pooled).float().cpu()
    return logits


def _ranking_logits(model: BridgeTower) -> Callable[[Tensor], Tensor]:
    """The score of the ranking head as the logit of a match, against 0."""

    def logits(pooled: Tensor) -> Tensor:
        scores = model.rank_scores(pooled)
        return torch.stack([torch.zeros_like(scores), scores], dim=1)

    return logits


def _pair_logits(
    model: BridgeTower,
    image: BlockEncoder,
    text: BlockEncoder,
    wanted: Bool[Tensor, "i t"],
    batch_size: int,
    head: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "i t 2"]:
    """Scores this process's images with `score_pairs`, block by block, and puts the rows of all processes together."""
    own_rows = _own_rows(len(wanted))
    own = torch.full((len(own_rows), wanted.shape[1], 2), torch.nan)
    for rows, images in image.blocks():
        for columns, texts in text.blocks():
            own[rows, columns] = score_pairs(model, images, texts, wanted[own_rows[rows], columns], batch_size, head)
    return gather_by_id(own_rows, own)[1]


def _candidates(
    similarity: Float[Tensor, "i t"], text_image_index: Int[Tensor, " t"], config: RetrievalConfig, *, dim: int
) -> Bool[Tensor, "i t"]:
    """Chooses the candidates of each query among the items of its fold."""
    size = config.fold_size or len(similarity)
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    for start in range(0, len(similarity), size):
        rows, texts = slice(start, start + size), (text_image_index // size == start // size).nonzero().squeeze(1)
        chosen[rows, texts] = topk_candidates(similarity[rows, texts], config.candidates, dim=dim)
    return chosen


def _recalls(
    scores: Float[Tensor, "i t"],
    text_image_index: Int[Tensor, " t"],
    config: RetrievalConfig,
    text_to_image: Float[Tensor, "i t"] | None = None,
) -> RetrievalRecalls:
    if config.fold_size is None:
        return retrieval_recalls(scores, text_image_index, text_to_image_scores=text_to_image)
    return fold_recalls(scores, text_image_index, fold_size=config.fold_size, text_to_image_scores=text_to_image)


def _flat(stages: Mapping[str, RetrievalRecalls | None]) -> dict[str, float]:
    """The recalls of each stage that there is, under flat names."""
    return {
        f"{stage}_{name}": value
        for stage, recalls in stages.items()
        if recalls is not None
        for name, value in recalls.to_dict().items()
        if not name.startswith("num_")
    }


def _chance(text_image_index: Int[Tensor, " t"], num_images: int, config: RetrievalConfig) -> RetrievalRecalls:
    """Recalls of a random ranking."""
    if config.fold_size is None:
        return chance_recalls(text_image_index, num_images)
    tied = torch.zeros(num_images, len(text_image_index))  # tied items count by chance
    return _recalls(tied, text_image_index, config)


def _check_folds(images: CaptionImages, config: RetrievalConfig) -> None:
    if config.fold_size is not None and len(images) % config.fold_size:
        raise ValueError(f"{len(images)} images do not split into folds of {config.fold_size}; expected a multiple")


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


def _encoders(
    model: BridgeTower,
    images: CaptionImages,
    texts: Sequence[str],
    config: RetrievalConfig,
    device: torch.device | None,
) -> tuple[BlockEncoder, BlockEncoder]:
    """Encoders of this process's images and of all texts; each may hold half of the memory."""
    cls_only = model.itm_head is None and model.rank_head is None
    place, model_config, own_rows = device or next(model.parameters()).device, model.config, _own_rows(len(images))

    def encode_images(rows: Sequence[int]) -> Encoded:
        pixel_values = images.pixel_values(own_rows[rows].tolist()).to(place)
        if cls_only:
            return model.encode_image(pixel_values, read="cls")
        return model.start_image(model.encode_image(pixel_values))

    def encode_texts(rows: Sequence[int]) -> Encoded:
        batch = images.processor.texts([texts[row] for row in rows], truncate=True)
        mask = None if batch.attention_mask is None else batch.attention_mask.to(place)
        if cls_only:
            return model.encode_text(batch.input_ids.to(place), mask, read="cls")
        return model.start_text(model.encode_text(batch.input_ids.to(place), mask))

    tensors = model_config.fusion.num_handed_layers + 4  # a start holds four times the width
    token_bytes = tensors * model_config.fusion.hidden_size * next(model.parameters()).element_size()
    room = config.memory_gib * 2**30 / 2 / token_bytes  # in tokens
    lengths = model_config.vision.num_tokens, images.processor.config.max_length
    sizes = [max(config.batch_size, int(room / length)) for length in lengths]
    encoders = (
        BlockEncoder(encode_images, len(own_rows), block_size=sizes[0], batch_size=config.batch_size),
        BlockEncoder(encode_texts, len(texts), block_size=sizes[1], batch_size=config.batch_size),
    )
    if len(own_rows) > sizes[0] or len(texts) > sizes[1]:
        _LOG.info(
            "%d images and %d texts are encoded more than once, in blocks of %d and %d: memory_gib is %g",
            *(len(own_rows), len(texts), *sizes, config.memory_gib),
        )
    return encoders
