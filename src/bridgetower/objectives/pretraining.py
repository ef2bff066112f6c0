"""Pre-training and retrieval fine-tuning: objectives on images with captions, over one encoding of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batch import CaptionBatch, RankingBatch
from bridgetower.distributed import all_gather, rank, world_size
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import entry
from bridgetower.model.fusion import Encoded
from bridgetower.objectives import losses
from bridgetower.objectives.config import Phase, PretrainingConfig, RankingConfig
from bridgetower.objectives.losses import Contrast, Features, Losses, Pairs, similarity

Texts = Literal["plain", "masked"]


@dataclass(frozen=True)
class Step:
    """What the objectives of a step share."""

    phase: Phase  # which is in force
    batch: CaptionBatch
    image: Encoded
    texts: dict[Texts, Encoded] = field(default_factory=dict)  # of the kinds that the objectives of the phase read
    contrast: Contrast | None = None  # ITC of all pairs of the step, where it is computed outside


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A pre-training objective, which phases name with a weight.

    Attributes:
        loss: Gives, of the task and a step, the loss and metrics by name, which are logged beside it.
        heads: Heads that the model has to have.
        texts: Captions that it reads: `plain`, or `masked`, with hidden words.
        fuses: Whether it reads all hidden states, to fuse them; else only the vectors of images and texts are computed.
    """

    loss: Callable[[PretrainingTask, Step], tuple[Float[Tensor, ""], dict[str, Tensor]]]
    heads: tuple[str, ...] = ()
    texts: tuple[Texts, ...] = ("plain",)
    fuses: bool = True


