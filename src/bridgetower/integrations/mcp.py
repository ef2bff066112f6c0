"""An index as tools of the Model Context Protocol, which agents call."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from bridgetower.checkpoints import match_text
from bridgetower.extras import require
from bridgetower.inference.predictor import Predictor
from bridgetower.processor import open_reduced
from bridgetower.search.conditions import condition_sql
from bridgetower.search.indexed import Hit, Indexed
from bridgetower.search.searcher import Searcher

require("mcp")

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

_THUMBNAIL_SIDE = 384  # pixels of the longer side
_MAX_BYTES = 2**26  # of an image
_INSTRUCTIONS = (
    "Finds images, and moments of videos, by what they show. Describe in a few plain English words what should be "
    "seen, such as 'two dogs in the snow'."
)
Top = Annotated[int, Field(ge=1, le=20, description="How many to return.")]
Where = Annotated[
    dict[str, Any] | None,
    Field(
        description='Condition on path, size, width, height, captions, start, end, such as {"width": {"gte": 800}}.'
    ),
]
Block = dict[str, Any] | Image
"""A hit, or the thumbnail of one."""


def mcp_server(searcher: Searcher, answering: Predictor | None = None) -> MCPServer:
    """Returns a server with the tools `search_images`, `find_moments`, and with a model that answers `ask`.

    It opens files of the index in its folder only, as they were indexed, and nothing at URLs.

    Args:
        searcher: What is searched.
        answering: A model fine-tuned on VQA; None: no tool `ask`.
    """
    server = MCPServer("bridgetower", instructions=_INSTRUCTIONS)
    tools = _Tools(searcher)

    @server.tool(structured_output=False)
    def search_images(query: str, top: Top = 5, where: Where = None) -> list[Block]:
        """Find images by a description of what they show. Returns each hit with a small copy, best first."""
        with _tool_errors():
            condition = None if where is None else condition_sql(where)
            hits = tools.search(query, top=top, where=condition, against="images")
            return tools.blocks(hits)

    @server.tool(structured_output=False)
    def find_moments(query: str, top: Top = 5) -> list[Block]:
        """Find moments of videos by what is said or seen in them. Start and end are in seconds."""
        with _tool_errors():
            hits = tools.search(query, top=top, where="start IS NOT NULL")
            return tools.blocks(hits)

    if answering is not None:
        model = answering
        model.class_names("vqa")  # raises if the model has no answers

        @server.tool()
        def ask(question: str, id: str) -> list[dict[str, Any]]:  # noqa: A002 - its name in hits
            """Answer a question about one image that was found, by its id. The likeliest answer comes first."""
            with _tool_errors():
                image = tools.image_with(id)
                (choices,) = model.answer([image], [question], truncate=True)
            return [
                {"answer": choice.label, "probability": round(choice.probability, 4)}
                for choice in choices
            ]

    return server


@contextmanager
def _tool_errors() -> Iterator[None]:
    """Raises errors that an agent can do something about with their message."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ToolError(str(error)) from error


class _Tools:
    """The work of the tools: searching, and opening images inside the index's folder."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher
        self.index = searcher.index
        self.background = searcher.predictor.processor.config.background

    def search(self, query: str, **options: Any) -> list[Hit]:
        limits: dict[str, Any] = {"within_root": True, "fetch": False, "max_bytes": _MAX_BYTES}
        try:
            return self.searcher.search(query, truncate=True, **options, **limits)
        except ValueError:  # no candidate may be opened; a wrong query fails again
            return self.searcher.search(query, truncate=True, **options, rerank=0)

    def blocks(self, hits: Sequence[Hit]) -> list[Block]:
        """Returns each hit, followed by its thumbnail if it can be opened."""
        frames = self.index.frames(hits)
        blocks: list[Block] = []
        for rank, hit in enumerate(hits, start=1):
            description: dict[str, Any] = {
                "rank": rank,
                "id": hit.digest,
                "file": str(hit.file),
                "captions": list(hit.captions),
            }
            match = match_text(hit.probability, hit.score)
            if match:
                description["match"] = match
            else:
                description["cosine"] = round(hit.cosine, 3)
            if hit.weak:
                description["weak"] = "unrelated texts find images that are just as near"
            if hit.is_moment:
                description["start"] = hit.start
                description["end"] = hit.end
            blocks.append(description)
            try:
                blocks.append(self._thumbnail(hit, frames))
            except (OSError, ValueError) as error:
                description["problem"] = str(error)
        return blocks

    def image_with(self, digest: str) -> io.BytesIO:
        """Returns the content of the image with this digest, as an open file."""
        copies = self.index.with_digest(digest)
        if not copies:
            raise ValueError(
                f"the index has no image with the id {digest!r}; take one from search_images"
            )
        return io.BytesIO(self._content(copies[0]))

    def _content(self, image: Indexed, frames: Mapping[str, bytes] | None = None) -> bytes:
        return self.index.content(
            image, within_root=True, fetch=False, max_bytes=_MAX_BYTES, frames=frames
        )

    def _thumbnail(self, hit: Hit, frames: Mapping[str, bytes]) -> Image:
        content = io.BytesIO(self._content(hit, frames))
        image, _ = open_reduced(content, _THUMBNAIL_SIDE, background=self.background)
        image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=85)
        return Image(data=jpeg.getvalue(), format="jpeg")
