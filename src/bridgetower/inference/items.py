"""From inputs to results: items of every kind are encoded, fused and read by heads together, for every caller."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple, TypeVar

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

Kind = Literal["embedding", "match", "score", "fill_mask", "mask_probabilities", "prediction"]
Tokens = tuple[int, ...]
Pixels = UInt8[Tensor, "3 h w"]

TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "an image of a {}")

# Masks whose words are ranked at once: each has a row as long as the vocabulary.
_MASKS = 64

_Key = TypeVar("_Key", bound=Hashable)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class FilledWord:
    """A candidate for a masked word, as it would stand in the text; its probability is over the whole vocabulary."""

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
    """The likeliest tokens for each mask of a text, likeliest first; `filled_words` makes words of them."""

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
        ids: Of the text, with a mask for `fill_mask` and `mask_probabilities`. Equal ones are encoded once.
        top: Words per mask of `fill_mask`; classes of a prediction are chosen by `choices`.
    """

    kind: Kind = "embedding"
    head: str = ""
    image: Pixels | None = None
    image_2: Pixels | None = None
    ids: Tokens | None = None
    top: int = 1


def compute(
    engine: Engine, processor: Processor, items: Sequence[Item], *, gradients: bool = False
) -> list[Outcome]:
    """Computes items together, with each image and text encoded once; with `gradients` not in inference mode."""
    computation = Computation(engine, processor, items, gradients=gradients)
    computation.start()
    return computation.outcomes()


def compute_batches(
    engine: Engine, processor: Processor, batches: Iterable[Sequence[Item]]
) -> Iterator[list[Outcome]]:
    """Yields the outcomes of batches of items; a batch is read when a GPU has been given the next."""
    waiting = deque[Computation]()
    for items in batches:
        computation = Computation(engine, processor, items)
        computation.start()
        waiting.append(computation)
        if len(waiting) > 1:
            yield waiting.popleft().outcomes()
    for computation in waiting:
        yield computation.outcomes()


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
        # Rows of the items, results on the host, and which of the results each row has; None: one each.
        self._copies: list[tuple[list[int], Tensor, list[int] | None]] = []
        self._copied: torch.cuda.Event | None = None

    def start(self) -> None:
        """Encodes each image and text once, and fuses pairs by what is computed of them."""
        engine, items = self._engine, self._items
        with self._mode():
            self._start_alone()
            pair_rows = [
                row
                for row, item in enumerate(items)
                if item.ids is not None and item.image is not None
            ]
            if not pair_rows:
                return
            pixels, image_index = _distinct((items[row].image for row in pair_rows), id)
            ids, text_index = _distinct(items[row].ids for row in pair_rows)
            images = engine.cache_image(encoded_images(engine, self._processor, pixels))
            texts = engine.cache_text(encoded_texts(engine, self._processor, ids))
            groups = grouped(self._group_of(items[row]) for row in pair_rows)
            for group, positions in groups.items():
                rows = [pair_rows[position] for position in positions]
                image = _select(images, [image_index[position] for position in positions])
                text = _select(texts, [text_index[position] for position in positions])
                if group == "score":
                    self._copy(rows, self._scores(image, text))
                elif group in ("fill_mask", "mask_probabilities"):
                    self._read_masks(rows, engine.fuse(image, text, "text").text)
                else:
                    pooled = engine.fuse(image, text, "pooled").pooled
                    if group == "pooled_pair":
                        second = self._pooled_of_second_images(rows, text)
                        pooled = torch.cat([pooled, second], dim=-1)
                    self._read_pooled(rows, pooled)

    def outcomes(self) -> list[Outcome]:
        """Waits for the results, and returns one for each item."""
        if self._copied is not None:
            self._copied.synchronize()
        with self._mode():
            for rows, results, index in self._copies:
                values = _finite(results) if index is None else _finite(results)[index]
                self._set(rows, values.tolist() if values.ndim == 1 else values)
        return self._outcomes

    def _set(self, rows: list[int], outcomes: Iterable[Outcome]) -> None:
        for row, outcome in zip(rows, outcomes, strict=True):
            self._outcomes[row] = outcome

    def _copy(self, rows: list[int], results: Tensor, index: list[int] | None = None) -> None:
        """Queues a copy of results to the host."""
        device = self._engine.device
        copied = results.to("cpu", non_blocking=device.type not in ("cpu", "mps"))
        self._copies.append((rows, copied, index))
        if device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    def _start_alone(self) -> None:
        """Computes images and texts that are not fused, which needs the last CLS of a tower only."""
        items = self._items
        image_rows = [row for row, item in enumerate(items) if item.ids is None]
        if image_rows:
            pixels, index = _distinct((items[row].image for row in image_rows), id)
            image = encoded_images(self._engine, self._processor, pixels, "cls")
            self._read_alone(image_rows, index, image, self._model.image_embeds)
        text_rows = [row for row, item in enumerate(items) if item.image is None]
        if text_rows:
            ids, index = _distinct(items[row].ids for row in text_rows)
            text = encoded_texts(self._engine, self._processor, ids, "cls")
            self._read_alone(text_rows, index, text, self._model.text_embeds)

    def _read_alone(
        self,
        rows: list[int],
        index: list[int],
        encoded: Encoded,
        embed: Callable[[Encoded], Float[Tensor, "b c"]],
    ) -> None:
        for head, positions in grouped(self._items[row].head for row in rows).items():
            results = self._predict(head, encoded.cls) if head else unit_length(embed(encoded))
            self._copy(
                [rows[position] for position in positions],
                results,
                [index[position] for position in positions],
            )

    def _group_of(self, item: Item) -> str:
        """Returns a name that items share which are fused together."""
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

    def _pooled_of_second_images(self, rows: list[int], text: Encoded) -> Float[Tensor, "n e"]:
        engine = self._engine
        pixels, index = _distinct((self._items[row].image_2 for row in rows), id)
        encoded = encoded_images(engine, self._processor, pixels, token_type=SECOND_IMAGE)
        images_2 = engine.cache_image(encoded)
        return engine.fuse(_select(images_2, index), text, "pooled").pooled

    def _read_pooled(self, rows: list[int], pooled: Float[Tensor, "b e"]) -> None:
        readers = [(self._items[row].kind, self._items[row].head) for row in rows]
        for (kind, head), positions in grouped(readers).items():
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

    def _read_masks(self, rows: list[int], hidden: Float[Tensor, "n l d"]) -> None:
        """Computes the probabilities of words at each mask, or for `fill_mask` the likeliest tokens."""
        # Some masks at a time, whose rows are as long as the vocabulary.
        input_ids = self._processor.pad([self._items[row].ids or () for row in rows]).input_ids
        masked = input_ids == self._processor.mask_token_id
        row_index, column_index = (
            to_device(index, hidden.device) for index in masked.nonzero(as_tuple=True)
        )
        at_masks = hidden[row_index, column_index].split(_MASKS)
        logits = (self._model.mlm_logits(states).float().cpu() for states in at_masks)
        probabilities = (_finite(part.softmax(dim=-1)) for part in logits)
        counts: list[int] = masked.sum(dim=1).tolist()
        if self._items[rows[0]].kind == "mask_probabilities":
            self._set(rows, torch.cat(list(probabilities)).split(counts))
            return

        # The likeliest tokens at each mask.
        tops = [self._items[row].top for row in rows]
        ranked = [part.topk(min(max(tops), part.shape[-1])) for part in probabilities]
        values = torch.cat([part.values for part in ranked]).split(counts)
        token_ids = torch.cat([part.indices for part in ranked]).split(counts)
        for row, top, ids, likelihoods in zip(rows, tops, token_ids, values, strict=True):
            self._outcomes[row] = LikeliestTokens(ids[:, :top], likelihoods[:, :top])


