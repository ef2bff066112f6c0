"""What the model computes of one batch: items of every kind together, each picture and each text encoded once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from bridgetower.answering import Choice, choices
from bridgetower.model.encodings import Encoded
from bridgetower.predictor import FilledWord, Predictor, classified, matched, unit
from bridgetower.processor import Resized

Kind = Literal["embedding", "match", "answer", "fill_mask"]
Tokens = tuple[int, ...]
Outcome = Tensor | float | list[Choice] | list[list[FilledWord]]

_MASKS = 64  # whose words are ranked at once: each has a row as long as the vocabulary

_Source = TypeVar("_Source")


@dataclass(frozen=True, eq=False, kw_only=True)
class Item:
    """One thing to be computed.

    Attributes:
        kind: An `embedding` is of the picture, the text or both; every other kind takes both.
        image: The picture. One object in several items is encoded once.
        ids: The text's token ids, likewise.
        top: Answers, or words per mask.
    """

    kind: Kind = "embedding"
    image: Resized | None = None
    ids: Tokens | None = None
    top: int = 1

    @property
    def is_pair(self) -> bool:
        """Whether picture and text are fused."""
        return self.image is not None and self.ids is not None


@torch.inference_mode()
def compute(predictor: Predictor, items: Sequence[Item]) -> list[Outcome]:
    """Returns for each item what the predictor's method for it returns.

    All pictures are encoded in one run of the vision tower, all texts in one of the text tower, and all pairs are fused
    together, those with masks apart: there something else is read.
    """
    batch = _Batch(predictor, items)

    def given(numbers: Sequence[int]) -> list[Item]:
        return [items[number] for number in numbers]

    return _assembled(
        [item.kind if item.kind == "fill_mask" else (item.image is None, item.ids is None) for item in items],
        {
            (False, True): lambda numbers: batch.image_vectors(given(numbers)),
            (True, False): lambda numbers: batch.text_vectors(given(numbers)),
            (False, False): lambda numbers: batch.read_pooled(given(numbers)),
            "fill_mask": lambda numbers: batch.filled(given(numbers)),
        },
    )


class _Batch:
    """The encodings of a batch, and what is read of them."""

    def __init__(self, predictor: Predictor, items: Sequence[Item]) -> None:
        self.predictor, self.engine, self.model = predictor, predictor.engine, predictor.model
        read: Literal["layers", "cls"] = "layers" if any(item.is_pair for item in items) else "cls"
        self.images, pictures = _distinct(item.image for item in items)
        self.texts, ids = _distinct(item.ids for item in items)
        if pictures:
            pixels = predictor.processor.normalise(torch.stack([picture.pixels for picture in pictures]))
            self.image = self.engine.encode_image(pixels, read=read)
        if ids:
            text = predictor.processor.pad(ids)
            self.text = self.engine.encode_text(text.input_ids, text.attention_mask, read=read)

    def image_vectors(self, items: Sequence[Item]) -> Iterable[Tensor]:
        cls = Encoded((), self.image.cls)[self._rows(self.images, (item.image for item in items))]
        return unit(self.model.image_embeds(cls))

    def text_vectors(self, items: Sequence[Item]) -> Iterable[Tensor]:
        cls = Encoded((), self.text.cls)[self._rows(self.texts, (item.ids for item in items))]
        return unit(self.model.text_embeds(cls))

    def read_pooled(self, items: Sequence[Item]) -> list[Outcome]:
        pooled = self.engine.fuse(*self._pairs(items)).pooled
        return _assembled(
            [item.kind for item in items],
            {
                "embedding": lambda rows: unit(self.model.pair_embeds(pooled[rows])),
                "match": lambda rows: matched(self.model.itm_logits(pooled[rows])).tolist(),
                "answer": lambda rows: self._answers(pooled[rows], [items[row] for row in rows]),
            },
        )

    def filled(self, items: Sequence[Item]) -> list[Outcome]:
        hidden = self.engine.fuse(*self._pairs(items), read="text").text
        mask = self.predictor.processor.mask_token_id
        places = [
            (row, column) for row, item in enumerate(items) for column, id_ in enumerate(item.ids or ()) if id_ == mask
        ]
        rows, columns = torch.tensor(places, device=hidden.device).T
        top = max(item.top for item in items)
        words = [of_mask for part in hidden[rows, columns].split(_MASKS) for of_mask in self.predictor.words(part, top)]
        found: list[list[list[FilledWord]]] = [[] for _ in items]
        for (row, _), of_mask in zip(places, words, strict=True):
            found[row].append(of_mask[: items[row].top])
        return list(found)

    def _answers(self, rows: Tensor, items: Sequence[Item]) -> list[Outcome]:
        probabilities = classified("vqa", self.model.class_logits("vqa", rows))
        ranked = choices(probabilities, self.predictor.class_names("vqa"), max(item.top for item in items))
        return [answers[: item.top] for answers, item in zip(ranked, items, strict=True)]

    def _pairs(self, items: Sequence[Item]) -> tuple[Encoded, Encoded]:
        """Returns the picture and the text of each pair; what the first fusion layer computes of one is shared."""
        image_rows, images = _distinct(item.image for item in items)
        text_rows, texts = _distinct(item.ids for item in items)
        image = self.engine.start_image(self.image[self._rows(self.images, images)])
        text = self.engine.start_text(self.text[self._rows(self.texts, texts)])
        rows = self._rows(image_rows, (item.image for item in items))
        columns = self._rows(text_rows, (item.ids for item in items))
        return image[rows], text[columns]

    def _rows(self, numbers: dict[int, int], sources: Iterable[object]) -> Int[Tensor, " n"]:
        return torch.tensor([numbers[id(source)] for source in sources], device=self.engine.device)


def _assembled(
    keys: Sequence[Hashable], outcomes_of: Mapping[Hashable, Callable[[list[int]], Iterable[Outcome]]]
) -> list[Outcome]:
    """Hands the numbers of all items with one key to its function, and puts what they return in order."""
    outcomes: dict[int, Outcome] = {}
    for key in dict.fromkeys(keys):
        numbers = [number for number, other in enumerate(keys) if other == key]
        outcomes.update(zip(numbers, outcomes_of[key](numbers), strict=True))
    return [outcomes[number] for number in range(len(keys))]


def _distinct(sources: Iterable[_Source | None]) -> tuple[dict[int, int], list[_Source]]:
    """Returns the different objects, and the number of each by its identity."""
    found = {id(source): source for source in sources if source is not None}
    return {key: number for number, key in enumerate(found)}, list(found.values())
