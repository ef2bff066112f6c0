"""Routes that use the model: embeddings as of OpenAI, reranking as of Jina and Cohere, images with texts."""

from __future__ import annotations

import asyncio
import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from annotated_types import Len
from fastapi import APIRouter, Response
from PIL import Image
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from bridgetower.inference.attention import Method, view_of, words_of
from bridgetower.inference.items import (
    TEMPLATES,
    Choice,
    FilledWord,
    Item,
    Kind,
    Pixels,
    filled_words,
    label_choices,
    prompts_of,
)
from bridgetower.serve.config import MOST_TOP
from bridgetower.serve.costs import Unit
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import IMAGE, is_image
from bridgetower.serve.schemas import (
    COMPUTING,
    PROBABILITY,
    SCORE,
    Body,
    Images,
    JsonRoute,
    ListResponse,
    Modality,
    Several,
    Source,
    Text,
    Texts,
    Top,
    Usage,
    json_of,
    listed,
    usage,
)
from bridgetower.serve.service import HEADS, Explaining, Served, Service, Use

router = APIRouter(route_class=JsonRoute)

_ALL = 2**31  # classes: there are fewer
_DIGITS = 6  # of a share of attention, after the point
_QUALITY = 88  # of the JPEG of a view
_PAIRS = "images with texts"


class TextPart(BaseModel, extra="forbid"):
    type: Literal["text"]
    text: Text


class Url(BaseModel):
    url: Source


class ImagePart(BaseModel, extra="forbid"):
    type: Literal["image_url"]
    image_url: Url


class Message(BaseModel, extra="forbid"):
    """A message with at most one image and one text."""

    role: Literal["user"]
    content: (
        Text
        | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Several]
    )


class Content(BaseModel, extra="forbid"):
    """A text, an image, or both."""

    text: str | None = None
    image: Source | None = None

    @model_validator(mode="before")
    @classmethod
    def _object(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("expected a string, or an object with text, image or both")
        return given

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.text is None and self.image is None:
            raise ValueError("expected text, image or both")
        return self


def _whole(given: Any) -> None:
    if given is not None:
        raise ValueError("this model was not trained for shortened vectors; leave it out")


_PARTS = [
    {"type": "image_url", "image_url": {"url": IMAGE}},
    {"type": "text", "text": "a red square"},
]
_EMBEDDINGS = [
    {"input": ["two dogs in the snow", "a red square"]},
    {"input": IMAGE, "modality": "image"},
    {"input": [{"text": "a red square", "image": IMAGE}, {"text": "a red square"}]},
    {"messages": [{"role": "user", "content": _PARTS}], "encoding_format": "base64"},
]

_Entries = str | Content | Annotated[list[str | Content], Several]


class EmbeddingsRequest(Body, json_schema_extra={"examples": _EMBEDDINGS}):
    """Texts, images, or images with texts, which get a vector each; or one message, whose parts get one together."""

    modality: Modality = Field("text", description="What strings in `input` are.")
    input: Annotated[list[Content], Several] | None = Field(
        None,
        description="Texts, images, or objects with a text, an image or both, which get one vector together.",
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)] | None = None
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: of little-endian float32."
    )
    dimensions: Annotated[None, BeforeValidator(_whole)] = Field(None, description="Not possible.")
    embedding_type: Literal["float", "base64", "binary", "ubinary"] | None = Field(
        None,
        description="Jina's `encoding_format`; binary: signs, eight in an int8, ubinary: in an uint8.",
    )
    task: str | None = Field(
        None, max_length=1000, description="Accepted because Jina's clients send it; not used."
    )
    normalized: bool = Field(True, description="Likewise: the vectors have length one in any case.")
    truncation_direction: Annotated[
        Literal["right"], BeforeValidator(lambda given: str(given).lower())
    ] = "right"

    @field_validator("input", mode="before", json_schema_input_type=_Entries)
    @classmethod
    def _entries(cls, given: Any, info: ValidationInfo) -> Any:
        several = [given] if isinstance(given, str | dict) else given
        if not isinstance(several, list):
            return several
        if several and isinstance(several[0], int | list):
            raise ValueError(
                "token ids, which are another tokenizer's; expected texts (in LangChain: "
                "OpenAIEmbeddings(check_embedding_ctx_length=False))"
            )
        return [
            {info.data.get("modality", "text"): one} if isinstance(one, str) else one
            for one in several
        ]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected either input or messages")
        self.contents()
        return self

    def contents(self) -> list[Content]:
        if self.messages is None:
            return self.input or []
        given = self.messages[0].content
        parts = [TextPart(type="text", text=given)] if isinstance(given, str) else given
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if len(texts) > 1 or len(images) > 1:
            raise ValueError("a message has several texts or images; expected at most one of each")
        return [Content(text=next(iter(texts), None), image=next(iter(images), None))]