def decoded(
    processor: Processor,
    images: Sequence[ImageLike],
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[Pixels]:
    """Yields resized images, which are decoded batch by batch; an object that a batch has several times, once.

    Without workers, threads decode what comes next while a GPU computes; a CPU has its cores for computing.
    """
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    different: list[dict[int, tuple[int, ImageLike]]] = [{} for _ in batches]
    for number, image in enumerate(images):
        different[number // batch_size].setdefault(id(image), (number, image))
    numbered = [list(each.values()) for each in different]
    resize = partial(_resized, processor)
    if num_workers or device.type == "cpu":
        opened: Iterable[Iterable[Pixels]] = loaded(resize, numbered, num_workers=num_workers)
    else:
        opened = _ahead(resize, numbered)
    for batch, keys, pixels in zip(batches, different, opened, strict=True):
        found = dict(zip(keys, pixels, strict=True))
        yield from (found[id(image)] for image in batch)


def _ahead(
    load: Callable[[_Key], _Result], batches: Iterable[Sequence[_Key]]
) -> Iterator[list[_Result]]:
    with ThreadPoolExecutor(available_cores()) as pool:
        begun = ([pool.submit(load, item) for item in batch] for batch in batches)
        waiting = deque(islice(begun, 2))
        while waiting:
            yield [item.result() for item in waiting.popleft()]
            waiting.extend(islice(begun, 1))


def _resized(processor: Processor, numbered: tuple[int, ImageLike]) -> Pixels:
    return processor.resize_numbered((numbered[0], fetched(numbered[1])))


def fetched(image: ImageLike) -> ImageLike:
    """Returns the bytes of an image at a URL, for somebody who waits; other images as they are."""
    return (
        read_location(image, patience=BRIEF) if isinstance(image, str) and is_url(image) else image
    )


def encoded_images(
    engine: Engine,
    processor: Processor,
    pixels: Sequence[Pixels],
    outputs: EncodeOutputs = "layers",
    token_type: int = IMAGE,
) -> Encoded:
    """Encodes resized images; a GPU gets their bytes, a quarter of the normalised numbers, and normalises them."""
    values = processor.normalise(to_device(torch.stack(list(pixels)), engine.device))
    return engine.encode_image(values, token_type, outputs=outputs)


def encoded_texts(
    encodes: BridgeTower | Engine,
    processor: Processor,
    ids: Sequence[Sequence[int]],
    outputs: EncodeOutputs = "layers",
) -> Encoded:
    input_ids, mask = processor.pad(ids)
    mask = None if mask is None else to_device(mask, encodes.device)
    return encodes.encode_text(to_device(input_ids, encodes.device), mask, outputs=outputs)


def _select(encoded: Encoded, rows: list[int]) -> Encoded:
    """Selects rows; all of them in their order need neither an index on the device nor a copy."""
    if rows == list(range(len(encoded))):
        return encoded
    return encoded[to_device(torch.tensor(rows), encoded.cls.device)]


def score_pairs(
    fuses: BridgeTower | Engine,
    head: Callable[[Float[Tensor, "b e"]], Float[Tensor, "b k"]],
    image: Encoded,
    text_of: Callable[[tuple[int, ...]], Encoded],
    pairs: Int[Tensor, "n 2"],
    *,
    batch_size: int,
) -> Iterator[Float[Tensor, "b k"]]:
    """Yields a head's outputs of (image, text) pairs that are sorted by text; each text is encoded once."""
    device = image.cls.device
    texts, text_rows = pairs[:, 1].unique(return_inverse=True)
    for block in split_rows(range(len(texts)), batch_size):
        text = text_of(tuple(texts[block.start : block.stop].tolist()))
        start, stop = torch.searchsorted(
            text_rows, torch.tensor([block.start, block.stop])
        ).tolist()
        rows = torch.stack([pairs[start:stop, 0], text_rows[start:stop] - block.start])
        for batch in rows.split(batch_size, dim=1):
            image_rows, rows_of_text = to_device(batch, device)
            yield head(fuses.fuse(image[image_rows], text[rows_of_text]).pooled)


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
    """Ranks items by two stages: the candidates by the score of the second one, then the rest by cosine."""
    by_cosine = cosine.argsort(dim=-1, descending=True, stable=True)
    scores = scores.nan_to_num(nan=-torch.inf).gather(-1, by_cosine)
    return by_cosine.gather(-1, scores.argsort(dim=-1, descending=True, stable=True))


def choices(
    probabilities: Float[Tensor, "n k"], names: Sequence[str], top: int | None = None
) -> list[list[Choice]]:
    best = probabilities.topk(min(top or len(names), probabilities.shape[-1]))
    return [
        [Choice(names[number], probability) for number, probability in row]
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
    """Returns the log-odds of a match, in float32 on the CPU; `Reranking.match` makes numbers to show."""
    return _finite(log_odds(logits).cpu())


def split_rows(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def grouped(keys: Iterable[_Key]) -> dict[_Key, list[int]]:
    """Returns the positions of each key, in the order in which keys first appear."""
    groups: dict[_Key, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return groups


def _finite(results: Tensor) -> Tensor:
    if not results.isfinite().all():
        raise FloatingPointError(
            "the model gives NaN; its weights or settings are damaged, or too large for fp16 or bf16"
        )
    return results


def _distinct(
    sources: Iterable[_Result | None], key: Callable[[_Result], Hashable] = lambda source: source
) -> tuple[list[_Result], list[int]]:
    """Returns the sources that differ by their key, and for each source its index among them."""
    present = [source for source in sources if source is not None]
    different = {key(source): source for source in present}
    index_of = {name: index for index, name in enumerate(different)}
    return list(different.values()), [index_of[key(source)] for source in present]


def prompts_of(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns the texts of labels: each in all templates, then the next."""
    if len(labels) < 2 or not all(label.strip() for label in labels):
        raise ValueError(f"labels are {labels!r}; expected two or more, none empty")
    if repeated := sorted(label for label, count in Counter(labels).items() if count > 1):
        raise ValueError(f"labels has {repeated[0]!r} twice; expected different ones")
    if not templates:
        raise ValueError(f"templates are {templates!r}; expected a list of one or more")
    if odd := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(
            f"template {odd[0]!r} has {odd[0].count('{}')} places for a label; expected one {{}}"
        )
    return [template.replace("{}", label) for label in labels for template in templates]


def label_choices(
    model: BridgeTower,
    images: Float[Tensor, "n c"],
    prompts: Float[Tensor, "p c"],
    labels: Sequence[str],
    top: int | None = None,
) -> list[list[Choice]]:
    """Returns the likeliest labels of every image; the probabilities of all labels of an image sum to one."""
    scale = float(model.head("itc").logit_scale())
    return choices(
        (scale * images @ label_vectors(prompts, len(labels)).T).softmax(dim=-1), labels, top
    )


def label_vectors(prompts: Float[Tensor, "p c"], num_labels: int) -> Float[Tensor, "k c"]:
    """Returns the vectors of labels, each the mean over its templates at length one, as CLIP's are."""
    return l2_normalize(prompts.unflatten(0, (num_labels, -1)).mean(dim=1))
