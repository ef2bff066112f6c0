"""Image-text retrieval in two stages: contrastive vectors, then matching of the candidates."""

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
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.checkpoints import ITC_WEIGHT, UNMEASURED, Reranking
from bridgetower.checkpoints.checkpoint import exact_fingerprint, fingerprint
from bridgetower.checkpoints.tensors import read_safetensors, write_safetensors
from bridgetower.data.batches.batch import Batch
from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.batches.examples import PreparedImages
from bridgetower.distributed import barrier, gather_by_id, rank, world_size
from bridgetower.evaluation.config import DEFAULTS, EvaluationOptions, Judgement, RetrievalConfig
from bridgetower.evaluation.metrics import (
    Candidates,
    GroundTruth,
    PairIndex,
    PairMask,
    PairScores,
    RetrievalRecalls,
    ScoresOf,
    candidate_pairs,
    chance_recalls,
    streamed_recalls,
)
from bridgetower.files import locked, remove_leftovers
from bridgetower.inference.items import (
    encoded_bytes,
    encoded_texts,
    log_odds,
    score_pairs,
    split_rows,
    two_stage_order,
)
from bridgetower.model.bridgetower import BridgeTower, EncodeOutputs
from bridgetower.model.fusion import Encoded
from bridgetower.objectives.losses import similarity
from bridgetower.processor import load_items
from bridgetower.progress import count_bars, counted

_LOG = logging.getLogger(__name__)

PAIRS_PER_CHUNK = 4096
"""About how many pairs are scored before their scores are kept."""

_CHUNK_BYTES = 2**26
"""About the most that the encodings of the images of a chunk take."""


def ranked_texts(images: CaptionImages, config: RetrievalConfig) -> tuple[list[str], GroundTruth]:
    """Returns the captions that are ranked, and their images.

    Without folds, the captions of images with the same captions are ranked once.
    """
    if config.fold_size is not None and len(images) % config.fold_size:
        raise ValueError(
            f"{len(images)} images do not split into folds of {config.fold_size}; expected a multiple"
        )
    owners = torch.arange(len(images))
    if config.fold_size is None:
        owners = images.owners()
    texts, text_image_index = images.texts(config.max_captions, owners)
    return texts, GroundTruth(text_image_index, owners)


