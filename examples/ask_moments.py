"""Asks a multimodal language model about what `bridgetower serve` finds: frames, times and transcripts as messages.

python examples/ask_moments.py "a red square" "What follows it?" --llm http://127.0.0.1:11434/v1 --model NAME

`--llm` is any endpoint with OpenAI's chat completions. Its key is read from OPENAI_API_KEY.
"""

import argparse
import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any


def messages_of(
    hits: Sequence[dict[str, Any]], frames: Sequence[bytes], question: str
) -> list[dict[str, Any]]:
    """Returns a question about moments as OpenAI's chat messages.

    Args:
        hits: Of `/v1/search`.
        frames: Of each hit, from `/v1/images/{id}`.
        question: About them.
    """
    parts: list[dict[str, Any]] = []
    for number, (hit, frame) in enumerate(zip(hits, frames, strict=True), start=1):
        said = hit.get("transcript") or " ".join(hit["captions"])
        times = f", {hit['start']:.1f} to {hit['end']:.1f} s" if "start" in hit else ""
        words = f": {said!r}" if said else ""
        parts.append(
            {"type": "text", "text": f"[{number}] {hit['path'].partition('#')[0]}{times}{words}"}
        )
        url = "data:image/jpeg;base64," + base64.b64encode(frame).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": question})
    rules = "Answer from the moments of videos below, and name those you used by their number."
    return [{"role": "system", "content": rules}, {"role": "user", "content": parts}]


def fetch(url: str, body: object = None, key: str | None = None) -> bytes:
    """Sends a request, with JSON if there is a body; returns the content of the answer.

    Raises:
        SystemExit: The server refuses it or cannot be reached; with its message in OpenAI's or Prediction Guard's form.
    """
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    request = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request) as response:
            content: bytes = response.read()
    except urllib.error.HTTPError as error:
        raise SystemExit(
            f"{url}: {message_of(error.read()) or error.reason}, status {error.code}"
        ) from error
    except urllib.error.URLError as error:
        raise SystemExit(f"{url} cannot be reached: {error.reason}") from error
    return content


def message_of(content: bytes) -> str:
    """Returns the message of an error, an object of OpenAI's API or a text of Prediction Guard's; empty if neither."""
    try:
        found = json.loads(content)["error"]
        message = found if isinstance(found, str) else found["message"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(message)


def main(arguments: Sequence[str] | None = None) -> None:
    """Searches, asks, and prints the answer with links to the moments."""
    parser = argparse.ArgumentParser(description="Ask a language model about moments of videos.")
    parser.add_argument("query", help="what is searched for")
    parser.add_argument("question", help="what is asked about the moments found")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="of `bridgetower serve`")
    parser.add_argument("--llm", required=True, help="address before /chat/completions")
    parser.add_argument("--model", required=True, help="name of the language model")
    parser.add_argument("--top", type=int, default=4, help="moments that it sees")
    given = parser.parse_args(arguments)
    own, key = os.environ.get("BRIDGETOWER_API_KEY"), os.environ.get("OPENAI_API_KEY")
    hits = json.loads(
        fetch(f"{given.server}/v1/search", {"query": given.query, "top": given.top}, own)
    )["data"]
    frames = [fetch(f"{given.server}/v1/images/{hit['id']}?size=768", key=own) for hit in hits]
    body = {"model": given.model, "messages": messages_of(hits, frames, given.question)}
    answer = json.loads(fetch(f"{given.llm}/chat/completions", body, key))
    if message := answer.get("error"):  # some answer so with status 200
        raise SystemExit(f"{given.llm}: {message_of(json.dumps({'error': message}).encode())}")
    print(answer["choices"][0]["message"]["content"])
    for number, hit in enumerate(hits, start=1):
        print(f"[{number}] {given.server}{hit.get('link', '/v1/images/' + hit['id'])}")


if __name__ == "__main__":
    main()
