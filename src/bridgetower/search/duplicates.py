"""Near-duplicates in an index: groups of images whose vectors are almost the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bridgetower.progress import counting
from bridgetower.search.index import RETURNED, Hit, Index

BLOCK = 2**28
"""Bytes of vectors in memory: all others are read once for each such block."""

_TILE = 2048  # vectors that are compared at once with as many others
_ROUNDING = 1e-6  # of a cosine: that of a vector with itself may be a little less than 1


def near_duplicates(
    index: Index, threshold: float = 0.95, *, progress: bool = False
) -> list[list[Hit]]:
    """Returns groups of images, the largest first: chains of images whose cosine is at least the threshold.

    The first image of a group has the most pixels, then the most bytes; `cosine` is that with the first.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a cosine above 0 and at most 1")
    paths = index.paths()
    labels, start = np.arange(len(paths)), 0
    with counting("comparing images", total=len(paths), enabled=progress) as advance:
        while start < len(paths):
            kept, held = list[tuple[int, np.ndarray]](), 0
            for place, tile in _tiles(index):
                if place >= start and held < BLOCK:
                    kept.append((place, tile))
                    held += tile.nbytes
                for first, other in kept:
                    rows, columns = np.nonzero(other @ tile.T >= threshold - _ROUNDING)
                    ends = labels[first + rows], labels[place + columns]
                    if (new := ends[0] != ends[1]).any():
                        edges = np.ones(new.sum()), (ends[0][new], ends[1][new])
                        graph = coo_array(edges, shape=(len(paths), len(paths)))
                        labels = connected_components(graph, directed=False)[1][labels]
            start += (num_kept := sum(len(tile) for _, tile in kept))
            advance(num_kept)
    several, start = np.bincount(labels)[labels] > 1, 0
    groups = defaultdict[int, list[tuple[dict[str, Any], np.ndarray]]](list)
    for batch in index.checked_scan([*RETURNED, "image_vector"]):
        own = np.flatnonzero(several[start : start + len(batch)])
        vectors = (
            batch["image_vector"].combine_chunks().flatten().to_numpy().reshape(len(batch), -1)[own]
        )
        rows = batch.select(RETURNED).take(own).to_pylist()
        for row, vector, label in zip(rows, vectors, labels[start + own].tolist(), strict=True):
            groups[label].append((row, vector))
        start += len(batch)
    if index.paths() != paths:
        raise OSError(f"{index.uri} was written while it was read; run the same command again")
    found = [_hits(index, group) for group in groups.values()]
    return sorted(found, key=lambda group: (-len(group), group[0].path))


def _hits(index: Index, group: list[tuple[dict[str, Any], np.ndarray]]) -> list[Hit]:
    group.sort(
        key=lambda one: (-one[0]["width"] * one[0]["height"], -one[0]["size"], one[0]["path"])
    )
    vectors = np.stack([vector for _, vector in group])
    cosines = vectors @ vectors[0] / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(vectors[0]))
    return [
        index.hit(row, "images", cosine)
        for (row, _), cosine in zip(group, cosines.tolist(), strict=True)
    ]


def _tiles(index: Index) -> Iterator[tuple[int, Float[np.ndarray, "n c"]]]:
    """Yields vectors of length one with the number of the first."""
    start = 0
    for part in index.image_vectors():
        unit = part / np.linalg.norm(part, axis=1, keepdims=True)
        for some in np.split(unit, range(_TILE, len(unit), _TILE)):
            yield start, some
            start += len(some)