def _unit(content: Content) -> Unit:
    if content.image is None:
        return "text"
    return "image" if content.text is None else "pair"


def _signs(vector: torch.Tensor) -> np.ndarray:
    return np.packbits(vector.numpy() > 0)


_VECTOR_FORMS: dict[str, Callable[[torch.Tensor], list[float] | str]] = {
    "float": lambda vector: vector.tolist(),
    "base64": lambda vector: base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode(),
    "ubinary": lambda vector: _signs(vector).tolist(),
    "binary": lambda vector: (_signs(vector) ^ 128).view(np.int8).tolist(),
}


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


async def embedded(
    service: Service, body: Body, contents: Sequence[Content], param: str
) -> tuple[list[Item], list[torch.Tensor]]:
    """Computes a vector for each of some texts, images, or images with texts."""
    sources = [one.image for one in contents]
    units = Counter(_unit(one) for one in contents)
    joint = set(units) == {"pair"}
    with service.admission(units, param, body.model, None if joint else "itc", images=sources):
        items = await service.main.items(contents, param, truncate=body.truncate)
        return items, await service.scheduler.submit(items)


@router.post(
    "/v1/embeddings",
    response_model=ListResponse[Embedding],
    responses=COMPUTING,
    tags=["embeddings"],
)
async def embeddings(body: EmbeddingsRequest, service: Served) -> Response:
    """Turn texts and images into vectors that can be compared, or an image and a text together into a joint vector."""
    items, vectors = await embedded(
        service, body, body.contents(), "messages" if body.messages else "input"
    )

    written = _VECTOR_FORMS[body.embedding_type or body.encoding_format]
    rows = (
        {"object": "embedding", "index": number, "embedding": written(vector)}
        for number, vector in enumerate(vectors)
    )
    return await json_of(
        service.writers, listed(rows, service.main.name, service.main.tokens(items))
    )


