"""Measurements of search: python benchmarks/search.py --parts recall million update retrieval; prints tables and JSON.

`recall`: how often the two stages find an image by its fullest caption, of the held-out images, model and index that
`make demo` leaves. `million`: time, memory and recall of exact, approximate and hybrid search in generated vectors and
captions, and of usearch where it is installed.
`update`: the time of a run over unchanged images against that of the first run. `retrieval`: time and memory of ranking
a million generated texts for 5,000 images and the other way round, as an evaluation does, in a first stage and in a
second one with generated scores of the candidates. `--file` gives `million` vectors of your own, as `bridgetower embed`
writes them with `--out vectors.npy`, in an order that says nothing of them.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import RECALL_KS, GroundTruth, candidate_pairs, streamed_recalls
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index, IndexInfo
from bridgetower.search.indexed import Hit
from bridgetower.search.searcher import RERANK, Searcher, fuse_rankings
from bridgetower_demo.folder import FOLDER, held_out_index, trained_model

PARTS = ["recall", "million", "update", "retrieval"]
WIDTH = 256  # numbers in a vector, as the published models have
CHUNK = 20_000  # rows of a commit
PER_CENTRE = 100  # generated vectors
QUERIES = 200
WARM_UP = 20
TOP = 10
Row = dict[str, Any]
T = TypeVar("T")


def recall() -> Iterator[Row]:
    """Share of fullest captions with an image of theirs among the first k, by held-out set and stage."""
    searcher = Searcher(held_out_index(FOLDER))
    images = searcher.index.examples(len(searcher.index))
    for name in ("emoji", "flags"):
        shown = Counter(image.captions[0] for image in images if image.path.startswith(f"{name}/"))
        number = {"set": name, "texts": len(shown), "images": shown.total()}
        for stage, rerank in (("nearest vectors", 0), ("16 reranked", 16), ("64 reranked", 64)):
            ranks = [_rank(searcher, text, rerank, f"path LIKE '{name}/%'") for text in shown]
            found = {
                f"recall_at_{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in RECALL_KS
            }
            yield {**number, "stage": stage, **found}
        chance = {f"recall_at_{k}": _chance(shown, k) for k in RECALL_KS}
        yield {**number, "stage": "chance", **chance}


def _rank(searcher: Searcher, text: str, rerank: int, where: str) -> int:
    hits = searcher.search(text, top=max(RECALL_KS), rerank=rerank, where=where, truncate=True)
    return next(
        (rank for rank, hit in enumerate(hits, start=1) if hit.captions[0] == text), len(hits) + 1
    )


def _chance(shown: Counter[str], k: int) -> float:
    """Recall at k of a random order."""
    count = shown.total()
    missed = [math.comb(count - own, k) / math.comb(count, k) for own in shown.values()]
    return 1 - sum(missed) / len(missed)


def generated(count: int, num_centres: int, seed: int) -> torch.Tensor:
    """Vectors around centres: cosine 0.71 with the centre, the rest in all directions."""
    generator = torch.Generator().manual_seed(seed)
    centres = _unit(torch.randn(num_centres, WIDTH, generator=torch.Generator().manual_seed(0)))
    chosen = torch.randint(num_centres, (count,), generator=generator)
    return _unit(centres[chosen] + _unit(torch.randn(count, WIDTH, generator=generator)))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)


def million(count: int, file: Path | None) -> Iterator[Row]:
    """Builds an index of vectors and captions, and searches in it, exactly and approximately."""
    with tempfile.TemporaryDirectory() as place:
        uri = Path(place) / "generated.lance"
        if file is None:
            in_process(_draw, uri, count)
        else:
            uri.with_suffix(".npy").symlink_to(file.absolute())
            count = len(np.load(file, mmap_mode="r")) - WARM_UP - QUERIES
        yield {"what": f"write {count} rows", **alone(_write, uri, count)}
        yield {"what": "exact search", **alone(_nearest, uri, True)}
        yield {"what": "search by words", **alone(_words, uri)}
        yield {"what": "hybrid search", **alone(_hybrid, uri)}
        yield {"what": "an image by its digest", **alone(_by_digest, uri)}
        yield {"what": "product in NumPy", **alone(_product, uri)}
        if find_spec("usearch"):
            yield {"what": "usearch (HNSW)", **alone(_usearch, uri)}
        else:
            yield {"what": "usearch: not measured, as it is not installed"}
        yield {"what": "group the vectors", **alone(_group, uri)}
        yield {"what": "approximate search", **alone(_nearest, uri, False)}
        yield {
            "what": "on disk",
            "mib": sum(path.stat().st_size for path in uri.rglob("*") if path.is_file()) >> 20,
        }


def _draw(uri: Path, count: int) -> None:
    """Writes the vectors of an index and then those of queries to a file."""
    shape = (count + WARM_UP + QUERIES, WIDTH)
    file = np.lib.format.open_memmap(
        uri.with_suffix(".npy"), mode="w+", dtype=np.float32, shape=shape
    )
    for start in range(0, count, CHUNK):
        end = min(start + CHUNK, count)
        file[start:end] = generated(end - start, count // PER_CENTRE, seed=1 + start)
    file[count:] = generated(WARM_UP + QUERIES, count // PER_CENTRE, seed=-1)


def _vectors(uri: Path, start: int, count: int | None = None) -> np.ndarray:
    end = None if count is None else start + count
    return np.array(np.load(uri.with_suffix(".npy"), mmap_mode="r")[start:end])


def _captions(count: int, words: int, seed: int) -> list[str]:
    """Texts of words that are as frequent as in a language, without its most frequent ones."""
    shares = 1 / np.arange(10, 20_000)
    drawn = np.random.default_rng(seed).choice(len(shares), (count, words), p=shares / shares.sum())
    return [" ".join(f"word{number}" for number in row) for row in drawn]


def _write(uri: Path, count: int) -> Row:
    about = {"fingerprint": "generated", "model": "none", "root": str(uri.parent)}
    width = _vectors(uri, 0, 1).shape[1]
    index = Index.create(uri, IndexInfo(**about, image_width=width, pair_width=width))
    nothing, rng = np.empty((0, width), np.float32), np.random.default_rng(0)
    for start in range(0, count, CHUNK):
        vectors = _vectors(uri, start, min(CHUNK, count - start))
        rows = zip(
            vectors,
            _captions(len(vectors), 8, seed=start),
            rng.integers(200, 4000, (len(vectors), 3)),
            strict=True,
        )
        index.upsert(
            [
                {
                    "path": f"{number:09}.jpg",
                    "digest": f"{number:064x}",
                    "size": 100 * size,
                    "width": width,
                    "height": height,
                    "captions": [caption],
                    "image_vector": vector,
                    "text_vectors": nothing,
                    "pair_vectors": nothing,
                }
                for number, (vector, caption, (size, width, height)) in enumerate(rows, start=start)
            ]
        )
    index.optimize()
    return {}


def _group(uri: Path) -> Row:
    Index(uri).create_ann_index()
    return {}


def _asked(ask: Callable[[Any], T], queries: Iterable[Any]) -> tuple[Row, list[T]]:
    """Returns percentiles of the time of an answer after a warm-up, and all answers."""
    seconds, answers = [], []
    for query in queries:
        started = time.perf_counter()
        answers.append(ask(query))
        seconds.append(time.perf_counter() - started)
    cuts = statistics.quantiles(seconds[WARM_UP:], n=100)
    return {"p50_ms": round(1000 * cuts[49], 1), "p99_ms": round(1000 * cuts[98], 1)}, answers


def _product(uri: Path) -> Row:
    """The least that an exact search takes: the product of all vectors, in memory, with a query."""
    count = len(Index(uri))
    vectors = _vectors(uri, 0, count)
    return _asked(lambda query: float((vectors @ query)[0]), _vectors(uri, count))[0]


def _usearch(uri: Path) -> Row:
    """Another library, with all vectors in memory and its defaults; its seconds are mostly those of adding them."""
    from usearch.index import Index as Peer

    count = len(Index(uri))
    vectors, queries = _vectors(uri, 0, count), _vectors(uri, count)
    peer = Peer(ndim=vectors.shape[1], metric="cos")
    peer.add(np.arange(count), vectors)
    row, found = _asked(lambda query: peer.search(query, TOP).keys, queries)
    best = [np.argsort(-(vectors @ query))[:TOP] for query in queries]
    return row | {"recall_at_10": _shared(best, found)}


def _nearest(uri: Path, exact: bool) -> Row:
    index = Index(uri)
    queries = list(torch.from_numpy(_vectors(uri, len(index))))
    row, found = _asked(lambda query: index.nearest(query, TOP, exact=exact), queries)
    if exact:
        return row
    best = [[hit.path for hit in index.nearest(query, TOP, exact=True)] for query in queries]
    return row | {"recall_at_10": _shared(best, [[hit.path for hit in hits] for hits in found])}


def _shared(best: Sequence[Iterable[object]], found: Sequence[Iterable[object]]) -> float:
    return round(
        statistics.fmean(
            len({*one} & {*other}) / TOP for one, other in zip(best, found, strict=True)
        ),
        4,
    )


def _queries(uri: Path, index: Index) -> list[tuple[str, torch.Tensor]]:
    return list(
        zip(
            _captions(WARM_UP + QUERIES, 3, seed=2**31),
            torch.from_numpy(_vectors(uri, len(index))),
            strict=True,
        )
    )


def _words(uri: Path) -> Row:
    index = Index(uri)
    return _asked(lambda query: index.containing(query[0], query[1], TOP), _queries(uri, index))[0]


def _hybrid(uri: Path) -> Row:
    """What a search by words and exact vectors does without a model: 64 of each, at the same time, joined."""
    index, pool = Index(uri), ThreadPoolExecutor(1)

    def both(query: tuple[str, torch.Tensor]) -> list[Hit]:
        by_words = pool.submit(index.containing, *query, RERANK)
        return fuse_rankings(index.nearest(query[1], RERANK), by_words.result())

    return _asked(both, _queries(uri, index))[0]


def _by_digest(uri: Path) -> Row:
    """Looks up images from all over an index that was searched, as the server does for each thumbnail."""
    index = Index(uri)
    for query in torch.from_numpy(_vectors(uri, len(index)))[:2]:
        index.nearest(query, TOP)
    return _asked(
        index.with_digest, [f"{row * 7919 % len(index):064x}" for row in range(WARM_UP + QUERIES)]
    )[0]


def in_process(work: Callable[..., T], *arguments: Any) -> T:
    """Does some work in a process of its own, which sees nothing that other work left in memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def alone(work: Callable[..., Row], *arguments: Any) -> Row:
    """Does some work in a process of its own; adds its seconds, and how far its memory rose in MiB."""
    return in_process(_measured, work, arguments)


