"""BERT-style token masking for masked language modelling."""

from collections.abc import Collection

import torch
from jaxtyping import Bool, Float, Int
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
    """Hides some tokens and returns the masked ids with the labels to predict.

    The draws come from `generator` alone and their number depends on the shape only. Random tokens come from the
    vocabulary without the special and mask tokens.

    Args:
        input_ids: Token ids; not changed in place.
        config: Probability and shares.
        special_ids: Never predicted and never drawn: padding, start, end and the like. The mask token always counts.
        mask_token_id: The id that hides a token.
        vocab_size: Number of token ids.
        generator: Source of all randomness, on any device.
        continues_word: True at vocabulary ids that carry on the word before them (WordPiece's `##`); needed for
            `whole_word`, refused without. A special token always ends a word.

    Returns:
        Masked ids, and labels: the original id where predicted, `IGNORED` elsewhere.
    """
    special = _special_table({*special_ids, mask_token_id}, vocab_size)
    _check_ids(input_ids, vocab_size)
    _check_words(config, continues_word, vocab_size)
    device = input_ids.device
    is_special = special.to(device)[input_ids]
    draws = _uniform(input_ids, generator)
    if continues_word is not None:
        draws = _share_in_words(draws, is_special, continues_word.to(device)[input_ids])
    predicted = (draws < config.probability) & ~is_special

    ordinary = (~special).nonzero().squeeze(1)
    masked = _replace(input_ids, predicted, config, ordinary, mask_token_id, generator)
    return masked, input_ids.masked_fill(~predicted, IGNORED)


def _replace(
    input_ids: Int[Tensor, "b l"],
    predicted: Bool[Tensor, "b l"],
    config: MaskingConfig,
    ordinary: Int[Tensor, " o"],
    mask_token_id: int,
    generator: torch.Generator,
) -> Int[Tensor, "b l"]:
    """Draws for each predicted token whether it is hidden, exchanged or kept."""
    drawn = torch.randint(len(ordinary), input_ids.shape, generator=generator, device=generator.device)
    strangers = ordinary[drawn.to(ordinary.device)].to(input_ids)
    fate = _uniform(input_ids, generator)
    hidden = predicted & (fate < config.mask_share)
    exchanged = predicted & (fate < config.mask_share + config.random_share)
    return torch.where(exchanged, strangers, input_ids).masked_fill(hidden, mask_token_id)  # hidden wins


def _share_in_words(
    draws: Float[Tensor, "b l"], is_special: Bool[Tensor, "b l"], continues: Bool[Tensor, "b l"]
) -> Float[Tensor, "b l"]:
    """Gives every token the draw of its word's first token; a special token, never predicted, cuts words apart."""
    starts = ~continues | is_special
    positions = torch.arange(draws.shape[1], device=draws.device).expand_as(draws)
    first = torch.where(starts, positions, 0).cummax(dim=1).values
    return draws.gather(1, first)


def _uniform(input_ids: Tensor, generator: torch.Generator) -> Float[Tensor, "b l"]:
    return torch.rand(input_ids.shape, generator=generator, device=generator.device).to(input_ids.device)


def _special_table(special_ids: set[int], vocab_size: int) -> Bool[Tensor, " v"]:
    outside = sorted(token for token in special_ids if not 0 <= token < vocab_size)
    if outside:
        raise ValueError(f"special or mask ids {outside} are outside the vocabulary; expected 0 to {vocab_size - 1}")
    if len(special_ids) == vocab_size:
        raise ValueError(f"all {vocab_size} ids are special; expected at least one ordinary token")
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[list(special_ids)] = True
    return special


def _check_ids(input_ids: Tensor, vocab_size: int) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids are {list(input_ids.shape)}; expected [batch, tokens]")
    outside = int(((input_ids < 0) | (input_ids >= vocab_size)).sum())
    if outside:
        raise ValueError(f"{outside} input ids are outside the vocabulary; expected 0 to {vocab_size - 1}")


def _check_words(config: MaskingConfig, continues_word: Tensor | None, vocab_size: int) -> None:
    if config.whole_word != (continues_word is not None):
        given = f"whole_word is {config.whole_word} {'without' if config.whole_word else 'with'} continues_word"
        raise ValueError(f"{given}; expected the table with whole_word and only then")
    if continues_word is not None and continues_word.shape != (vocab_size,):
        raise ValueError(f"continues_word is {list(continues_word.shape)}; expected one entry per id, [{vocab_size}]")
