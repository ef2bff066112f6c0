"""Image-text retrieval: contrastive recall, then matching of the candidates, in parts that outlast a kill."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.checkpoints import ITC_WEIGHT, UNMEASURED, Reranking
from bridgetower.checkpoints.checkpoint import exact_fingerprint, fingerprint
from bridgetower.checkpoints.tensors import read_safetensors, write_safetensors
from bridgetower.data.batch import Batch
from bridgetower.data.captions import CaptionImages
from bridgetower.data.examples import PreparedImages
from bridgetower.distributed import barrier, gather_by_id, rank, world_size
from bridgetower.evaluation.config import DEFAULTS, EvaluationOptions, Judgement, RetrievalConfig
from bridgetower.evaluation.metrics import (
    Candidates,
    GroundTruth,
    RetrievalRecalls,
    candidate_pairs,
    chance_recalls,
    streamed_recalls,
)
from bridgetower.files import locked, remove_leftovers
from bridgetower.inference import encoded_texts, image_bytes, log_odds, score_pairs, split_rows, two_stage_order
from bridgetower.model.bridgetower import BridgeTower, EncodeOutputs
from bridgetower.model.fusion import Encoded
from bridgetower.objectives.losses import similarity
from bridgetower.processor import load_items
from bridgetower.progress import count_bars, counted

_LOG = logging.getLogger(__name__)

PAIRS_PER_PART = 4096
"""About how many pairs are scored before their scores are kept."""

_PART_BYTES = 2**26
"""About the most that the encodings of the images of a part take."""


def ranked_texts(images: CaptionImages, config: RetrievalConfig) -> tuple[list[str], GroundTruth]:
    """Returns the captions that are ranked, and whose they are: images with the same share them, except in folds."""
    if config.fold_size is not None and len(images) % config.fold_size:
        raise ValueError(f"{len(images)} images do not split into folds of {config.fold_size}; expected a multiple")
    owners = images.owners() if config.fold_size is None else torch.arange(len(images))
    texts, text_image_index = images.texts(config.max_captions, owners)
    return texts, GroundTruth(text_image_index, owners)


class PairScorer:
    """Scores pairs of images and texts; the processes of a run share the images, all or those of some numbers.

    Every image is encoded once for its vector and once more for its pairs, and texts with every batch of pairs, so
    that no encoding is kept for longer than a part of the images takes.
    """

    def __init__(
        self,
        model: BridgeTower,
        images: PreparedImages,
        texts: Sequence[str],
        config: RetrievalConfig,
        options: EvaluationOptions,
        numbers: Int[Tensor, " i"] | None = None,
    ) -> None:
        self.model, self.images, self.config, self.options = model, images, config, options
        self.folder: Path | None = None
        self._device = next(model.parameters()).device
        self._numbers = torch.arange(len(images)) if numbers is None else numbers
        ids = images.processor.token_ids(texts, truncate=True)
        order = sorted(range(len(ids)), key=lambda text: len(ids[text]))  # short texts first, so that little is padded
        self.ids = [ids[text] for text in order]
        self._place = torch.tensor(order).argsort()
        self._own = torch.arange(len(self._numbers))[rank() :: world_size()]
        self._shown = options.progress and rank() == 0

    def vectors(self) -> tuple[Float[Tensor, "i c"], Float[Tensor, "t c"]]:
        model, size, shown = self.model, self.config.batch_size, self._shown
        batches, rows = split_rows(range(len(self._own)), size), split_rows(range(len(self.ids)), size)
        images = counted(self._encode_images(batches, "cls"), "image batches", shown=shown, total=len(batches))
        places = counted(rows, "text batches", shown=shown)
        vectors = {
            "images": (model.image_embeds(image) for image in images),
            "texts": (model.text_embeds(self._encode_texts(each, outputs="cls")) for each in places),  # short first
        }
        none = torch.empty(0, model.config.heads.itc_size)  # a process may have no images
        found = []
        for name, computed in vectors.items():
            kept = self._read(f"vectors-{name}")
            if kept is None:
                kept = torch.cat([none, *(each.float().cpu() for each in computed)])
                self._keep(f"vectors-{name}", kept)
            found.append(kept)
        return gather_by_id(self._own, found[0])[1], found[1][self._place]

    def score(
        self, image: Int[Tensor, " n"], text: Int[Tensor, " n"], head: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """Returns the log-odds of a match of pairs, with protocol `paper` its logit, and whether they are accepted."""
        own = (image % world_size() == rank()).nonzero().squeeze(1)
        rows, texts, count = image[own] // world_size(), text[own], len(self._own)
        size = max(1, min(_PART_BYTES // image_bytes(self.model), PAIRS_PER_PART * count // max(1, len(own))))
        parts = split_rows(range(count), size)
        starts = torch.searchsorted(rows, torch.tensor([0, *(part.stop for part in parts)])).tolist()
        digest = hashlib.sha256(torch.stack([rows, texts]).numpy().data).hexdigest()[:8]
        names = [f"scores-{digest}-{number:05d}" for number in range(len(parts))]
        kept = [self._read(name) for name in names]
        # The encodings of the images of a part, part by part; workers decode ahead of it.
        batches = [
            split_rows(part, self.config.batch_size) for part, logits in zip(parts, kept, strict=True) if logits is None
        ]
        images = map(self.model.cache_image, self._encode_images(list(chain.from_iterable(batches))))
        encoded = (Encoded.cat(list(islice(images, len(each)))) for each in batches)
        match, accepted = torch.empty(len(own)), torch.empty(len(own), dtype=torch.bool)
        with count_bars(shown=self._shown) as bars:
            bar = bars.add_task("pairs", total=len(own))
            for name, logits, part, start, end in zip(names, kept, parts, starts, starts[1:], strict=False):
                if logits is None:
                    numbers = torch.stack([rows[start:end] - part.start, self._place[texts[start:end]]], dim=1)
                    advance = partial(bars.advance, bar)
                    logits = self._score_part(next(encoded), numbers, head or self.model.itm_logits, advance)
                    self._keep(name, logits)
                odds = log_odds(logits)
                match[start:end] = logits[:, 1] if self.config.protocol == "paper" else odds
                accepted[start:end] = odds > 0
                bars.update(bar, completed=end)
        _, match, accepted = gather_by_id(own, match, accepted)
        return match, accepted

    def _score_part(
        self,
        image: Encoded,
        pairs: Int[Tensor, "n 2"],
        head: Callable[[Tensor], Tensor],
        advance: Callable[[int], object],
    ) -> Float[Tensor, "n 2"]:
        order, found = pairs[:, 1].argsort(stable=True), list[Tensor]()

        def text_of(places: Sequence[int]) -> Encoded:
            return self.model.cache_text(self._encode_texts(places))

        size = self.config.batch_size
        for scores in score_pairs(self.model, head, image, text_of, pairs[order], batch_size=size):
            found.append(scores.float())
            advance(len(scores))
        logits = torch.cat(found).cpu()[order.argsort()]  # a GPU is waited for once
        if bool(logits.isnan().any()):
            raise ValueError(f"{int(logits.isnan().any(dim=1).sum())} of {len(logits)} pairs have a score that is NaN")
        return logits

    def _encode_images(self, batches: Sequence[range], outputs: EncodeOutputs = "layers") -> Iterator[Encoded]:
        images, workers = self.images, self.options.num_workers
        numbers = [self._numbers[self._own[list(rows)]].tolist() for rows in batches]
        loader: Iterator[Batch] = load_items(images.batch, numbers, num_workers=workers, device=self._device)
        for batch in loader:
            moved = images.on_device(batch, self._device)
            yield self.model.encode_image(moved.pixel_values, outputs=outputs, states=moved.image_states)

    def _encode_texts(self, places: Sequence[int], outputs: EncodeOutputs = "layers") -> Encoded:
        return encoded_texts(self.model, self.images.processor, [self.ids[place] for place in places], outputs)

    def _read(self, name: str) -> Tensor | None:
        """Returns a result from its file; None where there is none, or a damaged one."""
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").exists():
            return None
        try:
            return read_safetensors(path)["values"]
        except ValueError as error:
            _LOG.warning(f"what {path} held is computed again ({error})")
            return None

    def _keep(self, name: str, values: Tensor) -> None:
        if self.folder is not None:
            write_safetensors(self.folder / f"{name}.safetensors", {"values": values})


@contextmanager
def resumable(scorer: PairScorer) -> Iterator[PairScorer]:
    """Lets scores be kept in `options.work`; they are removed at the end, unless that comes by an error."""
    model, images, options = scorer.model, scorer.images, scorer.options
    if options.work is None:
        yield scorer
        barrier()
        return
    decisive = {  # all that decides the scores
        "weights": exact_fingerprint(model.state_dict()),
        "preprocessing": fingerprint(model.config, {}, images.processor),
        "data": images.digests(),
        "texts": hashlib.sha256(json.dumps(scorer.ids).encode()).hexdigest(),
        "settings": asdict(scorer.config),
        "processes": world_size(),
        "half precision": torch.is_autocast_enabled(next(model.parameters()).device.type),
    }
    path = options.work / hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    @contextmanager
    def removed_at_the_end() -> Iterator[None]:
        with locked(path):
            yield
            shutil.rmtree(path)

    with ExitStack() as stack:
        if rank() == 0:
            (options.until_written or stack).enter_context(removed_at_the_end())
        folder = path / f"process-{rank()}"
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        scorer.folder = folder
        yield scorer
        barrier()


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Scores and recalls of one model on one set; what matching gives is None without a matching head."""

    image_vectors: Float[Tensor, "i c"]  # contrastive, of length one
    text_vectors: Float[Tensor, "t c"]  # the same of the texts that are ranked
    truth: GroundTruth
    recalls: Mapping[str, RetrievalRecalls]  # by stage: itc; of candidates by matching and by both scores; chance
    candidates: Candidates | None = None  # the pairs that were matched, and their scores
    reranking: Reranking | None = None  # with which they were ranked; None with protocol `paper`
    ece: float | None = None  # expected calibration error of `Reranking.match` on candidates of texts; None likewise
    itm_accuracy: float | None = None  # of each text with its own image and with a random other one

    def metrics(self) -> dict[str, float]:
        """Flat metrics: recalls `itc_…`, `matching_…`, `two_stage_…` and `chance_…`, the others, the last `rsum`."""
        metrics: dict[str, float] = {}
        for stage, recalls in self.recalls.items():
            metrics |= recalls.named(stage)
        weight = None if self.reranking is None else self.reranking.itc_weight
        others = {ITC_WEIGHT: weight, "ece": self.ece, "itm_accuracy": self.itm_accuracy}
        metrics |= {name: value for name, value in others.items() if value is not None}
        return metrics | {"rsum": self.recalls.get("two_stage", self.recalls["itc"]).rsum}


