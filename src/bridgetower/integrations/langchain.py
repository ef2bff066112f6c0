"""LangChain: embeddings by a model of this package, and a retriever over an index."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridgetower.extras import require
from bridgetower.predictor import Predictor, load
from bridgetower.processor import ImageLike

require("langchain")
require("search")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever

from bridgetower.search.index import Indexed
from bridgetower.search.searcher import Against, Searcher


class BridgeTowerEmbeddings(Embeddings):
    """L2-normalised vectors of texts, of images, and of images with texts.

    Attributes:
        predictor: The model.
        batch_size: Inputs at once.
        truncate: Cut texts that are too long instead of refusing them.
    """

    def __init__(
        self, model: Predictor | str | Path, *, batch_size: int = 32, truncate: bool = False, **options: Any
    ) -> None:
        """Loads a model, with options of `bridgetower.load`, unless it is loaded."""
        self.predictor = model if isinstance(model, Predictor) else load(model, **options)
        self.batch_size, self.truncate = batch_size, truncate

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Returns a vector for each text."""
        return self._listed(self.predictor.embed_texts, texts, truncate=self.truncate)

    def embed_query(self, text: str) -> list[float]:
        """Returns the vector of a text."""
        return self.embed_documents([text])[0]

    def embed_image(self, uris: Sequence[ImageLike]) -> list[list[float]]:
        """Returns a vector for each image; images are files, bytes, PIL images or arrays."""
        return self._listed(self.predictor.embed_images, uris)

    def embed_image_text_pairs(self, texts: list[str], images: Sequence[ImageLike]) -> list[list[float]]:
        """Returns a joint vector for each image with its text; there are as many of one as of the other."""
        return self._listed(self.predictor.embed_pairs, images, texts, truncate=self.truncate)

    def _listed(self, embed: Any, *inputs: Sequence[Any], **options: Any) -> list[list[float]]:
        return embed(*inputs, batch_size=self.batch_size, **options).tolist() if any(map(len, inputs)) else []


class BridgeTowerRetriever(BaseRetriever):
    """Finds images of an index for a text, as `Searcher.search` does.

    A document has the captions of an image, one a line; its metadata are those of the hit, with the file as `source`.

    Attributes:
        searcher: The index with its model.
        k: Documents to return.
        rerank: Candidates that are matched with the text.
        where: Condition in SQL on columns of the index.
        against: What the text is compared with.
        truncate: Cut texts that are too long instead of refusing them.
    """

    searcher: Any
    k: int = 4
    rerank: int | None = None
    where: str | None = None
    against: Against | None = None
    truncate: bool = False

    @classmethod
    def of(cls, index: str | Path, model: Predictor | str | Path | None = None, **fields: Any) -> BridgeTowerRetriever:
        """Opens an index; None loads the model that it was made with. `fields` are the attributes."""
        return cls(searcher=Searcher(index, model), **fields)

    def _get_relevant_documents(
        self, query: str, *, run_manager: Any, k: int | None = None, where: str | None = None
    ) -> list[Document]:
        """Returns the documents of the best images; `k` and `where` of a call go before those of the retriever."""
        hits = self.searcher.search(
            query,
            top=self.k if k is None else k,
            where=self.where if where is None else where,
            rerank=self.rerank,
            against=self.against,
            truncate=self.truncate,
        )
        return [document_of(hit, hit.file, id_=hit.digest) for hit in hits]

    async def _aget_relevant_documents(self, query: str, *, run_manager: Any, **changes: Any) -> list[Document]:
        return await asyncio.to_thread(self._get_relevant_documents, query, run_manager=None, **changes)


def document_of(one: Indexed, file: Path | str, *, id_: str) -> Document:
    """Returns the document of an image of an index: its captions, with what is known of it as metadata."""
    about = {**vars(one), "source": str(file), "captions": list(one.captions)}
    about.pop("file", None)
    return Document(id=id_, page_content="\n".join(one.captions), metadata=about)
