"""Recall that vectors in fewer bytes keep: python research/quantized.py; prints tables and lines of JSON.

For every query the ten nearest of the float32 vectors are the truth. Compared are those that `embed --quantize` writes:
int8 by cosine, binary by Hamming distance, and each with the best forty ranked again by their float32 vectors. The
vectors are those of the demo's index, image vectors searched by captions, and generated ones.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import lancedb
import numpy as np

from bridgetower.inference.config import Quantize
from bridgetower.inference.vector_files import quantized
from bridgetower_demo.folder import FOLDER, held_out_index

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from search import PER_CENTRE, TOP, Row, generated, show

KINDS: tuple[Quantize | None, ...] = (None, "float16", "int8", "binary")
AGAIN = 4 * TOP  # that are ranked again
AT_ONCE = 100  # queries


def of_index(uri: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image vectors of an index, and the first caption's vector of each image that has one."""
    table = lancedb.connect(uri.parent).open_table(uri.stem).to_arrow()
    texts = [vectors[0] for vectors in table["text_vectors"].to_pylist() if vectors]
    return np.array(table["image_vector"].to_pylist(), np.float32), np.array(texts, np.float32)


def similarities(queries: np.ndarray, vectors: np.ndarray, kind: Quantize | None) -> np.ndarray:
    """Returns what ranks stored vectors for queries, which are stored likewise: [queries, vectors]."""
    if kind == "binary":
        bits = [np.unpackbits(one, axis=1).astype(np.float32) * 2 - 1 for one in (queries, vectors)]
        return bits[0] @ bits[1].T
    found = [one.astype(np.float32) for one in (queries, vectors)]
    found = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in found]
    return found[0] @ found[1].T


def nearest(similarity: np.ndarray, count: int) -> np.ndarray:
    """Returns the columns with the largest values of each row, those first."""
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]


def measured(vectors: np.ndarray, queries: np.ndarray) -> Iterator[Row]:
    """Yields the recall at ten of each kind of vectors, alone and with the best ranked again."""
    parts = [queries[start : start + AT_ONCE] for start in range(0, len(queries), AT_ONCE)]
    truth = [nearest(similarities(part, vectors, None), TOP) for part in parts]
    for kind in KINDS:
        stored, alone, again = quantized(vectors, kind), [], []
        for part, best in zip(parts, truth, strict=True):
            found = nearest(similarities(quantized(part, kind), stored, kind), AGAIN)
            exact = np.einsum("qc,qnc->qn", part, vectors[found])
            ranked = np.take_along_axis(found, nearest(exact, TOP), axis=1)
            alone += [
                len({*one[:TOP]} & {*other}) / TOP for one, other in zip(found, best, strict=True)
            ]
            again += [len({*one} & {*other}) / TOP for one, other in zip(ranked, best, strict=True)]
        yield {
            "vectors": kind or "float32",
            "bytes": stored.itemsize * stored.shape[1],
            "recall_at_10": round(float(np.mean(alone)), 4),
            "ranked_again": round(float(np.mean(again)), 4),
        }


def main() -> None:
    """Measures the demo's vectors, where it has run, and generated ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--index", type=Path, default=held_out_index(FOLDER), help="whose vectors are measured"
    )
    parser.add_argument(
        "--generated", type=int, default=100_000, help="how many vectors are generated"
    )
    given = parser.parse_args()
    if given.index.exists():
        vectors, queries = of_index(given.index)
        show(
            f"{given.index.name}: {len(queries)} captions, {len(vectors)} images",
            measured(vectors, queries),
        )
    vectors, queries = (
        generated(count, given.generated // PER_CENTRE, seed).numpy()
        for count, seed in ((given.generated, 1), (200, -1))
    )
    show(f"{len(vectors)} generated vectors", measured(vectors, queries))


if __name__ == "__main__":
    main()
