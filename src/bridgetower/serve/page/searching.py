"""What the page's search does; apart from the other tabs, because it needs what an index needs."""

from __future__ import annotations

import asyncio
from pathlib import Path

from PIL import Image
from pydantic import ValidationError

from bridgetower.processor import open_reduced
from bridgetower.search.searcher import Hit
from bridgetower.serve.errors import invalid_request
from bridgetower.serve.page import markup
from bridgetower.serve.page.actions import Actions, given, stripped
from bridgetower.serve.search import SearchRequest, found
from bridgetower.serve.service import Service

THUMBNAIL = 360  # pixels, the longer side
_WHITE = (255, 255, 255)  # under transparent pixels


class Searching:
    """Finds pictures for the page.

    Args:
        service: With an index.
        actions: Of the other tabs.
    """

    def __init__(self, service: Service, actions: Actions) -> None:
        self._service, self._actions = service, actions

    async def search(self, text: str | None, picture: str | None, top: float, where: str | None) -> str:
        """Returns the pictures that are found as markup, or what is wrong with the request."""
        return await self._actions.answered(self._search(stripped(text), picture, int(top), stripped(where)))

    async def _search(self, text: str, picture: str | None, top: int, where: str) -> str:
        image = None if picture is None else await given(picture)
        values = {"query": text or None, "image": image, "top": top, "where": where or None}
        try:
            body = SearchRequest.model_validate(values)
        except ValidationError as error:
            raise invalid_request(error.errors()) from error
        hits, _ = await found(body, self._service)
        return markup.cards(await asyncio.gather(*(asyncio.to_thread(_card, hit) for hit in hits)))


def _card(hit: Hit) -> markup.Card:
    return markup.Card(
        path=hit.path,
        cosine=hit.cosine,
        probability=hit.probability,
        captions=hit.captions,
        thumbnail=thumbnail(hit.file),
    )


def thumbnail(file: Path) -> Image.Image | None:
    """Returns a picture made small, of a JPEG decoded no larger than that takes; None if it cannot be opened."""
    try:
        image, _ = open_reduced(file, THUMBNAIL, background=_WHITE)
    except (ValueError, OSError):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return image
