"""Images to pixel values and texts to token ids, with the settings that travel with a checkpoint."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordPiece
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bridgetower import files
from bridgetower.model.plain import check_choice
from bridgetower.processor import huggingface
from bridgetower.processor.config import ProcessorConfig
from bridgetower.processor.images import open_reduced
from bridgetower.processor.inputs import ImageLike, Images, Resized, Texts, image_list, is_image, text_list
from bridgetower.processor.text import (
    Special,
    TextBatch,
    check_texts,
    encode,
    find_tokenizer,
    join_pair,
    load_tokenizer,
    special_tokens,
    tokenizers_errors,
)

_LOG = logging.getLogger(__name__)
_VERSION = 1
_TOKENIZER_FILE = "tokenizer.json"
_SPACES = ("Ġ", "▁")  # how byte-level BPE and sentencepiece spell a space

# transformers, BridgeTowerImageProcessor.resize: the long side of an image whose short side is 800 stays below 1333.
_LONG_SIDE = 1333 / 800


Padding = Literal[False, True, "do_not_pad", "longest", "max_length"]
"""Whether and how far texts are filled up: `do_not_pad` is False, `longest` is True."""

Truncation = Literal[False, True, "do_not_truncate", "longest_first", "only_first"]
"""Whether texts that are too long are cut: `do_not_truncate` is False; the last two are True, as no text is a pair."""


class ModelInputs(dict[str, Tensor]):
    """Tensors by name, which are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(f"no {name} here; there are {', '.join(self)}")

    def to(self, device: str | torch.device) -> Self:
        """Returns them on a device."""
        return type(self)({name: tensor.to(device) for name, tensor in self.items()})