class PretrainingTask(nn.Module):
    """The objectives of each phase over one encoding of each image and text.

    ITC compares the pairs that it is given with those of the other processes, and negatives come from the same pairs:
    with accumulation that is one micro-batch per process, not the whole batch of the step. ITC over more than that is
    computed outside, from `features`, and handed to `forward`. The share of the run that is done decides the phase.
    """

    contrast_loss: Callable[..., Float[Tensor, ""]] = staticmethod(losses.info_nce)
    """Contrastive loss of some pairs against all; a subclass may have another one."""

    def __init__(self, model: BridgeTower, config: PretrainingConfig) -> None:
        super().__init__()
        self.model, self.config, self.progress = model, config, 0.0
        self.objectives = {**OBJECTIVES, **model.extensions.objectives}
        named = {name: entry("phases", name, self.objectives) for phase in config.phases for name in phase.weights}
        needed = [head for objective in named.values() for head in objective.heads]
        needed += ["itc" for phase in config.phases if phase.itm and phase.negatives == "hard"]
        missing = [head for head in dict.fromkeys(needed) if getattr(model, f"{head}_head", None) is None]
        if missing:
            raise ValueError(f"the model has no {' and no '.join(missing)} head; set heads.{missing[0]} in its config")
        if model.compares_pairs and not config.phases[-1].itc:
            raise ValueError(
                "heads.itc is fused, but itc of the last phase is 0: as the fusion encoder changes, embeddings of "
                "pairs could no longer be compared with those of images and texts; give itc a weight, or leave the "
                "head out of the checkpoint (bridgetower convert --drop-itc)"
            )

    @property
    def fuses(self) -> bool:
        """Whether any phase reads more than the vectors of images and texts."""
        named = [self.objectives[name] for phase in self.config.phases for name in phase.weights]
        return self.model.compares_pairs or any(each.fuses for each in named)

    def forward(self, batch: CaptionBatch, contrast: Contrast | None = None) -> Losses:
        # With `contrast`, dropout has to be that of `features`, which encodes no masked texts.
        step = replace(self.encode(batch, masked=contrast is None), contrast=contrast)
        weights = step.phase.weights
        active = {name: objective for name, objective in self.objectives.items() if name in weights}
        parts: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for name, objective in active.items():
            # ITC comes first; then all that is encoded, before anything is fused: backward then frees what fusion keeps
            # before the gradients of the text tower take memory.
            if name != "itc" and "masked" not in step.texts and any("masked" in each.texts for each in active.values()):
                ids, mask = batch.masked_input_ids, batch.attention_mask
                step.texts["masked"] = self.model.encode_text(ids, mask, states=batch.masked_states)
            parts[name], found = objective.loss(self, step)
            metrics |= found
        return Losses.weigh(parts, weights, metrics)

    def predict(self, batch: CaptionBatch) -> Float[Tensor, " b"]:
        """Returns the probability that each text belongs to its image."""
        model = self.model
        text = model.encode_text(batch.input_ids, batch.attention_mask, states=batch.text_states)
        image = model.encode_image(batch.pixel_values, states=batch.image_states)
        logits = model.itm_logits(model.fuse(image, text).pooled)
        return logits.float().softmax(dim=-1)[:, 1]

    def features(self, batch: CaptionBatch) -> Features:
        """Returns what ITC reads, drawing the dropout that `forward` draws from the same random state."""
        step = self.encode(batch, cache=False)
        return Features(self._embeds(step.image, step.texts["plain"]), batch.image_index)

    def encode(self, batch: CaptionBatch, *, cache: bool = True, masked: bool = False) -> Step:
        """Encodes images and plain texts that the phase reads; with `masked`, masked ones in the same batch."""
        model, phase, texts = self.model, self.config.phase(self.progress), dict[Texts, Encoded]()
        active = [self.objectives[name] for name in phase.weights]
        plain = [each for each in active if "plain" in each.texts]
        fuses, fuses_plain = (any(each.fuses for each in some) for some in (active, plain))
        fuses_pairs = phase.itc > 0 and model.compares_pairs
        if plain:  # before the images, as the gradients of word embeddings, one for each call, need much memory
            outputs: Literal["layers", "cls"] = "layers" if fuses_plain or fuses_pairs else "cls"
            ids, mask, states = batch.input_ids, batch.attention_mask, batch.text_states
            if masked and outputs == "layers" and any("masked" in each.texts for each in active):
                ids = torch.cat([ids, batch.masked_input_ids])
                mask = None if mask is None else torch.cat([mask, mask])
                states = None if states is None else torch.cat([states, cast(Tensor, batch.masked_states)])
            encoded = model.encode_text(ids, mask, outputs=outputs, states=states)
            texts["plain"] = encoded[: len(batch)]
            if len(encoded) > len(batch):
                texts["masked"] = encoded[len(batch) :]
        outputs = "layers" if fuses or fuses_pairs else "cls"
        image = model.encode_image(batch.pixel_values, outputs=outputs, states=batch.image_states)
        if cache and fuses:
            image = model.cache_image(image)
        if cache and fuses_plain:
            texts["plain"] = model.cache_text(texts["plain"])
        return Step(phase, batch, image, texts)

    def itc(
        self, image: Encoded, text: Encoded, batch: CaptionBatch, contrast: Contrast | None = None
    ) -> Float[Tensor, ""]:
        """Contrastive loss over the features of all ranks, or `contrast` with the features of this batch."""
        embeds = self._embeds(image, text)
        scale = self.model.head("itc").logit_scale()
        if contrast is not None:
            return contrast.through(embeds, scale)
        gathers = self.config.gather_with_grads
        return losses.itc_loss(embeds, batch.image_index, scale, gather_with_grads=gathers, loss=self.contrast_loss)

    def contrast(self, parts: Sequence[Features]) -> list[Contrast]:
        """Returns ITC over the features of all micro-batches of a step and of all ranks, for each micro-batch."""
        if type(self).itc is not PretrainingTask.itc and type(self).contrast_loss is PretrainingTask.contrast_loss:
            raise ValueError(
                f"{type(self).__name__} overrides itc, which sees one micro-batch only: with --contrast-over step "
                "override contrast_loss, or contrast"
            )
        gathers, scale = self.config.gather_with_grads, self.model.head("itc").logit_scale()
        return losses.contrast_parts(parts, scale, gather_with_grads=gathers, loss=self.contrast_loss)

    def itm(self, image: Encoded, text: Encoded, pairs: Pairs) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Matching loss and accuracy of `pairs`, one fusion over all of them."""
        fused = self.model.fuse(image[pairs.image_rows], text[pairs.text_rows], outputs="pooled")
        return losses.matching_loss(self.model.itm_logits(fused.pooled), pairs.labels)

    def mlm(self, image: Encoded, masked: Encoded, batch: CaptionBatch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Masked-word loss and accuracy with the weight of the batch, read from the text stream with the true image."""
        fused = self.model.fuse(image, masked, outputs="text")
        loss, accuracy = losses.mlm_loss(self.model.mlm_logits, fused.text, batch.mlm_labels, batch.mlm_positions)
        weight = batch.mlm_weight
        return (loss, accuracy) if weight is None else (loss * weight, accuracy * weight)

    def pairs(
        self, image: Encoded, text: Encoded, batch: CaptionBatch, phase: Phase
    ) -> tuple[Pairs, tuple[Encoded, Encoded]]:
        """Draws the pairs of the phase; returns them and the encodings that their rows refer to."""
        generator = torch.Generator().manual_seed(batch.seed)
        if phase.negatives == "random":
            return losses.random_pairs(batch.image_index, generator), (image, text)
        if phase.negatives == "uniform":
            return losses.uniform_pairs(batch.image_index, generator), (image, text)
        index, own = batch.image_index, slice(0, len(batch))
        if self.config.negatives_from == "world" and world_size() > 1:
            image = replace(image, first_layer_cache=None).map(all_gather)
            text = gather_texts(replace(text, first_layer_cache=None))
            own = slice(rank() * len(batch), (rank() + 1) * len(batch))
        all_index = all_gather(index) if len(image) > len(batch) else index
        with torch.no_grad():
            scale = self.model.head("itc").logit_scale()
            images, texts = self.model.image_embeds(image), self.model.text_embeds(text)
            image_to_text, text_to_image = similarity(images[own], texts, scale), similarity(texts[own], images, scale)
        pairs = losses.hard_pairs(image_to_text, text_to_image, index, all_index, own, generator)
        return pairs, (image, text)

    def _embeds(self, image: Encoded, text: Encoded) -> tuple[Float[Tensor, "b c"], ...]:
        """What ITC compares: images, texts and, where the head has embeddings of pairs, each image with its text."""
        model = self.model
        embeds = model.image_embeds(image), model.text_embeds(text)
        return (*embeds, model.pair_embeds(model.fuse(image, text).pooled)) if model.compares_pairs else embeds


