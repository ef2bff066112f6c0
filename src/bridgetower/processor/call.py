"""Images with texts as one call, with the arguments and tensors of transformers' BridgeTowerProcessor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from bridgetower.model.plain import check_choice
from bridgetower.processor.inputs import Images, Texts, image_list, text_list
from bridgetower.processor.text import encode

if TYPE_CHECKING:
    from bridgetower.processor.processor import Processor

Padding = Literal[False, True, "do_not_pad", "longest", "max_length"]
"""Whether and how far texts are filled up: `do_not_pad` is False, `longest` is True."""

Truncation = Literal[False, True, "do_not_truncate", "longest_first", "only_first"]
"""Whether texts that are too long are cut: `do_not_truncate` is False; the last two are True, as no text is a pair."""


class CallOptions(TypedDict, total=False):
    """Arguments of a call.

    Attributes:
        padding: Fill texts up to the longest of them, or with `max_length` to that many tokens; False unless given.
        truncation: Cut texts that are too long; False unless given.
        max_length: Longest text in tokens; that of the model unless given.
        return_tensors: Of PyTorch, in any case.
    """

    padding: Padding
    truncation: Truncation
    max_length: int | None
    return_tensors: Literal["pt"]


class ModelInputs(dict[str, Tensor]):
    """Tensors by name, which are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(f"no {name} here; there are {', '.join(self)}")

    def to(self, device: str | torch.device) -> Self:
        """Returns them on a device."""
        return type(self)({name: tensor.to(device) for name, tensor in self.items()})


def model_inputs(
    processor: Processor,
    images: Images | None,
    text: Texts | None,
    *,
    padding: Padding = False,
    truncation: Truncation = False,
    max_length: int | None = None,
    return_tensors: Literal["pt"] = "pt",
) -> ModelInputs:
    """Prepares images, texts or both."""
    if images is None and text is None:
        raise ValueError("neither images nor text given; expected one of them at least")
    if return_tensors != "pt":
        raise ValueError(f"return_tensors is {return_tensors!r}; expected 'pt'")
    check_choice("padding", padding, Padding)
    check_choice("truncation", truncation, Truncation)
    found = ModelInputs()
    if images is not None:
        pixel_values = processor.images(image_list(images))
        mask = pixel_values.new_ones(pixel_values[:, 0].shape, dtype=torch.long)
        found.update(pixel_values=pixel_values, pixel_mask=mask)
    if text is not None:
        limit = processor.config.max_length if max_length is None else max_length
        ids = _token_ids(processor, text, limit, truncation not in (False, "do_not_truncate"))
        if padding in (False, "do_not_pad") and len({len(row) for row in ids}) > 1:
            raise ValueError("the texts have different numbers of tokens; pass padding=True to fill them up")
        batch = processor.pad(ids)
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        missing = (0, limit - mask.shape[1] if padding == "max_length" else 0)
        found["input_ids"] = F.pad(batch.input_ids, missing, value=processor.pad_token_id)
        found["attention_mask"] = F.pad(mask, missing)
    return found


def _token_ids(processor: Processor, texts: Texts, limit: int, truncate: bool) -> list[list[int]]:
    most = processor.config.max_length
    if not 3 <= limit <= most:
        raise ValueError(f"max_length is {limit}; expected 3 to {most}, the longest that this model takes")
    if processor.tokenizer is None:
        raise ValueError("this processor has no tokenizer; give images alone, or a model's processor")
    try:
        return encode(processor.tokenizer, text_list(texts), max_length=limit, truncate=truncate)
    except ValueError as error:
        raise ValueError(str(error).replace("truncate=True", "truncation=True")) from error
