"""Near-duplicates in an index: groups of images whose vectors are almost the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bridgetower.progress import counting
from bridgetower.search.index import RETURNED, Index, image_matrix
from bridgetower.search.indexed import Hit

BLOCK = 2**28
"""Bytes of vectors in memory. All other vectors are read once for each block."""

_TILE = 2048  # vectors compared at once with as many others
_ROUNDING = 1e-6  # by which the cosine of a vector with itself may be less than 1

_Row = tuple[dict[str, Any], Float[np.ndarray, " c"]]  # columns of an image, and its vector


def near_duplicates(
    index: Index, threshold: float = 0.95, *, progress: bool = False
) -> list[list[Hit]]:
    """Returns groups of images, the largest first: chains of images whose cosine is at least the threshold.

    The first image of a group has the most pixels, then the most bytes; `cosine` is that with the first.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a cosine above 0 and at most 1")
    paths = index.paths()
    labels = _group_labels(index, len(paths), threshold, progress)

    # Images that are alone in their group are no duplicates.
    has_duplicates = np.bincount(labels)[labels] > 1
    groups = defaultdict[int, list[_Row]](list)
    start = 0
    for batch in index.checked_scan([*RETURNED, "image_vector"]):
        indices = np.flatnonzero(has_duplicates[start : start + len(batch)])
        duplicates = batch.take(indices)
        vectors = image_matrix(duplicates)
        rows = duplicates.select(RETURNED).to_pylist()
        row_labels = labels[start + indices].tolist()
        for row, vector, label in zip(rows, vectors, row_labels, strict=True):
            groups[label].append((row, vector))
        start += len(batch)
    if index.paths() != paths:
        raise OSError(f"{index.uri} was written while it was read; run the same command again")
    hits_of_groups = [_hits(index, group) for group in groups.values()]
    return sorted(hits_of_groups, key=lambda hits: (-len(hits), hits[0].path))


def _group_labels(
    index: Index, num_images: int, threshold: float, progress: bool
) -> Int[np.ndarray, " n"]:
    """Labels each image with its group: images whose cosine is at least the threshold have one label."""
    labels = np.arange(num_images)
    end = 0  # of the images that were compared with all others
    with counting("comparing images", total=num_images, enabled=progress) as advance:
        while end < num_images:
            block = []
            num_bytes = 0
            block_start = end
            for start, tile in _tiles(index):
                if start >= block_start and num_bytes < BLOCK:
                    block.append((start, tile))
                    num_bytes += tile.nbytes
                    end = start + len(tile)
                for block_tile_start, block_tile in block:
                    cosines = block_tile @ tile.T
                    rows, columns = np.nonzero(cosines >= threshold - _ROUNDING)
                    first_labels = labels[block_tile_start + rows]
                    second_labels = labels[start + columns]
                    labels = _join_groups(labels, first_labels, second_labels)
            advance(end - block_start)
    return labels


def _join_groups(
    labels: Int[np.ndarray, " n"],
    first_labels: Int[np.ndarray, " pairs"],
    second_labels: Int[np.ndarray, " pairs"],
) -> Int[np.ndarray, " n"]:
    """Labels images anew so that the groups of each pair are one."""
    is_new = first_labels != second_labels
    if not is_new.any():
        return labels
    edges = (first_labels[is_new], second_labels[is_new])
    weights = np.ones(is_new.sum())
    graph = coo_array((weights, edges), shape=(len(labels), len(labels)))
    _, components = connected_components(graph, directed=False)
    return components[labels]


def _hits(index: Index, group: list[_Row]) -> list[Hit]:
    group.sort(key=_size_order)
    vectors = np.stack([vector for _, vector in group])
    lengths = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ vectors[0] / (lengths * lengths[0])
    hits = []
    for (row, _), cosine in zip(group, cosines.tolist(), strict=True):
        hits.append(index.hit(row, "images", cosine))
    return hits


def _size_order(entry: _Row) -> tuple[int, int, str]:
    """Returns a key that sorts rows by pixels, then by bytes, both from the largest, then by path."""
    row, _ = entry
    num_pixels = row["width"] * row["height"]
    return -num_pixels, -row["size"], row["path"]


def _tiles(index: Index) -> Iterator[tuple[int, Float[np.ndarray, "n c"]]]:
    """Yields vectors at length one, with the index of the first."""
    start = 0
    for vectors in index.image_vectors():
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / lengths
        for tile in np.split(unit, range(_TILE, len(unit), _TILE)):
            yield start, tile
            start += len(tile)
