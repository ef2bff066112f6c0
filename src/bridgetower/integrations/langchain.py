"""LangChain: embeddings by a model of this package, and an index as a vector store."""

from __future__ import annotations

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

from bridgetower.data.sets.store import Table, Uri
from bridgetower.data.sources.example import Example, Image
from bridgetower.data.sources.fetch import is_url
from bridgetower.extras import require
from bridgetower.inference.config import SourceConfig
from bridgetower.inference.predictor import Predictor, load
from bridgetower.processor import ImageLike
from bridgetower.search.config import Against

require("langchain")
require("search")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from bridgetower.inference.embed import Of, embedded, write_lock
from bridgetower.search.build import new_index, row_of
from bridgetower.search.index import Hit, Index, Indexed
from bridgetower.search.searcher import Searcher

Filter = Mapping[str, Any] | Callable[[Document], bool]
"""Values that metadata have, or a function of a document."""


class BridgeTowerEmbeddings(Embeddings):
    """L2-normalised vectors of texts, of images, and of images with texts; too long texts are cut with `truncate`."""

    def __init__(
        self,
        model: Predictor | str | Path,
        *,
        batch_size: int = 32,
        truncate: bool = False,
        **options: Any,
    ) -> None:
        """Loads a model, with options of `bridgetower.load`, unless it is loaded."""
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
        """Returns a vector for each image; images are files, bytes, PIL images or arrays."""
        return self._vectors(self.predictor.embed_images, uris)

    def embed_image_text_pairs(
        self, texts: list[str], images: Sequence[ImageLike]
    ) -> list[list[float]]:
        """Returns a joint vector for each image with its text; there are as many of one as of the other."""
        return self._vectors(self.predictor.embed_pairs, images, texts, truncate=self.truncate)

    def _vectors(self, embed: Any, *inputs: Sequence[Any], **options: Any) -> list[list[float]]:
        if not any(map(len, inputs)):
            return []
        return embed(*inputs, batch_size=self.batch_size, **options).tolist()


