"""Items of inference, which every caller computes: inputs are encoded, fused and read by heads together."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bridgetower.data.sources.fetch import BRIEF, is_url, read_location
from bridgetower.distributed import available_cores
from bridgetower.engines.engine import Engine
from bridgetower.model.bridgetower import IMAGE, SECOND_IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.fusion import Encoded
from bridgetower.model.heads import predictions
from bridgetower.model.layers import to_device
from bridgetower.processor import ImageLike, Processor, loaded

Kind = Literal["embedding", "match", "score", "fill_mask", "prediction"]
Tokens = tuple[int, ...]
Pixels = UInt8[Tensor, "3 h w"]

TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "an image of a {}")

# Masks whose words are ranked at once: each has a row as long as the vocabulary.
_MASKS = 64

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class FilledWord:
    """A candidate for a masked word, as it stands in the text. Its probability is over the whole vocabulary."""

    word: str
    probability: float


@dataclass(frozen=True)
class Choice:
    """An answer or a class that the model can choose.

    Probabilities of answers, and of classes of which several may hold, are independent; elsewhere they sum to one.
    """

    label: str
    probability: float


class LikeliestTokens(NamedTuple):
    """The likeliest tokens for each mask of a text, likeliest first. `filled_words` makes words of them."""

    ids: Int[Tensor, "m k"]
    probabilities: Float[Tensor, "m k"]


Outcome = Tensor | float | LikeliestTokens


@dataclass(frozen=True, eq=False, kw_only=True)
class Item:
    """One input of the model, and what is computed of it.

    Attributes:
        kind: An embedding is of the image, the text or both, a prediction of what its head reads. All else takes both.
        head: Of a prediction.
        image: As `Processor.resize` returns it. One object in several items is encoded once.
        image_2: The second image, for a head that reads two.
        ids: Of the text, with a mask for `fill_mask`. Equal ones are encoded once.
        top: Words per mask of `fill_mask`. Classes of a prediction are chosen by `choices`.
    """

    kind: Kind = "embedding"
    head: str = ""
    image: Pixels | None = None
    image_2: Pixels | None = None
    ids: Tokens | None = None
    top: int = 1


def compute_items(
    engine: Engine, processor: Processor, items: Sequence[Item], *, gradients: bool = False
) -> list[Outcome]:
    """Computes items together. Each image and text is encoded once, in inference mode unless `gradients` is set."""
    computation = Computation(engine, processor, items, gradients=gradients)
    computation.start()
    return computation.outcomes()


def compute_batches(
    engine: Engine, processor: Processor, batches: Iterable[Sequence[Item]]
) -> Iterator[list[Outcome]]:
    """Yields the outcomes of batches of items. A batch is read when a GPU has been given the next."""
    waiting = deque[Computation]()
    for items in batches:
        computation = Computation(engine, processor, items)
        computation.start()
        waiting.append(computation)
        if len(waiting) > 1:
            yield waiting.popleft().outcomes()
    for computation in waiting:
        yield computation.outcomes()


class _EncodedRows(NamedTuple):
    """Images or texts of items, of which equal ones were encoded once."""

    encoded: Encoded
    positions: Mapping[int, int]  # in `encoded`, by the row of the item

    def select(self, rows: Sequence[int]) -> Encoded:
        """Returns the encodings of items. All in their order need neither an index on the device nor a copy."""
        index = [self.positions[row] for row in rows]
        if index == list(range(len(self.encoded))):
            return self.encoded
        return self.encoded[to_device(torch.tensor(index), self.encoded.cls.device)]


class Computation:
    """Items that are computed together: `start` gives a GPU its work, `outcomes` waits for it."""

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        items: Sequence[Item],
        *,
        gradients: bool = False,
    ) -> None:
        self._engine = engine
        self._model = engine.model
        self._processor = processor
        self._items = items
        self._mode = nullcontext if gradients else torch.inference_mode
        self._outcomes: list[Outcome] = [0.0] * len(items)
        self._copies: list[tuple[list[int], Tensor]] = []  # rows of items, and their results
        self._copied: torch.cuda.Event | None = None

    def start(self) -> None:
        """Encodes each image and text once, and fuses pairs by what is computed of them."""
        image_rows = []
        text_rows = []
        pair_rows = []
        for row, item in enumerate(self._items):
            if item.ids is None:
                image_rows.append(row)
            elif item.image is None:
                text_rows.append(row)
            else:
                pair_rows.append(row)

        engine = self._engine
        with self._mode():
            # Of images and texts that are not fused, heads read the last CLS of a tower only.
            if image_rows:
                images = self._encode_images(image_rows, outputs="cls")
                self._read_alone(image_rows, images, self._model.image_embeds)
            if text_rows:
                texts = self._encode_texts(text_rows, outputs="cls")
                self._read_alone(text_rows, texts, self._model.text_embeds)
            if not pair_rows:
                return

            # Pairs are fused by what is computed of them.
            images = self._encode_images(pair_rows)
            texts = self._encode_texts(pair_rows)
            for inputs, rows in grouped(pair_rows, self._head_inputs).items():
                image = images.select(rows)
                text = texts.select(rows)
                if inputs == "score":
                    self._copy(rows, self._scores(image, text))
                elif inputs == "fill_mask":
                    self._fill_masks(rows, engine.fuse(image, text, "text").text)
                else:
                    pooled = engine.fuse(image, text, "pooled").pooled
                    if inputs == "pooled_pair":
                        images_2 = self._encode_images(rows, are_second=True)
                        pooled_2 = engine.fuse(images_2.select(rows), text, "pooled").pooled
                        pooled = torch.cat([pooled, pooled_2], dim=-1)
                    self._read_pooled(rows, pooled)

    def outcomes(self) -> list[Outcome]:
        """Waits for the results, and returns one for each item."""
        if self._copied is not None:
            self._copied.synchronize()
        with self._mode():
            for rows, results in self._copies:
                values = _finite(results)
                outcomes = values.tolist() if values.ndim == 1 else values
                for row, outcome in zip(rows, outcomes, strict=True):
                    self._outcomes[row] = outcome
        return self._outcomes

    def _encode_images(
        self, rows: list[int], *, outputs: EncodeOutputs = "layers", are_second: bool = False
    ) -> _EncodedRows:
        items = [self._items[row] for row in rows]
        pixels, index = _distinct(
            [item.image_2 if are_second else item.image for item in items], id
        )
        token_type = SECOND_IMAGE if are_second else IMAGE
        encoded = encoded_images(self._engine, self._processor, pixels, outputs, token_type)
        if outputs == "layers":
            encoded = self._engine.cache_image(encoded)
        return _EncodedRows(encoded, dict(zip(rows, index, strict=True)))

    def _encode_texts(self, rows: list[int], *, outputs: EncodeOutputs = "layers") -> _EncodedRows:
        ids, index = _distinct([self._items[row].ids for row in rows], tuple)
        encoded = encoded_texts(self._engine, self._processor, ids, outputs)
        if outputs == "layers":
            encoded = self._engine.cache_text(encoded)
        return _EncodedRows(encoded, dict(zip(rows, index, strict=True)))

    def _read_alone(
        self,
        rows: list[int],
        inputs: _EncodedRows,
        embed: Callable[[Encoded], Float[Tensor, "b c"]],
    ) -> None:
        for head, head_rows in grouped(rows, lambda row: self._items[row].head).items():
            encoded = inputs.select(head_rows)
            if head:
                self._copy(head_rows, self._predict(head, encoded.cls))
            else:
                self._copy(head_rows, unit_length(embed(encoded)))

    def _head_inputs(self, row: int) -> str:
        """Returns a name that items share which are fused together."""
        item = self._items[row]
        if item.kind == "prediction":
            return self._model.extensions.head_specs[item.head].inputs
        return "pooled" if item.kind in ("embedding", "match") else item.kind

    def _scores(self, image: Encoded, text: Encoded) -> Float[Tensor, "n s"]:
        """Returns log-odds of a match and cosines, as far as the model has the heads."""
        model = self._model
        scores = list[Tensor]()
        if model.itm_head is not None:
            pooled = self._engine.fuse(image, text, "pooled").pooled
            scores.append(log_odds(model.itm_logits(pooled)))
        if model.itc_head is not None:
            image_vectors = unit_length(model.image_embeds(image))
            text_vectors = unit_length(model.text_embeds(text))
            scores.append((image_vectors * text_vectors).sum(dim=1))
        return torch.stack(scores, dim=1)

    def _read_pooled(self, rows: list[int], pooled: Float[Tensor, "b e"]) -> None:
        items = [self._items[row] for row in rows]
        positions_by_head = grouped(
            range(len(rows)), lambda position: (items[position].kind, items[position].head)
        )
        for (kind, head), positions in positions_by_head.items():
            features = pooled
            if len(positions) < len(rows):
                features = pooled[to_device(torch.tensor(positions), self._engine.device)]
            if kind == "embedding":
                results = unit_length(self._model.pair_embeds(features))
            elif kind == "match":
                results = log_odds(self._model.itm_logits(features))
            else:
                results = self._predict(head, features)
            self._copy([rows[position] for position in positions], results)

    def _predict(self, head: str, features: Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        logits = self._model.head(head)(features).float().reshape(len(features), -1)
        return predictions(logits, self._model.head_outputs(head))

    def _copy(self, rows: list[int], results: Tensor) -> None:
        """Queues a copy of results to the host."""
        device = self._engine.device
        copy = results.to("cpu", non_blocking=device.type not in ("cpu", "mps"))
        self._copies.append((rows, copy))
        if device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    def _fill_masks(self, rows: list[int], hidden: Float[Tensor, "n l d"]) -> None:
        """Computes the likeliest tokens at each mask."""
        items = [self._items[row] for row in rows]
        input_ids = self._processor.pad([item.ids or () for item in items]).input_ids
        is_mask = input_ids == self._processor.mask_token_id
        row_index, column_index = is_mask.nonzero(as_tuple=True)
        device = hidden.device
        at_masks = hidden[to_device(row_index, device), to_device(column_index, device)]
        top = max(item.top for item in items)
        ids = []
        probabilities = []
        for states in at_masks.split(_MASKS):
            logits = self._model.mlm_logits(states).float().cpu()
            likeliest = _finite(logits.softmax(dim=-1)).topk(min(top, logits.shape[-1]))
            ids.append(likeliest.indices)
            probabilities.append(likeliest.values)
        counts = is_mask.sum(dim=1).tolist()
        ids_by_row = torch.cat(ids).split(counts)
        probabilities_by_row = torch.cat(probabilities).split(counts)
        for row, item, *tokens in zip(rows, items, ids_by_row, probabilities_by_row, strict=True):
            self._outcomes[row] = LikeliestTokens(*(values[:, : item.top] for values in tokens))


def decoded(
    processor: Processor,
    images: Sequence[ImageLike],
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[Pixels]:
    """Yields resized images, decoded batch by batch. An object that comes again in a batch is decoded once.

    Without workers, threads decode what comes next while a GPU computes. A CPU has its cores for computing.
    """
    numbered = list(enumerate(images))
    batches = [
        _distinct(numbered[start : start + batch_size], lambda item: id(item[1]))
        for start in range(0, len(images), batch_size)
    ]
    different = [items for items, _ in batches]
    resize = partial(_fetch_and_resize, processor)
    if num_workers or device.type == "cpu":
        opened: Iterable[Iterable[Pixels]] = loaded(resize, different, num_workers=num_workers)
    else:
        opened = _ahead(resize, different)
    for (_, index), pixels in zip(batches, opened, strict=True):
        rows = list(pixels)  # one object for each image
        yield from (rows[number] for number in index)


def _ahead(
    load: Callable[[_Value], _Result], batches: Iterable[Sequence[_Value]]
) -> Iterator[list[_Result]]:
    """Loads batches in threads, one batch ahead of what is read."""
    with ThreadPoolExecutor(available_cores()) as pool:
        begun = ([pool.submit(load, value) for value in batch] for batch in batches)
        waiting = deque(islice(begun, 2))
        while waiting:
            yield [future.result() for future in waiting.popleft()]
            waiting.extend(islice(begun, 1))


def _fetch_and_resize(processor: Processor, numbered: tuple[int, ImageLike]) -> Pixels:
    number, image = numbered
    return processor.resize_numbered((number, fetched(image)))


def fetched(image: ImageLike) -> ImageLike:
    """Returns the bytes of an image at a URL, with the patience of a caller who waits, or other images as they are."""
    if isinstance(image, str) and is_url(image):
        return read_location(image, patience=BRIEF)
    return image


def encoded_images(
    engine: Engine,
    processor: Processor,
    pixels: Sequence[Pixels],
    outputs: EncodeOutputs = "layers",
    token_type: int = IMAGE,
) -> Encoded:
    """Encodes resized images. A GPU gets their bytes, a quarter of the normalised numbers, and normalises them."""
    values = processor.normalise(to_device(torch.stack(list(pixels)), engine.device))
    return engine.encode_image(values, token_type, outputs=outputs)


def encoded_texts(
    engine: BridgeTower | Engine,
    processor: Processor,
    ids: Sequence[Sequence[int]],
    outputs: EncodeOutputs = "layers",
) -> Encoded:
    input_ids, mask = processor.pad(ids)
    mask = None if mask is None else to_device(mask, engine.device)
    return engine.encode_text(to_device(input_ids, engine.device), mask, outputs=outputs)


def score_pairs(
    engine: BridgeTower | Engine,
    head: Callable[[Float[Tensor, "b e"]], Float[Tensor, "b k"]],
    image: Encoded,
    text_of: Callable[[tuple[int, ...]], Encoded],
    image_rows: Int[Tensor, " n"],
    text_rows: Int[Tensor, " n"],
    *,
    batch_size: int,
) -> Iterator[Float[Tensor, "b k"]]:
    """Yields a head's outputs of pairs that are sorted by text. Each text is encoded once, by `text_of`."""
    for texts in text_rows.unique().split(batch_size):
        text = text_of(tuple(texts.tolist()))
        pairs = torch.isin(text_rows, texts)
        index = torch.searchsorted(texts, text_rows[pairs])
        rows = torch.stack([image_rows[pairs], index])
        for batch in rows.split(batch_size, dim=1):
            image_index, text_index = to_device(batch, image.cls.device)
            yield head(engine.fuse(image[image_index], text[text_index]).pooled)


