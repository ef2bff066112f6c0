"""Vectors in fewer bytes; `benchmarks/quantized.py` measures the recall that they keep."""

from __future__ import annotations

import numpy as np

from bridgetower.bulk.config import Quantize

_MOST = 127  # of int8


def quantized(vectors: np.ndarray, kind: Quantize | None) -> np.ndarray:
    """Returns vectors in fewer bytes.

    Args:
        vectors: [n, c], float32.
        kind: `float16`; `int8`, each vector scaled so that its largest number is 127, which leaves its cosines; or
            `binary`, the signs, eight in a byte, to be compared by their Hamming distance. None: float32.

    Returns:
        [n, c], or [n, ⌈c/8⌉] of `binary`, as uint8.
    """
    if kind is None:
        return vectors
    if kind == "float16":
        return vectors.astype(np.float16)
    if kind == "int8":
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        return np.rint(vectors * (_MOST / np.where(largest > 0, largest, _MOST))).astype(np.int8)
    return np.packbits(vectors > 0, axis=1)
