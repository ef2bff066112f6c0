"""An index as tools of the Model Context Protocol, which agents call."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

from bridgetower.checkpoints import described
from bridgetower.extras import require
from bridgetower.predictor import Predictor
from bridgetower.processor import open_reduced
from bridgetower.search.conditions import condition_sql
from bridgetower.search.index import Hit
from bridgetower.search.searcher import Searcher

require("mcp")

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

_SIDE = 384  # pixels of the longer side of what an agent is shown
_MAX_BYTES = 2**26  # of an image
_INSTRUCTIONS = "Finds images, and moments of videos, by what they show. Describe in a few plain English words what "
_INSTRUCTIONS += "should be seen, such as 'two dogs in the snow'."
Top = Annotated[int, Field(ge=1, le=20, description="How many to return.")]
Where = Annotated[
    dict[str, Any] | None,
    Field(description='Condition on path, size, width, height, captions, start, end, such as {"width": {"gte": 800}}.'),
]


@contextmanager
def _told() -> Iterator[None]:
    """Lets an agent read the message of an error that it can do something about."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ToolError(str(error)) from error


def mcp_server(searcher: Searcher, answering: Predictor | None = None) -> MCPServer:
    """Returns a server with the tools `search_images`, `find_moments`, and with a model that answers `ask`.

    It opens files of the index in its folder only, as they were indexed, and nothing at URLs.

    Args:
        searcher: What is searched.
        answering: A model fine-tuned on VQA; None: no tool `ask`.
    """
    server = MCPServer("bridgetower", instructions=_INSTRUCTIONS)
    index, background = searcher.index, searcher.predictor.processor.config.background

    content = partial(index.content, within_root=True, fetch=False, max_bytes=_MAX_BYTES)

    def hits_of(query: str, **given: Any) -> list[Hit]:
        try:
            return searcher.search(query, truncate=True, **given, **content.keywords)
        except ValueError:  # no candidate may be opened; a wrong query fails again
            return searcher.search(query, truncate=True, **given, rerank=0)

    def shown(hits: Sequence[Hit]) -> list[dict[str, Any] | Image]:
        blocks, frames = list[dict[str, Any] | Image](), index.frames(hits)
        for rank, hit in enumerate(hits, start=1):
            match = described(hit.probability, hit.score)
            found = {"rank": rank, "id": hit.digest, "file": str(hit.file), "captions": list(hit.captions)}
            found |= {"match": match} if match else {"cosine": round(hit.cosine, 3)}
            found |= {} if hit.start is None else {"start": hit.start, "end": hit.end}
            blocks.append(found)
            try:
                image, _ = open_reduced(io.BytesIO(content(hit, frames=frames)), _SIDE, background=background)
            except (OSError, ValueError) as error:
                found["problem"] = str(error)
                continue
            image.thumbnail((_SIDE, _SIDE))
            image.save(stream := io.BytesIO(), "JPEG", quality=85)
            blocks.append(Image(data=stream.getvalue(), format="jpeg"))
        return blocks

    @server.tool(structured_output=False)
    def search_images(query: str, top: Top = 5, where: Where = None) -> list[dict[str, Any] | Image]:
        """Find images by a description of what they show; returns each hit with a small copy, best first."""
        with _told():
            condition = None if where is None else condition_sql(where)
            return shown(hits_of(query, top=top, where=condition, against="images"))

    @server.tool(structured_output=False)
    def find_moments(query: str, top: Top = 5) -> list[dict[str, Any] | Image]:
        """Find moments of videos by what is said or seen in them; start and end are in seconds."""
        with _told():
            return shown(hits_of(query, top=top, where="start IS NOT NULL"))

    if answering is not None:
        model = answering
        model.class_names("vqa")  # says what is missing

        @server.tool()
        def ask(question: str, id: str) -> list[dict[str, Any]]:  # noqa: A002 - as hits have it
            """Answer a question about one image that was found, by its id; the likeliest answer comes first."""
            with _told():
                copies = index.with_digest(id)
                if not copies:
                    raise ValueError(f"the index has no image with the id {id!r}; take one from search_images")
                (choices,) = model.answer([io.BytesIO(content(copies[0]))], [question], truncate=True)
            return [{"answer": one.label, "probability": round(one.probability, 4)} for one in choices]

    return server
