"""Search in two stages: the nearest contrastive vectors, then matching of the candidates with the text."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bridgetower.arguments import check_at_least_1
from bridgetower.checkpoints import Reranking
from bridgetower.data.sets.store import Uri
from bridgetower.distributed import available_cores
from bridgetower.inference.items import Item, batched, two_stage_order
from bridgetower.inference.predictor import Predictor, load
from bridgetower.plain import check_choice
from bridgetower.processor import ImageLike, Resized
from bridgetower.search.config import Against, Vectors
from bridgetower.search.index import Index, Unrelated
from bridgetower.search.indexed import Hit

RERANK = 64
"""Candidates that are matched by default."""

_FUSION_RANKS = 60  # as in the paper on reciprocal rank fusion (Cormack et al., 2009)

logger = logging.getLogger(__name__)


class Searcher:
    """An `index` together with the model that made it, its `predictor`."""

    def __init__(self, index: Index | Uri, model: Predictor | str | Path | None = None) -> None:
        """Opens an index, and loads its model.

        Args:
            index: The opened index, or its URI.
            model: The loaded model, or what to load; None loads the model that made the index.

        Raises:
            FileNotFoundError: There is no such index or model.
            ValueError: The index was made with another model.
        """
        self.index = index if isinstance(index, Index) else Index(index)
        if not isinstance(model, Predictor):
            model = load(self.index.model_or(model))
        self.predictor = model
        self.index.check_model(self.predictor.fingerprint, self.predictor.source)
        self._warned: set[Vectors] = set()  # kinds that were compared with in place of pairs

    def search(
        self,
        text: str | None = None,
        image: ImageLike | None = None,
        *,
        top: int = 10,
        rerank: int | None = None,
        where: str | None = None,
        against: Against | None = None,
        exact: bool = False,
        truncate: bool = False,
        batch_size: int = 32,
        fetch: bool = True,
        within_root: bool = False,
        max_bytes: int | None = None,
    ) -> list[Hit]:
        """Finds images for a text, an image, or both.

        First come the candidates, by their log-odds of matching the text + `itc_weight` · cosine (see
        `Predictor.reranking`), then the others by cosine. With text and image the candidates are those nearest to the
        mean of both vectors. Without a text there is nothing to match, and the cosine alone decides. Where moments are
        found by what is said and others by their images, both are ranked apart, images with matching, and take turns:
        the best of each, the second ...

        Args:
            text: What should be seen.
            image: Similar images are found.
            top: Hits to return.
            rerank: How many of the nearest are matched with the text; 0 leaves it at the cosine. None: see `plan`.
            where: A condition in SQL on path, size, mtime, width, height, captions, start or end, as `width > 800`.
            against: What the query is compared with: the images, their captions, or both together; the words of
                captions and transcripts; or `hybrid`, words and vectors. None: see `plan`.
            exact: Compare the query with every vector, even where the index could leave most out.
            truncate: Cut a text that is too long instead of refusing it.
            batch_size: Images matched at once.
            fetch: Open candidates at URLs too; those that are not opened are left out.
            within_root: Open no candidate to which a link or a path leads out of the folder of the images.
            max_bytes: Of a candidate that is opened; None: any number.

        Raises:
            ValueError: There is neither text nor image, a number is out of range, `rerank` without a text or a matching
                head, the condition is none, or none of the candidates can be opened.
        """
        check_at_least_1(batch_size=batch_size)
        predictor = self.predictor
        kind, rerank = self.plan(text, image, top=top, rerank=rerank, against=against)

        # Embed the query.
        vectors = []
        if kind == "pairs" and text is not None and image is not None:
            vectors.append(predictor.embed_pairs(image, text, truncate=truncate))
        else:
            if image is not None:
                vectors.append(predictor.embed_images(image))
            if text is not None:
                vectors.append(predictor.embed_texts(text, truncate=truncate))
        vector = mean_vector(torch.cat(vectors))

        # Words and vectors are searched at the same time.
        count = max(top, rerank)
        if against == "hybrid":
            count = max(count, RERANK)
        find_words = partial(self.index.containing, text or "", vector, count, where=where)
        if against == "words":
            return find_words()[:top]
        with ThreadPoolExecutor(1) as pool:
            words = pool.submit(find_words) if against == "hybrid" else None
            nearest = self.index.nearest(vector, count, against=kind, where=where, exact=exact)

        # Match the candidates that can be opened.
        matched, unmatched = candidates(nearest, rerank, kind)
        log_odds: list[float] = []
        if text is not None and matched:
            open_candidate = partial(
                self.open,
                fetch=fetch,
                within_root=within_root,
                max_bytes=max_bytes,
                frames=self.index.frames(matched),
            )
            with ThreadPoolExecutor(available_cores()) as pool:  # decoding lets other threads run
                images = list(pool.map(open_candidate, matched))
            opened = self.opened(matched, images)
            matched = [hit for hit, _ in opened]
            (ids,) = predictor.processor.token_ids([text], truncate=truncate)
            items = [Item(kind="match", image=image.pixels, ids=tuple(ids)) for _, image in opened]
            for batch in batched(items, batch_size):
                log_odds += predictor.compute(batch)  # type: ignore[arg-type]  # numbers

        # Rank all hits.
        unrelated = self.unrelated(text, image)
        hits = two_stages(matched, log_odds, unmatched, predictor.reranking, unrelated)
        if words is not None:
            hits = fuse_rankings(hits, words.result())
        return hits[:top]

    def unrelated(self, text: str | None, image: object) -> Unrelated | None:
        """Returns the cosines of unrelated texts for a query of text alone, the only kind that they are known for."""
        if text is None or image is not None:
            return None
        return self.index.unrelated

    def plan(
        self,
        text: str | None,
        image: ImageLike | None,
        *,
        top: int,
        rerank: int | None,
        against: Against | None,
    ) -> tuple[Vectors | None, int]:
        """Returns which vectors a query is compared with (None: see `Index.nearest`), and how many are matched.

        By default a text alone is compared with what is said in moments of videos, and all else with images; 64
        candidates are matched with a text that is seen, unless validation did not find that this ranks better.
        """
        check_query(text, image, top=top, rerank=rerank, against=against)
        if against == "words":
            return "images", 0
        model = self.predictor.model
        if rerank:
            model.head("itm")  # raises if the model has none
        kind: Vectors | None = None if against == "hybrid" else against
        num_spoken = 0
        if text is not None and image is None and kind in (None, "captions"):
            num_spoken = self.index.num_spoken
        is_all_spoken = num_spoken > 0 and num_spoken == len(self.index)
        if rerank is None:
            rerank = 0 if is_all_spoken else self._default_rerank(text)
        if kind is None and is_all_spoken:
            kind = "captions"
        elif kind is None and not num_spoken:
            kind = "images"
        if kind == "pairs" and not model.compares_pairs:
            kind = self._without_pairs(text, image)
        return kind, rerank

    def _default_rerank(self, text: str | None) -> int:
        if text is None or self.predictor.model.itm_head is None:
            return 0
        may_help = self.predictor.reranking.helps is not False  # None: not measured
        return RERANK if may_help else 0

    def _without_pairs(self, text: str | None, image: object) -> Vectors:
        """Returns which vectors a query is compared with if only queries of both can be compared with pairs."""
        if text is not None and image is not None:
            return "pairs"
        kind: Vectors = "images" if text is None else "captions"
        if kind not in self._warned:
            logger.warning(
                "the vectors of pairs of this model cannot be compared with that of %s alone, as its contrastive "
                "head has no part for pairs; it is compared with %s instead: give both a text and an image to "
                "compare with pairs",
                "an image" if text is None else "a text",
                kind,
            )
        self._warned.add(kind)
        return kind

    def open(
        self,
        hit: Hit,
        *,
        prepare: Callable[[bytes], Resized] | None = None,
        max_bytes: int | None = None,
        fetch: bool = True,
        within_root: bool = False,
        frames: Mapping[str, bytes] | None = None,
    ) -> Resized | ValueError | OSError:
        """Returns the image of a candidate as it was indexed, or why it cannot be opened. `prepare` decodes a file."""
        prepare = prepare or self.predictor.processor.prepare
        try:
            content = self.index.content(
                hit, within_root=within_root, fetch=fetch, max_bytes=max_bytes, frames=frames
            )
            return prepare(content)
        except OSError as error:
            return OSError(f"{hit.path!r}: {error.strerror or error}")
        except ValueError as error:
            return ValueError(f"{hit.path!r}: {error}")

    def opened(
        self, hits: Sequence[Hit], images: Sequence[Resized | ValueError | OSError]
    ) -> list[tuple[Hit, Resized]]:
        """Returns candidates with their images, without those that `open` could not open.

        Raises:
            ValueError: None can be opened.
        """
        opened = []
        errors = []
        for hit, image in zip(hits, images, strict=True):
            if isinstance(image, Resized):
                opened.append((hit, image))
            else:
                errors.append(image)
        if errors and not opened:
            raise ValueError(
                f"none of the {len(errors)} images that were found can be opened in {self.index.root}: {errors[0]}; "
                "give the folder where they are now as root, or rerank 0"
            )
        if errors:
            logger.warning(
                "%d of %d images that were found cannot be opened and are left out: %s",
                len(errors),
                len(hits),
                errors[0],
            )
        return opened


def check_query(
    text: str | None, image: object, *, top: int, rerank: int | None, against: Against | None = None
) -> None:
    """Refuses queries that no index and no model can answer."""
    if text is None and image is None:
        raise ValueError("nothing to search for; give a text, an image or both")
    if text is not None and not text.strip():
        raise ValueError(
            f"the text to search for is {text!r}; give words, or leave it out and give an image"
        )
    check_at_least_1(top=top)
    if rerank is not None and rerank < 0:
        raise ValueError(f"rerank is {rerank}; expected at least 0")
    if rerank and text is None:
        raise ValueError(
            f"rerank is {rerank}, but images are matched with a text; give one, or rerank 0"
        )
    if against is not None:
        check_choice("against", against, Against)
    if against == "words" and rerank:
        raise ValueError(
            f"rerank is {rerank}, but hits by words are not matched; use against hybrid"
        )
    if against in ("words", "hybrid") and text is None:
        raise ValueError(f"against is {against}, but there are no words; give a text")


def mean_vector(vectors: Float[Tensor, "n c"]) -> Float[Tensor, " c"]:
    """Returns the mean of vectors, brought to length one."""
    mean = vectors.mean(dim=0)
    return F.normalize(mean, dim=0)


def candidates(
    hits: Sequence[Hit], count: int, against: Vectors | None
) -> tuple[list[Hit], list[Hit]]:
    """Splits hits into those to match and the others.

    The first `count` hits are matched, with `against` None only those that were found by their images.
    """
    kind = against or "images"
    matched = []
    unmatched = []
    for rank, hit in enumerate(hits):
        if rank < count and hit.against == kind:
            matched.append(hit)
        else:
            unmatched.append(hit)
    return matched, unmatched


def fuse_rankings(*rankings: Sequence[Hit]) -> list[Hit]:
    """Joins rankings by reciprocal rank fusion: the sum of 1 / (60 + rank) over those that have a hit, best first.

    A hit that has words of the query is not called weak.
    """
    scores = defaultdict[str, float](float)
    hits: dict[str, Hit] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, start=1):
            path = hit.path
            scores[path] += 1 / (_FUSION_RANKS + rank)
            first = hits.setdefault(path, hit)
            if hit.against == "words":
                hits[path] = replace(first, weak=None)
    fused = [replace(hit, rank_score=scores[path]) for path, hit in hits.items()]
    return sorted(fused, key=lambda hit: (-hit.rank_score, hit.path))


def two_stages(
    matched: Sequence[Hit],
    log_odds: Sequence[float],
    unmatched: Sequence[Hit],
    reranking: Reranking,
    unrelated: Unrelated | None,
) -> list[Hit]:
    """Ranks candidates by matching and cosine together, then the others by cosine.

    Hits that were compared with captions and with images, whose cosines differ in scale, are ranked apart and take
    turns, which is reciprocal rank fusion of two rankings that have nothing in common.
    """
    # The scores of candidates.
    num_matched = len(matched)
    match = torch.full([num_matched + len(unmatched)], torch.nan)
    match[:num_matched] = torch.tensor(log_odds)
    cosine = torch.tensor([hit.cosine for hit in [*matched, *unmatched]])
    scores = torch.add(match, cosine, alpha=reranking.itc_weight)
    hits = []
    rank_scores = scores[:num_matched].tolist()
    head_scores = reranking.matches(match[:num_matched])  # by their names in a hit
    for hit, rank_score, head_score in zip(matched, rank_scores, head_scores, strict=True):
        hits.append(replace(hit, rank_score=rank_score, **head_score))
    hits += unmatched

    # The turns of captions and images.
    num_hits = Counter[str]()  # of each kind
    turns = []
    for index in two_stage_order(cosine, scores).tolist():
        hit = hits[index]
        num_hits[hit.against] += 1
        turn = (num_hits[hit.against], hit.against)  # captions before images
        turns.append((turn, replace(hit, weak=_is_weak(hit, unrelated))))
    turns.sort(key=itemgetter(0))
    return [hit for _, hit in turns]


def _is_weak(hit: Hit, unrelated: Unrelated | None) -> bool | None:
    """Tells whether unrelated texts come as near. A hit that probably matches is not weak."""
    limit = None if unrelated is None else getattr(unrelated, hit.against)
    if limit is None:
        return None
    return hit.cosine <= limit and (hit.probability is None or hit.probability < 0.5)
