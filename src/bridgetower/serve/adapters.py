"""Routes in the protocols of other servers: OPEA's, text-embeddings-inference's and vLLM's."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Response
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bridgetower.inference.items import Item
from bridgetower.serve.costs import Unit
from bridgetower.serve.embedding_routes import (
    Parts,
    RerankRequest,
    TextOrImage,
    TextPart,
    TruncationDirection,
    best_first,
    embed_contents,
    rerank,
    score_documents,
)
from bridgetower.serve.inputs import IMAGE
from bridgetower.serve.schemas import (
    COMPUTING,
    Body,
    JsonRoute,
    ListResponse,
    Several,
    Source,
    Text,
    as_list,
    json_of,
    listed,
)
from bridgetower.serve.service import Served

_TEXTS: list[Any] = ["a red square", "two dogs"]
router = APIRouter(route_class=JsonRoute, responses=COMPUTING, tags=["protocols of other servers"])


class EncodeRequest(
    Body, json_schema_extra={"examples": [{"text": "a red square", "img_b64_str": IMAGE}]}
):
    text: Text
    img_b64_str: Source | None = None
    truncate: bool = True


class EncodeResponse(BaseModel):
    embedding: list[float]


@router.post("/v1/encode", response_model=EncodeResponse)
async def encode_pair(body: EncodeRequest, service: Served) -> Response:
    """OPEA's: the vector of a text, or of an image together with a text."""
    image = body.img_b64_str
    model = service.main
    work: dict[Unit, int] = {"text" if image is None else "pair": 1}
    head = "itc" if image is None else None
    with service.admission(work, "text", body.model, head, images=[image]):
        (pixels,) = await model.images([image], "img_b64_str")
        (ids,) = await model.texts([body.text], "text", truncate=body.truncate)
        (vector,) = await service.scheduler.submit([Item(image=pixels, ids=ids)])
    return await json_of(service.writers, {"embedding": vector.tolist()})


@router.get("/v1/health_check", include_in_schema=False)
async def health_check() -> dict[str, str]:
    """OPEA's: whether the server runs."""
    return {"message": "BridgeTower server is running"}


class _Inference(Body):
    """Fields of text-embeddings-inference beside the inputs, whose other values would need another vector."""

    prompt_name: None = None
    truncation_direction: TruncationDirection = "right"


class EmbedRequest(_Inference, json_schema_extra={"examples": [{"inputs": _TEXTS}]}):
    inputs: Annotated[
        list[TextOrImage],
        Several,
        BeforeValidator(
            as_list, json_schema_input_type=TextOrImage | Annotated[list[TextOrImage], Several]
        ),
    ]
    normalize: Literal[True, None] = None
    dimensions: None = None
    encoding_format: Literal["float", None] = None


@router.post("/", include_in_schema=False)
@router.post("/embed", response_model=list[list[float]])
async def embed(body: EmbedRequest, service: Served) -> Response:
    """Of text-embeddings-inference: a vector for each text, or image."""
    _, vectors = await embed_contents(service, body, body.inputs, "inputs")
    return await json_of(service.writers, (vector.tolist() for vector in vectors))


class Sentences(BaseModel, extra="forbid"):
    source_sentence: TextOrImage
    sentences: Annotated[list[TextOrImage], Several]


_SIMILARITY = {"inputs": {"source_sentence": _TEXTS[0], "sentences": _TEXTS}}


class SimilarityRequest(Body, json_schema_extra={"examples": [_SIMILARITY]}):
    inputs: Sentences
    parameters: _Inference | None = None


@router.post("/similarity", response_model=list[float])
async def sentence_similarity(body: SimilarityRequest, service: Served) -> Response:
    """Of text-embeddings-inference: the cosine of each text with the first, or the match of an image with a text."""
    if body.parameters is not None:
        body.truncate = body.parameters.truncate
    queries = [body.inputs.source_sentence]
    scores, _, _ = await score_documents(service, body, queries, body.inputs.sentences, "sentences")
    return await json_of(service.writers, scores)


class EitherRerank(RerankRequest, _Inference):
    """With `texts` as text-embeddings-inference takes it, with `documents` as Jina does."""

    documents: Annotated[list[TextOrImage], Several] | None = None  # type: ignore[assignment]  # one of the two
    texts: Annotated[list[TextOrImage], Several] | None = None
    raw_scores: Literal[False] = False
    return_text: bool = False

    @model_validator(mode="after")
    def _has_one_of_both(self) -> Self:
        if (self.documents is None) == (self.texts is None):
            raise ValueError("expected either documents or texts")
        return self


@router.post("/rerank", include_in_schema=False)
async def rerank_either(body: EitherRerank, service: Served) -> Response:
    """Sort documents as `/v1/rerank`, or as text-embeddings-inference does."""
    if body.texts is None:
        return await rerank(body, service)
    scores, _, _ = await score_documents(service, body, [body.query], body.texts, "texts")
    rows = []
    for index in best_first(scores):
        document = body.texts[index]
        text = document.text or document.image
        rows.append(
            {"index": index, "score": scores[index], "text": text if body.return_text else None}
        )
    return await json_of(service.writers, rows)


class _ContentParts(BaseModel, extra="forbid"):
    content: Parts


def _documents(value: Any) -> Any:
    """Returns entries of vLLM: strings, an object with several parts, or several objects with one part each."""
    if isinstance(value, list):
        entries = [_documents(entry) if isinstance(entry, dict) else [entry] for entry in value]
        if any(len(entry) > 1 for entry in entries):
            raise ValueError("an entry has several parts; expected one text or image in each")
        return [entry[0] for entry in entries]
    if isinstance(value, dict) and "content" in value:
        return [
            {"text": element.text}
            if isinstance(element, TextPart)
            else {"image": element.image_url.url}
            for element in _ContentParts.model_validate(value).content
        ]
    return as_list(value)


_Entries = Annotated[
    list[TextOrImage],
    Several,
    BeforeValidator(
        _documents, json_schema_input_type=Text | _ContentParts | Annotated[list[Text], Several]
    ),
]


class ScoreRequest(Body):
    """One query or as many as there are documents, each a text or an image."""

    model_config = ConfigDict(
        populate_by_name=True,
        json_schema_extra={"examples": [{"text_1": _TEXTS[0], "text_2": _TEXTS}]},
    )
    queries: _Entries = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))
    documents: _Entries = Field(validation_alias=AliasChoices("text_2", "documents", "data_2"))

    @model_validator(mode="after")
    def _has_equal_counts(self) -> Self:
        if len(self.queries) not in (1, len(self.documents)):
            raise ValueError(
                f"{len(self.queries)} and {len(self.documents)} given; expected one or as many of the first"
            )
        return self


class Score(BaseModel):
    object: Literal["score"] = "score"
    index: int
    score: float


@router.post("/score", include_in_schema=False)
@router.post("/v1/score", response_model=ListResponse[Score])
async def score(body: ScoreRequest, service: Served) -> Response:
    """vLLM's: how well each document fits its query, as in `/v1/rerank`."""
    scores, _, items = await score_documents(service, body, body.queries, body.documents, "text_2")
    rows = (
        {"object": "score", "index": index, "score": value} for index, value in enumerate(scores)
    )
    response = listed(rows, service.main.name, service.main.tokens(items))
    return await json_of(service.writers, response | {"created": int(time.time())})
