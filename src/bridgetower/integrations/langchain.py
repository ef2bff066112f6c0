"""LangChain: embeddings by a model of this package, and a retriever over an index."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bridgetower.extras import require
from bridgetower.inference.predictor import Predictor, load
from bridgetower.processor import ImageLike

require("langchain")
require("search")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

from bridgetower.search.searcher import Searcher


class BridgeTowerEmbeddings(Embeddings):
    """L2-normalised vectors of texts, of images, and of images with texts.

    Any vector store of LangChain takes them.
    """

    def __init__(
        self,
        model: Predictor | str | Path,
        *,
        batch_size: int = 32,
        truncate: bool = False,
        **options: Any,
    ) -> None:
        """Loads a model unless it is loaded.

        Args:
            model: The loaded model, or what to load.
            batch_size: Inputs computed at once.
            truncate: Cut texts that are too long instead of refusing them.
            options: Of `bridgetower.load`.
        """
        self.predictor = model if isinstance(model, Predictor) else load(model, **options)
        self.batch_size = batch_size
        self.truncate = truncate

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Returns a vector for each text."""
        return self._vectors(self.predictor.embed_texts, texts, truncate=self.truncate)

    def embed_query(self, text: str) -> list[float]:
        """Returns the vector of a text."""
        return self.embed_documents([text])[0]

    def embed_image(self, uris: Sequence[ImageLike]) -> list[list[float]]:
        """Returns a vector for each image: a file, bytes, a PIL image or an array."""
        return self._vectors(self.predictor.embed_images, uris)

    def embed_image_text_pairs(
        self, texts: list[str], images: Sequence[ImageLike]
    ) -> list[list[float]]:
        """Returns a joint vector for each image with its text, of which there are as many."""
        return self._vectors(self.predictor.embed_pairs, images, texts, truncate=self.truncate)

    def _vectors(
        self, embed: Callable[..., Any], *inputs: Sequence[Any], **options: Any
    ) -> list[list[float]]:
        if not any(map(len, inputs)):
            return []
        return embed(*inputs, batch_size=self.batch_size, **options).tolist()


class BridgeTowerRetriever(BaseRetriever):
    """Finds images or moments of an index in two stages, as `Searcher.search` does.

    The id of a document is the path of its image in the index, its text the captions, one a line. Its metadata are the
    fields of a `Hit`, and the file as `source`.

    Attributes:
        searcher: The index with its model.
        search_kwargs: Options of `Searcher.search`, such as `top`, `where` and `rerank`. `invoke` takes them too.
    """

    searcher: Searcher
    search_kwargs: dict[str, Any] = Field(default_factory=dict)

    def _get_relevant_documents(
        self, query: str, *, run_manager: object, **search_kwargs: Any
    ) -> list[Document]:
        documents = []
        for hit in self.searcher.search(query, **{**self.search_kwargs, **search_kwargs}):
            metadata = {**vars(hit), "source": str(hit.file), "captions": list(hit.captions)}
            del metadata["file"]
            text = "\n".join(hit.captions)
            documents.append(Document(id=hit.path, page_content=text, metadata=metadata))
        return documents

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: object, **search_kwargs: Any
    ) -> list[Document]:
        search = partial(self._get_relevant_documents, query, run_manager=run_manager)
        return await asyncio.to_thread(search, **search_kwargs)