@torch.inference_mode()
def evaluate_retrieval(
    model: BridgeTower,
    images: CaptionImages,
    config: RetrievalConfig,
    options: EvaluationOptions = DEFAULTS,
    *,
    reranking: Reranking | None = UNMEASURED,
) -> RetrievalResult:
    """Ranks all images for every caption and all captions for every image, or those of its fold.

    Images with the same captions count as one thing: their texts are ranked once, and each of them is right for these;
    not so with folds. Images are shared out over the processes of a distributed run; every process gets the same
    result.
    """
    model.head("itc")
    texts, truth = ranked_texts(images, config)
    with resumable(PairScorer(model, images, texts, config, options)) as scorer:
        image_vectors, text_vectors = scorer.vectors()

        def cosines(rows: slice, texts: Int[Tensor, " b"]) -> Float[Tensor, "r b"]:
            return similarity(image_vectors[rows], text_vectors[texts], torch.ones(()))

        second: dict[str, Any] = {}
        recalls: dict[str, RetrievalRecalls] = {}
        if model.itm_head is not None and config.candidates:
            controls, count = _control_pairs(truth), len(truth.text_image_index)
            pairs = candidate_pairs(cosines, truth, config, others=controls)
            match, accepted = scorer.score(pairs.image, pairs.text)
            candidates = replace(pairs, itm=match)
            is_control = torch.isin(pairs.image * count + pairs.text, controls[0] * count + controls[1])
            matched = (accepted == pairs.belong)[is_control].double().mean().item()
            second = {"candidates": candidates, "itm_accuracy": matched}
            recalls = dict.fromkeys(("matching", "two_stage"), candidates.recalls())
            if config.protocol == "standard":
                used = candidates.fitted() if reranking is None else reranking
                second |= {"reranking": used, "ece": candidates.error(used)}
                if used.itc_weight:
                    recalls["two_stage"] = candidates.recalls(used.itc_weight)
    size = config.fold_size
    by_cosine, chance = streamed_recalls(cosines, truth, fold_size=size), chance_recalls(truth, fold_size=size)
    return RetrievalResult(
        image_vectors=image_vectors,
        text_vectors=text_vectors,
        truth=truth,
        recalls={"itc": by_cosine, **recalls, "chance": chance},
        **second,
    )


