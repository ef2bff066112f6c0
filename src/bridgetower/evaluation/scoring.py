"""Scores of pairs of images and captions: each encoded once, pairs in batches of like length, safe against kills."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.checkpoints.fingerprint import exact_fingerprint, fingerprint
from bridgetower.data.captions import CaptionImages
from bridgetower.distributed import barrier, gather_by_id, rank, world_size
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.encodings import Embed, Encode, Encodings
from bridgetower.files import locked, remove_leftovers, require_space
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.encodings import Encoded
from bridgetower.model.outputs import CachedFeatures
from bridgetower.objectives.losses import similarity
from bridgetower.processor import loaded
from bridgetower.progress import count_bars
from bridgetower.rows import FILE_BYTES, MemoryRows, RowFiles, Rows

logger = logging.getLogger(__name__)

PAIRS_PER_PART = 4096
"""About how many pairs are scored before their scores are kept."""

_LOGITS = "logits"

Head = Callable[[Tensor], Tensor]
"""Gives the logits of no match and match of a pooled output."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """With what an evaluation is done, which changes nothing in its result.

    Attributes:
        work: Folder in which an evaluation keeps what it has in a folder of its own until it is finished: called again
            after a kill, the same evaluation goes on from there. None: it starts again.
        num_workers: Processes that decode; 0 decodes in this one.
        progress: Show bars.
    """

    work: Path | None = None
    num_workers: int = 0
    progress: bool = False


AS_USUAL = Means()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What matching says of the pairs that were scored.

    Attributes:
        match: Logit of a match, NaN where no score was wanted.
        accepted: Whether it is above that of no match; False where no score was wanted.
    """

    match: Float[Tensor, "i t"]
    accepted: Bool[Tensor, "i t"]


