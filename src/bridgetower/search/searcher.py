"""Search in two stages: the nearest contrastive vectors, then matching of the candidates with the text."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bridgetower.arguments import check_at_least_1
from bridgetower.checkpoints import Reranking
from bridgetower.data.sets.store import Uri
from bridgetower.distributed import available_cores
from bridgetower.inference.items import Item, two_stage_order
from bridgetower.inference.predictor import Predictor, load
from bridgetower.plain import check_choice
from bridgetower.processor import ImageLike, Resized
from bridgetower.search.config import Against, Vectors
from bridgetower.search.index import Hit, Index, Unrelated

RERANK = 64
"""Candidates that are matched by default."""
_RANKS_OF_FUSION = 60  # as in the paper on reciprocal rank fusion (Cormack et al., 2009)

logger = logging.getLogger(__name__)


class Searcher:
    """An `index` together with the model that made it, its `predictor`."""

    def __init__(self, index: Index | Uri, model: Predictor | str | Path | None = None) -> None:
        """Brings both together.

        Args:
            index: The index, or where it is.
            model: The loaded model, or what to load; None loads what the index was made with.

        Raises:
            FileNotFoundError: There is no such index or model.
            ValueError: The index was made with another model.
        """
        self.index = index if isinstance(index, Index) else Index(index)
        self.predictor = model if isinstance(model, Predictor) else load(self.index.model_or(model))
        self.index.check_model(self.predictor.fingerprint, self.predictor.source)
        self._warned: set[Vectors] = set()  # what queries against pairs were compared with instead

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
        mean of both vectors. Without a text there is nothing to match, and the cosine alone decides. Texts without an
        image, which a LangChain store may have, are no candidates. Where moments are found by what is said and others
        by their images, both are ranked apart, images with matching, and take turns: the best of each, the second ...

        Args:
            text: What should be seen.
            image: Similar images are found.
            top: Hits to return.
            rerank: How many of the nearest are matched with the text; 0 leaves it at the cosine. None: see `planned`.
            where: A condition in SQL on path, size, mtime, width, height, captions, start or end, as `width > 800`.
            against: What the query is compared with: the images, their captions, or both together; the words of
                captions and transcripts; or `hybrid`, words and vectors. None: see `planned`.
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
        asked = against
        against, rerank = self.planned(text, image, top=top, rerank=rerank, against=asked)
        if against == "pairs" and text is not None and image is not None:
            vectors = [self.predictor.embed_pairs(image, text, truncate=truncate)]
        else:
            vectors = [] if image is None else [self.predictor.embed_images(image)]
            vectors += [] if text is None else [self.predictor.embed_texts(text, truncate=truncate)]
        vector = mean_vector(torch.cat(vectors))
        count = max(top, rerank, RERANK if asked == "hybrid" else 0)
        by_words = None
        if text is not None and asked in (
            "words",
            "hybrid",
        ):  # Lance finds them while vectors are compared
            by_words = ThreadPoolExecutor(1).submit(
                self.index.containing, text, vector, count, where=where
            )
        found = (
            []
            if asked == "words"
            else self.index.nearest(vector, count, against=against, where=where, exact=exact)
        )
        matched, others = candidates(found, rerank, against)
        log_odds: list[float] = []
        if text is not None and matched:
            frames = self.index.frames(matched)
            read = partial(
                self.open, fetch=fetch, within_root=within_root, max_bytes=max_bytes, frames=frames
            )
            with ThreadPoolExecutor(available_cores()) as pool:  # decoding lets other threads run
                opened = self.usable(matched, list(pool.map(read, matched)))
            (ids,) = map(tuple, self.predictor.processor.token_ids([text], truncate=truncate))
            items = [Item(kind="match", image=resized.pixels, ids=ids) for _, resized in opened]
            for start in range(0, len(items), batch_size):
                log_odds += self.predictor.compute(items[start : start + batch_size])  # type: ignore[arg-type]  # numbers
            matched = [one for one, _ in opened]
        hits = two_stages(
            matched, log_odds, others, self.predictor.reranking, self.unrelated(text, image)
        )
        if by_words:
            hits = by_words.result() if asked == "words" else fused(hits, by_words.result())
        return hits[:top]

    def unrelated(self, text: str | None, image: object) -> Unrelated | None:
        """Returns what unrelated texts reach, for a text alone, of which alone it is known."""
        return self.index.unrelated if text is not None and image is None else None

    def planned(
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
        if against == "hybrid":
            against = None
        model = self.predictor.model
        if rerank:
            model.head("itm")
        spoken = (
            self.index.num_spoken
            if text is not None and image is None and against in (None, "captions")
            else 0
        )
        said = spoken > 0 and spoken == len(self.index)
        if rerank is None:
            able = text is not None and not said and model.itm_head is not None
            rerank = RERANK if able and self.predictor.reranking.helps is not False else 0
        if against is None and (said or not spoken):
            against = "captions" if said else "images"
        if against == "pairs" and (text is None or image is None) and not model.compares_pairs:
            alone, against = ("an image", "images") if text is None else ("a text", "captions")
            if against not in self._warned:
                logger.warning(
                    "the vectors of pairs of this model cannot be compared with that of %s alone, as its contrastive "
                    "head has no part for pairs; it is compared with %s instead: give both a text and an image to "
                    "compare with pairs",
                    alone,
                    against,
                )
            self._warned.add(against)
        return against, rerank

    def open(
        self,
        one: Hit,
        *,
        prepare: Callable[[bytes], Resized] | None = None,
        max_bytes: int | None = None,
        fetch: bool = True,
        within_root: bool = False,
        frames: Mapping[str, bytes] | None = None,
    ) -> Resized | ValueError | OSError:
        """Returns the image of a candidate as it was indexed, or why it cannot be opened; `prepare` decodes a file."""
        try:
            content = self.index.content(
                one, within_root=within_root, fetch=fetch, max_bytes=max_bytes, frames=frames
            )
            return (prepare or self.predictor.processor.prepare)(content)
        except OSError as error:
            return OSError(f"{one.path!r}: {error.strerror or error}")
        except ValueError as error:
            return ValueError(f"{one.path!r}: {error}")

    def usable(
        self, found: Sequence[Hit], opened: Sequence[Resized | ValueError | OSError]
    ) -> list[tuple[Hit, Resized]]:
        """Returns candidates with their images, as `open` returned them; a ValueError says that none can be opened."""
        good = [
            (one, image)
            for one, image in zip(found, opened, strict=True)
            if isinstance(image, Resized)
        ]
        errors = [image for image in opened if isinstance(image, Exception)]
        if errors and not good:
            raise ValueError(
                f"none of the {len(errors)} images that were found can be opened in {self.index.root}: {errors[0]}; "
                "give the folder where they are now as root, or rerank 0"
            )
        if errors:
            logger.warning(
                "%d of %d images that were found cannot be opened and are left out: %s",
                *(len(errors), len(found), errors[0]),
            )
        return good


def check_query(
    text: str | None, image: object, *, top: int, rerank: int | None, against: Against | None = None
) -> None:
    """Refuses what no index and no model can find."""
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
    """Returns the vector that stands for several: their mean, brought to length one."""
    return F.normalize(vectors.mean(dim=0), dim=0)


def candidates(
    found: Sequence[Hit], count: int, against: Vectors | None
) -> tuple[list[Hit], list[Hit]]:
    """Returns those of the nearest that are matched, with `against` None only those found by image, and the others."""
    kind = against or "images"
    able = [
        place < count and one.width > 0 and one.against == kind for place, one in enumerate(found)
    ]
    matched = [one for one, is_able in zip(found, able, strict=True) if is_able]
    return matched, [one for one, is_able in zip(found, able, strict=True) if not is_able]


def fused(*rankings: Sequence[Hit]) -> list[Hit]:
    """Joins rankings by reciprocal rank fusion: the sum of 1 / (60 + rank) over those that have a hit, best first.

    A hit that has words of the query is not called weak.
    """
    scores, first = defaultdict[str, float](float), dict[str, Hit]()
    for ranking in rankings:
        for rank, hit in enumerate(ranking, start=1):
            scores[hit.path] += 1 / (_RANKS_OF_FUSION + rank)
            first.setdefault(hit.path, hit)
            if hit.against == "words":
                first[hit.path] = replace(first[hit.path], weak=None)
    order = sorted(first, key=lambda path: (-scores[path], path))
    return [replace(first[path], rank_score=scores[path]) for path in order]


def two_stages(
    matched: Sequence[Hit],
    log_odds: Sequence[float],
    others: Sequence[Hit],
    reranking: Reranking,
    unrelated: Unrelated | None,
) -> list[Hit]:
    """Ranks candidates by matching and cosine together, then the others by cosine; candidates get what is shown.

    Hits that were compared with captions and with images, whose cosines differ in scale, are ranked apart and take
    turns, which is reciprocal rank fusion of two rankings that have nothing in common.
    """
    match = torch.tensor([*log_odds, *[torch.nan] * len(others)])
    cosine = torch.tensor([one.cosine for one in [*matched, *others]])
    scores = torch.add(match, cosine, alpha=reranking.itc_weight)
    named = reranking.named(match[: len(matched)])
    seconds = scores[: len(matched)].tolist()
    found = [
        replace(one, rank_score=score, **value)
        for one, score, value in zip(matched, seconds, named, strict=True)
    ]
    found += others
    ranks, placed = Counter[str](), list[tuple[int, str, Hit]]()
    for row in two_stage_order(cosine, scores).tolist():
        ranks[found[row].against] += 1
        placed.append((ranks[found[row].against], found[row].against, found[row]))
    ranked = [
        hit for *_, hit in sorted(placed, key=lambda place: place[:2])
    ]  # captions before images
    return [replace(hit, weak=_is_weak(hit, unrelated)) for hit in ranked]


def _is_weak(hit: Hit, unrelated: Unrelated | None) -> bool | None:
    """Tells whether unrelated texts come as near; what probably matches is not weak, however near it is."""
    limit = None if unrelated is None else getattr(unrelated, hit.against)
    if limit is None:
        return None
    return hit.cosine <= limit and (hit.probability is None or hit.probability < 0.5)
