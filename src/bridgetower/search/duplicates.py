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
    groups = defaultdict[int, list[tuple[dict[str, Any], np.ndarray]]](list)
    start = 0
    for batch in index.checked_scan([*RETURNED, "image_vector"]):
        end = start + len(batch)
        selected = np.flatnonzero(has_duplicates[start:end])
        duplicates = batch.take(selected)
        rows = duplicates.select(RETURNED).to_pylist()
        labels_of_rows = labels[start + selected].tolist()
        for row, vector, label in zip(rows, image_matrix(duplicates), labels_of_rows, strict=True):
            groups[label].append((row, vector))
        start = end
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
                    rows, columns = np.nonzero(block_tile @ tile.T >= threshold - _ROUNDING)
                    first = labels[block_tile_start + rows]
                    second = labels[start + columns]
                    is_new = first != second
                    if is_new.any():
                        edges = (first[is_new], second[is_new])
                        shape = (num_images, num_images)
                        graph = coo_array((np.ones(is_new.sum()), edges), shape=shape)
                        _, components = connected_components(graph, directed=False)
                        labels = components[labels]
            advance(end - block_start)
    return labels


def _hits(index: Index, group: list[tuple[dict[str, Any], np.ndarray]]) -> list[Hit]:
    def order(entry: tuple[dict[str, Any], np.ndarray]) -> tuple[int, int, str]:
        row, _ = entry
        return -row["width"] * row["height"], -row["size"], row["path"]

    group.sort(key=order)
    vectors = np.stack([vector for _, vector in group])
    lengths = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ vectors[0] / (lengths * lengths[0])
    return [
        index.hit(row, "images", cosine)
        for (row, _), cosine in zip(group, cosines.tolist(), strict=True)
    ]


def _tiles(index: Index) -> Iterator[tuple[int, Float[np.ndarray, "n c"]]]:
    """Yields vectors at length one, with the index of the first."""
    start = 0
    for vectors in index.image_vectors():
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        for tile in np.split(unit, range(_TILE, len(unit), _TILE)):
            yield start, tile
            start += len(tile)
