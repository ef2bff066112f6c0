"""What the model computes of one batch: items of every kind together, each picture and each text encoded once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from bridgetower.analysis.attention import Attention, attention_of
from bridgetower.answering import Choice, PairHead, choices
from bridgetower.model.bridgetower import IMAGE, SECOND_IMAGE, EncodeOutputs
from bridgetower.model.encodings import Encoded, Fused
from bridgetower.predictor import FilledWord, Predictor, classified, l2_normalize, matched
from bridgetower.processor import Resized

Kind = Literal["embedding", "match", "answer", "entail", "reason", "fill_mask", "attention"]
Tokens = tuple[int, ...]
Outcome = Tensor | float | list[Choice] | list[list[FilledWord]] | Attention

_MASKS = 64  # whose words are ranked at once: each has a row as long as the vocabulary

_Source = TypeVar("_Source")


@dataclass(frozen=True, eq=False, kw_only=True)
class Item:
    """One thing to be computed.

    Attributes:
        kind: An `embedding` is of the picture, the text or both; every other kind takes both, and `reason` two images.
            The text of a `fill_mask` has a mask, that of an `attention` a word.
        image: The picture. One object in several items is encoded once.
        image_2: The second image of `reason`, likewise.
        ids: The text's token ids, likewise.
        top: Answers or judgements, or words per mask.
    """

    kind: Kind = "embedding"
    image: Resized | None = None
    image_2: Resized | None = None
    ids: Tokens | None = None
    top: int = 1

    @property
    def part(self) -> Literal["images", "texts", "pairs", "attention"]:
        """What has to be run for it."""
        if self.image is None:
            return "texts"
        if self.ids is None:
            return "images"
        return "attention" if self.kind == "attention" else "pairs"


@torch.inference_mode()
def compute(predictor: Predictor, items: Sequence[Item]) -> list[Outcome]:
    """Returns for each item what the predictor's method for it returns.

    What is fused is encoded in one run of each tower and fused together, those with masks apart, as something else is
    read there. What is embedded alone takes a run of its own, which is cheaper: only the last CLS is read. Attention is
    looked at pair by pair.
    """
    batch = _Batch(predictor)

    def given(numbers: Sequence[int]) -> list[Item]:
        return [items[number] for number in numbers]

    return _assembled(
        [item.part for item in items],
        {
            "pairs": lambda numbers: batch.pairs(given(numbers)),
            "images": lambda numbers: batch.image_vectors(given(numbers)),
            "texts": lambda numbers: batch.text_vectors(given(numbers)),
            "attention": lambda numbers: batch.attention(given(numbers)),
        },
    )


def compute_with(predictors: Mapping[Kind, Predictor], items: Sequence[Item]) -> list[Outcome]:
    """Returns what `compute` returns, each kind of item computed by its model."""

    def computed(model: Predictor) -> Callable[[list[int]], list[Outcome]]:
        return lambda numbers: compute(model, [items[number] for number in numbers])

    models = [predictors[item.kind] for item in items]
    return _assembled(models, {model: computed(model) for model in models})


class _Batch:
    """What is computed of a batch."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.engine, self.model = predictor, predictor.engine, predictor.model

    def image_vectors(self, items: Sequence[Item]) -> Iterable[Tensor]:
        image, rows = self._images([item.image for item in items], "cls")
        return l2_normalize(self.model.image_embeds(image))[rows.cpu()]

    def text_vectors(self, items: Sequence[Item]) -> Iterable[Tensor]:
        text, rows = self._texts(items, "cls")
        return l2_normalize(self.model.text_embeds(text))[rows.cpu()]

    def pairs(self, items: Sequence[Item]) -> list[Outcome]:
        image, image_rows = self._images([item.image for item in items], "layers")
        text, text_rows = self._texts(items, "layers")
        image, text = self.engine.cache_image(image), self.engine.cache_text(text)  # shared by the pairs of each

        def fused(numbers: list[int], outputs: Literal["pooled", "text"]) -> Fused:
            return self.engine.fuse(image[image_rows[numbers]], text[text_rows[numbers]], outputs)

        def reasoned(numbers: list[int]) -> Iterable[Outcome]:
            some = [items[number] for number in numbers]
            other, rows = self._images([item.image_2 for item in some], "layers", SECOND_IMAGE)
            second = self.engine.fuse(self.engine.cache_image(other)[rows], text[text_rows[numbers]]).pooled
            return self._choices("nlvr2", torch.cat([fused(numbers, "pooled").pooled, second], dim=-1), some)

        return _assembled(
            [item.kind if item.kind in ("fill_mask", "reason") else "pooled" for item in items],
            {
                "pooled": lambda numbers: self._pooled(fused(numbers, "pooled").pooled, [items[n] for n in numbers]),
                "fill_mask": lambda numbers: self._filled(fused(numbers, "text").text, [items[n] for n in numbers]),
                "reason": reasoned,
            },
        )

    def attention(self, items: Sequence[Item]) -> list[Outcome]:
        return [
            attention_of(self.predictor, item.image, item.ids)
            for item in items
            if item.image is not None and item.ids is not None
        ]

    def _pooled(self, pooled: Tensor, items: Sequence[Item]) -> list[Outcome]:
        return _assembled(
            [item.kind for item in items],
            {
                "embedding": lambda rows: l2_normalize(self.model.pair_embeds(pooled[rows])),
                "match": lambda rows: matched(self.model.itm_logits(pooled[rows])).tolist(),
                "answer": lambda rows: self._choices("vqa", pooled[rows], [items[row] for row in rows]),
                "entail": lambda rows: self._choices("snli_ve", pooled[rows], [items[row] for row in rows]),
            },
        )

    def _filled(self, hidden: Tensor, items: Sequence[Item]) -> list[Outcome]:
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

    def _choices(self, head: PairHead, rows: Tensor, items: Sequence[Item]) -> list[Outcome]:
        probabilities = classified(head, self.model.class_logits(head, rows))
        ranked = choices(probabilities, self.predictor.class_names(head), max(item.top for item in items))
        return [chosen[: item.top] for chosen, item in zip(ranked, items, strict=True)]

    def _images(
        self, images: Sequence[Resized | None], outputs: EncodeOutputs, token_type: int = IMAGE
    ) -> tuple[Encoded, Int[Tensor, " n"]]:
        """Returns the different images, encoded, and the row of each."""
        pictures, rows = _distinct(images)
        pixels = self.predictor.processor.normalise(torch.stack([picture.pixels for picture in pictures]))
        return self.engine.encode_image(pixels, token_type, outputs=outputs), torch.tensor(
            rows, device=self.engine.device
        )

    def _texts(self, items: Sequence[Item], outputs: EncodeOutputs) -> tuple[Encoded, Int[Tensor, " n"]]:
        """Returns the different texts of items, encoded, and the row of each item."""
        ids, rows = _distinct([item.ids for item in items])
        text = self.predictor.processor.pad(ids)
        encoded = self.engine.encode_text(text.input_ids, text.attention_mask, outputs=outputs)
        return encoded, torch.tensor(rows, device=self.engine.device)


def _assembled(
    keys: Sequence[Hashable], outcomes_of: Mapping[Hashable, Callable[[list[int]], Iterable[Outcome]]]
) -> list[Outcome]:
    """Hands the numbers of all items with one key to its function, and puts what they return in order."""
    outcomes: dict[int, Outcome] = {}
    for key in dict.fromkeys(keys):
        numbers = [number for number, other in enumerate(keys) if other == key]
        outcomes.update(zip(numbers, outcomes_of[key](numbers), strict=True))
    return [outcomes[number] for number in range(len(keys))]


def _distinct(sources: Sequence[_Source | None]) -> tuple[list[_Source], list[int]]:
    """Returns the different objects, and the number of each source's among them."""
    found = {id(source): source for source in sources if source is not None}
    numbers = {key: number for number, key in enumerate(found)}
    return list(found.values()), [numbers[id(source)] for source in sources]
