"""Turns images into pixel values and texts into token ids, with the settings of a checkpoint."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bridgetower import files
from bridgetower.arguments import AtLeast1, Expected, checked
from bridgetower.model.layers import to_device
from bridgetower.plain import from_plain
from bridgetower.processor import huggingface
from bridgetower.processor.config import FAST_MARGIN, ProcessorConfig
from bridgetower.processor.images import Fit, open_reduced
from bridgetower.processor.text import (
    CheckedTokenizer,
    TextBatch,
    check_tokenizer,
    encode_texts,
    tokenizers_errors,
)
from bridgetower.processor.tokenizer_files import find_tokenizer, load_tokenizer

_LOG = logging.getLogger(__name__)
_VERSION = 1
_TOKENIZER_FILE = "tokenizer.json"

# transformers, BridgeTowerImageProcessor.resize: the long side of an image whose short side is 800 stays below 1333.
_LONG_SIDE = 1333 / 800

# Spellings of transformers: `do_not_…` is False; `longest`, `longest_first` and `only_first` are True.
Padding = Literal[False, True, "do_not_pad", "longest", "max_length"]
Truncation = Literal[False, True, "do_not_truncate", "longest_first", "only_first"]


@dataclass(frozen=True, kw_only=True)
class Resized:
    """An image from `Processor.prepare` at the model's size, with its full size upright. It is accepted as an image."""

    pixels: UInt8[Tensor, "3 h w"] = field(repr=False)
    width: int
    height: int


_KINDS_OF_IMAGES = "path, URL, bytes, open file, PIL image, uint8 array or tensor"
ImageLike: TypeAlias = Annotated[
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | Image.Image
    | np.ndarray
    | Tensor
    | Resized,
    Expected(f"an image ({_KINDS_OF_IMAGES})"),
]
"""A path, an image file as bytes or opened (`BytesIO`), a PIL image, a uint8 array or tensor [H, W], [H, W, 1|3|4] or
[1|3|4, H, W], or an image that is at the model's size already."""

Images: TypeAlias = Annotated[
    ImageLike | Iterable[ImageLike], Expected(f"an image ({_KINDS_OF_IMAGES}) or a list of images")
]
Texts: TypeAlias = Annotated[str | Iterable[str], Expected("a text or a list of texts")]


_SINGLE_IMAGES = (bytes, bytearray, memoryview, Image.Image, Resized, str, os.PathLike)


def is_image(value: object) -> bool:
    """Whether a value is one image, not a batch such as an array of four axes."""
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim != 4
    return isinstance(value, _SINGLE_IMAGES) or hasattr(value, "read")


def image_list(images: Images) -> list[ImageLike]:
    """Returns one image or several as a list."""
    return _as_checked_list(images, is_image(images), "images")


def text_list(texts: Texts) -> list[str]:
    """Returns one text or several as a list."""
    return _as_checked_list(texts, isinstance(texts, str), "texts")


def _as_checked_list(inputs: Any, is_single: bool, kind: str) -> list[Any]:
    items = [inputs] if is_single else list(inputs)
    if not items:
        raise ValueError(f"no {kind} given; expected at least one")
    return items


def pair_lists(
    images: Images, texts: Texts, advice: str = "", *, images_2: Images | None = None
) -> tuple[list[ImageLike], list[str], list[ImageLike] | None]:
    """Returns as many images as texts, and repeats a single image or text for all."""
    lists: dict[str, list[Any]] = {"images": image_list(images)}
    if images_2 is not None:
        lists["second images"] = image_list(images_2)
    lists["texts"] = text_list(texts)
    count = max(map(len, lists.values()))
    if any(len(items) not in (1, count) for items in lists.values()):
        *counts, last_count = (f"{len(items)} {name}" for name, items in lists.items())
        raise ValueError(
            f"{', '.join(counts)} and {last_count}; expected one text per image, or one of either{advice}"
        )
    aligned = {name: items * count if len(items) == 1 else items for name, items in lists.items()}
    return aligned["images"], aligned["texts"], aligned.get("second images")


