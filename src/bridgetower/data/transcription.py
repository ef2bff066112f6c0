"""What is said in a video, by a server with OpenAI's protocol for transcriptions."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridgetower.data.video import Video

KEY = "OPENAI_API_KEY"
_SECONDS = 600  # of sound in one request: 3.6 MB
_DEADLINE, _ATTEMPTS = 900.0, 3
_MOST = 2**24  # bytes of an answer
_AGAIN = (408, 429, 500, 502, 503, 504)


class _Staying(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Staying)


def transcribed(video: Video, url: str, model: str) -> list[tuple[float, float, str]]:
    """Returns start, end and text of what is said, in seconds; the sound goes to the server in parts of 10 minutes."""
    address = url if url.endswith("/transcriptions") else f"{url.rstrip('/')}/audio/transcriptions"
    found = []
    for start, sound in video.sound(_SECONDS):
        answer = _asked(address, {"model": model, "response_format": "verbose_json"}, sound)
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


def _asked(address: str, fields: dict[str, str], sound: bytes) -> Any:
    mark = uuid.uuid4().hex
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{value}\r\n' for n, value in fields.items()
    ]
    parts.append(
        f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="sound.mp3"\r\n'
        "Content-Type: audio/mpeg\r\n\r\n"
    )
    body = "".join(parts).encode() + sound + f"\r\n--{mark}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            request = urllib.request.Request(address, body, headers)
            with _OPENER.open(request, timeout=_DEADLINE) as response:
                return json.loads(response.read(_MOST))
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}: {error.read(500).decode(errors='replace')}"
            if error.code not in _AGAIN:
                break
        except (OSError, ValueError, http.client.HTTPException) as error:
            problem = str(error)
        if attempt < _ATTEMPTS:
            time.sleep(2.0**attempt)
    raise OSError(f"{address} cannot transcribe: {problem}")
