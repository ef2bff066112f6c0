"""What waits in the queue, and how a batch of it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from bridgetower.analysis.attention import Attention, attention_of
from bridgetower.inference import HEAD_OF, Choice, FilledWord, Item, Pixels, Tokens, assembled, choices
from bridgetower.predictor import Predictor
from bridgetower.processor import Resized

Outcome = Tensor | float | list[Choice] | list[list[FilledWord]] | Attention


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionItem:
    """An image and a text with at least one word, for their cross-attention."""

    image: Pixels
    ids: Tokens


QueueItem = Item | AttentionItem


def embedding_items(images: Sequence[Resized], texts: Sequence[Tokens], *, joint: bool) -> list[Item]:
    """Returns an item for each image and each text, or one for the only image with the only text."""
    if joint:
        return [Item(image=images[0].pixels, ids=texts[0])]
    return [*(Item(image=image.pixels) for image in images), *(Item(ids=ids) for ids in texts)]


def compute(predictor_of: Callable[[QueueItem], Predictor], items: Sequence[QueueItem]) -> list[Outcome]:
    """Returns for each item what the predictor's method for it returns, computed by its model.

    Attention is looked at pair by pair, everything else together.
    """

    def computed(predictor: Predictor, chosen: Sequence[QueueItem]) -> list[Outcome]:
        if isinstance(chosen[0], AttentionItem):
            return [attention_of(predictor, item.image, item.ids) for item in chosen if isinstance(item, AttentionItem)]
        some = [item for item in chosen if isinstance(item, Item)]
        return [_outcome(predictor, item, found) for item, found in zip(some, predictor.compute(some), strict=True)]

    keys = [(predictor_of(item), type(item)) for item in items]
    return assembled(keys, lambda key, rows: computed(key[0], [items[row] for row in rows]))


def _outcome(predictor: Predictor, item: Item, found: Tensor | float | list[list[FilledWord]]) -> Outcome:
    """Names the classes of a judgement."""
    if item.kind in HEAD_OF and isinstance(found, Tensor):
        return choices(found[None], predictor.class_names(HEAD_OF[item.kind]), item.top)[0]
    return found