def either_lists(
    images: ImageLike | Iterable[ImageLike | None] | None, texts: Texts | None, blank: ImageLike
) -> tuple[list[ImageLike], list[str]]:
    """Returns as many images as texts, with a blank image or an empty text for what is missing."""
    if images is None and texts is None:
        raise ValueError("neither images nor texts given; expected one of them at least")
    filled_texts = [""] if texts is None else text_list(texts)
    items: Any = [images] if images is None or is_image(images) else images
    filled_images = [blank if image is None else image for image in items]
    images, texts, _ = pair_lists(filled_images, filled_texts)
    return images, texts


class ModelInputs(dict[str, Tensor]):
    """Tensors by name, which are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(f"no {name} here; there are {', '.join(self)}")

    def to(self, device: str | torch.device) -> Self:
        """Returns the tensors on a device."""
        return type(self)({name: tensor.to(device) for name, tensor in self.items()})


class Processor:
    """Prepares images and texts the way one checkpoint expects them.

    An image or text that cannot be used raises ValueError, which names its number, and a missing file
    FileNotFoundError.

    Attributes:
        config: The settings.
        tokenizer: From `load_tokenizer` or `train_tokenizer`, with the special tokens of RoBERTa or BERT; it must not
            be changed afterwards. None if only images are prepared; all methods for text then raise ValueError.
    """

    def __init__(self, config: ProcessorConfig, tokenizer: Tokenizer | None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._checked = None if tokenizer is None else check_tokenizer(tokenizer)
        # Decoded tokens by id.
        self._words: dict[int, str] = {}

    @property
    def pad_token_id(self) -> int:
        """Id that fills short texts."""
        return self._text.special_ids.pad

    @property
    def mask_token_id(self) -> int:
        """Id that hides a token."""
        return self._text.special_ids.mask

    @property
    def mask_token(self) -> str:
        """Spelling of the mask token."""
        return self._text.special.mask

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of start, padding, end, unknown and mask."""
        return frozenset(self._text.special_ids)

    @cached_property
    def vocab_size(self) -> int:
        """Rows that an embedding needs, for all token ids with special and added tokens."""
        vocabulary = self._text.tokenizer.get_vocab(with_added_tokens=True)
        return 1 + max(vocabulary.values())

    @cached_property
    def continues_word(self) -> Bool[Tensor, " v"]:
        """True at the ids of tokens that continue a word."""
        text = self._text
        is_wordpiece = isinstance(text.tokenizer.model, WordPiece)
        continues = [False] * self.vocab_size
        for token, number in text.tokenizer.get_vocab(with_added_tokens=True).items():
            if is_wordpiece:
                continues[number] = token.startswith("##")
            # In byte-level BPE and sentencepiece, a token with a space begins a word.
            elif token not in text.special:
                continues[number] = not token.startswith(("Ġ", "▁"))
        return torch.tensor(continues)

    @checked
    def __call__(
        self,
        images: Images | None = None,
        text: Texts | None = None,
        *,
        padding: Padding = False,
        truncation: Truncation = False,
        max_length: AtLeast1 | None = None,
        return_tensors: Literal["pt"] = "pt",
    ) -> ModelInputs:
        """Prepares images, texts or both as transformers' BridgeTowerProcessor does.

        Args:
            images, text: One or several.
            padding: Fill texts up to the longest text, or with `max_length` to that many tokens.
            truncation: Cut texts that are too long.
            max_length: Longest text in tokens; None: the model's.
            return_tensors: Of PyTorch, in any case.

        Returns:
            `pixel_values` [b, 3, h, w], `pixel_mask` [b, h, w] of ones, as images have one size, `input_ids` and
            `attention_mask` [b, l], as far as there are images and text.
        """
        if images is None and text is None:
            raise ValueError("neither images nor text given; expected one of them at least")
        inputs = ModelInputs()
        if images is not None:
            pixel_values = self.images(image_list(images))
            mask = pixel_values.new_ones(pixel_values[:, 0].shape, dtype=torch.long)
            inputs.update(pixel_values=pixel_values, pixel_mask=mask)
        if text is not None:
            model_limit = self.config.max_length
            limit = model_limit if max_length is None else max_length
            if not 3 <= limit <= model_limit:
                raise ValueError(
                    f"max_length is {limit}; expected 3 to {model_limit}, the longest that this model takes"
                )
            if self.tokenizer is None:
                raise ValueError(
                    "this processor has no tokenizer; give images alone, or a model's processor"
                )
            texts = text_list(text)
            truncate = truncation not in (False, "do_not_truncate")
            try:
                ids = encode_texts(self.tokenizer, texts, max_length=limit, truncate=truncate)
            # The argument has another name here.
            except ValueError as error:
                raise ValueError(str(error).replace("truncate=True", "truncation=True")) from error
            if padding in (False, "do_not_pad") and len({len(row) for row in ids}) > 1:
                raise ValueError(
                    "the texts have different numbers of tokens; pass padding=True to fill them up"
                )
            input_ids, attention_mask = self.pad(ids)
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            if padding == "max_length":
                missing = (0, limit - input_ids.shape[1])
                input_ids = F.pad(input_ids, missing, value=self.pad_token_id)
                attention_mask = F.pad(attention_mask, missing)
            inputs.update(input_ids=input_ids, attention_mask=attention_mask)
        return inputs

    def images(self, images: Sequence[ImageLike]) -> Float[Tensor, "b 3 h w"]:
        """Opens, resizes and normalises images."""
        if is_image(images):
            raise ValueError(
                f"one image ({type(images).__name__}) where a list of images is expected; pass [image]"
            )
        pixels = list(map(self.resize_numbered, enumerate(image_list(images))))
        return self.normalise(torch.stack(pixels))

    def resize_numbered(self, item: tuple[int, ImageLike]) -> UInt8[Tensor, "3 h w"]:
        """Calls `resize` on an image with its number, which errors name."""
        number, image = item
        try:
            return self.resize(image)
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from error

    def resize(self, image: ImageLike) -> UInt8[Tensor, "3 h w"]:
        """Opens one image and resizes it to the model's size, for `normalise`."""
        return self.prepare(image).pixels

    def prepare(self, image: ImageLike, *, decode: Callable[..., Any] = open_reduced) -> Resized:
        """Opens one image as `resize` does and keeps its full size. A prepared image is returned as it is."""
        config = self.config
        if isinstance(image, Resized):
            expected = [3, config.image_size, config.image_size]
            if list(image.pixels.shape) != expected:
                raise ValueError(
                    f"an image was prepared as {list(image.pixels.shape)}; this model takes {expected}"
                )
            return image
        side = FAST_MARGIN * config.resize_edge if config.fast_decode else None
        fit = None
        if config.profile != "hf":
            crops = config.profile == "official-pretrain"
            fit = Fit(config.image_size, config.interpolation, crops)
        opened, (width, height) = decode(image, side, background=config.background, fit=fit)
        pixels = to_tensor(opened)
        if config.profile == "hf":
            # PyTorch resizes pixels whose channels come last in memory in a third of the time.
            pixels = _letterboxed(pixels, config)
        return Resized(pixels=pixels.contiguous(), width=width, height=height)

    def blank_image(self) -> Resized:
        """Returns an image of the mean colour, which becomes about 0, for examples without an image."""
        side = self.config.image_size
        levels = [round(255 * mean) for mean in self.config.image_mean]
        colour = torch.tensor(levels, dtype=torch.uint8)
        pixels = colour[:, None, None].expand(3, side, side).contiguous()
        return Resized(pixels=pixels, width=side, height=side)

    def normalise(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Maps a batch of resized images to (v/255 - mean) / std, the last step of `images`."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            shape = list(pixels.shape)
            raise ValueError(
                f"pixels are {pixels.dtype} of shape {shape}; expected uint8 [batch, 3, h, w]"
            )
        # Mean and standard deviation have the factor 255, as in transformers, so that values are equal bit for bit.
        mean = _times_255(self.config.image_mean, pixels.device)
        std = _times_255(self.config.image_std, pixels.device)
        return pixels.to(torch.float32).sub_(mean).div_(std)

    def texts(self, texts: Sequence[str], *, truncate: bool = False) -> TextBatch:
        """Tokenises texts and pads them to the longest text. `truncate` cuts texts above `config.max_length`."""
        return self.pad(self.token_ids(texts, truncate=truncate))

    def token_ids(
        self, texts: Sequence[str], *, truncate: bool = False, first: int = 0
    ) -> list[list[int]]:
        """Tokenises texts, with start and end token, without padding. Errors number the texts from `first` on."""
        tokenizer = self._text.tokenizer
        limit = self.config.max_length
        return encode_texts(tokenizer, texts, max_length=limit, truncate=truncate, first=first)

    def pair_ids(self, texts: Sequence[Sequence[str]]) -> list[list[int]]:
        """Tokenises single texts or pairs of texts, without padding. Of a pair the longer text is cut first, then both.

        Pairs are joined as `<s> A </s></s> B </s>` or `[CLS] A [SEP] B [SEP]`.
        """
        # All texts are encoded at once.
        tokenizer, _, special_ids = self._text
        all_texts = [text for example in texts for text in example]
        encoded = iter(encode_texts(tokenizer, all_texts, max_length=sys.maxsize))

        # A pair of empty texts is a start token, what separates both, and an end token.
        with tokenizers_errors("the tokenizer cannot encode a pair of empty texts"):
            empty_pair = tokenizer.encode("", "").ids
        separator = [special_ids.eos] * max(1, len(empty_pair) - 2)
        limit = self.config.max_length
        room = limit - 2 - len(separator)

        # Each example is joined and cut.
        joined = list[list[int]]()
        for example in texts:
            if len(example) > 2:
                raise ValueError(
                    f"an example has {len(example)} texts; expected one or two: join them, or choose one"
                )
            ids, *second_ids = [next(encoded) for _ in example]
            if second_ids:
                first = ids[1:-1]
                second = second_ids[0][1:-1]
                # The shorter text keeps up to half of the room, and the longer text has the remainder.
                if len(first) + len(second) > room:
                    shorter = min(len(first), len(second), room // 2)
                    longer = room - shorter
                    is_first_longer = len(first) > len(second)
                    first = first[: longer if is_first_longer else shorter]
                    second = second[: shorter if is_first_longer else longer]
                ids = [special_ids.bos, *first, *separator, *second, special_ids.eos]
            if len(ids) > limit:
                ids = [*ids[: limit - 1], ids[-1]]
            joined.append(ids)
        return joined

    def pad(self, ids: Sequence[Sequence[int]]) -> TextBatch:
        """Fills lists of ids up to the longest list, on the right."""
        if not ids or not all(ids):
            raise ValueError(
                f"{len(ids)} lists of token ids, some without a token; expected at least one, none empty"
            )
        lengths = torch.tensor([len(row) for row in ids])
        rows = [torch.tensor(row) for row in ids]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        present = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return TextBatch(input_ids, None if bool(present.all()) else present.long())

    def decode(
        self, ids: Sequence[int] | Int[Tensor, " l"], *, skip_special_tokens: bool = True
    ) -> str:
        """Turns the ids of one text back into a string."""
        with tokenizers_errors("the tokenizer cannot decode these ids"):
            numbers = [int(number) for number in ids]
            tokenizer = self._text.tokenizer
            return tokenizer.decode(numbers, skip_special_tokens=skip_special_tokens)

    def word(self, token_id: int) -> str:
        """Returns a single token as text."""
        if token_id not in self._words:
            self._words[token_id] = self.decode([token_id]).strip()
        return self._words[token_id]

    def with_image_size(self, image_size: int) -> Processor:
        """Returns a processor for another image size, with the same tokenizer."""
        edge = self.config.shortest_edge
        # A larger model's settings with transformers' default crop have the new size as their edge.
        if edge == image_size:
            edge = None
        if edge is not None and image_size != self.config.image_size:
            raise ValueError(
                f"shortest_edge {edge} was set apart from image_size {self.config.image_size}; choose both with "
                f"dataclasses.replace(config, image_size={image_size}, shortest_edge=...)"
            )
        config = replace(self.config, image_size=image_size, shortest_edge=edge)
        return Processor(config, self.tokenizer)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, then `processor.json`, each atomically."""
        target = Path(folder)
        if self.tokenizer is not None:
            files.write_text(target / _TOKENIZER_FILE, self.tokenizer.to_str(pretty=True))
        values = {
            "version": _VERSION,
            "tokenizer": self.tokenizer is not None,
            "config": asdict(self.config),
        }
        files.write_json(target / "processor.json", values)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Processor:
        """Reads what `save` wrote."""
        path = Path(folder) / "processor.json"
        values = files.read_json(path)
        if values.get("version") != _VERSION or values.keys() != {"version", "tokenizer", "config"}:
            raise ValueError(
                f"{path} is of version {values.get('version')} with {sorted(values)}; this release reads {_VERSION} "
                "with version, tokenizer and config"
            )
        config = from_plain(ProcessorConfig, values["config"], "processor config")
        tokenizer = None
        if values["tokenizer"]:
            tokenizer = load_tokenizer(path.with_name(_TOKENIZER_FILE))
        return cls(config, tokenizer)

    @classmethod
    def from_huggingface(
        cls, folder: str | os.PathLike[str], *, patch_size: int, max_length: int | None = None
    ) -> Processor:
        """Reads preprocessing and tokenizer of a transformers folder, as `huggingface.read_config` describes.

        Args:
            folder: With `preprocessor_config.json` or `processor_config.json`, and tokenizer files if texts are needed.
            patch_size: Patch side of the model.
            max_length: Longest text in tokens; None takes the tokenizer's `model_max_length`, or 512.
        """
        source = Path(folder)
        config = huggingface.read_config(source, patch_size=patch_size, max_length=max_length)
        tokenizer = load_tokenizer(source) if find_tokenizer(source) else None
        return cls(config, tokenizer)

    def save_huggingface(self, folder: str | os.PathLike[str]) -> None:
        """Writes preprocessor_config.json, tokenizer.json, tokenizer_config.json for transformers' AutoProcessor."""
        target = Path(folder)
        settings = huggingface.image_settings(self.config)
        if (target / "processor_config.json").exists():
            raise ValueError(
                f"{target} has a processor_config.json, which would win over the new files; remove it first"
            )
        if self.config.profile != "hf":
            _LOG.warning(
                "transformers cannot repeat profile %r exactly: pixels differ by up to 1 of 255 levels, an odd crop by "
                "one pixel of position",
                self.config.profile,
            )
        if self.config.fast_decode:
            _LOG.warning(
                "transformers decodes JPEG files at their full size, without fast_decode: pixels differ a bit"
            )
        if self.tokenizer is not None:
            files.write_text(target / _TOKENIZER_FILE, self.tokenizer.to_str(pretty=True))
            text_settings = huggingface.tokenizer_settings(
                self._text.special, self.config.max_length
            )
            files.write_json(target / "tokenizer_config.json", text_settings)
        files.write_json(target / "preprocessor_config.json", settings)

    @property
    def _text(self) -> CheckedTokenizer:
        """The tokenizer and its special tokens."""
        if self._checked is None:
            raise ValueError(
                "this processor has no tokenizer; build it with Processor(config, load_tokenizer(folder))"
            )
        return self._checked


@lru_cache(maxsize=64)
def _times_255(values: tuple[float, ...], device: torch.device) -> Float[Tensor, "3 1 1"]:
    # Tensors made in inference mode could not be used in training.
    with torch.inference_mode(False):
        scaled = torch.tensor(values) * 255.0
        return to_device(scaled[:, None, None], device)


def to_tensor(image: Image.Image | UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "3 h w"]:
    """Returns the pixels of an RGB image."""
    array = image if isinstance(image, np.ndarray) else np.array(image)
    return torch.from_numpy(array).permute(2, 0, 1)


def _letterboxed(image: UInt8[Tensor, "3 h w"], config: ProcessorConfig) -> UInt8[Tensor, "3 s s"]:
    """Resizes as transformers' torchvision backend, bicubic on the uint8 tensor.

    PIL differs by a level here and there. The short side is scaled, the long side limited, both are cut to multiples of
    a divisor, then cropped or filled with black to a square. Odd differences leave the smaller margin left and above,
    unlike torchvision's `center_crop`.
    """
    # Sides that are scaled and limited, then cut to multiples.
    height, width = image.shape[-2:]
    edge = config.resize_edge
    divisor = config.resize_divisor
    scale = edge / min(height, width)
    exact = (edge, scale * width) if height < width else (scale * height, edge)
    shrink = min(1.0, int(_LONG_SIDE * edge) / max(exact))
    rows, columns = (int(shrink * side + 0.5) // divisor * divisor for side in exact)
    if min(rows, columns) == 0:
        raise ValueError(
            f"an image of {width}x{height} is too elongated for profile 'hf': its short side shrinks below "
            f"{divisor} px and is cut to 0; crop it first or use profile 'official-pretrain'"
        )
    (scaled,) = F.interpolate(
        image[None], (rows, columns), mode=config.interpolation, antialias=True
    )
    # Margins are negative where the image is cropped.
    size = config.image_size
    start = int((size - columns) / 2)
    top = int((size - rows) / 2)
    return F.pad(scaled, [start, size - columns - start, top, size - rows - top])