@torch.inference_mode()
def evaluate_matching(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, options: EvaluationOptions = DEFAULTS
) -> float:
    """Accuracy of matching on each caption with its own image and with a random other one (the same at every call)."""
    model.head("itm")
    texts, truth = ranked_texts(images, config)
    (index, owners), (image, text) = truth, _control_pairs(truth)
    with resumable(PairScorer(model, images, texts, config, options)) as scorer:
        _, accepted = scorer.score(image, text)
    return (accepted == (owners[image] == index[text])).double().mean().item()


@torch.inference_mode()
def evaluate_all_pairs(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, options: EvaluationOptions = DEFAULTS
) -> dict[str, float]:
    """Ranks all pairs, or those of each fold, by one score of the fusion encoder: retrieval without contrast."""
    if model.rank_head is None:
        model.head("itm")

    def logits(pooled: Tensor) -> Tensor:
        if model.rank_head is None:
            return model.itm_logits(pooled)
        scores = model.head("rank")(pooled)
        return torch.stack([torch.zeros_like(scores), scores], dim=1)  # as the logit of a match, against 0

    size = config.fold_size or len(images)
    texts, truth = ranked_texts(images, config)
    image, text = (torch.arange(len(images))[:, None] // size == truth.text_image_index // size).nonzero().unbind(1)
    with resumable(PairScorer(model, images, texts, config, options)) as scorer:
        scores, _ = scorer.score(image, text, logits)
    chosen, cosine = torch.ones_like(image, dtype=torch.bool), torch.full_like(scores, torch.nan)
    sides = {"image_side": chosen, "text_side": chosen}
    pairs = Candidates(image=image, text=text, cosine=cosine, truth=truth, config=config, itm=scores, **sides)
    one_stage, chance = pairs.recalls(), chance_recalls(truth, fold_size=config.fold_size)
    return one_stage.named("one_stage") | chance.named("chance") | {"rsum": one_stage.rsum}


def _control_pairs(truth: GroundTruth) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Each text with its own image and with one of other captions, drawn with a fixed seed, by image."""
    different, own = truth.text_image_index.unique(return_inverse=True)
    strangers = truth.text_image_index
    if len(different) > 1:
        shift = torch.randint(1, len(different), own.shape, generator=torch.Generator().manual_seed(0))
        strangers = different[(own + shift) % len(different)]
    image = torch.cat([truth.text_image_index, strangers])
    order = image.argsort(stable=True)
    return image[order], order % len(own)


Direction = Literal["text_to_image", "image_to_text"]


class Ranking(NamedTuple):
    """All items for a query: candidates by the score of the second stage, then the rest by cosine."""

    order: Int[Tensor, " m"]  # their rows, best first
    rank: int  # place of the best right answer, counted from 1
    itm: float | None  # matching score of the first item; None without a matching head


def rankings(result: RetrievalResult, direction: Direction, queries: Iterable[int]) -> Iterator[Ranking]:
    to_image, found = direction == "text_to_image", result.candidates
    images = result.image_vectors, result.truth.owners
    texts = result.text_vectors, result.truth.text_image_index
    (vectors, own), (others, owners) = (texts, images) if to_image else (images, texts)
    ends, items, scores, itm = [0] * len(vectors), torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0)
    if found is not None:
        of_query, of_item = (found.text, found.image) if to_image else (found.image, found.text)
        chosen = found.sides[to_image].nonzero().squeeze(1)
        chosen = chosen[of_query[chosen].argsort(stable=True)]
        ends = torch.bincount(of_query[chosen], minlength=len(vectors)).cumsum(0).tolist()
        weight = result.reranking.itc_weight if result.reranking else 0.0
        items, scores, itm = of_item[chosen], found.scores(weight)[chosen], found.itm[chosen]
    for query in queries:
        cosine = similarity(vectors[[query]], others, torch.ones(()))[0]
        listed = slice(ends[query - 1] if query else 0, ends[query])
        by_item = torch.full_like(cosine, torch.nan).index_put((items[listed],), scores[listed])
        order = two_stage_order(cosine, by_item)
        first = itm[listed][items[listed] == order[0]]
        yield Ranking(
            order=order,
            rank=int((owners[order] == own[query]).int().argmax()) + 1,
            itm=float(first) if len(first) else None,
        )


def retrieval_judgements(result: RetrievalResult, images: CaptionImages, texts: Sequence[str]) -> list[Judgement]:
    """Returns every text with the image that is found first; a miss is as bad as the right image is far behind."""
    reranking = result.reranking or UNMEASURED
    ranked = rankings(result, "text_to_image", range(len(texts)))
    captions, names = images.all_captions(), images.names(range(len(images)))
    return [
        Judgement(
            id=names[own],
            images=(own,),
            text=text,
            expected="first of all" if rank == 1 else f"image {rank} of {len(order)}",
            given=captions[int(order[0])][0],
            score=float(rank == 1),
            miss=float(rank - 1),
            probability=None if itm is None else float(reranking.match(torch.tensor(itm))),
            found=int(order[0]),
        )
        for text, own, (order, rank, itm) in zip(texts, result.truth.text_image_index.tolist(), ranked, strict=True)
    ]
