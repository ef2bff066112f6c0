"""BERT-style token masking for masked language modelling."""

from collections.abc import Collection

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bridgetower.data.config import MaskingConfig

IGNORED = -100
"""Label of a position that is not predicted; the default `ignore_index` of PyTorch's cross-entropy."""


def mask_tokens(
    input_ids: Int[Tensor, "b l"],
    *,
    config: MaskingConfig,
    special_ids: Collection[int],
    mask_token_id: int,
    vocab_size: int,
    generator: torch.Generator,
    continues_word: Bool[Tensor, " v"] | None = None,
) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
    """Hides some tokens and returns the masked ids with the labels to predict, `IGNORED` elsewhere.

    The draws come from `generator` alone and their number depends on the shape only. Random tokens come from the
    vocabulary without the special and mask tokens. For whole words, `continues_word` is True at ids that carry on the
    word before them (WordPiece's `##`); a special token always ends a word.
    """
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[[*special_ids, mask_token_id]] = True
    is_special = special[input_ids]
    draws = torch.rand(input_ids.shape, generator=generator)
    if continues_word is not None:  # every token has the draw of its word's first token
        starts = ~continues_word[input_ids] | is_special
        first = torch.where(starts, torch.arange(input_ids.shape[1]), 0).cummax(dim=1).values
        draws = draws.gather(1, first)
    predicted = (draws < config.probability) & ~is_special

    ordinary = (~special).nonzero().squeeze(1)
    strangers = ordinary[torch.randint(len(ordinary), input_ids.shape, generator=generator)].to(input_ids)
    fate = torch.rand(input_ids.shape, generator=generator)
    hidden = predicted & (fate < config.mask_share)
    exchanged = predicted & (fate < config.mask_share + config.random_share)
    masked = torch.where(exchanged, strangers, input_ids).masked_fill(hidden, mask_token_id)  # hidden wins
    return masked, input_ids.masked_fill(~predicted, IGNORED)