class Document(Content):
    """A text or an image."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if (self.text is None) == (self.image is None):
            raise ValueError("expected either text or image")
        return self


def _document(given: Any) -> Any:
    if isinstance(given, str):
        return {"image" if is_image(given) else "text": given}
    return given


TextOrImage = Annotated[Document, BeforeValidator(_document, json_schema_input_type=str | Document)]
_RERANK = [
    {"query": "a red square", "documents": [{"image": IMAGE}]},
    {"query": "a red square", "documents": ["two dogs in the snow", "a square in red"], "top_n": 1},
]


class RerankRequest(Body, json_schema_extra={"examples": _RERANK}):
    """A query and documents, which are all texts or all images."""

    query: TextOrImage
    documents: Annotated[list[TextOrImage], Several]
    top_n: int | None = Field(None, ge=1, description="Results to return; all of them if left out.")
    return_documents: bool = Field(False, description="Repeat the documents in the results.")
    max_tokens_per_doc: int | None = Field(
        None, ge=1, strict=True, description="Of Cohere's client; not used."
    )


class Result(BaseModel):
    index: int = Field(description="Its number in the request.")
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """Documents, the most relevant first."""

    model: str
    scored_by: Literal["matching", "cosine"] = Field(
        description="By `/v1/match`, or between two of one kind."
    )
    results: list[Result]
    usage: Usage


async def scored(
    service: Service,
    body: Body,
    queries: Sequence[Content],
    documents: Sequence[Content],
    param: str,
) -> tuple[list[float], bool, list[Item]]:
    """Computes the relevance of each document to the query, or to its own; and whether by the vectors of both.

    Texts and images are matched by the whole model, texts among themselves and images among themselves compared.
    """
    kinds = {one.text is None for one in documents}
    if len(kinds) > 1 or len({one.text is None for one in queries}) > 1:
        message = (
            f"{param} are texts and images, whose scores cannot be compared; send two requests"
        )
        raise ApiError(400, message, param=param)
    same, model = {queries[0].text is None} == kinds, service.main
    sources = [one.image for one in (*queries, *documents)]
    head = "itc" if same else "itm"
    compared = (*queries, *documents)
    work: dict[Unit, int] = (
        {_unit(compared[0]): len(compared)} if same else {"pair": len(documents)}
    )
    with service.admission(work, param, body.model, head, images=sources):
        asked = await model.items(queries, "query", truncate=body.truncate)
        items = await model.items(documents, param, truncate=body.truncate)
        repeated = asked * len(items) if len(asked) == 1 else asked
        if same:
            items = [*asked, *items]
        else:
            items = [
                Item(
                    kind="match",
                    image=one.image if query.ids else query.image,
                    ids=query.ids or one.ids,
                )
                for query, one in zip(repeated, items, strict=True)
            ]
        outcomes = await service.scheduler.submit(items)
    if not same:
        return model.predictor.reranking.match(torch.tensor(outcomes)).tolist(), same, items
    vectors = torch.stack(outcomes)
    # rounding may exceed it
    cosines = (vectors[: len(queries)] * vectors[len(queries) :]).sum(dim=-1).clamp(-1, 1)
    return cosines.tolist(), same, items


@router.post("/v2/rerank", include_in_schema=False)
@router.post("/v1/rerank", response_model=RerankResponse, responses=COMPUTING, tags=["rerank"])
async def rerank(body: RerankRequest, service: Served) -> Response:
    """Sort documents by their relevance to a query: by the whole model, or texts among themselves by their vectors."""
    scores, same, items = await scored(service, body, [body.query], body.documents, "documents")
    order = best_first(scores)[: body.top_n]

    results = (
        {
            "index": number,
            "relevance_score": scores[number],
            "document": body.documents[number].model_dump(exclude_none=True)
            if body.return_documents
            else None,
        }
        for number in order
    )
    response = {
        "model": service.main.name,
        "scored_by": "cosine" if same else "matching",
        "results": results,
        "usage": usage(service.main.tokens(items)),
    }
    return await json_of(service.writers, response)


def best_first(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda number: -scores[number])


class PairRequest(Body):
    images: Images = Field(description="One image goes with every text, but for `/v1/reason`.")
    texts: Texts


async def _answered(
    use: Use | None, head: str, result: str, body: PairRequest, service: Service
) -> Response:
    """Responds with what a head says of each pair, or without a use of what it reads, be it classes or a number."""
    if body.images is None and body.texts is None:  # which may be left out of `classify`
        raise ApiError(
            400, "neither images nor texts given; expected one of them at least", param="images"
        )
    sources: Sequence[str | None] = body.images or [None] * len(body.texts)
    given, sources_2 = body.texts or [""] * len(sources), getattr(body, "images_2", None) or []
    texts_param = type(body).model_fields["texts"].alias or "texts"
    # one image for all texts
    all_pairs = getattr(body, "all_pairs", False) or (len(sources) == 1 and not sources_2)
    model = service.model_for(head)
    spec = model.predictor.model.extensions.head_specs.get(head)
    reads = spec.inputs if spec else "pooled"
    if (reads == "pooled_pair") != bool(sources_2) or (
        sources_2 and len(sources) != len(sources_2)
    ):
        expected = "a second one for each first" if reads == "pooled_pair" else "no second ones"
        raise ApiError(
            400,
            f"{len(sources)} images and {len(sources_2)} images_2; expected {expected}",
            param="images_2",
        )
    unused = {"image_cls": "texts", "text_cls": "images"}.get(reads)
    if unused and getattr(body, unused) is not None:
        raise ApiError(400, f"the {head} head reads no {unused}; leave them out", param=unused)
    if not all_pairs and len(sources) != len(given):
        raise ApiError(
            400,
            f"{len(sources)} images and {len(given)} texts; expected as many of one as of the other",
        )
    count = len(sources) * len(given) if all_pairs else len(sources) + len(sources_2)
    param = "images" if body.images else texts_param
    processor, top = model.predictor.processor, getattr(body, "top", None) or _ALL
    units: dict[str | None, Unit] = {"texts": "image", "images": "text", None: "pair"}
    work = {units[unused]: count}
    if use == "fill-mask":
        work["word"] = top * sum(text.count(processor.mask_token) for text in given)
    given_images = [*sources, *sources_2]
    with service.admission(work, param, body.model, head, images=given_images, numbers=use is None):
        blank = processor.blank_image().pixels
        images = [
            blank if image is None else image for image in await model.images(sources, "images")
        ]
        images_2 = await model.images(sources_2, "images_2")
        texts = await model.texts(given, texts_param, truncate=body.truncate)
        if use == "fill-mask":
            most, masks = (
                MOST_TOP * service.config.max_items,
                [ids.count(processor.mask_token_id) for ids in texts],
            )
            if 0 in masks:
                message = f"no mask in text {masks.index(0)}; put {processor.mask_token} where a word is missing"
                raise ApiError(400, f"{texts_param}: {message}", param=texts_param)
            if sum(masks) * top > most:
                message = f"{sum(masks)} masks with {top} words each, the limit is {most} words; ask for fewer"
                raise ApiError(413, f"{texts_param}: {message}", param=texts_param)
        places = [
            (i, t) for i in range(len(images)) for t in (range(len(texts)) if all_pairs else [i])
        ]
        kinds: dict[Use | None, Kind] = {"match": "match", "fill-mask": "fill_mask"}
        kind, seconds = kinds.get(use, "prediction"), images_2 or [None] * len(images)
        items = [
            Item(
                kind=kind,
                head=head if kind == "prediction" else "",
                image=None if unused == "images" else images[i],
                image_2=seconds[i],
                ids=None if unused == "texts" else texts[t],
                top=top,
            )
            for i, t in places
        ]
        outcomes = await service.scheduler.submit(items)

        rows: Iterable[Mapping[str, Any]]
        if use == "match":
            named = model.predictor.reranking.named(torch.tensor(outcomes))
            rows = (
                {"image": i, "text": t, **scores}
                for (i, t), scores in zip(places, named, strict=True)
            )
        else:

            def shown(outcome: Any) -> dict[str, Any]:
                if use == "fill-mask":
                    outcome = filled_words(processor, outcome)
                return {"number" if isinstance(outcome, float) else result: outcome}

            rows = ({"index": number, **shown(outcome)} for number, outcome in enumerate(outcomes))
        return await json_of(service.writers, listed(rows, model.name, model.tokens(items)))


def _route(
    use: Use,
    about: str,
    example: Mapping[str, Any],
    entry: Mapping[str, Any],
    more: Mapping[str, Any] = MappingProxyType({}),
    texts: str = "texts",
) -> None:
    """Adds a route: what its body has beside images and texts, which may have another name, and each of its results."""
    name = use.title().replace("-", "")
    request = create_model(
        f"{name}Request",
        __base__=PairRequest,
        __doc__=about,
        __cls_kwargs__={"json_schema_extra": {"examples": [{"images": IMAGE, **example}]}},
        texts=(Texts, Field(alias=None if texts == "texts" else texts)),
        **more,
    )
    fields: dict[str, Any] = ({} if use == "match" else {"index": (int, ...)}) | dict(entry)
    numbered = create_model(name, **fields)

    async def handle(body: PairRequest, service: Served) -> Response:
        return await _answered(use, str(HEADS[use]), next(iter(entry)), body, service)

    handle.__annotations__["body"] = request
    settings: dict[str, Any] = {"response_model": ListResponse[numbered], "responses": COMPUTING}  # type: ignore[valid-type]
    router.add_api_route(
        f"/v1/{use}",
        handle,
        methods=["POST"],
        name=use.replace("-", "_"),
        description=about,
        tags=[_PAIRS],
        **settings,
    )


_TOP: dict[str, Any] = {"top": (Top, 5)}
_JUDGED = {"judgements": (list[Choice], Field(description="Likeliest first."))}

_route(
    "match",
    "Compute how well images and texts match: image n and text n, or all pairs.",
    {"texts": ["a red square", "two dogs in the snow"], "all_pairs": True},
    {
        "image": (int, Field(description="Number of the image.")),
        "text": (int, Field(description="Number of the text.")),
        "probability": (float | None, PROBABILITY),
        "score": (float | None, SCORE),
    },
    {
        "all_pairs": (
            bool,
            Field(False, description="Match every image, the first one first, with every text."),
        )
    },
)
_route(
    "answer",
    "Answer questions about images, with a model that was fine-tuned on VQA.",
    {"questions": "what colour is the square?", "top": 3},
    {"answers": (list[Choice], Field(description="Do not sum to one; likeliest first."))},
    _TOP,
    "questions",
)
_route(
    "fill-mask",
    "Fill masked words of texts about images.",
    {"texts": "a <mask> square"},
    {"masks": (list[list[FilledWord]], Field(description="For each mask, likeliest first."))},
    _TOP,
)
_route(
    "entail",
    "Classify whether images contradict, are neutral to or entail statements, with a model fine-tuned on SNLI-VE.",
    {"statements": "it is red"},
    _JUDGED,
    texts="statements",
)
_route(
    "reason",
    "Classify statements about a left and a right image as true or false, with a model fine-tuned on NLVR2.",
    {"images_2": IMAGE, "statements": "both are red"},
    _JUDGED,
    {"images_2": (Images, ...)},
    "statements",
)

Phrases = Annotated[list[Annotated[str, Len(max_length=1000)]], Several]
_EXAMPLES = [
    {"images": IMAGE, "texts": "a red square"},
    {"images": IMAGE, "labels": ["a red square", "two dogs"]},
]


class ClassifyRequest(PairRequest, json_schema_extra={"examples": _EXAMPLES}):
    images: Images | None = None  # type: ignore[assignment]  # here one of the two may be missing
    texts: Texts | None = None  # type: ignore[assignment]
    labels: Phrases | None = Field(
        None, description="Classes to compare images with; without, those of the model."
    )
    templates: Phrases = Field(
        list(TEMPLATES), description="Texts with {} where a label goes; its vector is the mean."
    )
    top: Top | None = Field(None, description="Classes per input; all if left out.")


class Classified(BaseModel):
    index: int
    classes: list[Choice] = Field(description="Likeliest first.")


@router.post(
    "/v1/classify", response_model=ListResponse[Classified], responses=COMPUTING, tags=[_PAIRS]
)
async def classify(body: ClassifyRequest, service: Served) -> Response:
    """Classify images by labels, or images, texts or both with a model fine-tuned on custom classes."""
    if body.labels is None:
        if "templates" in body.model_fields_set:
            raise ApiError(
                400, "templates are for labels; give labels too, or neither", param="templates"
            )
        return await _answered("classify", "classification", "classes", body, service)
    labels, top = body.labels, min(body.top or len(body.labels), len(body.labels))
    if body.images is None or body.texts is not None:
        raise ApiError(
            400, "labels are compared with images alone; give images and no texts", param="labels"
        )
    work: dict[Unit, int] = {"image": len(body.images), "text": len(labels) * len(body.templates)}
    with service.admission(work, "labels", body.model, "itc", images=body.images):
        if len(body.images) * top > (most := MOST_TOP * service.config.max_items):
            message = f"labels: {len(body.images)} images with {top} labels each, the limit is {most}; send top"
            raise ApiError(413, message, param="labels")
        try:
            prompts = prompts_of(labels, body.templates)
        except ValueError as error:
            raise ApiError(400, str(error), param="labels") from error
        images = await service.main.images(body.images, "images")
        texts = await service.main.texts(prompts, "labels", truncate=body.truncate)
        items = [*(Item(image=image) for image in images), *(Item(ids=ids) for ids in texts)]
        vectors = torch.stack(await service.scheduler.submit(items))

    count = len(images)
    model = service.main.predictor.model
    classes = await asyncio.to_thread(
        label_choices, model, vectors[:count], vectors[count:], labels, body.top
    )
    rows = ({"index": number, "classes": best} for number, best in enumerate(classes))
    return await json_of(
        service.writers, listed(rows, service.main.name, service.main.tokens(items))
    )


class PredictRequest(
    PairRequest,
    json_schema_extra={
        "examples": [{"head": "vqa", "images": IMAGE, "texts": "what colour is the square?"}]
    },
):
    head: Annotated[str, Len(1, 1000)] = Field(description="One of those in `/v1/models`.")
    images: Images | None = None  # type: ignore[assignment]
    texts: Texts | None = None  # type: ignore[assignment]
    images_2: Images | None = Field(None, description="For a head that reads two images.")
    top: Top | None = Field(None, description="Classes per input; all if left out.")


class Predicted(BaseModel):
    index: int
    classes: list[Choice] | None = Field(None, description="Likeliest first.")
    number: float | None = Field(None, description="Of a head without classes.")


@router.post(
    "/v1/predict", response_model=ListResponse[Predicted], responses=COMPUTING, tags=[_PAIRS]
)
async def predict(body: PredictRequest, service: Served) -> Response:
    """Predict classes or a number by a head of the model, of the package or custom."""
    predicting = service.model_for(body.head).predicting
    if body.head not in predicting:
        raise ApiError(
            400,
            f"there is no head {body.head!r} to predict with; expected one of {', '.join(predicting) or 'none'}",
            param="head",
            code="unsupported_by_model",
        )
    return await _answered(None, body.head, "classes", body, service)


class ExplainRequest(
    Body, json_schema_extra={"examples": [{"image": IMAGE, "text": "a red square"}]}
):
    image: Source
    text: Text = Field(description="With at least one word.")
    method: Method = Field(
        "attention", description="`gradcam` weighs it by the gradient of the matching head."
    )
    view: bool = Field(False, description="Also return the part of the image that the model sees.")


class ExplainResponse(BaseModel):
    """The cross-attention of each word over the image, or its Grad-CAM, mean over the heads, layer by layer."""

    model: str = Field(description="That answered.")
    method: Method = Field(description="That was asked for.")
    words: list[str] = Field(description="Of the text; with `gradcam` its class token before them.")
    maps: list[list[list[list[float]]]] = Field(
        description="By layer, word, row and column; of attention each sums to 1."
    )
    prefix_shares: list[list[float]] = Field(
        description="By layer and word: what went to the class token instead."
    )
    probability: float | None = PROBABILITY
    score: float | None = SCORE
    view: str | None = Field(
        None, description="Data URI of the part of the image that the maps cover."
    )
    usage: Usage


@router.post("/v1/explain", response_model=ExplainResponse, responses=COMPUTING, tags=[_PAIRS])
async def explain(body: ExplainRequest, service: Served) -> Response:
    """Compute where each word of a text looks in an image, or by Grad-CAM what of it decides the match."""
    model, processor = service.main, service.main.predictor.processor

    def decoded(content: bytes) -> tuple[Pixels, str | None]:
        view = None
        if body.view:
            whole, _ = model.decoders.open(content, background=processor.config.background)
            view_of(processor, Image.fromarray(whole)).save(
                stream := io.BytesIO(), "JPEG", quality=_QUALITY
            )
            view = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
        return model.prepared(content).pixels, view

    head = "itm" if body.method == "gradcam" else None
    unit: Unit = "gradient" if body.method == "gradcam" else "pair"
    with service.admission({unit: 1}, "image", body.model, head, images=[body.image]):
        ((image, view),) = await model.decoded(decoded, [body.image], "image")
        (ids,) = await model.texts([body.text], "text", truncate=body.truncate)
        try:
            words_of(processor, ids)
        except ValueError as error:
            raise ApiError(400, str(error), param="text") from error
        (attention,) = await service.scheduler.submit([Explaining(image, ids, body.method)])
        maps = attention.maps.double().round(decimals=_DIGITS)
        response = {
            "model": model.name,
            "method": attention.method,
            "words": list(attention.words),
            "prefix_shares": attention.prefix_shares.tolist(),
            "probability": attention.probability,
            "score": attention.score,
            "view": view,
            "usage": usage(model.tokens([Item(image=image, ids=ids)])),
            "maps": (layer.tolist() for layer in maps),
        }
        return await json_of(service.writers, response)
