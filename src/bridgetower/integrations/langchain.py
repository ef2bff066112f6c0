"""LangChain: embeddings by a model of this package, and an index as a vector store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bridgetower.data.example import Example, Image
from bridgetower.data.fetch import is_url
from bridgetower.data.store import Table, Uri
from bridgetower.extras import require
from bridgetower.predictor import Predictor, load
from bridgetower.processor import ImageLike
from bridgetower.search.config import Against, SourceConfig

require("langchain")
require("search")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from bridgetower.search.build import new_index, row_of
from bridgetower.search.embed import Of, embedded, write_lock
from bridgetower.search.index import Hit, Index, Indexed
from bridgetower.search.searcher import Searcher

Filter = Mapping[str, Any] | Callable[[Document], bool]
"""Values that metadata have, or a function of a document."""


class BridgeTowerEmbeddings(Embeddings):
    """L2-normalised vectors of texts, of images, and of images with texts; too long texts are cut with `truncate`."""

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


class BridgeTowerVectorStore(VectorStore):
    """Documents in an index: images, images with texts, and texts.

    The id of a document is its path in the index. A text without an image is found by its own vector, in the place of
    an image's. Indexes that `bridgetower index` made are searched as well; their documents have the captions of an
    image, one a line, and as metadata those of the hit, with the file as `source`. `searcher` is the index with its
    model.
    """

    def __init__(self, index: Uri, embedding: BridgeTowerEmbeddings | None = None, *, root: Path | None = None) -> None:
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
            place = root or (Path.cwd() if is_url(index) else Path(index).resolve().parent)
            with write_lock(index):
                new_index(index, embedding.predictor, place)
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
        return self._added(images, list(texts), metadatas, ids)

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
        return self._added(uris, texts, metadatas, ids)

    def _added(
        self,
        uris: Sequence[str | Path] | None,
        texts: Sequence[str] | None,
        metadatas: Sequence[dict[str, Any]] | None,
        ids: Sequence[str | None] | None,
    ) -> list[str]:
        given: Sequence[Any] = texts or () if uris is None else uris
        for name, values in (("metadatas", metadatas), ("ids", ids), ("texts", texts)):
            if values is not None and len(values) != len(given):
                what = f"{len(given)} {'images' if name == 'texts' else 'documents'} and {len(values)} {name}"
                raise ValueError(f"{what}; expected as many of one as of the other")
        index, examples = self.searcher.index, list[Example]()
        for number in range(len(given)):
            path, about = (ids[number] if ids else None) or str(uuid4()), metadatas[number] if metadatas else {}
            captions: tuple[str, ...] = () if texts is None else (texts[number],)
            where: dict[str, Any] = {"metadata": about}
            images, uri = tuple[Image, ...](), ""
            if uris is not None:
                uri = str(uris[number])
                file = {"url": uri} if is_url(uri) else {"file": os.path.relpath(uri, index.root)}
                where, images = {**file, "metadata": {"source": uri, **about}}, (Image(name=path, place=uri),)
            try:
                fields = {"path": path, "captions": list(captions), "place": json.dumps(where)}
            except TypeError as error:
                message = f"metadata {about!r} cannot be kept ({error}); expected values of JSON"
                raise ValueError(message) from error
            examples.append(Example(id=path, images=images, texts=captions, fields=fields, place=uri or "a text"))
        config = SourceConfig(truncate=self._embedding.truncate, batch_size=self._embedding.batch_size, num_workers=0)
        of: Of = None if uris is None else "all"
        found = [*chain.from_iterable(embedded(self.searcher.predictor, examples, of, config))]
        for one in found:
            if one.problem:
                raise ValueError(f"{one.example.place}: {one.problem}; nothing was added")
        with write_lock(index.uri):
            index.upsert(list({one.example.id: row_of(one) for one in found}.values()))
            index.optimize()
        return [one.id for one in examples]

    def delete(self, ids: list[str] | None = None) -> bool:
        """Deletes documents; None: all. Ids that are not there are passed over."""
        index = self.searcher.index
        with write_lock(index.uri):
            index.remove(index.paths() if ids is None else ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Returns the documents with some ids, in their order; those that are not there are left out."""
        images = (Indexed(**row) for row in self.searcher.index.rows(ids))
        found = {one.path: _document(one, one.file_in(self.searcher.index.root)) for one in images}
        return [found[id_] for id_ in ids if id_ in found]

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
        settings: Any = {"where": where, "against": against, "rerank": rerank, "truncate": self._embedding.truncate}
        return _chosen(lambda count: self.searcher.search(query, top=count, **settings), k, filter)

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

    def max_marginal_relevance_search(self, query: str, *args: Any, **settings: Any) -> list[Document]:
        """Returns documents for a text that differ from each other; see `max_marginal_relevance_search_by_vector`."""
        return self.max_marginal_relevance_search_by_vector(self._embedding.embed_query(query), *args, **settings)

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **settings: Any
    ) -> list[Document]:
        """Returns `k` of the `fetch_k` documents nearest to a vector that differ from each other.

        A `lambda_mult` of 1 counts nearness alone, 0 difference alone; see `similarity_search_by_vector` for others.
        """
        found = self.similarity_search_by_vector(embedding, fetch_k, **settings)
        rows = self.searcher.index.rows([str(document.id) for document in found], ["path", "image_vector"])
        vectors = {row["path"]: row["image_vector"] for row in rows}
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
        index: Uri | None = None,
        **given: Any,
    ) -> BridgeTowerVectorStore:
        """Opens or makes an index, its name ending in `.lance`, and adds texts, or images with a text each.

        Takes the other arguments of `add_texts` too.

        Raises:
            ValueError: There is no index, or other embeddings than `BridgeTowerEmbeddings`.
        """
        if index is None:
            raise ValueError("from_texts has no index; give where it is or shall be, such as index='documents.lance'")
        if not isinstance(embedding, BridgeTowerEmbeddings):
            raise ValueError(f"embedding is {type(embedding).__name__}; expected BridgeTowerEmbeddings")
        store = cls(index, embedding)
        store.add_texts(texts, metadatas, **given)
        return store


def _document(one: Indexed, file: Path | str) -> Document:
    """Returns the document that was added or, of an index from elsewhere, that of a hit."""
    about = one.where().get("metadata")
    if about is None:
        about = {**vars(one), "source": str(file), "captions": list(one.captions)}
        about.pop("file", None)
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
