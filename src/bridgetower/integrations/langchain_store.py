"""LangChain: an index of images as a vector store, to which texts, images and images with texts can be added."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bridgetower.data.example import Example, Image
from bridgetower.data.fetch import is_url
from bridgetower.data.store import Uri
from bridgetower.extras import require
from bridgetower.files import json_object

require("langchain")
require("search")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from bridgetower.integrations.langchain import BridgeTowerEmbeddings, document_of
from bridgetower.search.build import new_index, row_of
from bridgetower.search.embedding import Embedder
from bridgetower.search.index import Hit, Index, Indexed, file_of, write_lock
from bridgetower.search.searcher import Against, Searcher

Filter = Mapping[str, Any] | Callable[[Document], bool]
"""Values that metadata have, or a function of a document."""


class BridgeTowerVectorStore(VectorStore):
    """Documents in an index: images, images with texts, and texts.

    The id of a document is its path in the index. A text without an image is found by its own vector, in the place of
    an image's. Indexes that `bridgetower index` made are searched as well; their documents are those of
    `BridgeTowerRetriever`.

    Attributes:
        searcher: The index with its model.
    """

    def __init__(self, index: Uri, embedding: BridgeTowerEmbeddings, *, root: Path | None = None) -> None:
        """Opens an index, or makes an empty one.

        Args:
            index: Where it is, its name ending in `.lance`.
            embedding: The model.
            root: Folder that paths of images start from; default: the one that the index names, of a new one the one
                that it is in, or of one in an object store the working directory.

        Raises:
            ValueError: The index was made with another model.
        """
        self._embedding, predictor = embedding, embedding.predictor
        if not Index.exists(index):
            place = root or (Path.cwd() if is_url(index) else Path(index).resolve().parent)
            with write_lock(index):
                new_index(index, predictor, place)
        self.searcher = Searcher(Index(index, root=root), predictor)

    @property
    def embeddings(self) -> Embeddings:
        """The model."""
        return self._embedding

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        images: Sequence[str | Path] | None = None,
    ) -> list[str]:
        """Adds texts, or images with a text each; documents with ids that are there are replaced.

        Args:
            texts: What documents say.
            metadatas: Of each, of values that JSON has.
            ids: Of each; made up where there is none.
            images: Files or URLs, image n for text n.

        Returns:
            The ids.

        Raises:
            ValueError: There are not as many of one as of the other, a text is too long, or an image cannot be used.
        """
        given = list(texts)
        if images is not None:
            return self.add_images(images, metadatas, ids=ids, texts=given)
        names = _names(given, metadatas, ids)
        vectors = self._embedding.embed_documents(given)
        rows = [
            {
                "path": name,
                "captions": [text],
                "place": _place({"metadata": about}),
                "digest": hashlib.sha256(text.encode()).hexdigest(),
                "width": 0,
                "height": 0,
                "image_vector": np.array(vector, np.float32),
                "text_vectors": np.array([vector], np.float32),
                "pair_vectors": np.empty((0, 0), np.float32),
            }
            for name, text, vector, about in zip(names, given, vectors, metadatas or [{}] * len(given), strict=True)
        ]
        return self._written(rows, names)

    def add_images(
        self,
        uris: Sequence[str | Path],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        texts: Sequence[str] | None = None,
    ) -> list[str]:
        """Adds images, as `add_texts` adds texts; metadata get the file or URL as `source`.

        Args:
            uris: Files or URLs.
            metadatas: Of each, of values that JSON has.
            ids: Of each; made up where there is none.
            texts: Captions or transcripts, text n for image n.

        Returns:
            The ids.

        Raises:
            ValueError: There are not as many of one as of the other, a text is too long, or an image cannot be used.
        """
        names = _names(uris, metadatas, ids)
        if texts is not None and len(texts) != len(uris):
            raise ValueError(f"{len(uris)} images and {len(texts)} texts; expected as many of one as of the other")
        examples = [
            Example(
                id=name,
                images=(Image(name=name, place=str(uri)),),
                texts=(texts[number],) if texts else (),
                place=str(uri),
            )
            for number, (name, uri) in enumerate(zip(names, uris, strict=True))
        ]
        embedder = Embedder(
            self.searcher.predictor,
            "images",
            truncate=self._embedding.truncate,
            batch_size=self._embedding.batch_size,
            with_texts=True,
        )
        rows = []
        decoded = embedder.embed(*embedder.decoder()(examples)) if examples else []
        for one, about in zip(decoded, metadatas or [{}] * len(examples), strict=True):
            uri = one.example.place
            if one.problem:
                raise ValueError(f"{uri}: {one.problem}; nothing was added")
            file = {"url": uri} if is_url(uri) else {"file": os.path.relpath(uri, self.searcher.index.root)}
            place = _place({**file, "metadata": {"source": uri, **about}})
            rows.append(row_of(one, {"path": one.example.id, "captions": list(one.example.texts), "place": place}))
        return self._written(rows, names)

    def _written(self, rows: Sequence[Mapping[str, Any]], names: list[str]) -> list[str]:
        with write_lock(self.searcher.index.uri):
            self.searcher.index.upsert(list({row["path"]: row for row in rows}.values()))
            self.searcher.index.optimize()
        return names

    def delete(self, ids: list[str] | None = None) -> bool:
        """Deletes documents; None: all. Ids that are not there are passed over."""
        index = self.searcher.index
        with write_lock(index.uri):
            index.remove(index.paths() if ids is None else ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Returns the documents with some ids, in their order; those that are not there are left out."""
        index = self.searcher.index
        found = {one.path: _document(one, file_of(one, index.root)) for one in index.with_paths(ids)}
        return [found[id_] for id_ in ids if id_ in found]

    def similarity_search_with_score(
        self,
        query: str,
        k: int = 4,
        *,
        filter: Filter | None = None,  # noqa: A002 - its name in LangChain
        where: str | None = None,
        against: Against | None = None,
        rerank: int = 0,
    ) -> list[tuple[Document, float]]:
        """Returns the best documents for a text with their cosines, best first.

        Args:
            query: What to look for.
            k: Documents.
            filter: Which documents; they are compared after the search, which looks further until there are `k`.
            where: A condition in SQL on columns of the index, such as `width > 800`.
            against: What the text is compared with, as of `Searcher.search`.
            rerank: Of the nearest documents, how many are matched with the text if they have an image; they come first.
        """
        truncate = self._embedding.truncate

        def search(count: int) -> list[Hit]:
            return self.searcher.search(
                query, top=count, where=where, against=against, rerank=rerank, truncate=truncate
            )

        return _chosen(search, k, filter)

    def similarity_search(self, query: str, k: int = 4, **settings: Any) -> list[Document]:
        """Returns the best documents for a text; see `similarity_search_with_score`."""
        return [document for document, _ in self.similarity_search_with_score(query, k, **settings)]

    def similarity_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        *,
        filter: Filter | None = None,  # noqa: A002 - its name in LangChain
        where: str | None = None,
    ) -> list[Document]:
        """Returns the documents whose image, or text without one, is nearest to a vector of `embed_query`."""
        vector: Float[Tensor, " c"] = torch.tensor(embedding)
        found = _chosen(lambda count: self.searcher.index.nearest(vector, count, where=where), k, filter)
        return [document for document, _ in found]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **settings: Any
    ) -> list[Document]:
        """Returns documents for a text that differ from each other; see `max_marginal_relevance_search_by_vector`."""
        vector = self._embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, **settings)

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **settings: Any
    ) -> list[Document]:
        """Returns documents that are near to a vector and differ from each other.

        Args:
            embedding: The vector.
            k: Documents.
            fetch_k: The nearest, of which they are chosen.
            lambda_mult: 1 counts nearness alone, 0 difference alone.
            settings: Of `similarity_search_by_vector`.
        """
        found = self.similarity_search_by_vector(embedding, fetch_k, **settings)
        vectors = self.searcher.index.image_vectors([str(document.id) for document in found])
        others = [vectors[str(document.id)] for document in found]
        chosen = maximal_marginal_relevance(np.array(embedding), others, lambda_mult, k) if found else []
        return [found[number] for number in chosen]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(1.0, max(0.0, (1 + cosine) / 2))

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        index: Uri | None = None,
        images: Sequence[str | Path] | None = None,
    ) -> BridgeTowerVectorStore:
        """Opens or makes an index and adds texts, or images with a text each.

        Args:
            texts: See `add_texts`.
            embedding: `BridgeTowerEmbeddings`.
            metadatas: See `add_texts`.
            ids: See `add_texts`.
            index: Where it is, its name ending in `.lance`.
            images: See `add_texts`.

        Raises:
            ValueError: There is no index, or other embeddings.
        """
        if index is None:
            raise ValueError("from_texts has no index; give where it is or shall be, such as index='documents.lance'")
        if not isinstance(embedding, BridgeTowerEmbeddings):
            raise ValueError(f"embedding is {type(embedding).__name__}; expected BridgeTowerEmbeddings")
        store = cls(index, embedding)
        store.add_texts(texts, metadatas, ids=ids, images=images)
        return store


