"""One object for using a model: embed images, texts and pairs, match them, fill masked words, answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridgetower.answering import Answering, PairHead
from bridgetower.checkpoints import Checkpoint, fingerprint, read_checkpoint
from bridgetower.engines.config import EngineRequest, Precision
from bridgetower.engines.engine import Engine
from bridgetower.engines.start import EngineChoice, chosen_engine
from bridgetower.model.bridgetower import IMAGE, SECOND_IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.encodings import Encoded
from bridgetower.model.heads import ClassifierName
from bridgetower.processor import ImageLike, Processor, Resized, loaded
from bridgetower.progress import count_bars, counted

Images = ImageLike | Sequence[ImageLike]
Texts = str | Sequence[str]

_GIB = 2**30

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
    engine: EngineRequest = "torch",
    cache: str | Path | None = None,
    compile: bool = False,  # noqa: A002 - as torch calls it
    tokenizer: str | Path | None = None,
    answers: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    fast_decode: bool = False,
) -> Predictor:
    """Loads a model for use.

    Args:
        source: Hub id, folder (of this package, exported or not, of transformers, or of a training run), or official
            `.ckpt`.
        revision: Branch, tag or commit of a hub id; the commit that was loaded is in `Predictor.source`.
        image_size: Pixels; position embeddings are resized if it is not the checkpoint's own.
        device: Such as `cpu` or `cuda:0`; None takes a GPU if there is one.
        precision: `fp32`; `bf16` (engines `torch` and `openvino`) and `int8` (engine `onnxruntime`) take less time on
            hardware that has them, and give other numbers.
        engine: `torch`, or `onnxruntime` or `openvino`, which run exported parts on the CPU. A source that was not
            exported is exported once, to `cache`. `auto` takes the fastest that is installed, as docs/engines.md tells.
        cache: Folder of such exports; None is `~/.cache/bridgetower`.
        compile: With engine `torch`: let `torch.compile` make kernels at the first use, which takes minutes and a C++
            compiler.
        tokenizer: Folder or file with a tokenizer, needed for an official `.ckpt`, which has none.
        answers: JSON file with the list of answers, needed for an official `.ckpt` with a VQA head.
        overrides: Model config fields that an official `.ckpt` of unpublished towers cannot tell.
        fast_decode: Decode large JPEG files at reduced scale, which changes pixels a little; a model that was trained
            so does it anyway.

    Raises:
        FileNotFoundError: Nothing is there, or the engine's packages are not installed.
        ValueError: What is there is damaged, unknown, or does not fit together, or there is no such device or engine.
    """
    place = {} if cache is None else {"cache": Path(cache)}
    chosen = chosen_engine(engine, precision, device)
    choice = EngineChoice(engine=chosen, precision=precision, device=device, compile=compile, **place)
    checkpoint = read_checkpoint(
        source,
        revision=revision,
        tokenizer=tokenizer,
        answers=answers,
        overrides=overrides,
        dtype=choice.dtype,
    )
    unchanged = image_size in (None, checkpoint.config.vision.image_size)
    if image_size is not None:
        checkpoint = checkpoint.resized(image_size)
    if fast_decode:
        checkpoint = checkpoint.decoding_fast()
    return Predictor(checkpoint, choice.start(checkpoint, Path(source) if unchanged else None))


class Predictor(Answering):
    """A loaded model with its preprocessing.

    Images are paths, bytes, PIL images or uint8 arrays, one or a sequence; results are float32 tensors on the CPU, one
    row per input, whatever the batch size.

    Attributes:
        source: What was loaded; a hub id carries its commit.
        engine: What computes.
        processor: Preprocessing that travels with the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, engine: Engine) -> None:
        if checkpoint.processor is None:
            raise ValueError(
                f"{checkpoint.source} has no preprocessing; expected processor.json or preprocessor_config.json"
            )
        self.source = checkpoint.source
        self.engine = engine
        self.processor: Processor = checkpoint.processor
        self._about = replace(checkpoint, tensors={}, extra_tensors={})

    @cached_property
    def fingerprint(self) -> str:
        """Names what the vectors depend on; a model has the same in either precision."""
        return fingerprint(self.model.config, self.model.state_dict(), self.processor)

    @property
    def model(self) -> BridgeTower:
        """The network in PyTorch, in evaluation mode; once used on a CPU, its weights are packed."""
        return self.engine.model

    @property
    def device(self) -> torch.device:
        """Where the engine's results are."""
        return self.engine.device

    @torch.inference_mode()
    def embed_images(
        self, images: Images, *, batch_size: int = 32, num_workers: int = 0, progress: bool = False
    ) -> Float[Tensor, "n c"]:
        """Returns L2-normalised vectors that can be compared with those of texts.

        Args:
            images: One or several.
            batch_size: Images at once.
            num_workers: Processes that decode while others are encoded; 0 decodes in this one.
            progress: Show a bar.

        Raises:
            ValueError: No images, an unreadable one, or a model without contrastive head.
        """
        self.model.contrastive_head()
        given = _images(images)
        numbered = list(enumerate(given))
        items = [numbered[batch] for batch in _batches(len(given), batch_size, False)]
        decoded = loaded(self.processor.resize_numbered, items, num_workers=num_workers)
        vectors = [
            self.model.image_embeds(self._encode(given[batch], self.processor.normalise(next(decoded)), outputs="cls"))
            for batch in _batches(len(given), batch_size, progress)
        ]
        return l2_normalize(torch.cat(vectors))

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
        given = self.processor.token_ids(_texts(texts), truncate=truncate)
        order = sorted(range(len(given)), key=lambda row: len(given[row]))  # so that batches hold little padding
        ids = [given[row] for row in order]
        batches = _batches(len(ids), batch_size, progress)
        vectors = [self.model.text_embeds(self._encode_texts(ids, batch, outputs="cls")) for batch in batches]
        return l2_normalize(torch.cat(vectors))[torch.tensor(order).argsort()]

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
        given, words = _pairs(images, texts)
        ids = self.processor.token_ids(words, truncate=truncate)
        batches = _batches(len(given), batch_size, progress)
        return l2_normalize(torch.cat([self.model.pair_embeds(self._pooled(given, ids, batch)) for batch in batches]))

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
        memory_gib: float = 4.0,
    ) -> Float[Tensor, ...]:
        """Returns the probability that image and text belong together.

        Args:
            images, texts: Image n goes with text n.
            all_pairs: Score every image with every text instead. Each image is still encoded only once; so is each
                text if the encodings of all texts fit into a quarter of `memory_gib`, else once per part of the images.
            batch_size: Items or pairs at once.
            truncate: Cut longer texts instead of refusing them.
            progress: Show a bar.
            memory_gib: With `all_pairs`: memory for encodings, which are made and matched in parts.

        Returns:
            [n], or [images, texts] with `all_pairs`.

        Raises:
            ValueError: A model without matching head, different numbers without `all_pairs`, unreadable inputs, or
                `memory_gib` of 0 or less.
        """
        self.model.head("itm")
        if not memory_gib > 0:
            raise ValueError(f"memory_gib is {memory_gib}; expected more than 0")
        given, words = _images(images), _texts(texts)
        if not all_pairs and len(given) != len(words):
            raise ValueError(
                f"{len(given)} images and {len(words)} texts; expected one text per image, or all_pairs=True to match "
                "every image with every text"
            )
        ids = self.processor.token_ids(words, truncate=truncate)
        if not all_pairs:
            batches = _batches(len(given), batch_size, progress)
            return torch.cat([matched(self.model.itm_logits(self._pooled(given, ids, batch))) for batch in batches])
        return self._match_all(given, ids, batch_size, int(memory_gib * _GIB) // 4, progress)

    def _match_all(
        self, images: Sequence[ImageLike], ids: Sequence[Sequence[int]], batch_size: int, room: int, progress: bool
    ) -> Float[Tensor, "i t"]:
        """Matches every image with every text, in blocks of both; `room` bytes are of one block's encodings."""
        scores = torch.empty(len(images), len(ids))

        def image_blocks() -> Iterator[tuple[slice, Encoded]]:
            batches = _batches(len(images), batch_size, False)
            return _blocks(batches, lambda batch: self.engine.cache_image(self._encode_images(images, batch)), room)

        def text_blocks() -> Iterator[tuple[slice, Encoded]]:
            batches = _batches(len(ids), batch_size, False)
            return _blocks(batches, lambda batch: self.engine.cache_text(self._encode_texts(ids, batch)), room)

        kept: list[tuple[slice, Encoded]] = []
        with count_bars(shown=progress) as bars:
            bar = bars.add_task("pairs", total=scores.numel())
            for rows, image in image_blocks():
                for columns, text in kept or text_blocks():
                    kept = [(columns, text)] if len(text) == len(ids) else []
                    pairs = torch.cartesian_prod(torch.arange(len(image)), torch.arange(len(text))).to(self.device)
                    block = []
                    for batch in pairs.split(batch_size):
                        fused = self.engine.fuse(image[batch[:, 0]], text[batch[:, 1]])
                        block.append(matched(self.model.itm_logits(fused.pooled)))
                        bars.advance(bar, len(batch))
                    scores[rows, columns] = torch.cat(block).reshape(len(image), len(text))
        return scores

    @overload
    def fill_mask(  # type: ignore[overload-overlap]  # a string is a sequence of strings, but one text here
        self,
        images: ImageLike,
        texts: str,
        *,
        top: int = 5,
        batch_size: int = 32,
        truncate: bool = False,
        progress: bool = False,
    ) -> list[list[FilledWord]]: ...

    @overload
    def fill_mask(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        *,
        top: int = 5,
        batch_size: int = 32,
        truncate: bool = False,
        progress: bool = False,
    ) -> list[list[list[FilledWord]]]: ...

    @torch.inference_mode()
    def fill_mask(
        self,
        images: Images,
        texts: Texts,
        *,
        top: int = 5,
        batch_size: int = 32,
        truncate: bool = False,
        progress: bool = False,
    ) -> list[list[FilledWord]] | list[list[list[FilledWord]]]:
        """Returns the `top` likeliest words for each mask of each text, given its image.

        Args:
            images, texts: Image n goes with text n; each text has one or more mask tokens (`processor.mask_token`,
                usually `<mask>`).
            top: Candidates per mask.
            batch_size: Pairs at once.
            truncate: Cut longer texts instead of refusing them.
            progress: Show a bar.

        Returns:
            Per mask, the candidates, likeliest first; for a sequence of texts, a list of that per text.

        Raises:
            ValueError: A text without mask (after cutting), `top` below 1, a model without MLM head, different numbers
                of images and texts, or unreadable ones.
        """
        if top < 1:
            raise ValueError(f"top is {top}; expected at least 1")
        given, words = _pairs(images, texts)
        ids = self.processor.token_ids(words, truncate=truncate)
        for text, tokens in zip(words, ids, strict=True):
            if self.processor.mask_token_id not in tokens:
                raise ValueError(f"no mask in {text!r}; put {self.processor.mask_token} where a word is missing")
        batches = _batches(len(given), batch_size, progress)
        filled = [masks for batch in batches for masks in self._fill(given, ids, batch, top)]
        return filled[0] if isinstance(texts, str) else filled

    def class_names(self, head: ClassifierName) -> tuple[str, ...]:
        """Returns the names of the classes of a head, in its order.

        Raises:
            ValueError: The model has no such head, or the names are not known.
        """
        self.model.head(head)
        return self._about.class_names(head)

    @torch.inference_mode()
    def class_probabilities(
        self,
        head: PairHead,
        images: Images,
        texts: Texts,
        images_2: Images | None = None,
        *,
        batch_size: int = 32,
        truncate: bool = False,
        progress: bool = False,
    ) -> Float[Tensor, "n k"]:
        """Returns the probability of every class of a head for each text with its image.

        Args:
            head: `vqa`, `snli_ve`, or `nlvr2`, which reads two images.
            images, texts: Image n goes with text n.
            images_2: The second image of each text, for `nlvr2` alone.
            batch_size: Texts at once.
            truncate: Cut longer texts instead of refusing them.
            progress: Show a bar.

        Returns:
            [n, classes]. Those of `vqa` are of each answer on its own and do not sum to one.

        Raises:
            ValueError: A model without that head, different numbers of images and texts, or unreadable ones.
        """
        self.model.head(head)
        given, words = _pairs(images, texts)
        others = None if images_2 is None else _pairs(images_2, texts)[0]
        if (head == "nlvr2") != (others is not None):
            raise ValueError(f"images_2 for head {head}; expected second images for nlvr2 and for no other")
        ids = self.processor.token_ids(words, truncate=truncate)
        probabilities = [
            classified(head, self.model.class_logits(head, self._features(given, others, ids, batch)))
            for batch in _batches(len(given), batch_size, progress)
        ]
        return torch.cat(probabilities)

    def words(self, hidden: Float[Tensor, "n d"], top: int) -> list[list[FilledWord]]:
        """Returns the `top` likeliest words for each of the masks whose hidden states these are, likeliest first."""
        probabilities = _numbers(self.model.mlm_logits(hidden).float().cpu().softmax(dim=-1))
        best = probabilities.topk(min(top, probabilities.shape[-1]))
        return [
            [FilledWord(self.processor.decode([token]).strip(), probability) for token, probability in words]
            for words in map(zip, best.indices.tolist(), best.values.tolist())
        ]

    def _features(
        self,
        images: Sequence[ImageLike],
        others: Sequence[ImageLike] | None,
        ids: Sequence[Sequence[int]],
        batch: slice,
    ) -> Tensor:
        """Returns what a downstream head reads of one batch: the pooled output, or those with two images."""
        if others is None:
            return self._pooled(images, ids, batch)
        first, second = self._encode_images(images, batch), self._encode_images(others, batch, token_type=SECOND_IMAGE)
        text = self.engine.cache_text(self._encode_texts(ids, batch))
        return torch.cat([self.engine.fuse(image, text).pooled for image in (first, second)], dim=-1)

    def _fill(
        self, images: Sequence[ImageLike], ids: Sequence[Sequence[int]], batch: slice, top: int
    ) -> list[list[list[FilledWord]]]:
        """Fills the masks of one batch of pairs."""
        masked = self.processor.pad(ids[batch]).input_ids == self.processor.mask_token_id
        fused = self.engine.fuse(self._encode_images(images, batch), self._encode_texts(ids, batch), outputs="text")
        masks = iter(self.words(fused.text[masked.to(self.device)], top))
        return [list(islice(masks, count)) for count in masked.sum(dim=1).tolist()]

    def _encode_images(
        self, images: Sequence[ImageLike], batch: slice, outputs: EncodeOutputs = "layers", *, token_type: int = IMAGE
    ) -> Encoded:
        """Decodes and encodes one batch of images."""
        pixel_values = self.processor.images(images[batch], first=batch.start or 0)
        return self._encode(images[batch], pixel_values, outputs, token_type=token_type)

    def _encode(
        self,
        images: Sequence[ImageLike],
        pixel_values: Float[Tensor, "b 3 h w"],
        outputs: EncodeOutputs = "layers",
        *,
        token_type: int = IMAGE,
    ) -> Encoded:
        """Encodes images that were decoded; an object that comes several times is encoded once."""
        first = {id(image): number for number, image in reversed(list(enumerate(images)))}
        kept = sorted(first.values())
        encoded = self.engine.encode_image(pixel_values[kept], token_type, outputs=outputs)
        if len(kept) == len(images):
            return encoded
        rows = [kept.index(first[id(image)]) for image in images]
        return encoded[torch.tensor(rows, device=self.device)]

    def _encode_texts(self, ids: Sequence[Sequence[int]], batch: slice, outputs: EncodeOutputs = "layers") -> Encoded:
        text = self.processor.pad(ids[batch])
        return self.engine.encode_text(text.input_ids, text.attention_mask, outputs=outputs)

    def _pooled(self, images: Sequence[ImageLike], ids: Sequence[Sequence[int]], batch: slice) -> Tensor:
        return self.engine.fuse(self._encode_images(images, batch), self._encode_texts(ids, batch)).pooled


def l2_normalize(vectors: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Returns a model's vectors at length one, in float32 on the CPU."""
    return _numbers(F.normalize(vectors.float(), dim=-1).cpu())


def matched(logits: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """Returns the probabilities of a match, in float32 on the CPU."""
    return _numbers(logits.float().softmax(dim=-1)[:, 1].cpu())


def classified(head: PairHead, logits: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Returns the probabilities of the classes of a head, of `vqa` each on its own, in float32 on the CPU."""
    values = logits.float().cpu()
    return _numbers(values.sigmoid() if head == "vqa" else values.softmax(dim=-1))


def _numbers(results: Tensor) -> Tensor:
    if not results.isfinite().all():
        raise FloatingPointError("the model gives NaN; its weights or settings are damaged, or too large for bf16")
    return results


def _images(images: Images) -> list[ImageLike]:
    single = isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor | Resized)
    return _some([images] if single else list(images), "images")  # type: ignore[arg-type, list-item]


def _texts(texts: Texts) -> list[str]:
    return _some([texts] if isinstance(texts, str) else list(texts), "texts")


def _pairs(images: Images, texts: Texts) -> tuple[list[ImageLike], list[str]]:
    some_images, some_texts = _images(images), _texts(texts)
    if len(some_images) != len(some_texts):
        raise ValueError(f"{len(some_images)} images and {len(some_texts)} texts; expected one text per image")
    return some_images, some_texts


def _some(items: list[_Item], what: str) -> list[_Item]:
    if not items:
        raise ValueError(f"no {what} given; expected at least one")
    return items


def _blocks(batches: Iterable[slice], encode: Callable[[slice], Encoded], room: int) -> Iterator[tuple[slice, Encoded]]:
    """Yields the encodings of several batches joined, with the items they are of: as many as `room` bytes take."""
    parts: list[Encoded] = []
    start = 0
    for batch in batches:
        part = encode(batch)
        if parts and sum(each.nbytes for each in parts) + part.nbytes > room:
            joined, parts = Encoded.cat(parts), []
            yield slice(start, start + len(joined)), joined
            start += len(joined)
        parts.append(part)
    joined, parts = Encoded.cat(parts), []
    yield slice(start, start + len(joined)), joined


def _batches(count: int, size: int, progress: bool) -> Iterator[slice]:
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected at least 1")
    starts = range(0, count, size)
    return (slice(start, start + size) for start in counted(starts, "batches", shown=progress and len(starts) > 1))
