"""What the page's search does; apart from the other tabs, because it needs what an index needs."""

from __future__ import annotations

import asyncio

from bridgetower.processor import open_image
from bridgetower.search.searcher import Hit
from bridgetower.serve.conditions import check_condition
from bridgetower.serve.errors import ApiError
from bridgetower.serve.page import markup
from bridgetower.serve.page.actions import Actions, given, stripped
from bridgetower.serve.search import SearchRequest, found
from bridgetower.serve.service import Service

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
        try:
            check_condition(where)
        except ValueError as error:
            raise ApiError(400, f"condition: {error}") from error
        image = None if picture is None else await given(picture)
        body = SearchRequest.model_validate({"query": text or None, "image": image, "top": top, "where": where or None})
        hits, _ = await found(body, self._service)
        return markup.cards(await asyncio.gather(*(asyncio.to_thread(_card, hit) for hit in hits)))


def _card(hit: Hit) -> markup.Card:
    try:
        thumbnail = markup.thumbnail(open_image(hit.file, background=_WHITE))
    except (ValueError, OSError):
        thumbnail = None
    return markup.Card(
        path=hit.path,
        cosine=hit.cosine,
        probability=hit.probability,
        captions=hit.captions,
        thumbnail=thumbnail,
    )
