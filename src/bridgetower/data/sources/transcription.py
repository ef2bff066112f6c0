"""What is said in a video, by a server with OpenAI's protocol for transcriptions."""

from __future__ import annotations

import asyncio
import math
import os
from typing import TYPE_CHECKING, Any

from bridgetower.data.sources.fetch import retried

if TYPE_CHECKING:
    from bridgetower.data.sources.video import Video

KEY = "OPENAI_API_KEY"
_SECONDS = 600  # of sound in one request: 3.6 MB
_DEADLINE = 900.0


def transcribed(video: Video, url: str, model: str) -> list[tuple[float, float, str]]:
    """Returns start, end and text of what is said, in seconds; the sound goes to the server in parts of 10 minutes."""
    address = url if url.endswith("/transcriptions") else f"{url.rstrip('/')}/audio/transcriptions"
    found = []
    for start, sound in video.sound(_SECONDS):
        answer = retried(
            address, lambda *_, sound=sound: asyncio.run(_posted(address, model, sound))
        )
        try:
            for one in answer["segments"]:
                first, last = float(one["start"]), float(one["end"])
                if not math.isfinite(first + last):
                    raise ValueError("times that are not finite")
                found.append((start + first, start + last, str(one["text"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{address} answered without segments that have start, end and text ({error}); expected OpenAI's "
                "verbose_json"
            ) from error
    return found


async def _posted(address: str, model: str, sound: bytes) -> Any:
    import aiohttp

    form = aiohttp.FormData({"model": model, "response_format": "verbose_json"})
    form.add_field("file", sound, filename="sound.mp3", content_type="audio/mpeg")
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_DEADLINE)) as session,
        session.post(
            address, data=form, headers=headers, allow_redirects=False
        ) as response,  # not with the key
    ):
        if response.status != 200:
            message, info = (
                f"{response.reason}: {await response.text(errors='replace')}",
                response.request_info,
            )
            raise aiohttp.ClientResponseError(info, (), status=response.status, message=message)
        return await response.json(content_type=None)
