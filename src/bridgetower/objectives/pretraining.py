"""Pre-training and retrieval fine-tuning: MLM, ITM and ITC on images with captions, one image encode per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridgetower.data.batch import CaptionBatch
from bridgetower.distributed import all_gather, world_size
from bridgetower.model.bridgetower import BridgeTower, EncodeOutputs
from bridgetower.model.encodings import Encoded
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.contrast import Contrast, Features, contrast_parts
from bridgetower.objectives.encoding import encode_image, encode_text
from bridgetower.objectives.losses import Losses, info_nce, itc_loss, mlm_loss, own_columns, similarity
from bridgetower.objectives.matching import Pairs, hard_pairs, matching_loss, random_pairs, uniform_pairs


class PretrainingTask(nn.Module):
    """The paper's pre-training objectives over one encoding of each image and text.

    ITC compares the pairs that it is given with those of the other processes, and negatives come from the same pairs:
    with accumulation that is one micro-batch per process, not the whole batch of the step. ITC over more than that is
    computed outside, from `features`, and handed to `forward`.

    Attributes:
        progress: Share of the run that is done; decides the phase.
    """

    def __init__(self, model: BridgeTower, config: PretrainingConfig) -> None:
        super().__init__()
        self.model, self.config, self.progress = model, config, 0.0
        _check_heads(model, config)

    @property
    def graph(self) -> Phase:
        """What decides which parameters get gradients."""
        return self.config.phase(self.progress)

    def forward(self, batch: CaptionBatch, contrast: Contrast | None = None) -> Losses:
        """Returns the weighted losses of the current phase."""
        phase = self.config.phase(self.progress)
        image, text = self.encode(batch, phase)
        parts: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if phase.itc and text is not None:  # before all else, as its dropout has to be that of `features`
            parts["itc"] = self.itc(image, text, batch, contrast)
        # Encoded before anything is fused: backward then frees what fusion keeps before the gradients of the text tower
        # take memory.
        masked = encode_text(self.model, batch.masked_input_ids, batch.attention_mask) if phase.mlm else None
        if phase.itm and text is not None:
            pairs, candidates = self.pairs(image, text, batch, phase)
            parts["itm"], metrics["itm_accuracy"] = self.itm(*candidates, pairs)
        if masked is not None:
            parts["mlm"], metrics["mlm_accuracy"] = self.mlm(image, masked, batch)
        return Losses.weigh(parts, {"mlm": phase.mlm, "itm": phase.itm, "itc": phase.itc}, metrics)

    def predict(self, batch: CaptionBatch) -> Float[Tensor, " b"]:
        """Returns the probability that each text belongs to its image."""
        model = self.model
        text = encode_text(model, batch.input_ids, batch.attention_mask)
        logits = model.itm_logits(model.fuse(encode_image(model, batch.pixel_values), text).pooled)
        return logits.float().softmax(dim=-1)[:, 1]

    def features(self, batch: CaptionBatch) -> Features:
        """Returns what ITC reads, drawing the dropout that `forward` draws from the same random state."""
        image, text = self._encode(batch, self.config.phase(self.progress))
        assert text is not None  # the phase has ITC
        return Features(self._embeds(image, text), batch.image_index)

    def encode(self, batch: CaptionBatch, phase: Phase) -> tuple[Encoded, Encoded | None]:
        """Encodes images and, for ITM or ITC, plain texts, as far as the phase reads them."""
        image, text = self._encode(batch, phase)
        if phase.itm or phase.mlm:
            image = self.model.cache_image(image)
        if phase.itm and text is not None:
            text = self.model.cache_text(text)
        return image, text

    def itc(
        self, image: Encoded, text: Encoded, batch: CaptionBatch, contrast: Contrast | None = None
    ) -> Float[Tensor, ""]:
        """Contrastive loss over the features of all ranks, or `contrast` with the features of this batch."""
        embeds = self._embeds(image, text)
        scale = self.model.contrastive_head().logit_scale()
        if contrast is not None:
            return contrast.through(embeds, scale)
        gathers = self.config.gather_with_grads
        return itc_loss(embeds, batch.image_index, scale, gather_with_grads=gathers, loss=self.contrast_loss)

    def contrast(self, parts: Sequence[Features]) -> list[Contrast]:
        """Returns ITC over the features of all micro-batches of a step and of all ranks, for each micro-batch."""
        if type(self).itc is not PretrainingTask.itc and type(self).contrast_loss is PretrainingTask.contrast_loss:
            raise ValueError(
                f"{type(self).__name__} overrides itc, which sees one micro-batch only: with --contrast-over step "
                "override contrast_loss, or contrast"
            )
        gathers, scale = self.config.gather_with_grads, self.model.contrastive_head().logit_scale()
        return contrast_parts(parts, scale, gather_with_grads=gathers, loss=self.contrast_loss)

    def contrast_loss(
        self,
        rows: Sequence[Float[Tensor, "r c"]],
        row_index: Int[Tensor, " r"],
        columns: Sequence[Float[Tensor, "s c"]],
        column_index: Int[Tensor, " s"],
        *,
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """Contrastive loss of some pairs against all, as `info_nce`; override it for another one."""
        return info_nce(rows, row_index, columns, column_index, logit_scale=logit_scale)

    def itm(self, image: Encoded, text: Encoded, pairs: Pairs) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Matching loss and accuracy of `pairs`, one fusion over all of them."""
        fused = self.model.fuse(image[pairs.image_rows], text[pairs.text_rows], outputs="pooled")
        return matching_loss(self.model.itm_logits(fused.pooled), pairs.labels)

    def mlm(self, image: Encoded, masked: Encoded, batch: CaptionBatch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Masked-word loss and accuracy with the weight of the batch, read from the text stream with the true image."""
        fused = self.model.fuse(image, masked, outputs="text")
        loss, accuracy = mlm_loss(self.model.mlm_logits, fused.text, batch.mlm_labels, batch.mlm_positions)
        weight = batch.mlm_weight
        return (loss, accuracy) if weight is None else (loss * weight, accuracy * weight)

    def pairs(
        self, image: Encoded, text: Encoded, batch: CaptionBatch, phase: Phase
    ) -> tuple[Pairs, tuple[Encoded, Encoded]]:
        """Draws the pairs of the phase; returns them and the encodings that their rows refer to."""
        generator = torch.Generator().manual_seed(batch.seed)
        if phase.negatives == "random":
            return random_pairs(batch.image_index, generator), (image, text)
        if phase.negatives == "uniform":
            return uniform_pairs(batch.image_index, generator), (image, text)
        index, own = batch.image_index, slice(0, len(batch))
        if self.config.negatives_from == "world" and world_size() > 1:
            image = replace(image, first_layer_cache=None).map(all_gather)
            text = gather_texts(replace(text, first_layer_cache=None))
            own = own_columns(len(batch))
        all_index = all_gather(index) if len(image) > len(batch) else index
        with torch.no_grad():
            scale = self.model.contrastive_head().logit_scale()
            images, texts = self.model.image_embeds(image), self.model.text_embeds(text)
            image_to_text, text_to_image = similarity(images[own], texts, scale), similarity(texts[own], images, scale)
        pairs = hard_pairs(image_to_text, text_to_image, index, all_index, own, generator)
        return pairs, (image, text)

    def _encode(self, batch: CaptionBatch, phase: Phase) -> tuple[Encoded, Encoded | None]:
        text, fuses_texts = None, phase.itm or (phase.itc and self.model.compares_pairs)
        if phase.itm or phase.itc:  # before the images, as the gradients of word embeddings need memory twice
            outputs: EncodeOutputs = "layers" if fuses_texts else "cls"
            text = encode_text(self.model, batch.input_ids, batch.attention_mask, outputs=outputs)
        image = encode_image(self.model, batch.pixel_values, outputs="layers" if fuses_texts or phase.mlm else "cls")
        return image, text

    def _embeds(self, image: Encoded, text: Encoded) -> tuple[Float[Tensor, "b c"], ...]:
        """What ITC compares: images, texts and, where the head has embeddings of pairs, each image with its text."""
        model = self.model
        embeds = model.image_embeds(image), model.text_embeds(text)
        return (*embeds, model.pair_embeds(model.fuse(image, text).pooled)) if model.compares_pairs else embeds


def gather_texts(text: Encoded) -> Encoded:
    """Gathers the encodings of all ranks, with gradients, padded to the longest text of any rank."""
    length = torch.tensor([text.layers[0].shape[1]], device=text.cls.device)
    return text.padded(int(all_gather(length).max())).map(all_gather)


def _check_heads(model: BridgeTower, config: PretrainingConfig) -> None:
    needed = {
        "mlm": any(phase.mlm for phase in config.phases),
        "itm": any(phase.itm for phase in config.phases),
        "itc": any(phase.itc or (phase.itm and phase.negatives == "hard") for phase in config.phases),
    }
    missing = [name for name, needs in needed.items() if needs and getattr(model, f"{name}_head") is None]
    if missing:
        raise ValueError(f"the model has no {' and no '.join(missing)} head; set heads.{missing[0]} in its config")
    if model.compares_pairs and not config.phases[-1].itc:
        raise ValueError(
            "heads.itc is fused, but itc of the last phase is 0: as the fusion encoder changes, embeddings of pairs "
            "could no longer be compared with those of images and texts; give itc a weight, or leave the head out of "
            "the checkpoint (bridgetower convert --drop-itc)"
        )
