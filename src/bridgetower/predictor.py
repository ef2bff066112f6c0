"""One object for using a model: embed images, texts and pairs, match them, fill masked words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from rich.progress import track
from torch import Tensor

from bridgetower.checkpoints import Checkpoint, read_checkpoint
from bridgetower.model.bridgetower import BridgeTower, Encoded
from bridgetower.processor import ImageLike, Processor

Precision = Literal["fp32", "bf16"]
Images = ImageLike | Sequence[ImageLike]
Texts = str | Sequence[str]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class FilledWord:
    """A candidate for a masked word.

    Attributes:
        word: As it would stand in the text.
        probability: Over the whole vocabulary.
    """

    word: str
    probability: float


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    image_size: int | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "fp32",
    tokenizer: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Predictor:
    """Loads a model for use.

    Args:
        source: Hub id, folder (of this package, of transformers, or of a training run), or official `.ckpt`.
        revision: Branch, tag or commit of a hub id; the commit that was loaded is in `Predictor.source`.
        image_size: Pixels; position embeddings are resized if it is not the checkpoint's own.
        device: Such as `cpu` or `cuda:0`; None takes a GPU if there is one.
        precision: `fp32`, or `bf16` for about half the time on hardware that has it.
        tokenizer: Folder or file with a tokenizer, needed for an official `.ckpt`, which has none.
        overrides: Model config fields that an official `.ckpt` of unpublished towers cannot tell.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: What is there is damaged, unknown, or does not fit together.
    """
    if precision not in _DTYPES:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(_DTYPES)}")
    checkpoint = read_checkpoint(source, revision=revision, tokenizer=tokenizer, overrides=overrides)
    if image_size is not None:
        checkpoint = checkpoint.resized(image_size)
    return Predictor(checkpoint, device=torch.device(device or _default_device()), precision=precision)


class Predictor:
    """A loaded model with its preprocessing.

    Images are paths, bytes, PIL images or uint8 arrays, one or a sequence; results are float32 tensors on the CPU, one
    row per input, whatever the batch size.

    Attributes:
        source: What was loaded; a hub id carries its commit.
        model: The network, in evaluation mode.
        processor: Preprocessing that travels with the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, precision: Precision = "fp32") -> None:
        if checkpoint.processor is None:
            raise ValueError(
                f"{checkpoint.source} has no preprocessing; expected processor.json or preprocessor_config.json"
            )
        self.source = checkpoint.source
        self.device, self.dtype = device, _DTYPES[precision]
        self.model: BridgeTower = checkpoint.model().to(device, self.dtype).requires_grad_(False)
        self.processor: Processor = checkpoint.processor

    @torch.inference_mode()
    def embed_images(self, images: Images, *, batch_size: int = 32, progress: bool = False) -> Float[Tensor, "n c"]:
        """Returns L2-normalised vectors that can be compared with those of texts.

        Raises:
            ValueError: No images, an unreadable one, or a model without contrastive head.
        """
        self.model.contrastive_head()
        encode = self._encode_images
        parts = [self.model.image_embeds(encode(chunk)) for chunk in _chunks(_images(images), batch_size, progress)]
        return torch.cat(parts).float().cpu()

    @torch.inference_mode()
    def embed_texts(
        self, texts: Texts, *, batch_size: int = 32, truncate: bool = False, progress: bool = False
    ) -> Float[Tensor, "n c"]:
        """Returns L2-normalised vectors that can be compared with those of images.

        Args:
            texts: One or several.
            batch_size: Texts at once.
            truncate: Cut longer texts to the longest that the model takes instead of refusing them.
            progress: Show a bar.

        Raises:
            ValueError: No texts, one that is too long, or a model without contrastive head.
        """
        self.model.contrastive_head()
        chunks = _chunks(_texts(texts), batch_size, progress)
        return (
            torch.cat([self.model.text_embeds(self._encode_texts(chunk, truncate)) for chunk in chunks]).float().cpu()
        )

    @torch.inference_mode()
    def embed_pairs(
        self, images: Images, texts: Texts, *, batch_size: int = 32, truncate: bool = False, progress: bool = False
    ) -> Float[Tensor, "n c"]:
        """Returns L2-normalised joint vectors of image n with text n.

        They are comparable with the vectors of images and texts only in transformers' contrastive models, which have a
        head for them; elsewhere they are the pooled fusion output.

        Raises:
            ValueError: Different numbers of images and texts, or unreadable ones.
        """
        pairs = _pairs(images, texts)
        parts = [
            self.model.pair_embeds(self._pooled(chunk, truncate)) for chunk in _chunks(pairs, batch_size, progress)
        ]
        return torch.cat(parts).float().cpu()

    @torch.inference_mode()
    def match(
        self,
        images: Images,
        texts: Texts,
        *,
        all_pairs: bool = False,
        batch_size: int = 32,
        truncate: bool = False,
        progress: bool = False,
    ) -> Float[Tensor, ...]:
        """Returns the probability that image and text belong together.

        Args:
            images, texts: Image n goes with text n.
            all_pairs: Score every image with every text instead; each image and text is still encoded only once.
            batch_size: Items or pairs at once.
            truncate: Cut longer texts instead of refusing them.
            progress: Show a bar.

        Returns:
            [n], or [images, texts] with `all_pairs`.

        Raises:
            ValueError: A model without matching head, different numbers without `all_pairs`, or unreadable inputs.
        """
        logits = self.model.itm_logits
        if not all_pairs:
            pairs = _pairs(images, texts)
            chunks = _chunks(pairs, batch_size, progress)
            return torch.cat([_matched(logits(self._pooled(chunk, truncate))) for chunk in chunks])
        image = Encoded.cat([self._encode_images(chunk) for chunk in _chunks(_images(images), batch_size, progress)])
        text = Encoded.cat([self._encode_texts(chunk, truncate) for chunk in _chunks(_texts(texts), batch_size, False)])
        cells = torch.cartesian_prod(torch.arange(len(image)), torch.arange(len(text))).to(self.device)
        scores = [
            _matched(logits(self.model.fuse(image[rows[:, 0]], text[rows[:, 1]]).pooled))
            for rows in _chunks(cells, batch_size, progress)
        ]
        return torch.cat(scores).reshape(len(image), len(text))

    @torch.inference_mode()
    def fill_mask(self, image: ImageLike, text: str, *, top: int = 5) -> list[list[FilledWord]]:
        """Returns the `top` likeliest words for each mask in `text`, given the image.

        Args:
            image: One image.
            text: With one or more mask tokens (`processor.mask_token`, usually `<mask>`).
            top: Candidates per mask.

        Raises:
            ValueError: No mask in the text, or a model without MLM head.
        """
        batch = self.processor.texts([text])
        masked = batch.input_ids[0] == self.processor.mask_token_id
        if not masked.any():
            raise ValueError(f"no mask in {text!r}; put {self.processor.mask_token} where a word is missing")
        encoded = self.model.encode_text(batch.input_ids.to(self.device))
        fused = self.model.fuse(self._encode_images([image]), encoded, read="text")
        logits = self.model.mlm_logits(fused.text[0, masked.to(self.device)]).float().cpu()
        best = logits.softmax(dim=-1).topk(min(top, logits.shape[-1]))
        return [
            [
                FilledWord(self.processor.decode([token]).strip(), probability)
                for token, probability in zip(ids, values, strict=True)
            ]
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _encode_images(self, images: Sequence[ImageLike]) -> Encoded:
        return self.model.encode_image(self.processor.images(images).to(self.device, self.dtype))

    def _encode_texts(self, texts: Sequence[str], truncate: bool) -> Encoded:
        batch = self.processor.texts(texts, truncate=truncate)
        mask = batch.attention_mask
        return self.model.encode_text(batch.input_ids.to(self.device), None if mask is None else mask.to(self.device))

    def _pooled(self, pairs: Sequence[tuple[ImageLike, str]], truncate: bool) -> Tensor:
        image = self._encode_images([image for image, _ in pairs])
        return self.model.fuse(image, self._encode_texts([text for _, text in pairs], truncate)).pooled


def _matched(logits: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    return logits.float().softmax(dim=-1)[:, 1].cpu()


def _images(images: Images) -> list[ImageLike]:
    single = isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor)
    return _some([images] if single else list(images), "images")  # type: ignore[arg-type, list-item]


def _texts(texts: Texts) -> list[str]:
    return _some([texts] if isinstance(texts, str) else list(texts), "texts")


def _pairs(images: Images, texts: Texts) -> list[tuple[ImageLike, str]]:
    some_images, some_texts = _images(images), _texts(texts)
    if len(some_images) != len(some_texts):
        raise ValueError(
            f"{len(some_images)} images and {len(some_texts)} texts; expected one text per image "
            "(or match(..., all_pairs=True) for every combination)"
        )
    return list(zip(some_images, some_texts, strict=True))


def _some(items: list[_Item], what: str) -> list[_Item]:
    if not items:
        raise ValueError(f"no {what} given; expected at least one")
    return items


def _chunks(items: Any, size: int, progress: bool) -> Iterator[Any]:
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected at least 1")
    starts = range(0, len(items), size)
    shown = track(starts, description="batches") if progress and len(starts) > 1 else starts
    return (items[start : start + size] for start in shown)


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
