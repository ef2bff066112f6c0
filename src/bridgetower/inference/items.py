"""From inputs to results: items of every kind are encoded, fused and read by heads together, for every caller."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
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
from bridgetower.model.layers import to_device
from bridgetower.processor import ImageLike, Processor, loaded

Judging = Literal["answer", "entail", "reason", "classify"]
Kind = Literal["embedding", "match", "score", "fill_mask", "mask_probabilities"] | Judging

HEAD_OF: Mapping[str, str] = {
    "answer": "vqa",
    "entail": "snli_ve",
    "reason": "nlvr2",
    "classify": "classification",
}

Tokens = tuple[int, ...]
Pixels = UInt8[Tensor, "3 h w"]

TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "an image of a {}")

_APART = (
    "fill_mask",
    "mask_probabilities",
    "reason",
    "score",
)  # kinds that share no fusion with others
_MASKS = 64  # whose words are ranked at once: each has a row as long as the vocabulary

_Key = TypeVar("_Key", bound=Hashable)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class FilledWord:
    """A candidate for a masked word, as it would stand in the text; its probability is over the whole vocabulary."""

    word: str
    probability: float


@dataclass(frozen=True)
class Choice:
    """An answer or a judgement that the model can choose.

    Probabilities of answers, and of classes of which several may hold, are each on its own; elsewhere they sum to one.
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
    """One thing to be computed."""

    # An embedding is of the image, the text or both; every other kind takes both, and `reason` two images.
    kind: Kind = "embedding"
    # as `Processor.resize` returns it; one object in several items is encoded once
    image: Pixels | None = None
    image_2: Pixels | None = None  # the second one of `reason`
    # of the text, for `fill_mask` and `mask_probabilities` with a mask; equal ones once
    ids: Tokens | None = None
    top: int = 1  # words per mask of `fill_mask`; the best of a judgement are chosen by `choices`


def compute(engine: Engine, processor: Processor, items: Sequence[Item]) -> list[Outcome]:
    """Computes items together: what is fused in one run of each tower; what is embedded alone, of the last CLS only."""
    return begun(engine, processor, items).outcomes()


def compute_with_gradients(
    engine: Engine, processor: Processor, items: Sequence[Item]
) -> list[Outcome]:
    """Computes items as `compute` does, but not in inference mode."""
    batch: Begun = unwrap(begun)(engine, processor, items)
    return unwrap(Begun.outcomes)(batch)


def computed(
    engine: Engine, processor: Processor, batches: Iterable[Sequence[Item]]
) -> Iterator[list[Outcome]]:
    """Yields the outcomes of batches of items; those of one are read when a GPU has been given the next."""
    waiting = deque[Begun]()
    for items in batches:
        waiting.append(begun(engine, processor, items))
        if len(waiting) > 1:
            yield waiting.popleft().outcomes()
    for batch in waiting:
        yield batch.outcomes()


class Begun:
    """Items whose results are on their way from the device, and how outcomes are made of them."""

    def __init__(self, num_items: int, device: torch.device) -> None:
        self._outcomes: list[Outcome] = [0.0] * num_items
        self._device = device
        self._results: list[tuple[list[int], Tensor, Callable[[Tensor], Iterable[Outcome]]]] = []
        self._copied: torch.cuda.Event | None = None

    def set(self, rows: list[int], outcomes: Iterable[Outcome]) -> None:
        for row, outcome in zip(rows, outcomes, strict=True):
            self._outcomes[row] = outcome

    def add(
        self, rows: list[int], results: Tensor, read: Callable[[Tensor], Iterable[Outcome]]
    ) -> None:
        """Queues a copy of the results of items to the host."""
        copied = results.to("cpu", non_blocking=self._device.type not in ("cpu", "mps"))
        self._results.append((rows, copied, read))
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))

    @torch.inference_mode()
    def outcomes(self) -> list[Outcome]:
        if self._copied is not None:
            self._copied.synchronize()
        for rows, results, read in self._results:
            self.set(rows, read(results))
        return self._outcomes


