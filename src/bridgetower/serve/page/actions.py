"""What the page's buttons do: they ask the service as the routes do, and return markup."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Literal

from bridgetower.serve.batching import QueueFullError
from bridgetower.serve.errors import ApiError, failure, queue_full
from bridgetower.serve.inputs import OR_CUT
from bridgetower.serve.page import markup
from bridgetower.serve.service import Service

logger = logging.getLogger(__name__)

_TOP = 5  # answers, and words for a mask


class Actions:
    """One coroutine function per tab, but the search.

    Each takes what stands in the tab's fields and returns markup; what cannot be done comes
    back as markup too.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ask(self, picture: str | None, question: str | None) -> str:
        """Answers a question about a picture."""
        return await self.answered(self._ask(picture, stripped(question)))

    async def match(self, picture: str | None, texts: str | None) -> str:
        """Matches a picture with texts, one per line."""
        return await self.answered(
            self._match(picture, list(filter(None, map(str.strip, stripped(texts).splitlines()))))
        )

    async def fill(self, picture: str | None, text: str | None) -> str:
        """Fills the masks of a text about a picture."""
        return await self.answered(self._fill(picture, stripped(text)))

    async def explain(self, picture: str | None, text: str | None) -> str:
        """Shows where each word of a text looks in a picture."""
        return await self.answered(self._explain(picture, stripped(text)))

    async def answered(self, work: Awaitable[str]) -> str:
        """Returns what comes of a request, within the time that one may take."""
        seconds = self._service.config.timeout
        try:
            async with asyncio.timeout(seconds):
                return await work
        except ApiError as error:
            return markup.problem(error.message.removesuffix(OR_CUT))  # for which there is no button
        except QueueFullError as error:
            return markup.problem(queue_full(error).message)
        except TimeoutError:
            return markup.problem(f"no answer within {seconds:g} s; try again later")
        except Exception:
            logger.exception("a request of the page failed")
            return markup.problem(failure().message)

    async def _ask(self, picture: str | None, question: str) -> str:
        (choices,) = await self._pair("answer", picture, [question], "a question")
        return markup.ranking("Answers", [(choice.label, choice.probability) for choice in choices])

    async def _match(self, picture: str | None, texts: list[str]) -> str:
        scores = await self._pair("match", picture, texts, "a text")
        rows = sorted(zip(texts, scores, strict=True), key=lambda row: -row[1])
        return markup.ranking("Probability that text and picture belong together", rows)

    async def _fill(self, picture: str | None, text: str) -> str:
        (masks,) = await self._pair("fill_mask", picture, [text], "a text")
        titles = [f"Mask {number}" for number in range(1, len(masks) + 1)] if len(masks) > 1 else ["Words"]
        return "".join(
            markup.ranking(title, [(word.word, word.probability) for word in words])
            for title, words in zip(titles, masks, strict=True)
        )

    async def _explain(self, picture: str | None, text: str) -> str:
        image = await _needed(picture, text, "a text")
        with self._service.admission(1, "picture", None):
            return await asyncio.to_thread(markup.maps, await self._service.explanation(image, text))

    async def _pair(
        self, kind: Literal["match", "answer", "fill_mask"], picture: str | None, texts: list[str], wanted: str
    ) -> list[Any]:
        """Returns what the model says of a picture with each of some texts."""
        image = await _needed(picture, "".join(texts), wanted)
        pairs = [(0, number) for number in range(len(texts))]
        with self._service.admission(len(pairs), "texts", None):
            outcomes, _ = await self._service.pairs(
                kind, [image], texts, pairs, params=("picture", wanted.split()[-1]), top=_TOP
            )
        return outcomes


async def _needed(picture: str | None, text: str, wanted: str) -> str:
    """Returns a picture as requests hold it, once both picture and text are there."""
    if picture is None or not text:
        raise ApiError(400, f"give a picture and {wanted}")
    return await given(picture)


def stripped(text: str | None) -> str:
    """Returns what stands in a field, which is None until something was typed."""
    return (text or "").strip()


async def given(picture: str) -> str:
    """Returns an uploaded picture as requests hold it."""
    content = await asyncio.to_thread(Path(picture).read_bytes)
    return "data:image/any;base64," + base64.b64encode(content).decode()