def encoded_bytes(model: BridgeTower, tower: Literal["vision", "text"], num_tokens: int) -> int:
    """Returns the memory that an encoding of so many tokens takes, with its first-layer cache."""
    fusion = model.config.fusion
    widths = fusion.num_tower_layers(tower) + 4  # the cache has the fusion width four times
    return widths * fusion.hidden_size * num_tokens * next(model.parameters()).element_size()


def log_odds(logits: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    return logits.float().diff(dim=1)[:, 0]


def two_stage_order(
    cosine: Float[Tensor, "*q n"], scores: Float[Tensor, "*q n"]
) -> Int[Tensor, "*q n"]:
    """Ranks items in two stages: candidates by their score, then those without one (NaN) by cosine."""
    by_cosine = cosine.argsort(dim=-1, descending=True, stable=True)
    scores = scores.nan_to_num(nan=-torch.inf).gather(-1, by_cosine)
    return by_cosine.gather(-1, scores.argsort(dim=-1, descending=True, stable=True))


def choices(
    probabilities: Float[Tensor, "n k"], names: Sequence[str], top: int | None = None
) -> list[list[Choice]]:
    """Returns the `top` likeliest classes of each row, or all of them, likeliest first."""
    best = probabilities.topk(min(top or len(names), probabilities.shape[-1]))
    return [
        [Choice(names[index], probability) for index, probability in row]
        for row in map(zip, best.indices.tolist(), best.values.tolist())
    ]


def filled_words(processor: Processor, tokens: LikeliestTokens) -> list[list[FilledWord]]:
    return [
        [FilledWord(processor.word(token), probability) for token, probability in row]
        for row in map(zip, tokens.ids.tolist(), tokens.probabilities.tolist())
    ]


def l2_normalize(vectors: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Returns a model's vectors at length one, in float32 on the CPU."""
    return _finite(unit_length(vectors).cpu())


def unit_length(vectors: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    return F.normalize(vectors.float(), dim=-1)


def matched(logits: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """Returns the log-odds of a match, in float32 on the CPU. `Reranking.match` makes numbers to show."""
    return _finite(log_odds(logits).cpu())


def batched(values: Iterable[_Value], size: int) -> Iterator[list[_Value]]:
    remaining = iter(values)
    return iter(lambda: list(islice(remaining, size)), [])


def split_rows(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def grouped(values: Iterable[_Value], key: Callable[[_Value], _Key]) -> dict[_Key, list[_Value]]:
    """Returns the values of each key, in the order in which keys first appear."""
    groups: dict[_Key, list[_Value]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return groups


def _finite(results: Tensor) -> Tensor:
    if not results.isfinite().all():
        raise FloatingPointError(
            "the model gives NaN; its weights or settings are damaged, or too large for fp16 or bf16"
        )
    return results


def _distinct(values: Iterable[Any], key: Callable[[Any], Hashable]) -> tuple[list[Any], list[int]]:
    """Returns the first value of each key, and for each value its index among them."""
    different: list[Any] = []
    index: dict[Hashable, int] = {}
    positions = []
    for value in values:
        position = index.setdefault(key(value), len(different))
        if position == len(different):
            different.append(value)
        positions.append(position)
    return different, positions


def prompts_of(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns each label in all templates."""
    if len(labels) < 2 or not all(label.strip() for label in labels):
        raise ValueError(f"labels are {labels!r}; expected two or more, none empty")
    repeated = sorted(label for label, count in Counter(labels).items() if count > 1)
    if repeated:
        raise ValueError(f"labels has {repeated[0]!r} twice; expected different ones")
    if not templates:
        raise ValueError(f"templates are {templates!r}; expected a list of one or more")
    for template in templates:
        count = template.count("{}")
        if count != 1:
            raise ValueError(
                f"template {template!r} has {count} places for a label; expected one {{}}"
            )
    return [template.replace("{}", label) for label in labels for template in templates]


def label_choices(
    model: BridgeTower,
    images: Float[Tensor, "n c"],
    prompts: Float[Tensor, "p c"],
    labels: Sequence[str],
    top: int | None = None,
) -> list[list[Choice]]:
    """Returns the likeliest labels of every image. The probabilities of all labels of an image sum to one."""
    scale = float(model.head("itc").logit_scale())
    logits = scale * images @ label_vectors(prompts, len(labels)).T
    return choices(logits.softmax(dim=-1), labels, top)


def label_vectors(prompts: Float[Tensor, "p c"], num_labels: int) -> Float[Tensor, "k c"]:
    """Returns the vectors of labels, each the mean over its templates at length one, as in CLIP."""
    return l2_normalize(prompts.unflatten(0, (num_labels, -1)).mean(dim=1))