class PairScorer:
    """Scores pairs of images and texts. The processes of a run share the images.

    Every image is encoded once for its vector and once more for its pairs, and texts with every batch of pairs: no
    encoding is kept for longer than a chunk of the images takes. Vectors and the scores of a chunk are kept in a folder
    (see `resumable`), so that a killed evaluation continues.
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
        """Tokenises the texts.

        Args:
            texts: Texts of the pairs, which are cut if they are too long.
            numbers: Numbers of the images of the pairs in the set; None: all images.
        """
        self.model = model
        self.images = images
        self.config = config
        self.options = options
        self.folder: Path | None = None
        if numbers is None:
            numbers = torch.arange(len(images))
        self._numbers = numbers
        # Short texts come first, so that little is padded.
        ids = images.processor.token_ids(texts, truncate=True)
        by_length = sorted(range(len(ids)), key=lambda text: len(ids[text]))
        self.ids = [ids[text] for text in by_length]
        self._row_of_text = torch.tensor(by_length).argsort()
        self._local_images = torch.arange(len(self._numbers))[rank() :: world_size()]
        self._shows_progress = options.progress and rank() == 0

    def vectors(self) -> tuple[Float[Tensor, "i c"], Float[Tensor, "t c"]]:
        """Returns the contrastive vectors of all images and texts."""
        image_vectors = self._cached("vectors-images", self._local_image_vectors)
        text_vectors = self._cached("vectors-texts", self._text_vectors)
        _, all_image_vectors = gather_by_id(self._local_images, image_vectors)
        return all_image_vectors, text_vectors[self._row_of_text]

    def _local_image_vectors(self) -> Float[Tensor, "i c"]:
        batches = split_rows(range(len(self._local_images)), self.config.batch_size)
        encoded = counted(
            self._encode_images(batches, "cls"),
            "image batches",
            enabled=self._shows_progress,
            total=len(batches),
        )
        vectors = [torch.empty(0, self.model.config.heads.itc_size)]  # a process may have no images
        for image in encoded:
            vectors.append(self.model.image_embeds(image).float().cpu())
        return torch.cat(vectors)

    def _text_vectors(self) -> Float[Tensor, "t c"]:
        vectors = []
        batches = split_rows(range(len(self.ids)), self.config.batch_size)
        for rows in counted(batches, "text batches", enabled=self._shows_progress):
            text = self._encode_texts(rows, outputs="cls")
            vectors.append(self.model.text_embeds(text).float().cpu())
        return torch.cat(vectors)

    def score(
        self,
        image: PairIndex,
        text: PairIndex,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[PairScores, PairMask]:
        """Returns a score of each pair, and whether it is accepted.

        The score is the log-odds of a match, with protocol `paper` the logit of a match.

        Args:
            image: Image of each pair, in ascending order.
            text: Text of each pair.
            head: Gives the two logits of pooled outputs; None: the matching head.
        """
        is_local = image % world_size() == rank()
        local_pairs = is_local.nonzero().squeeze(1)
        image = image[local_pairs] // world_size()  # index among the local images
        text = text[local_pairs]
        chunks = self._chunks(image, text)
        unscored = [chunk for chunk in chunks if chunk.logits is None]
        encoded = self._encode_chunks(unscored)  # workers decode ahead of it

        is_paper = self.config.protocol == "paper"
        match = torch.empty(len(local_pairs))
        accepted = torch.empty(len(local_pairs), dtype=torch.bool)
        with count_bars(enabled=self._shows_progress) as bars:
            bar = bars.add_task("pairs", total=len(local_pairs))
            for chunk in chunks:
                pairs = chunk.pairs
                logits = chunk.logits
                if logits is None:
                    logits = self._score_chunk(
                        next(encoded),
                        image[pairs] - chunk.images.start,
                        self._row_of_text[text[pairs]],
                        head or self.model.itm_logits,
                        partial(bars.advance, bar),
                    )
                    self._write(chunk.name, logits)
                odds = log_odds(logits)
                match[pairs] = logits[:, 1] if is_paper else odds
                accepted[pairs] = odds > 0
                bars.update(bar, completed=pairs.stop)
        _, match, accepted = gather_by_id(local_pairs, match, accepted)
        return match, accepted

    def _chunks(self, image: PairIndex, text: PairIndex) -> list[_Chunk]:
        """Splits the local images so that neither the encodings nor the pairs of a chunk are too many."""
        num_images = len(self._local_images)
        image_bytes = encoded_bytes(self.model, "vision", self.model.config.vision.num_tokens)
        images_by_memory = _CHUNK_BYTES // image_bytes
        images_by_pairs = PAIRS_PER_CHUNK * num_images // max(1, len(image))
        size = max(1, min(images_by_memory, images_by_pairs))
        pairs = torch.stack([image, text])
        digest = hashlib.sha256(pairs.numpy().data).hexdigest()[:8]
        chunks = []
        for number, images in enumerate(split_rows(range(num_images), size)):
            ends = torch.tensor([images.start, images.stop])
            start, stop = torch.searchsorted(image, ends).tolist()
            name = f"scores-{digest}-{number:05d}"
            chunks.append(_Chunk(name, images, slice(start, stop), self._read(name)))
        return chunks

    def _encode_chunks(self, chunks: Sequence[_Chunk]) -> Iterator[Encoded]:
        batches_of_chunks = [split_rows(chunk.images, self.config.batch_size) for chunk in chunks]
        batches = list(chain.from_iterable(batches_of_chunks))
        images = map(self.model.cache_image, self._encode_images(batches))
        for chunk_batches in batches_of_chunks:
            yield Encoded.cat(list(islice(images, len(chunk_batches))))

    def _score_chunk(
        self,
        image: Encoded,
        image_rows: PairIndex,
        text_rows: PairIndex,
        head: Callable[[Tensor], Tensor],
        advance: Callable[[int], object],
    ) -> Float[Tensor, "n 2"]:
        """Returns the logits of pairs of images and rows of texts."""

        def text_of(rows: Sequence[int]) -> Encoded:
            return self.model.cache_text(self._encode_texts(rows))

        by_text = text_rows.argsort(stable=True)
        scores = score_pairs(
            self.model,
            head,
            image,
            text_of,
            image_rows[by_text],
            text_rows[by_text],
            batch_size=self.config.batch_size,
        )
        blocks = []
        for block in scores:
            blocks.append(block.float())
            advance(len(block))
        logits = torch.cat(blocks).cpu()[by_text.argsort()]  # waits for a GPU once
        num_nan = int(logits.isnan().any(dim=1).sum())
        if num_nan:
            raise ValueError(f"{num_nan} of {len(logits)} pairs have a score that is NaN")
        return logits

    def _encode_images(
        self, batches: Sequence[range], outputs: EncodeOutputs = "layers"
    ) -> Iterator[Encoded]:
        local_numbers = self._numbers[self._local_images]
        numbers = [local_numbers[list(rows)].tolist() for rows in batches]
        device = self.model.device
        workers = self.options.num_workers
        batches_of_images: Iterator[Batch] = load_items(
            self.images.batch, numbers, num_workers=workers, device=device
        )
        for batch in batches_of_images:
            batch = self.images.on_device(batch, device)
            yield self.model.encode_image(
                batch.pixel_values, outputs=outputs, states=batch.image_states
            )

    def _encode_texts(self, rows: Sequence[int], outputs: EncodeOutputs = "layers") -> Encoded:
        ids = [self.ids[row] for row in rows]
        return encoded_texts(self.model, self.images.processor, ids, outputs)

    def _cached(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Returns a result from its file, or computes and writes it."""
        values = self._read(name)
        if values is None:
            values = compute()
            self._write(name, values)
        return values

    def _read(self, name: str) -> Tensor | None:
        """Returns a result from its file, or None if there is none or it is damaged."""
        if self.folder is None:
            return None
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            return read_safetensors(path)["values"]
        except ValueError as error:
            _LOG.warning(f"{path} is damaged and its values are computed again ({error})")
            return None

    def _write(self, name: str, values: Tensor) -> None:
        if self.folder is not None:
            write_safetensors(self.folder / f"{name}.safetensors", {"values": values})