def _measured(work: Callable[..., Row], arguments: Sequence[Any]) -> Row:
    before, started = resident("VmRSS"), time.perf_counter()
    row = work(*arguments)
    return {
        **row,
        "seconds": round(time.perf_counter() - started, 1),
        "mib": resident("VmHWM") - before,
    }


def resident(name: str) -> int:
    """MiB of memory of this process: `VmRSS` now, `RssAnon` its own now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))


def update(count: int) -> Iterator[Row]:
    """Indexes generated photos with the demo's model, then once more, then after one percent of them has changed."""
    with tempfile.TemporaryDirectory() as place:
        photos, uri = Path(place) / "photos", Path(place) / "photos.lance"
        photos.mkdir()
        for number in range(count):
            photo(number).save(photos / f"{number:06}.jpg")
        first = _timed(photos, uri)
        yield {"what": f"first run over {count} images", **first}
        again = _timed(photos, uri)
        yield {
            "what": "again, nothing changed",
            **again,
            "share": round(again["seconds"] / first["seconds"], 4),
        }
        for number in range(count // 100):
            photo(count + number).save(photos / f"{number:06}.jpg")
        some = _timed(photos, uri)
        yield {
            "what": "again, 1 % changed",
            **some,
            "share": round(some["seconds"] / first["seconds"], 4),
        }


def photo(number: int) -> Image.Image:
    """A soft image of 640 x 480 with some detail, another for each number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    detail = rng.integers(-12, 13, (480, 640, 1), dtype=np.int16)
    return Image.fromarray(
        (np.asarray(coarse, dtype=np.int16) + detail).clip(0, 255).astype(np.uint8)
    )


def _timed(photos: Path, uri: Path) -> Row:
    report = build_index(photos, uri, trained_model(FOLDER), IndexConfig())
    return {"embedded": report.added + report.changed, "seconds": round(report.seconds, 2)}


def retrieval(num_texts: int, num_images: int, k: int) -> Iterator[Row]:
    """Recalls of generated texts and images, each number of stages in a process of its own."""
    size = f"{num_texts} texts x {num_images} images"
    yield {"what": f"{size}, by the cosine", **alone(_ranked, num_texts, num_images, 0)}
    yield {"what": f"{size}, {k} candidates each", **alone(_ranked, num_texts, num_images, k)}


def _ranked(num_texts: int, num_images: int, k: int) -> Row:
    images, index = generated(num_images, num_images, seed=1), torch.arange(num_texts) % num_images
    texts = torch.empty(num_texts, WIDTH)
    for rows, part in zip(texts.split(CHUNK), index.split(CHUNK), strict=True):
        rows[:] = _unit(images[part] + generated(len(part), num_images, seed=2))
    truth = GroundTruth(index, torch.arange(num_images))

    def cosines(rows: slice, columns: torch.Tensor) -> torch.Tensor:
        return images[rows] @ texts[columns].T

    found, recalls = {}, streamed_recalls(cosines, truth)
    if k:
        pairs = candidate_pairs(cosines, truth, RetrievalConfig(candidates=k))
        noise = torch.randn(len(pairs.image), generator=torch.Generator().manual_seed(0))
        itm = 3 * pairs.is_match + noise
        candidates = replace(pairs, itm=itm)
        fitted = candidates.fit_reranking()
        recalls = candidates.recalls(fitted.itc_weight)
        found = {
            "pairs": len(itm),
            "itc_weight": fitted.itc_weight,
            "ece": round(candidates.calibration_error(fitted), 4),
        }
    return {
        "text_to_image_r1": round(recalls.text_to_image[1], 3),
        "image_to_text_r1": round(recalls.image_to_text[1], 3),
        **found,
    }


def show(title: str, measured: Iterable[Row]) -> None:
    """Prints a line of JSON per row as it comes, then a table."""
    rows = []
    for row in measured:
        print(json.dumps({"benchmark": title, **row}), flush=True)
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    Console().print(table)


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument(
        "--vectors", type=int, default=1_000_000, help="of `million`, and texts of `retrieval`"
    )
    parser.add_argument(
        "--file", type=Path, help="of `million`, an array of vectors; the last 220 are queries"
    )
    parser.add_argument("--images", type=int, default=10_000, help="of `update`")
    parser.add_argument("--retrieval-images", type=int, default=5_000, help="of `retrieval`")
    parser.add_argument("--candidates", type=int, default=10, help="of each query of `retrieval`")
    given = parser.parse_args()
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "recall": recall,
        "million": lambda: million(given.vectors, given.file),
        "update": lambda: update(given.images),
        "retrieval": lambda: retrieval(given.vectors, given.retrieval_images, given.candidates),
    }
    for part in given.parts:
        show(part, parts[part]())


if __name__ == "__main__":
    main()