def _names(given: Sequence[Any], metadatas: Sequence[Any] | None, ids: Sequence[str | None] | None) -> list[str]:
    """Returns the ids of documents, made up where there is none.

    Raises:
        ValueError: There are not as many metadata or ids as documents.
    """
    for name, values in (("metadatas", metadatas), ("ids", ids)):
        if values is not None and len(values) != len(given):
            raise ValueError(
                f"{len(given)} documents and {len(values)} {name}; expected as many of one as of the other"
            )
    return [name or str(uuid4()) for name in ids or [None] * len(given)]


def _place(where: Mapping[str, Any]) -> str:
    """Returns where an image is, together with metadata.

    Raises:
        ValueError: They have values that JSON has not.
    """
    try:
        return json.dumps(where)
    except TypeError as error:
        raise ValueError(f"metadata {where['metadata']!r} cannot be kept ({error}); expected values of JSON") from error


def _document(one: Indexed, file: Path | str) -> Document:
    """Returns the document that was added or, of an index from elsewhere, that of a hit."""
    about = json_object(one.place or "{}", "the place of an image").get("metadata")
    if about is None:
        return document_of(one, file, id_=one.path)
    return Document(id=one.path, page_content="\n".join(one.captions), metadata=about)


def _chosen(search: Callable[[int], list[Hit]], k: int, filter_: Filter | None) -> list[tuple[Document, float]]:
    """Searches for more and more until `k` documents pass the filter."""
    if isinstance(filter_, str):
        raise ValueError(f"filter is {filter_!r}; expected metadata or a function; give a condition in SQL as where")
    wanted = {} if filter_ is None or callable(filter_) else filter_

    def passes(document: Document) -> bool:
        if callable(filter_):
            return filter_(document)
        return all(document.metadata.get(name) == value for name, value in wanted.items())

    count = k
    while True:
        hits = search(count)
        found = [(document, hit.cosine) for hit in hits if passes(document := _document(hit, hit.file))]
        if len(found) >= k or len(hits) < count:
            return found[:k]
        count *= 4