class PairScorer:
    """Encodes images and captions and scores pairs of them; the processes of a run share the images.

    Attributes:
        text_image_index: Row of the image that each text belongs to.
    """

    def __init__(
        self, model: BridgeTower, images: CaptionImages, config: RetrievalConfig, means: Means, folder: _Folder
    ) -> None:
        self._model, self._images, self._config, self._means = model, images, config, means
        self._device = next(model.parameters()).device
        texts, self.text_image_index = images.texts(config.max_captions)
        ids = images.processor.token_ids(texts, truncate=True)
        order = sorted(range(len(ids)), key=lambda text: len(ids[text]))  # short texts first, so that little is padded
        self._ids = [ids[text] for text in order]
        self._order, self._place = torch.tensor(order), torch.tensor(order).argsort()
        self._own = torch.arange(rank(), len(images), world_size())
        self._folder = folder
        self._with_pairs = model.itm_head is not None or model.rank_head is not None
        self._image, self._text = self._plan()

    def similarity(self) -> Float[Tensor, "i t"]:
        """Returns the cosines of the contrastive vectors.

        Raises:
            ValueError: A picture cannot be decoded.
        """
        self._fill(encodings=False)
        size = self._model.config.heads.itc_size
        _, images = gather_by_id(self._own, self._image.vectors(size))
        return similarity(images, self._text.vectors(size)[self._place], torch.ones(()))

    def score(self, wanted: Bool[Tensor, "i t"], head: Head | None = None) -> Scores:
        """Returns the scores of the wanted pairs; those of a part of the images are kept as soon as they are there.

        Args:
            wanted: Pairs to score; scores of others, or of other pairs together, are not taken for theirs.
            head: None takes the matching head.

        Raises:
            ValueError: A picture cannot be decoded, or a score is not a number.
        """
        own = wanted[self._own]
        size = max(1, min(self._images_at_once, PAIRS_PER_PART * len(own) // max(1, int(own.sum()))))
        pairs = hashlib.sha256(own.numpy().data).hexdigest()[:8]
        scores = self._folder.rows(f"scores-{pairs}", num_rows=len(own), rows_per_part=size)
        if scores.missing():
            self._fill(encodings=True)
        with count_bars(shown=self._means.progress and rank() == 0) as bars:
            bar = bars.add_task("pairs", total=int(own.sum()))
            missing = scores.missing()
            for number in range(scores.num_parts):
                rows = scores.rows_of(number)
                part = own[rows.start : rows.stop]
                if number in missing:
                    logits = self._score_part(
                        rows, part, head or self._model.itm_logits, lambda n: bars.advance(bar, n)
                    )
                    scores.write(number, {_LOGITS: logits})
                else:
                    bars.advance(bar, int(part.sum()))
        return _gathered(self._own, own, scores)

    def _score_part(
        self, rows: range, wanted: Bool[Tensor, "r t"], head: Head, advance: Callable[[int], object]
    ) -> list[Float[Tensor, "n 2"]]:
        """Returns the logits of some images' pairs, in the order of their texts."""
        pairs = wanted.nonzero()  # by image, then by text
        places = self._place[pairs[:, 1]]
        image, logits = self._image.take(rows, self._device), torch.empty(len(pairs), 2)
        for batch in places.argsort(stable=True).split(self._config.batch_size):
            taken, which = places[batch].unique(return_inverse=True)
            text = self._text.take(taken.tolist(), self._device)
            fused = self._model.fuse(
                image[pairs[batch, 0].to(self._device)], text[which.to(self._device)], outputs="pooled"
            )
            logits[batch] = head(fused.pooled).float().cpu()
            advance(len(batch))
        if bool(logits.isnan().any()):
            raise ValueError(f"{int(logits.isnan().any(dim=1).sum())} of {len(logits)} pairs have a score that is NaN")
        return list(logits.split(wanted.sum(dim=1).tolist()))

    def _plan(self) -> tuple[Encodings, Encodings]:
        """Plans the encodings of images and texts, in files if both together do not fit into memory."""
        model, config = self._model, self._model.config
        widths = config.fusion.num_bridged_layers + 4  # a start has the fusion width four times
        token_bytes = widths * config.fusion.hidden_size * next(model.parameters()).element_size()
        image_bytes, num_tokens = token_bytes * config.vision.num_tokens, sum(map(len, self._ids))
        room = self._config.memory_gib * 2**30
        self._images_at_once = int(room / 2 / image_bytes)
        in_files = image_bytes * len(self._own) + token_bytes * num_tokens > room

        def plan(name: str, num_rows: int, num_bytes: int, encode: Encode, embed: Embed) -> Encodings:
            batch = self._config.batch_size
            per_part = batch * max(1, FILE_BYTES * num_rows // max(1, num_bytes) // batch)
            kept = vectors = None
            if self._with_pairs and in_files:
                kept = self._folder.large_rows(name, num_bytes, num_rows=num_rows, rows_per_part=per_part)
            elif self._with_pairs:
                kept = MemoryRows(num_rows=num_rows, rows_per_part=per_part)
            if model.itc_head is not None:
                vectors = embed, self._folder.rows(f"vectors of {name}", num_rows=num_rows, rows_per_part=per_part)
            return Encodings(encode, batch_size=batch, kept=kept, vectors=vectors)

        num_images = len(self._own)
        return (
            plan("images", num_images, image_bytes * num_images, self._encode_images, model.image_embeds),
            plan("texts", len(self._ids), token_bytes * num_tokens, self._encode_texts, model.text_embeds),
        )

    def _fill(self, *, encodings: bool) -> None:
        with count_bars(shown=self._means.progress and rank() == 0) as bars:
            for name, side, count in (("images", self._image, len(self._own)), ("texts", self._text, len(self._ids))):
                bar = bars.add_task(name, total=count)
                side.fill(partial(bars.advance, bar), encodings=encodings)
                bars.update(bar, completed=count)

    def _encode_images(self, batches: Sequence[range]) -> Iterator[Encoded]:
        for pixels in self._pixel_values([self._own[list(rows)].tolist() for rows in batches]):
            if self._with_pairs:
                yield self._model.cache_image(self._model.encode_image(pixels))
            else:
                yield self._model.encode_image(pixels, outputs="cls")

    def _pixel_values(self, batches: Sequence[Sequence[int]]) -> Iterator[Tensor | CachedFeatures]:
        images = self._images
        if images.frozen is not None:
            yield from (images.pixel_values(batch) for batch in batches)
            return
        for pixels in loaded(images.pixels, batches, num_workers=self._means.num_workers):
            yield images.processor.normalise(pixels).to(self._device)

    def _encode_texts(self, batches: Sequence[range]) -> Iterator[Encoded]:
        for rows in batches:
            batch = self._images.processor.pad(self._ids[rows.start : rows.stop])
            ids = batch.input_ids.to(self._device)
            mask = None if batch.attention_mask is None else batch.attention_mask.to(self._device)
            if self._with_pairs:
                yield self._model.cache_text(self._model.encode_text(ids, mask))
            else:
                yield self._model.encode_text(ids, mask, outputs="cls")


class _Folder:
    """Where the rows of one process go: those that outlast a kill, and encodings that do not fit into memory."""

    def __init__(self, path: Path | None, stack: ExitStack) -> None:
        self._lasting, self._stack = path, stack
        self._large = path

    def rows(self, name: str, *, num_rows: int, rows_per_part: int) -> Rows:
        """Returns rows that outlast a kill if there is a folder for that."""
        if self._lasting is None:
            return MemoryRows(num_rows=num_rows, rows_per_part=rows_per_part)
        return RowFiles(self._lasting, name, num_rows=num_rows, rows_per_part=rows_per_part)

    def large_rows(self, name: str, num_bytes: int, *, num_rows: int, rows_per_part: int) -> Rows:
        """Returns rows in files, in a temporary folder if there is no other.

        Raises:
            OSError: The disk has no room for so many bytes.
        """
        if self._large is None:
            self._large = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bridgetower-")))
        files = RowFiles(self._large, name, num_rows=num_rows, rows_per_part=rows_per_part)
        missing = num_bytes * len(files.missing()) // max(1, files.num_parts)
        require_space(self._large, missing, f"encodings of {name}")
        logger.info("encodings of %s take %.1f GiB in %s until this ends", name, num_bytes / 2**30, self._large)
        return files


@contextmanager
def pair_scorer(
    model: BridgeTower, images: CaptionImages, config: RetrievalConfig, means: Means
) -> Iterator[PairScorer]:
    """Lends what scores pairs; what it keeps in `means.work` is removed at the end, unless that comes by an error.

    Raises:
        FileExistsError: Another process does the same evaluation.
    """
    with ExitStack() as stack:
        path = None
        if means.work is not None:
            path = means.work / _digest(model, images, config)
            if rank() == 0:
                stack.enter_context(locked(path))
            (path / f"process-{rank()}").mkdir(parents=True, exist_ok=True)
            remove_leftovers(path / f"process-{rank()}")
        yield PairScorer(model, images, config, means, _Folder(path and path / f"process-{rank()}", stack))
        barrier()
        if path is not None and rank() == 0:
            shutil.rmtree(path)


def _digest(model: BridgeTower, images: CaptionImages, config: RetrievalConfig) -> str:
    """Names an evaluation by all that decides its encodings and scores."""
    content = {
        "weights": exact_fingerprint(model.state_dict()),
        "preprocessing": fingerprint(model.config, {}, images.processor),
        "data": images.digests(),
        "settings": asdict(config),
        "processes": world_size(),
        "half precision": torch.is_autocast_enabled(next(model.parameters()).device.type),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _gathered(own_rows: Int[Tensor, " r"], wanted: Bool[Tensor, "r t"], scores: Rows) -> Scores:
    """Puts the scores of all processes into tables."""
    match, accepted = torch.full(wanted.shape, torch.nan), torch.zeros(wanted.shape, dtype=torch.bool)
    for row, logits in enumerate(scores.read(_LOGITS, range(len(own_rows)))):
        match[row, wanted[row]] = logits[:, 1]
        accepted[row, wanted[row]] = logits[:, 1] > logits[:, 0]
    _, match, accepted = gather_by_id(own_rows, match, accepted)
    return Scores(match=match, accepted=accepted)
