"""LlamaIndex: a multi-modal embedding by a model of this package."""

from __future__ import annotations

import asyncio
from io import BytesIO
from pathlib import Path
from typing import Any

from bridgetower.extras import require
from bridgetower.inference.predictor import Predictor, load

require("llama-index")

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.embeddings import MultiModalEmbedding


class BridgeTowerEmbedding(MultiModalEmbedding):
    """L2-normalised vectors of texts and of images, which can be compared.

    Other processes, and readers of `to_dict`, load the model with `options` of `bridgetower.load`. Texts that are too
    long are cut with `truncate`.
    """

    truncate: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    _predictor: Predictor = PrivateAttr()

    def __init__(self, model: Predictor | str | Path | None = None, **fields: Any) -> None:
        """Loads a model unless it is loaded.

        Args:
            model: The loaded model, or what to load; None: `model_name`.
            fields: Of LlamaIndex.
        """
        source = fields.get("model_name") if model is None else model
        if source is None:
            raise ValueError("no model is given; give the loaded model, or what to load")
        if isinstance(source, Predictor):
            predictor = source
        else:
            predictor = load(source, **fields.get("options", {}))
        super().__init__(**{"model_name": predictor.source, **fields})
        self._predictor = predictor

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)

    @classmethod
    def class_name(cls) -> str:
        """Its name in LlamaIndex."""
        return "BridgeTowerEmbedding"

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._predictor.embed_texts(
            texts, batch_size=self.embed_batch_size, truncate=self.truncate
        ).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    def _get_image_embeddings(self, img_file_paths: list[str | BytesIO]) -> list[list[float]]:
        return self._predictor.embed_images(
            img_file_paths, batch_size=self.embed_batch_size
        ).tolist()

    def _get_image_embedding(self, img_file_path: str | BytesIO) -> list[float]:
        return self._get_image_embeddings([img_file_path])[0]

    # The base class computes in the thread of the event loop, or not at all.

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_image_embedding(self, img_file_path: str | BytesIO) -> list[float]:
        return await asyncio.to_thread(self._get_image_embedding, img_file_path)

    async def _aget_image_embeddings(
        self, img_file_paths: list[str | BytesIO]
    ) -> list[list[float]]:
        return await asyncio.to_thread(self._get_image_embeddings, img_file_paths)
