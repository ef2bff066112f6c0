"""Transcripts of sound by a server with OpenAI's protocol."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterable
from typing import Any

from bridgetower.data.sources.fetch import retried

KEY = "OPENAI_API_KEY"
SECONDS_OF_REQUEST = 600  # of sound: 3.6 MB

_DEADLINE = 900.0  # seconds


def transcribed(
    sound: Iterable[tuple[float, bytes]], url: str, model: str
) -> list[tuple[float, float, str]]:
    """Returns start, end and text of what is said, in seconds.

    Args:
        sound: MP3 files, each with the second at which it begins.
        url: The server's, with or without `/audio/transcriptions`.
        model: Model of the server.

    Raises:
        OSError: The server does not answer.
        ValueError: Its answer has no segments.
    """
    address = url if url.endswith("/transcriptions") else f"{url.rstrip('/')}/audio/transcriptions"
    segments = []
    for start, content in sound:
        answer = retried(
            address, lambda *_, content=content: asyncio.run(_post(address, model, content))
        )
        try:
            for segment in answer["segments"]:
                first = float(segment["start"])
                last = float(segment["end"])
                if not math.isfinite(first + last):
                    raise ValueError("times that are not finite")
                segments.append((start + first, start + last, str(segment["text"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{address} answered without segments that have start, end and text ({error}); "
                "expected OpenAI's verbose_json"
            ) from error
    return segments


async def _post(address: str, model: str, content: bytes) -> Any:
    import aiohttp

    form = aiohttp.FormData({"model": model, "response_format": "verbose_json"})
    form.add_field("file", content, filename="sound.mp3", content_type="audio/mpeg")
    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=_DEADLINE)
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
        # A redirection would take the key elsewhere.
        session.post(address, data=form, allow_redirects=False) as response,
    ):
        if response.status != 200:
            raise aiohttp.ClientResponseError(
                response.request_info,
                (),
                status=response.status,
                message=f"{response.reason}: {await response.text(errors='replace')}",
            )
        return await response.json(content_type=None)