class BridgeTowerVectorStore(VectorStore):
    """Documents in an index: images, images with texts, and texts.

    The id of a document is its path in the index. A text without an image is found by the vector of the text. Indexes
    that `bridgetower index` made are searched as well. Their documents have the captions of an image, one a line, and
    the columns of the index as metadata, with the file as `source`.

    Attributes:
        searcher: The index with its model.
    """

    def __init__(
        self,
        index: Uri,
        embedding: BridgeTowerEmbeddings | None = None,
        *,
        root: Path | None = None,
    ) -> None:
        """Opens an index, or makes an empty one.

        Args:
            index: Where it is, its name ending in `.lance`.
            embedding: The model; None: the one that the index was made with.
            root: Folder that paths of images start from; default: the one that the index names, of a new one the one
                that it is in, or of one in an object store the working directory.

        Raises:
            ValueError: The index was made with another model.
        """
        if embedding is not None and not Table.exists(index):
            folder = Path.cwd() if is_url(index) else Path(index).resolve().parent
            with write_lock(index):
                new_index(index, embedding.predictor, root or folder)
        self.searcher = Searcher(Index(index, root=root), embedding and embedding.predictor)
        self._embedding = embedding or BridgeTowerEmbeddings(self.searcher.predictor)

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
        """Adds texts, or images with a text each, and returns their ids; documents that have these are replaced.

        Images are files or URLs, and metadata are of values that JSON has. A ValueError says that there are not as many
        of one as of the other, that a text is too long, or that an image cannot be used; nothing is added then.
        """
        return self._add(images, list(texts), metadatas, ids)

    def add_images(
        self,
        uris: Sequence[str | Path],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        texts: Sequence[str] | None = None,
    ) -> list[str]:
        """Adds images, perhaps with captions or transcripts, text n for image n; see `add_texts`.

        Metadata get the file or URL as `source`.
        """
        return self._add(uris, texts, metadatas, ids)

    def _add(
        self,
        uris: Sequence[str | Path] | None,
        texts: Sequence[str] | None,
        metadatas: Sequence[dict[str, Any]] | None,
        ids: Sequence[str | None] | None,
    ) -> list[str]:
        num_documents = len(uris if uris is not None else texts or ())
        for name, values in (("metadatas", metadatas), ("ids", ids), ("texts", texts)):
            if values is not None and len(values) != num_documents:
                documents = "images" if name == "texts" else "documents"
                counts = f"{num_documents} {documents} and {len(values)} {name}"
                raise ValueError(f"{counts}; expected as many of one as of the other")

        examples = []
        for number in range(num_documents):
            id_ = ids[number] if ids else None
            text = None if texts is None else texts[number]
            uri = None if uris is None else str(uris[number])
            examples.append(
                self._example(
                    id_ or str(uuid4()), uri, text, metadatas[number] if metadatas else {}
                )
            )

        index = self.searcher.index
        config = SourceConfig(
            truncate=self._embedding.truncate, batch_size=self._embedding.batch_size, num_workers=0
        )
        of: Of = None if uris is None else "all"
        rows = {}
        for embedded_examples in embedded(self.searcher.predictor, examples, of, config):
            for result in embedded_examples:
                if result.problem:
                    raise ValueError(
                        f"{result.example.origin}: {result.problem}; nothing was added"
                    )
                rows[result.example.id] = row_of(result)
        with write_lock(index.uri):
            index.upsert(list(rows.values()))
            index.optimize()
        return [example.id for example in examples]

    def _example(
        self, id_: str, uri: str | None, text: str | None, metadata: dict[str, Any]
    ) -> Example:
        """Returns a document as an example of a source, whose fields are columns of the index."""
        captions = () if text is None else (text,)
        location: dict[str, Any] = {"metadata": metadata}
        images: tuple[Image, ...] = ()
        if uri is not None:
            file = (
                {"url": uri}
                if is_url(uri)
                else {"file": os.path.relpath(uri, self.searcher.index.root)}
            )
            location = {**file, "metadata": {"source": uri, **metadata}}
            images = (Image(name=id_, location=uri),)
        try:
            fields = {"path": id_, "captions": list(captions), "location": json.dumps(location)}
        except TypeError as error:
            message = f"metadata {metadata!r} cannot be kept ({error}); expected values of JSON"
            raise ValueError(message) from error
        return Example(id=id_, images=images, texts=captions, fields=fields, origin=uri or "a text")

    def delete(self, ids: list[str] | None = None) -> bool:
        """Deletes documents, or all of them without ids. Unknown ids are ignored."""
        index = self.searcher.index
        with write_lock(index.uri):
            index.remove(index.paths() if ids is None else ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Returns the documents with these ids, in their order. Unknown ids are ignored."""
        index = self.searcher.index
        documents = {}
        for row in index.rows(ids):
            image = Indexed(**row)
            documents[image.path] = _document(image, image.file_in(index.root))
        return [documents[id_] for id_ in ids if id_ in documents]

    def similarity_search_with_score(
        self,
        query: str,
        k: int = 4,
        *,
        filter: Filter | None = None,  # noqa: A002 - its name in LangChain
        where: str | None = None,
        against: Against | None = None,
        rerank: int | None = 0,
    ) -> list[tuple[Document, float]]:
        """Returns the best documents for a text with their cosines, best first.

        Args:
            query, k: What to look for, and how many.
            filter: Which documents; they are compared after the search, which looks further until there are `k`.
            where: A condition in SQL on columns of the index, such as `width > 800`.
            against: What the text is compared with, as of `Searcher.search`.
            rerank: Of the nearest documents, how many are matched with the text if they have an image; they come first.
                None: as many as `bridgetower search` matches.
        """

        def search(count: int) -> list[Hit]:
            return self.searcher.search(
                query,
                top=count,
                where=where,
                against=against,
                rerank=rerank,
                truncate=self._embedding.truncate,
            )

        return _filtered(search, k, filter)

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
        scored = _filtered(
            lambda count: self.searcher.index.nearest(vector, count, where=where), k, filter
        )
        return [document for document, _ in scored]

    def max_marginal_relevance_search(
        self, query: str, *args: Any, **settings: Any
    ) -> list[Document]:
        """Returns documents for a text that differ from each other; see `max_marginal_relevance_search_by_vector`."""
        return self.max_marginal_relevance_search_by_vector(
            self._embedding.embed_query(query), *args, **settings
        )

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        **settings: Any,
    ) -> list[Document]:
        """Returns `k` of the `fetch_k` documents nearest to a vector that differ from each other.

        A `lambda_mult` of 1 counts nearness alone, 0 difference alone; see `similarity_search_by_vector` for others.
        """
        candidates = self.similarity_search_by_vector(embedding, fetch_k, **settings)
        if not candidates:
            return []
        ids = [str(document.id) for document in candidates]
        vector_of = {
            row["path"]: row["image_vector"]
            for row in self.searcher.index.rows(ids, ["path", "image_vector"])
        }
        vectors = [vector_of[id_] for id_ in ids]
        selected = maximal_marginal_relevance(np.array(embedding), vectors, lambda_mult, k)
        return [candidates[number] for number in selected]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(1.0, max(0.0, (1 + cosine) / 2))

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        index: Uri | None = None,
        **options: Any,
    ) -> BridgeTowerVectorStore:
        """Opens or makes an index, its name ending in `.lance`, and adds texts, or images with a text each.

        Takes the other arguments of `add_texts` too.

        Raises:
            ValueError: There is no index, or other embeddings than `BridgeTowerEmbeddings`.
        """
        if index is None:
            raise ValueError(
                "from_texts has no index; give where it is or shall be, such as index='documents.lance'"
            )
        if not isinstance(embedding, BridgeTowerEmbeddings):
            raise ValueError(
                f"embedding is {type(embedding).__name__}; expected BridgeTowerEmbeddings"
            )
        store = cls(index, embedding)
        store.add_texts(texts, metadatas, **options)
        return store


def _document(image: Indexed, file: Path | str) -> Document:
    """Returns the document that was added or, of an index from elsewhere, one with the index's columns as metadata."""
    metadata = image.where().get("metadata")
    if metadata is None:
        metadata = {**vars(image), "source": str(file), "captions": list(image.captions)}
        metadata.pop("file", None)
    return Document(id=image.path, page_content="\n".join(image.captions), metadata=metadata)


def _filtered(
    search: Callable[[int], list[Hit]], k: int, filter_: Filter | None
) -> list[tuple[Document, float]]:
    """Searches for more and more until `k` documents pass the filter."""
    if isinstance(filter_, str):
        raise ValueError(
            f"filter is {filter_!r}; expected metadata or a function; give a condition in SQL as where"
        )

    def passes(document: Document) -> bool:
        if callable(filter_):
            return filter_(document)
        return all(document.metadata.get(name) == value for name, value in (filter_ or {}).items())

    count = k
    while True:
        hits = search(count)
        scored = [(_document(hit, hit.file), hit.cosine) for hit in hits]
        passed = [(document, cosine) for document, cosine in scored if passes(document)]
        if len(passed) >= k or len(hits) < count:
            return passed[:k]
        count *= 4