class _Chunk(NamedTuple):
    """Images whose pairs are scored together."""

    name: str  # of the file that its scores are kept in
    images: range  # among the local ones
    pairs: slice  # among the local ones
    logits: Float[Tensor, "n 2"] | None  # from an earlier attempt


@contextmanager
def resumable(scorer: PairScorer) -> Iterator[PairScorer]:
    """Keeps scores in `options.work` until the evaluation ends without an error."""
    model = scorer.model
    options = scorer.options
    if options.work is None:
        yield scorer
        barrier()
        return
    # The name of the folder depends on everything that decides the scores.
    conditions = {
        "weights": exact_fingerprint(model.state_dict()),
        "preprocessing": fingerprint(model.config, {}, scorer.images.processor),
        "data": scorer.images.digests(),
        "texts": _digest(scorer.ids),
        "settings": asdict(scorer.config),
        "processes": world_size(),
        "half precision": torch.is_autocast_enabled(model.device.type),
    }
    path = options.work / _digest(conditions)[:16]
    with ExitStack() as stack:
        if rank() == 0:
            until_written = options.until_written or stack
            until_written.enter_context(_removed_at_the_end(path))
        folder = path / f"process-{rank()}"
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        scorer.folder = folder
        yield scorer
        barrier()


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    with locked(path):
        yield
        shutil.rmtree(path)


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Scores and recalls of a model on a set. Results of matching are None without a matching head."""

    image_vectors: Float[Tensor, "i c"]  # contrastive, of length one
    text_vectors: Float[Tensor, "t c"]  # the same of the texts that are ranked
    truth: GroundTruth
    recalls: Mapping[str, RetrievalRecalls]  # by stage: itc, matching, two_stage, chance
    candidates: Candidates | None = None  # the pairs that were matched, and their scores
    reranking: Reranking | None = None  # with which they were ranked; None with protocol `paper`
    # expected calibration error of `Reranking.match` on candidates of texts; None with protocol `paper`
    ece: float | None = None
    itm_accuracy: float | None = None  # of each text with its own image and with a random other one

    def metrics(self) -> dict[str, float]:
        """Returns recalls `itc_…`, `matching_…`, `two_stage_…` and `chance_…`, the other metrics, and `rsum`."""
        metrics: dict[str, float] = {}
        for stage, recalls in self.recalls.items():
            metrics |= recalls.metrics(stage)
        if self.reranking is not None:
            metrics[ITC_WEIGHT] = self.reranking.itc_weight
        if self.ece is not None:
            metrics["ece"] = self.ece
        if self.itm_accuracy is not None:
            metrics["itm_accuracy"] = self.itm_accuracy
        metrics["rsum"] = self.recalls.get("two_stage", self.recalls["itc"]).rsum
        return metrics


@torch.inference_mode()
def evaluate_retrieval(
    model: BridgeTower,
    images: CaptionImages,
    config: RetrievalConfig,
    options: EvaluationOptions = DEFAULTS,
    *,
    reranking: Reranking | None = UNMEASURED,
) -> RetrievalResult:
    """Ranks images for every caption, and captions for every image, within each fold if there are folds.

    Without folds, images with the same captions share their texts. Each text is ranked once and is right for all of
    these images. The processes of a distributed run share the images, and all of them get the same result.
    """
    model.head("itc")
    texts, truth = ranked_texts(images, config)
    with resumable(PairScorer(model, images, texts, config, options)) as scorer:
        image_vectors, text_vectors = scorer.vectors()
        no_temperature = torch.ones(())

        def cosines(rows: slice, columns: Int[Tensor, " b"]) -> Float[Tensor, "r b"]:
            return similarity(image_vectors[rows], text_vectors[columns], no_temperature)

        result = RetrievalResult(
            image_vectors=image_vectors,
            text_vectors=text_vectors,
            truth=truth,
            recalls={"itc": streamed_recalls(cosines, truth, fold_size=config.fold_size)},
        )
        if model.itm_head is not None and config.candidates:
            result = _with_matching(result, scorer, cosines, reranking)
    chance = chance_recalls(truth, fold_size=config.fold_size)
    return replace(result, recalls={**result.recalls, "chance": chance})


def _with_matching(
    result: RetrievalResult, scorer: PairScorer, cosines: ScoresOf, reranking: Reranking | None
) -> RetrievalResult:
    """Adds the second stage of retrieval, with a fit of its settings if `reranking` is None."""
    truth = result.truth
    config = scorer.config
    control_pairs = _control_pairs(truth)
    pairs = candidate_pairs(cosines, truth, config, extra_pairs=control_pairs)
    match, accepted = scorer.score(pairs.image, pairs.text)
    candidates = replace(pairs, itm=match)

    # Accuracy of matching on the control pairs. The number of a pair is image · num_texts + text.
    control_images, control_texts = control_pairs
    control_numbers = control_images * truth.num_texts + control_texts
    is_control = torch.isin(pairs.image * truth.num_texts + pairs.text, control_numbers)
    is_right = accepted == pairs.is_match
    accuracy = is_right[is_control].double().mean().item()

    # Recalls, by the score of matching alone and beside the cosine.
    matching = candidates.recalls()
    two_stage = matching
    ece = None
    if config.protocol == "paper":
        reranking = None
    else:
        if reranking is None:
            reranking = candidates.fit_reranking()
        ece = candidates.calibration_error(reranking)
        if reranking.itc_weight:
            two_stage = candidates.recalls(reranking.itc_weight)
    return replace(
        result,
        recalls={**result.recalls, "matching": matching, "two_stage": two_stage},
        candidates=candidates,
        reranking=reranking,
        ece=ece,
        itm_accuracy=accuracy,
    )


@torch.inference_mode()
def evaluate_matching(
    model: BridgeTower,
    images: CaptionImages,
    config: RetrievalConfig,
    options: EvaluationOptions = DEFAULTS,
) -> float:
    """Accuracy of matching on each caption with its own image and with a random other one (the same at every call)."""
    model.head("itm")
    texts, truth = ranked_texts(images, config)
    image, text = _control_pairs(truth)
    with resumable(PairScorer(model, images, texts, config, options)) as scorer:
        _, accepted = scorer.score(image, text)
    is_right = accepted == truth.is_match(image, text)
    return is_right.double().mean().item()


@torch.inference_mode()
def evaluate_all_pairs(
    model: BridgeTower,
    images: CaptionImages,
    config: RetrievalConfig,
    options: EvaluationOptions = DEFAULTS,
) -> dict[str, float]:
    """Ranks all pairs, or those of each fold, by one score of the fusion encoder: retrieval without contrast."""
    if model.rank_head is None:
        model.head("itm")

    def logits(pooled: Tensor) -> Tensor:
        if model.rank_head is None:
            return model.itm_logits(pooled)
        scores = model.head("rank")(pooled)
        # The score is the logit of a match, beside a logit of 0.
        return torch.stack([torch.zeros_like(scores), scores], dim=1)

    fold_size = config.fold_size or len(images)
    texts, truth = ranked_texts(images, config)
    fold_of_image = torch.arange(len(images)) // fold_size
    fold_of_text = truth.text_image_index // fold_size
    is_same_fold = fold_of_image[:, None] == fold_of_text
    image, text = is_same_fold.nonzero().unbind(1)
    with resumable(PairScorer(model, images, texts, config, options)) as scorer:
        scores, _ = scorer.score(image, text, logits)
    all_pairs = torch.ones_like(image, dtype=torch.bool)
    pairs = Candidates(
        image=image,
        text=text,
        image_side=all_pairs,
        text_side=all_pairs,
        cosine=torch.full_like(scores, torch.nan),
        truth=truth,
        config=config,
        itm=scores,
    )
    one_stage = pairs.recalls()
    chance = chance_recalls(truth, fold_size=config.fold_size)
    return {**one_stage.metrics("one_stage"), **chance.metrics("chance"), "rsum": one_stage.rsum}


def _control_pairs(truth: GroundTruth) -> tuple[PairIndex, PairIndex]:
    """Returns each text with its own image and with a wrong one, sorted by image.

    The wrong images are drawn with a fixed seed from those with other captions.
    """
    right_images = truth.text_image_index
    different_images, index = right_images.unique(return_inverse=True)
    num_images = len(different_images)
    wrong_images = right_images
    if num_images > 1:
        # In a circle of all images, a shift by less than a round leads to another image.
        generator = torch.Generator().manual_seed(0)
        shift = torch.randint(1, num_images, index.shape, generator=generator)
        wrong_images = different_images[(index + shift) % num_images]
    image = torch.cat([right_images, wrong_images])
    by_image = image.argsort(stable=True)
    return image[by_image], by_image % len(right_images)


Direction = Literal["text_to_image", "image_to_text"]


class Ranking(NamedTuple):
    """The ranking of all items for a query: candidates by the score of the second stage, then the rest by cosine."""

    order: Int[Tensor, " m"]  # their rows, best first
    rank: int  # of the best right answer, counted from 1
    itm: float | None  # matching score of the first item; None without a matching head


def rankings(
    result: RetrievalResult, direction: Direction, queries: Iterable[int]
) -> Iterator[Ranking]:
    """Yields the ranking of all items for each query."""
    truth = result.truth
    if direction == "text_to_image":
        query_vectors = result.text_vectors
        item_vectors = result.image_vectors
        owner_of_query = truth.text_image_index
        owner_of_item = truth.owners
    else:
        query_vectors = result.image_vectors
        item_vectors = result.text_vectors
        owner_of_query = truth.owners
        owner_of_item = truth.text_image_index
    second_stage = _second_stage(result, direction, len(query_vectors))
    for query in queries:
        cosine = similarity(query_vectors[[query]], item_vectors, torch.ones(()))[0]
        items, scores, itm = second_stage[query]
        score_of_item = torch.full_like(cosine, torch.nan).index_put((items,), scores)
        order = two_stage_order(cosine, score_of_item)
        is_right = owner_of_item[order] == owner_of_query[query]
        best_rank = int(is_right.int().argmax()) + 1
        first_itm = itm[items == order[0]].tolist()
        yield Ranking(order, best_rank, first_itm[0] if first_itm else None)


def _second_stage(
    result: RetrievalResult, direction: Direction, num_queries: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns the candidates of each query, their scores and their matching scores, if there are any."""
    pairs = result.candidates
    if pairs is None:
        empty = torch.empty(0)
        return [(empty.long(), empty, empty)] * num_queries
    image_side, text_side = pairs.sides
    if direction == "text_to_image":
        query = pairs.text
        item = pairs.image
        side = text_side
    else:
        query = pairs.image
        item = pairs.text
        side = image_side
    itc_weight = 0.0
    if result.reranking is not None:
        itc_weight = result.reranking.itc_weight
    candidates = side.nonzero().squeeze(1)
    candidates = candidates[query[candidates].argsort(stable=True)]
    counts = query[candidates].bincount(minlength=num_queries).tolist()
    items = item[candidates].split(counts)
    scores = pairs.scores(itc_weight)[candidates].split(counts)
    itm = pairs.itm[candidates].split(counts)
    return list(zip(items, scores, itm, strict=True))


def retrieval_judgements(
    result: RetrievalResult, images: CaptionImages, texts: Sequence[str]
) -> list[Judgement]:
    """Judges the first image of the ranking of each text. Its error is the rank of the right image minus one."""
    reranking = result.reranking or UNMEASURED
    captions = images.all_captions()
    names = images.names(range(len(images)))
    right_images = result.truth.text_image_index.tolist()
    rankings_of_texts = rankings(result, "text_to_image", range(len(texts)))
    judgements = []
    for text, right_image, ranking in zip(texts, right_images, rankings_of_texts, strict=True):
        first_image = int(ranking.order[0])
        is_first = ranking.rank == 1
        target = f"image {ranking.rank} of {len(ranking.order)}"
        if is_first:
            target = "first of all"
        probability = None
        if ranking.itm is not None:
            probability = float(reranking.match(torch.tensor(ranking.itm)))
        judgement = Judgement(
            id=names[right_image],
            images=(right_image,),
            text=text,
            target=target,
            prediction=captions[first_image][0],
            score=float(is_first),
            error=float(ranking.rank - 1),
            probability=probability,
            predicted_image=first_image,
        )
        judgements.append(judgement)
    return judgements