@torch.inference_mode()
def begun(engine: Engine, processor: Processor, items: Sequence[Item]) -> Begun:
    """Runs the model on items, as `compute` does, without waiting for a GPU, but for words of masks."""
    model = engine.model
    batch = Begun(len(items), engine.device)
    image_rows = [row for row, item in enumerate(items) if item.ids is None]
    text_rows = [row for row, item in enumerate(items) if item.image is None]
    pairs = [
        row for row, item in enumerate(items) if item.ids is not None and item.image is not None
    ]

    # What is embedded alone.
    if image_rows:
        pixels, places = _distinct((items[row].image for row in image_rows), id)
        vectors = model.image_embeds(encoded_images(engine, processor, pixels, "cls"))
        batch.add(image_rows, unit_length(vectors), partial(_numbers_at, places))
    if text_rows:
        ids, places = _distinct(items[row].ids for row in text_rows)
        vectors = model.text_embeds(encoded_texts(engine, processor, ids, "cls"))
        batch.add(text_rows, unit_length(vectors), partial(_numbers_at, places))
    if not pairs:
        return batch

    # What is fused: each image and each text is encoded once, and shared by its pairs.
    pixels, image_places = _distinct((items[row].image for row in pairs), id)
    ids, text_places = _distinct(items[row].ids for row in pairs)
    image = engine.cache_image(encoded_images(engine, processor, pixels))
    text = engine.cache_text(encoded_texts(engine, processor, ids))
    runs: dict[str, list[int]] = {}  # places in `pairs` of what is fused together
    for place, row in enumerate(pairs):
        runs.setdefault(items[row].kind if items[row].kind in _APART else "pooled", []).append(
            place
        )
    for run, places in runs.items():
        rows = [pairs[place] for place in places]
        chosen_items = [items[row] for row in rows]
        images = _taken(image, [image_places[place] for place in places])
        texts = _taken(text, [text_places[place] for place in places])
        if run in ("fill_mask", "mask_probabilities"):
            batch.set(
                rows,
                _masks(model, processor, engine.fuse(images, texts, "text").text, chosen_items),
            )
            continue
        if run == "score":  # log-odds of a match and cosine, as far as the model has the heads
            scores = list[Tensor]()
            if model.itm_head is not None:
                scores.append(
                    log_odds(model.itm_logits(engine.fuse(images, texts, "pooled").pooled))
                )
            if model.itc_head is not None:
                vectors = unit_length(model.image_embeds(images))
                scores.append((vectors * unit_length(model.text_embeds(texts))).sum(dim=1))
            batch.add(rows, torch.stack(scores, dim=1), _numbers)
            continue
        pooled = engine.fuse(images, texts, "pooled").pooled
        if run == "reason":
            pixels, seconds = _distinct((item.image_2 for item in chosen_items), id)
            image_2 = engine.cache_image(
                encoded_images(engine, processor, pixels, token_type=SECOND_IMAGE)
            )
            second = engine.fuse(_taken(image_2, seconds), texts, "pooled").pooled
            pooled = torch.cat([pooled, second], dim=-1)
        for kind in dict.fromkeys(item.kind for item in chosen_items):
            numbers = [number for number, item in enumerate(chosen_items) if item.kind == kind]
            kind_rows = [rows[number] for number in numbers]
            pooled_of_kind = (
                pooled if len(numbers) == len(rows) else pooled[_index(engine, numbers)]
            )
            if kind == "embedding":
                batch.add(kind_rows, unit_length(model.pair_embeds(pooled_of_kind)), _numbers)
            elif kind == "match":
                odds = log_odds(model.itm_logits(pooled_of_kind))
                batch.add(kind_rows, odds, lambda results: _numbers(results).tolist())
            else:
                logits = model.head(HEAD_OF[kind])(pooled_of_kind).float()
                batch.add(kind_rows, logits, partial(_probabilities, model, kind))
    return batch


def _probabilities(
    model: BridgeTower, kind: str, logits: Float[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """Returns what the outputs of a head mean: probabilities, or a number."""
    heads = model.config.heads
    if heads.predicts_number(HEAD_OF[kind]):
        return _numbers(logits)
    if kind == "answer" or (kind == "classify" and heads.multi_label):
        return _numbers(logits.sigmoid())
    return _numbers(logits.softmax(dim=-1))


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


def _index(engine: Engine, rows: Sequence[int]) -> Int[Tensor, " n"]:
    return to_device(torch.tensor(rows), engine.device)


def _taken(encoded: Encoded, rows: list[int]) -> Encoded:
    """Selects rows; all of them in their order need neither an index on the device nor a copy."""
    if rows == list(range(len(encoded))):
        return encoded
    return encoded[to_device(torch.tensor(rows), encoded.cls.device)]


def _masks(
    model: BridgeTower, processor: Processor, hidden: Float[Tensor, "b l d"], items: Sequence[Item]
) -> Iterable[Outcome]:
    masked = processor.pad([item.ids or () for item in items]).input_ids == processor.mask_token_id
    counts: list[int] = masked.sum(dim=1).tolist()
    row_index, column_index = (
        to_device(index, hidden.device) for index in masked.nonzero(as_tuple=True)
    )
    chosen = hidden[row_index, column_index]
    parts = (
        _numbers(model.mlm_logits(part).float().cpu().softmax(dim=-1))
        for part in chosen.split(_MASKS)
    )
    if items[0].kind == "mask_probabilities":
        return torch.cat(list(parts)).split(counts)
    top = max(item.top for item in items)
    best = [part.topk(min(top, part.shape[-1])) for part in parts]
    probabilities = torch.cat([ranked.values for ranked in best]).split(counts)
    token_ids = torch.cat([ranked.indices for ranked in best]).split(counts)
    return [
        LikeliestTokens(ids[:, : item.top], likelihoods[:, : item.top])
        for item, ids, likelihoods in zip(items, token_ids, probabilities, strict=True)
    ]


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
    return _numbers(unit_length(vectors).cpu())


def unit_length(vectors: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    return F.normalize(vectors.float(), dim=-1)


def matched(logits: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """Returns the log-odds of a match, in float32 on the CPU; `Reranking.match` makes numbers to show."""
    return _numbers(log_odds(logits).cpu())


def split_rows(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def assembled(
    keys: Sequence[_Key], outcomes_of: Callable[[_Key, list[int]], Iterable[_Result]]
) -> list[_Result]:
    """Computes the rows of each key together, and puts what comes of them in order."""
    outcomes: dict[int, _Result] = {}
    for key in dict.fromkeys(keys):
        rows = [row for row, other in enumerate(keys) if other == key]
        outcomes.update(zip(rows, outcomes_of(key, rows), strict=True))
    return [outcomes[row] for row in range(len(keys))]


def _numbers(results: Tensor) -> Tensor:
    if not results.isfinite().all():
        raise FloatingPointError(
            "the model gives NaN; its weights or settings are damaged, or too large for fp16 or bf16"
        )
    return results


def _numbers_at(rows: list[int], results: Tensor) -> Tensor:
    return _numbers(results)[rows]


def _distinct(
    sources: Iterable[_Result | None], key: Callable[[_Result], Hashable] = lambda source: source
) -> tuple[list[_Result], list[int]]:
    present = [source for source in sources if source is not None]
    found = {key(source): source for source in present}
    numbers = {name: number for number, name in enumerate(found)}
    return list(found.values()), [numbers[key(source)] for source in present]


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
