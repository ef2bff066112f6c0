"""LanceDB: importing this module registers the embedding function `bridgetower`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np

from bridgetower.extras import require
from bridgetower.inference.predictor import Predictor, load

require("search")

from lancedb.embeddings import EmbeddingFunction, register


@register("bridgetower")
class BridgeTowerEmbeddings(EmbeddingFunction):
    """L2-normalised vectors of texts or images, so that a table of either can be searched by both.

    A table stores these fields, not the model, which is loaded when it is first needed.
    """

    name: str  # the model, as `bridgetower.load` takes it
    source: Literal["image", "text"] = (
        "image"  # content of the source column; images are files or bytes
    )
    device: str | None = None  # such as `cpu`; None takes a GPU if there is one
    batch_size: int = 32
    truncate: bool = False  # cut texts that are too long instead of refusing them
    max_retries: int = 0  # another attempt would fail too

    def ndims(self) -> int:
        """Returns the width of the vectors."""
        return len(self.compute_query_embeddings("a")[0])

    def compute_query_embeddings(self, query: Any, *_: Any, **__: Any) -> list[np.ndarray]:
        """Returns the vector of a text (a string), or of an image (bytes, PIL image, array)."""
        return self._vectors([query], is_text=isinstance(query, str))

    def compute_source_embeddings(self, inputs: Any, *_: Any, **__: Any) -> list[np.ndarray]:
        """Returns the vectors of values of the source column."""
        return self._vectors(list(self.sanitize_input(inputs)), is_text=self.source == "text")

    def _vectors(self, inputs: list[Any], *, is_text: bool) -> list[np.ndarray]:
        predictor = _load_once(self.name, self.device)
        if is_text:
            vectors = predictor.embed_texts(
                inputs, batch_size=self.batch_size, truncate=self.truncate
            )
        else:
            vectors = predictor.embed_images(inputs, batch_size=self.batch_size)
        return list(vectors.numpy())


@lru_cache(maxsize=4)
def _load_once(name: str, device: str | None) -> Predictor:
    return load(name, device=device)