def gather_texts(text: Encoded) -> Encoded:
    """Gathers the encodings of all ranks, with gradients, padded to the longest text of any rank."""
    length = torch.tensor([text.layers[0].shape[1]], device=text.cls.device)
    return text.padded(int(all_gather(length).max())).map(all_gather)


def _itc(task: PretrainingTask, step: Step) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    return task.itc(step.image, step.texts["plain"], step.batch, step.contrast), {}


def _itm(task: PretrainingTask, step: Step) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    pairs, candidates = task.pairs(step.image, step.texts["plain"], step.batch, step.phase)
    loss, accuracy = task.itm(*candidates, pairs)
    return loss, {"itm_accuracy": accuracy}


def _mlm(task: PretrainingTask, step: Step) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    loss, accuracy = task.mlm(step.image, step.texts["masked"], step.batch)
    return loss, {"mlm_accuracy": accuracy}


OBJECTIVES: dict[str, Objective] = {
    "itc": Objective(loss=_itc, heads=("itc",), fuses=False),
    "itm": Objective(loss=_itm, heads=("itm",)),
    "mlm": Objective(loss=_mlm, heads=("mlm",), texts=("masked",)),
}
"""In the order in which they are computed."""


class RankingTask(nn.Module):
    """Cross-entropy of the true text's score against those of the false texts, and matching beside it.

    Official `compute_irtr`, which crashes: it stacks tensors of different shapes. Its run config also switches
    matching on, with the head of pre-training kept as it is; so here.
    """

    def __init__(self, model: BridgeTower, config: RankingConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        if config.itm:
            model.head("itm").requires_grad_(False)

    def forward(self, batch: RankingBatch) -> Losses:
        image, text, scores = self.score(batch)
        loss, accuracy = losses.class_loss(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))
        parts, metrics = {"rank": loss}, {"rank_accuracy": accuracy}
        if self.config.itm:  # of the true texts, half of them with another image of the batch
            pairs = losses.random_pairs(batch.image_index, torch.Generator().manual_seed(batch.seed))
            fused = self.model.fuse(image[pairs.image_rows], text[pairs.text_rows * scores.shape[1]])
            logits = self.model.itm_logits(fused.pooled)
            parts["itm"], metrics["itm_accuracy"] = losses.matching_loss(logits, pairs.labels)
        return Losses.weigh(parts, {"rank": 1.0, "itm": self.config.itm}, metrics)

    def predict(self, batch: RankingBatch) -> Float[Tensor, "b n"]:
        """Returns the probability of each text to be the true one among those of its image."""
        return self.score(batch)[2].float().softmax(dim=-1)

    def score(self, batch: RankingBatch) -> tuple[Encoded, Encoded, Float[Tensor, "b n"]]:
        """Returns images, texts, and the scores of the texts of each image, the true one first."""
        model = self.model
        image = model.cache_image(model.encode_image(batch.pixel_values, states=batch.image_states))
        text = model.encode_text(batch.input_ids, batch.attention_mask, states=batch.text_states)
        num_texts = len(text) // len(image)
        rows = torch.arange(len(image), device=image.cls.device).repeat_interleave(num_texts)
        return image, text, model.head("rank")(model.fuse(image[rows], text).pooled).unflatten(0, (-1, num_texts))