class Processor:
    """Prepares images and texts the way one checkpoint expects them.

    Attributes:
        config: The settings.
        tokenizer: None if only images are prepared; everything about text then raises ValueError.
    """

    def __init__(self, config: ProcessorConfig, tokenizer: Tokenizer | None) -> None:
        """Keeps both.

        Args:
            config: Sizes, profile, limits.
            tokenizer: From `load_tokenizer` or `train_tokenizer`; it must not be changed afterwards.

        Raises:
            ValueError: Its special tokens are spelled otherwise than RoBERTa's or BERT's, or it adds other tokens.
        """
        self.config, self.tokenizer = config, tokenizer
        self._special = None if tokenizer is None else special_tokens(tokenizer)

    @property
    def bos_token_id(self) -> int:
        """Id of the start token."""
        return self._text[2].bos

    @property
    def eos_token_id(self) -> int:
        """Id of the end token."""
        return self._text[2].eos

    @property
    def pad_token_id(self) -> int:
        """Id that fills short texts."""
        return self._text[2].pad

    @property
    def mask_token_id(self) -> int:
        """Id that hides a token."""
        return self._text[2].mask

    @property
    def mask_token(self) -> str:
        """Spelling of the mask token."""
        return self._text[1].mask

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of start, padding, end, unknown and mask."""
        return frozenset(self._text[2])

    @cached_property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: one more than the largest token id, special and added ones included."""
        return 1 + max(self._text[0].get_vocab(with_added_tokens=True).values())

    @cached_property
    def continues_word(self) -> Bool[Tensor, " v"]:
        """True at the ids of tokens that carry on the word before them, for whole-word masking.

        In a WordPiece vocabulary those are the tokens that begin with `##`, in others (byte-level BPE, sentencepiece)
        those that do not begin with a space. The first word of a text has no space before it: there the start token
        ends the word.
        """
        tokenizer, special, _ = self._text
        tokens = map(tokenizer.id_to_token, range(self.vocab_size))
        if isinstance(tokenizer.model, WordPiece):
            return torch.tensor([token is not None and token.startswith("##") for token in tokens])
        others = (None, *special)
        return torch.tensor([token not in others and not token.startswith(_SPACES) for token in tokens])

    def __call__(
        self,
        images: Images | None = None,
        text: Texts | None = None,
        *,
        padding: Padding = False,
        truncation: Truncation = False,
        max_length: int | None = None,
        return_tensors: Literal["pt"] = "pt",
    ) -> ModelInputs:
        """Prepares images, texts or both as transformers' BridgeTowerProcessor does.

        Args:
            images, text: One or several.
            padding: Fill texts up to the longest of them, or with `max_length` to that many tokens.
            truncation: Cut texts that are too long.
            max_length: Longest text in tokens; None: the model's.
            return_tensors: Of PyTorch, in any case.

        Returns:
            `pixel_values` [b, 3, h, w], `pixel_mask` [b, h, w] of ones, as images have one size, `input_ids` and
            `attention_mask` [b, l], as far as there are images and text.

        Raises:
            ValueError: There is neither, an argument or input cannot be used, a text is too long and not to be cut, or
                texts differ in length without `padding`.
        """
        if images is None and text is None:
            raise ValueError("neither images nor text given; expected one of them at least")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; expected 'pt'")
        check_choice("padding", padding, Padding)
        check_choice("truncation", truncation, Truncation)
        found = ModelInputs()
        if images is not None:
            pixel_values = self.images(image_list(images))
            mask = pixel_values.new_ones(pixel_values[:, 0].shape, dtype=torch.long)
            found.update(pixel_values=pixel_values, pixel_mask=mask)
        if text is not None:
            most, truncate = self.config.max_length, truncation not in (False, "do_not_truncate")
            limit = most if max_length is None else max_length
            if not 3 <= limit <= most:
                raise ValueError(f"max_length is {limit}; expected 3 to {most}, the longest that this model takes")
            if self.tokenizer is None:
                raise ValueError("this processor has no tokenizer; give images alone, or a model's processor")
            try:
                ids = encode(self.tokenizer, text_list(text), max_length=limit, truncate=truncate)
            except ValueError as error:
                raise ValueError(str(error).replace("truncate=True", "truncation=True")) from error
            if padding in (False, "do_not_pad") and len({len(row) for row in ids}) > 1:
                raise ValueError("the texts have different numbers of tokens; pass padding=True to fill them up")
            batch = self.pad(ids)
            mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            missing = (0, limit - mask.shape[1] if padding == "max_length" else 0)
            found["input_ids"] = F.pad(batch.input_ids, missing, value=self.pad_token_id)
            found["attention_mask"] = F.pad(mask, missing)
        return found

    def images(self, images: Sequence[ImageLike], *, first: int = 0) -> Float[Tensor, "b 3 h w"]:
        """Opens, resizes and normalises images.

        Args:
            images: At least one.
            first: Number of the first one, for errors.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: There are no images, or one cannot be used; its number is named.
        """
        if is_image(images):
            raise ValueError(f"one image ({type(images).__name__}) where a list of images is expected; pass [image]")
        return self.normalise(
            torch.stack([self.resize_numbered(item) for item in enumerate(image_list(images), first)])
        )

    def resize(self, image: ImageLike) -> UInt8[Tensor, "3 h w"]:
        """Opens one image and brings it to the model's size: all that comes before `normalise`.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: The image cannot be used.
        """
        return self.prepare(image).pixels

    def prepare(self, image: ImageLike, *, decode: Callable[..., Any] = open_reduced) -> Resized:
        """Opens one image as `resize` does and keeps how large it was; one that was prepared is returned as it is.

        Args:
            image: The image.
            decode: In place of `open_reduced`, such as one with another `max_pixels`.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: The image cannot be used, or was prepared for a model of another size.
        """
        config = self.config
        if isinstance(image, Resized):
            expected = [3, config.image_size, config.image_size]
            if list(image.pixels.shape) != expected:
                raise ValueError(f"an image was prepared as {list(image.pixels.shape)}; this model takes {expected}")
            return image
        opened, (width, height) = decode(image, config.decoded_side, background=config.background, fit=config.fit)
        pixels = to_tensor(opened)
        return Resized(pixels=pixels if config.fit else _letterboxed(pixels, config), width=width, height=height)

    def blank_image(self) -> Resized:
        """Returns what stands where an image is missing: an image of the mean colour, which becomes about 0."""
        side = self.config.image_size
        colour = torch.tensor([round(255 * mean) for mean in self.config.image_mean], dtype=torch.uint8)
        return Resized(pixels=colour[:, None, None].expand(3, side, side).contiguous(), width=side, height=side)

    def normalise(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Maps a batch of resized images to (v/255 - mean) / std; `images` is this after `resize`.

        The factor 255 sits in mean and std, as in transformers (equal bit for bit; the official order differs by
        rounding).

        Raises:
            ValueError: The pixels are not a uint8 batch.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            shape = list(pixels.shape)
            raise ValueError(f"pixels are {pixels.dtype} of shape {shape}; expected uint8 [batch, 3, h, w]")
        mean, std = (
            (torch.tensor(values) * 255.0)[:, None, None].to(pixels.device, non_blocking=True)
            for values in (self.config.image_mean, self.config.image_std)
        )
        return pixels.to(torch.float32).sub_(mean).div_(std)

    def texts(self, texts: Sequence[str], *, truncate: bool = False) -> TextBatch:
        """Tokenises texts and pads them to the longest of them.

        Args:
            texts: At least one.
            truncate: Cut texts above `config.max_length`; the end token stays.

        Raises:
            ValueError: There are no texts, or one is too long and not to be cut.
        """
        return self.pad(self.token_ids(texts, truncate=truncate))

    def token_ids(self, texts: Sequence[str], *, truncate: bool = False, first: int = 0) -> list[list[int]]:
        """Tokenises texts, with start and end token, without padding; in errors they are numbered from `first` on.

        Raises:
            ValueError: There are no texts, or one is too long and not to be cut.
        """
        return encode(self._text[0], texts, max_length=self.config.max_length, truncate=truncate, first=first)

    def token_offsets(self, text: str) -> Encoding:
        """Tokenises a text as `token_ids` does, uncut, with the characters and the word that each token is of.

        Raises:
            ValueError: The text is not valid Unicode, or the tokenizer fails.
        """
        check_texts([text])
        tokenizer, _, _ = self._text
        with tokenizers_errors("the tokenizer cannot encode this text"):
            return tokenizer.encode(text)

    def pair_ids(self, texts: Sequence[Sequence[str]]) -> list[list[int]]:
        """Tokenises single texts or pairs of them, without padding; what is too long is cut.

        Raises:
            ValueError: There are none, more than two of one example, or a text is not a string.
        """
        tokenizer, _, special = self._text
        flat = encode(tokenizer, [text for parts in texts for text in parts], max_length=sys.maxsize)
        encoded, limit = iter(flat), self.config.max_length
        joined = []
        for parts in texts:
            if len(parts) > 2:
                raise ValueError(f"an example has {len(parts)} texts; expected one or two: join them, or choose one")
            first, *others = [next(encoded) for _ in parts]
            if others:
                first = join_pair(first, others[0], tokenizer, special, limit)
            joined.append(first if len(first) <= limit else [*first[: limit - 1], first[-1]])
        return joined

    def pad(self, ids: Sequence[Sequence[int]]) -> TextBatch:
        """Fills lists of ids up to the longest of them, on the right.

        Raises:
            ValueError: There are no lists, or one is empty.
        """
        if not ids or not all(ids):
            raise ValueError(f"{len(ids)} lists of token ids, some without a token; expected at least one, none empty")
        lengths = torch.tensor([len(row) for row in ids])
        rows = [torch.tensor(row) for row in ids]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        present = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return TextBatch(input_ids, None if bool(present.all()) else present.long())

    def decode(self, ids: Sequence[int] | Int[Tensor, " l"], *, skip_special_tokens: bool = True) -> str:
        """Turns the ids of one text back into a string.

        Raises:
            ValueError: The tokenizer fails.
        """
        tokenizer, _, _ = self._text
        with tokenizers_errors("the tokenizer cannot decode these ids"):
            return tokenizer.decode([int(number) for number in ids], skip_special_tokens=skip_special_tokens)

    def with_image_size(self, image_size: int) -> Processor:
        """Returns a processor for another image size, with the same tokenizer.

        Raises:
            ValueError: The patch does not divide the size, or `shortest_edge` was set apart from it.
        """
        return Processor(self.config.with_image_size(image_size), self.tokenizer)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, then `processor.json`, each atomically."""
        target = Path(folder)
        if self.tokenizer is not None:
            files.write_text(target / _TOKENIZER_FILE, self.tokenizer.to_str(pretty=True))
        values = {"version": _VERSION, "tokenizer": self.tokenizer is not None, "config": self.config.to_dict()}
        files.write_json(target / "processor.json", values)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Processor:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: `processor.json` or the tokenizer that it names is missing.
            ValueError: A file is damaged, of another version, or has unknown fields.
        """
        path = Path(folder) / "processor.json"
        values = files.read_json(path)
        if values.get("version") != _VERSION or values.keys() != {"version", "tokenizer", "config"}:
            raise ValueError(
                f"{path} is of version {values.get('version')} with {sorted(values)}; this release reads {_VERSION} "
                "with version, tokenizer and config"
            )
        config = ProcessorConfig.from_dict(values["config"])
        return cls(config, load_tokenizer(path.with_name(_TOKENIZER_FILE)) if values["tokenizer"] else None)

    @classmethod
    def from_huggingface(
        cls, folder: str | os.PathLike[str], *, patch_size: int, max_length: int | None = None
    ) -> Processor:
        """Reads preprocessing and tokenizer of a transformers folder; see `huggingface.read_config`.

        Args:
            folder: With `preprocessor_config.json` or `processor_config.json`, and tokenizer files if texts are needed.
            patch_size: Patch side of the model.
            max_length: Longest text in tokens; None takes the tokenizer's `model_max_length`, or 512.

        Raises:
            FileNotFoundError: There are no image settings, or `vocab.json` lacks its `merges.txt`.
            ValueError: A setting cannot be carried out, or the model cannot take the size.
        """
        source = Path(folder)
        config = huggingface.read_config(source, patch_size=patch_size, max_length=max_length)
        return cls(config, None if find_tokenizer(source) is None else load_tokenizer(source))

    def save_huggingface(self, folder: str | os.PathLike[str]) -> None:
        """Writes `preprocessor_config.json`, `tokenizer.json`, `tokenizer_config.json` for transformers' AutoProcessor.

        Token ids are equal for every profile. Pixel values are equal for profile `hf`; for the official profiles they
        differ by what `huggingface.image_settings` tells, and a warning is logged.

        Raises:
            ValueError: The background is a colour that transformers cannot fill with, or a `processor_config.json` in
                the folder would hide the settings.
        """
        target = Path(folder)
        if (target / "processor_config.json").exists():
            raise ValueError(
                f"{target} has a processor_config.json, which would win over the new files; remove it first"
            )
        settings = huggingface.image_settings(self.config)
        if self.config.profile != "hf":
            _LOG.warning(
                "transformers cannot repeat profile %r exactly: pixels differ by up to 1 of 255 levels, an odd crop by "
                "one pixel of position",
                self.config.profile,
            )
        if self.tokenizer is not None:
            files.write_text(target / _TOKENIZER_FILE, self.tokenizer.to_str(pretty=True))
            text = huggingface.tokenizer_settings(self._text[1], self.config.max_length)
            files.write_json(target / "tokenizer_config.json", text)
        files.write_json(target / "preprocessor_config.json", settings)

    @property
    def _text(self) -> tuple[Tokenizer, Special[str], Special[int]]:
        """The tokenizer and its special tokens."""
        if self.tokenizer is None or self._special is None:
            raise ValueError("this processor has no tokenizer; build it with Processor(config, load_tokenizer(folder))")
        return self.tokenizer, *self._special

    def resize_numbered(self, item: tuple[int, ImageLike]) -> UInt8[Tensor, "3 h w"]:
        """Returns `resize` of an image that comes with its number, which errors name.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: The image cannot be used.
        """
        number, image = item
        try:
            return self.resize(image)
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from error


def to_tensor(image: Image.Image | UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "3 h w"]:
    """Returns the pixels of an RGB image."""
    array = image if isinstance(image, np.ndarray) else np.array(image)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _letterboxed(image: UInt8[Tensor, "3 h w"], config: ProcessorConfig) -> UInt8[Tensor, "3 s s"]:
    """As transformers' torchvision backend: bicubic on the uint8 tensor (PIL differs by a level here and there).

    The short side is scaled, the long side limited, both are cut to multiples of a divisor, then cropped or filled with
    black to a square. Odd differences leave the smaller part left and above; torchvision's own `center_crop` rounds
    half to even, which is one pixel off for some of them.
    """
    height, width = image.shape[-2:]
    edge, divisor, size = config.resize_edge, config.resize_divisor, config.image_size
    scale = edge / min(height, width)
    exact = (edge, scale * width) if height < width else (scale * height, edge)
    shrink = min(1.0, int(_LONG_SIDE * edge) / max(exact))
    rows, columns = (int(shrink * side + 0.5) // divisor * divisor for side in exact)
    if min(rows, columns) == 0:
        raise ValueError(
            f"an image of {width}x{height} is too elongated for profile 'hf': its short side shrinks below "
            f"{divisor} px and is cut to 0; crop it first or use profile 'official-pretrain'"
        )
    scaled = F.interpolate(image[None], (rows, columns), mode=config.interpolation, antialias=True)[0]
    missing_rows, missing_columns = max(size - rows, 0), max(size - columns, 0)
    left, top = missing_columns // 2, missing_rows // 2
    filled = F.pad(scaled, [left, missing_columns - left, top, missing_rows - top])
    row, column = max(rows - size, 0) // 2, max(columns - size, 0) // 2
    return filled[:, row : row + size, column : column + size]
