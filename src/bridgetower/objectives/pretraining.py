"""Objectives on images with captions, over one encoding of each: pre-training and fine-tuning for retrieval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batches.batch import CaptionBatch, RankingBatch
from bridgetower.distributed import all_gather, rank, world_size
from bridgetower.model.bridgetower import BridgeTower, EncodeOutputs
from bridgetower.model.config import look_up
from bridgetower.model.fusion import Encoded
from bridgetower.objectives import losses
from bridgetower.objectives.config import Phase, PretrainingConfig, RankingConfig
from bridgetower.objectives.losses import Contrast, Features, Losses, Pairs, Scalar, similarity

Texts = Literal["plain", "masked"]
LossAndMetrics = tuple[Scalar, dict[str, Tensor]]


@dataclass(frozen=True)
class Step:
    """Inputs of the objectives of a step."""

    phase: Phase
    batch: CaptionBatch
    image: Encoded
    # Of the kinds that the objectives of the phase read.
    texts: dict[Texts, Encoded] = field(default_factory=dict)
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

    loss: Callable[[PretrainingTask, Step], LossAndMetrics]
    heads: tuple[str, ...] = ()
    texts: tuple[Texts, ...] = ("plain",)
    fuses: bool = True


class PretrainingTask(nn.Module):
    """The objectives of each phase over one encoding of each image and text.

    ITC compares the pairs that it is given with those of the other processes, and negatives come from the same pairs:
    with accumulation that is one micro-batch per process, not the whole batch of the step. ITC over more than that is
    computed outside, from `features`, and handed to `forward`. The share of the run that is done decides the phase.
    """

    contrast_loss: Callable[..., Scalar] = staticmethod(losses.info_nce)
    """Contrastive loss of some pairs against all; a subclass may have another one."""

    def __init__(self, model: BridgeTower, config: PretrainingConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.progress = 0.0  # share of the run that is done
        self.objectives = {**OBJECTIVES, **model.extensions.objectives}
        needed_heads: list[str] = []
        for phase in config.phases:
            for name in phase.weights:
                needed_heads += look_up("phases", name, self.objectives).heads
            if phase.itm and phase.negatives == "hard":
                needed_heads.append("itc")
        missing = []
        for head in dict.fromkeys(needed_heads):
            if getattr(model, f"{head}_head", None) is None:
                missing.append(head)
        if missing:
            raise ValueError(
                f"the model has no {' and no '.join(missing)} head; set heads.{missing[0]} in its config"
            )
        if model.compares_pairs and not config.phases[-1].itc:
            raise ValueError(
                "heads.itc is fused, but itc of the last phase is 0: as the fusion encoder changes, embeddings of "
                "pairs could no longer be compared with those of images and texts; give itc a weight, or leave the "
                "head out of the checkpoint (bridgetower convert --drop-itc)"
            )

    @property
    def fuses(self) -> bool:
        """Whether any phase reads more than the vectors of images and texts."""
        if self.model.compares_pairs:
            return True
        names = {name for phase in self.config.phases for name in phase.weights}
        return any(self.objectives[name].fuses for name in names)

    def forward(self, batch: CaptionBatch, contrast: Contrast | None = None) -> Losses:
        phase = self.config.phase(self.progress)
        active = self._active_objectives(phase)
        reads_masked = any("masked" in objective.texts for objective in active.values())
        # With `contrast`, dropout has to be that of `features`, which encodes no masked texts.
        step = self.encode(batch, masked=reads_masked and contrast is None)
        step = replace(step, contrast=contrast)
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for name, objective in active.items():
            # ITC comes first, then masked texts are encoded, then pairs are fused: so the backward pass frees the
            # memory of fusion before the gradients of the text tower take some.
            if name != "itc" and reads_masked and "masked" not in step.texts:
                step.texts["masked"] = self.model.encode_text(
                    batch.masked_input_ids, batch.attention_mask, states=batch.masked_states
                )
            terms[name], objective_metrics = objective.loss(self, step)
            metrics |= objective_metrics
        return Losses.weigh(terms, phase.weights, metrics)

    def predict(self, batch: CaptionBatch) -> Float[Tensor, " b"]:
        """Returns the probability that each text belongs to its image."""
        model = self.model
        text = model.encode_text(batch.input_ids, batch.attention_mask, states=batch.text_states)
        image = model.encode_image(batch.pixel_values, states=batch.image_states)
        logits = model.itm_logits(model.fuse(image, text).pooled)
        return logits.float().softmax(dim=-1)[:, 1]

    def features(self, batch: CaptionBatch) -> Features:
        """Returns the inputs of ITC, with the dropout that `forward` draws from the same random state."""
        step = self.encode(batch, cache=False)
        embeds = self._embeds(step.image, step.texts["plain"])
        return Features(embeds, batch.image_index)

    def encode(self, batch: CaptionBatch, *, cache: bool = True, masked: bool = False) -> Step:
        """Encodes images and plain texts that the phase reads, and masked texts in the same batch if `masked`."""
        model = self.model
        phase = self.config.phase(self.progress)
        active = self._active_objectives(phase).values()
        reads_plain = any("plain" in objective.texts for objective in active)
        fusing = [objective for objective in active if objective.fuses]
        fuses_plain = any("plain" in objective.texts for objective in fusing)
        fuses_images = bool(fusing)
        embeds_pairs = phase.itc > 0 and model.compares_pairs

        # Texts come before images: the gradients of word embeddings, one for each call, need much memory.
        texts: dict[Texts, Encoded] = {}
        if reads_plain:
            text_outputs: EncodeOutputs = "layers" if fuses_plain or embeds_pairs else "cls"
            texts = self._encode_texts(batch, text_outputs, masked=masked)
        image_outputs: EncodeOutputs = "layers" if fuses_images or embeds_pairs else "cls"
        states = batch.image_states
        image = model.encode_image(batch.pixel_values, outputs=image_outputs, states=states)

        if cache and fuses_images:
            image = model.cache_image(image)
        if cache and fuses_plain:
            texts["plain"] = model.cache_text(texts["plain"])
        return Step(phase, batch, image, texts)

    def _active_objectives(self, phase: Phase) -> dict[str, Objective]:
        weights = phase.weights
        return {name: self.objectives[name] for name in self.objectives if name in weights}

    def _encode_texts(
        self, batch: CaptionBatch, outputs: EncodeOutputs, *, masked: bool
    ) -> dict[Texts, Encoded]:
        """Encodes plain texts, and masked ones in the same call of the tower if all layers are read."""
        ids = batch.input_ids
        mask = batch.attention_mask
        states = batch.text_states
        if outputs == "cls" or not masked:
            encoded = self.model.encode_text(ids, mask, outputs=outputs, states=states)
            return {"plain": encoded}
        ids = torch.cat([ids, batch.masked_input_ids])
        if mask is not None:
            mask = torch.cat([mask, mask])
        if states is not None:
            states = torch.cat([states, cast(Tensor, batch.masked_states)])
        encoded = self.model.encode_text(ids, mask, states=states)
        return {"plain": encoded[: len(batch)], "masked": encoded[len(batch) :]}

    def itc(
        self, image: Encoded, text: Encoded, batch: CaptionBatch, contrast: Contrast | None = None
    ) -> Scalar:
        """Contrastive loss over the features of all ranks, or `contrast` with the features of this batch."""
        embeds = self._embeds(image, text)
        scale = self.model.head("itc").logit_scale()
        if contrast is not None:
            return contrast.through(embeds, scale)
        return losses.itc_loss(
            embeds,
            batch.image_index,
            scale,
            gather_with_grads=self.config.gather_with_grads,
            loss=self.contrast_loss,
        )

    def contrast(self, micro_batches: Sequence[Features]) -> list[Contrast]:
        """Returns ITC over the features of all micro-batches of a step and of all ranks, for each micro-batch."""
        overrides_itc = type(self).itc is not PretrainingTask.itc
        overrides_loss = type(self).contrast_loss is not PretrainingTask.contrast_loss
        if overrides_itc and not overrides_loss:
            raise ValueError(
                f"{type(self).__name__} overrides itc, which sees one micro-batch only: with --contrast-over step "
                "override contrast_loss, or contrast"
            )
        scale = self.model.head("itc").logit_scale()
        return losses.contrast_micro_batches(
            micro_batches,
            scale,
            gather_with_grads=self.config.gather_with_grads,
            loss=self.contrast_loss,
        )

    def itm(self, image: Encoded, text: Encoded, pairs: Pairs) -> tuple[Scalar, Scalar]:
        """Matching loss and accuracy of `pairs`, one fusion over all of them."""
        fused = self.model.fuse(image[pairs.image_rows], text[pairs.text_rows], outputs="pooled")
        return losses.matching_loss(self.model.itm_logits(fused.pooled), pairs.labels)

    def mlm(self, image: Encoded, masked: Encoded, batch: CaptionBatch) -> tuple[Scalar, Scalar]:
        """Masked-word loss and accuracy with the weight of the batch, read from the text stream with the true image."""
        fused = self.model.fuse(image, masked, outputs="text")
        loss, accuracy = losses.mlm_loss(
            self.model.mlm_logits, fused.text, batch.mlm_labels, batch.mlm_positions
        )
        if batch.mlm_weight is None:
            return loss, accuracy
        return loss * batch.mlm_weight, accuracy * batch.mlm_weight

    def pairs(
        self, image: Encoded, text: Encoded, batch: CaptionBatch, phase: Phase
    ) -> tuple[Pairs, tuple[Encoded, Encoded]]:
        """Draws the pairs of the phase. Returns them and the encodings that their rows refer to."""
        generator = torch.Generator().manual_seed(batch.seed)
        index = batch.image_index
        if phase.negatives == "random":
            return losses.random_pairs(index, generator), (image, text)
        if phase.negatives == "uniform":
            return losses.uniform_pairs(index, generator), (image, text)

        # Hard negatives are drawn from the pairs of this rank, or of all ranks.
        all_index = index
        local_columns = slice(0, len(batch))
        if self.config.negatives_from == "world" and world_size() > 1:
            image = replace(image, first_layer_cache=None).map(all_gather)
            text = gather_texts(replace(text, first_layer_cache=None))
            all_index = all_gather(index)
            start = rank() * len(batch)
            local_columns = slice(start, start + len(batch))
        with torch.no_grad():
            scale = self.model.head("itc").logit_scale()
            image_embeds = self.model.image_embeds(image)
            text_embeds = self.model.text_embeds(text)
            image_to_text = similarity(image_embeds[local_columns], text_embeds, scale)
            text_to_image = similarity(text_embeds[local_columns], image_embeds, scale)
        pairs = losses.hard_pairs(
            image_to_text, text_to_image, index, all_index, local_columns, generator
        )
        return pairs, (image, text)

    def _embeds(self, image: Encoded, text: Encoded) -> tuple[Float[Tensor, "b c"], ...]:
        """Returns the embeddings of images, of texts and, where the head has them, of pairs."""
        model = self.model
        image_embeds = model.image_embeds(image)
        text_embeds = model.text_embeds(text)
        if not model.compares_pairs:
            return image_embeds, text_embeds
        return image_embeds, text_embeds, model.pair_embeds(model.fuse(image, text).pooled)


def gather_texts(text: Encoded) -> Encoded:
    """Gathers the encodings of all ranks, with gradients, padded to the longest text of any rank."""
    length = text.layers[0].shape[1]
    lengths = all_gather(torch.tensor([length], device=text.cls.device))
    longest = int(lengths.max())
    return text.padded(longest).map(all_gather)


def itc_objective(task: PretrainingTask, step: Step) -> LossAndMetrics:
    text = step.texts["plain"]
    return task.itc(step.image, text, step.batch, step.contrast), {}


def itm_objective(task: PretrainingTask, step: Step) -> LossAndMetrics:
    text = step.texts["plain"]
    pairs, candidates = task.pairs(step.image, text, step.batch, step.phase)
    loss, accuracy = task.itm(*candidates, pairs)
    return loss, {"itm_accuracy": accuracy}


def mlm_objective(task: PretrainingTask, step: Step) -> LossAndMetrics:
    text = step.texts["masked"]
    loss, accuracy = task.mlm(step.image, text, step.batch)
    return loss, {"mlm_accuracy": accuracy}


OBJECTIVES: dict[str, Objective] = {
    "itc": Objective(loss=itc_objective, heads=("itc",), fuses=False),
    "itm": Objective(loss=itm_objective, heads=("itm",)),
    "mlm": Objective(loss=mlm_objective, heads=("mlm",), texts=("masked",)),
}
"""In the order in which they are computed."""


class RankingTask(nn.Module):
    """Cross-entropy of the true text's score against those of the false texts, and matching beside it.

    Official `compute_irtr`, which crashes, as it stacks tensors of different shapes. As in its run config, matching is
    on, and the matching head of pre-training is not trained.
    """

    def __init__(self, model: BridgeTower, config: RankingConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        if config.itm:
            model.head("itm").requires_grad_(False)

    def forward(self, batch: RankingBatch) -> Losses:
        image, text, scores = self.score(batch)
        num_images, num_texts = scores.shape
        true_texts = torch.zeros(num_images, dtype=torch.long, device=scores.device)
        loss, accuracy = losses.class_loss(scores, true_texts)
        terms = {"rank": loss}
        metrics = {"rank_accuracy": accuracy}
        if self.config.itm:  # of the true texts, half of them with another image of the batch
            generator = torch.Generator().manual_seed(batch.seed)
            pairs = losses.random_pairs(batch.image_index, generator)
            pair_texts = text[pairs.text_rows * num_texts]
            fused = self.model.fuse(image[pairs.image_rows], pair_texts)
            logits = self.model.itm_logits(fused.pooled)
            terms["itm"], metrics["itm_accuracy"] = losses.matching_loss(logits, pairs.labels)
        return Losses.weigh(terms, {"rank": 1.0, "itm": self.config.itm}, metrics)

    def predict(self, batch: RankingBatch) -> Float[Tensor, "b n"]:
        """Returns the probability of each text to be the true one among those of its image."""
        _, _, scores = self.score(batch)
        return scores.float().softmax(dim=-1)

    def score(self, batch: RankingBatch) -> tuple[Encoded, Encoded, Float[Tensor, "b n"]]:
        """Returns images, texts, and the scores of the texts of each image, the true one first."""
        model = self.model
        image = model.cache_image(model.encode_image(batch.pixel_values, states=batch.image_states))
        text = model.encode_text(batch.input_ids, batch.attention_mask, states=batch.text_states)
        num_texts = len(text) // len(image)
        rows = torch.arange(len(image), device=image.cls.device)
        fused = model.fuse(image[rows.repeat_interleave(num_texts)], text)
        scores = model.head("rank")(fused.pooled)
        return image, text, scores.unflatten(0, (-1, num_texts))
