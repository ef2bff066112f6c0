"""Bodies are parsed outside the event loop, and those that would take long not at all."""

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from bridgetower.inference.items import FilledWord
from bridgetower.serve import queues, schemas
from bridgetower.serve.config import MOST_ITEMS
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import MAX_CHARACTERS
from bridgetower.serve.queues import Turns
from bridgetower.serve.schemas import OUTSIDE, STRINGS, TEXT, Texts, check_effort, json_of, parse
from helpers.servers import error_of

pytestmark = pytest.mark.anyio
ANYTHING = TypeAdapter(Any)


def effort_of(body):
    try:
        check_effort(body)
    except ApiError as error:
        return f"{error.status} {error.message}"
    return ""


def strings(content, *lengths):
    return b"[" + b",".join(b'"' + content * length + b'"' for length in lengths) + b"]"


def test_what_takes_long_to_parse():
    def check(small, large, words):
        assert effort_of(small) == ""
        assert words in effort_of(large)

    check(
        strings(b"a", *[1] * STRINGS),
        strings(b"a", *[1] * (STRINGS + 1)),
        f"more than {STRINGS} strings",
    )
    for content, length in ((b"1,", 2), (b"[", 1), (b"{},", 3), (b"9", 1), (b"null, \n", 5)):
        count = OUTSIDE // length
        check(
            content * count, content * (count + 1), f"more than {OUTSIDE} bytes outside of strings"
        )
    for text in ("é", "漢", "😀", "\\n", "\\u00e9", "\\/", "\\\\", '\\"'):
        content = text.encode()
        words = f"more than {TEXT} bytes in strings with escapes"
        count = TEXT // len(content)
        check(strings(content, count), strings(content, count + 9), words)
        check(strings(content, count // 2, count // 2), strings(content, *[count // 2] * 3), words)
    plain = b"a" * TEXT
    for character in ("é".encode(), b"\\n"):  # makes the whole string one of them
        for text in (character + plain, plain + character):
            check(strings(plain + b"a", 1), b'["' + text, "in strings with escapes")
    check(
        b"[" + b" \r\n\t" * OUTSIDE + b"1]", b'"",' * (8 * STRINGS), f"more than {STRINGS} strings"
    )
    assert effort_of(strings(b"A", 2**25)) == ""


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(alphabet='a"\\é\n/', max_size=200), max_size=200))
@example(["\\" * 200 + '"'] * 200)
def test_what_is_inside_of_strings_is_found_as_a_parser_does(texts):
    """Repeated, so that the parts which a body is looked at in end anywhere in the texts."""
    body = json.dumps(texts * 50, ensure_ascii=len(texts) % 2 == 0).encode()
    room = OUTSIDE - len("[[],]") - max(0, 50 * len(texts) - 1)
    assert effort_of(b"[" + body + b"," + b"1" * room + b"]") == ""
    assert "413 the body has more" in effort_of(b"[" + body + b"," + b"1" * (room + 1) + b"]")


def test_large_bodies_are_parsed_in_a_thread_of_their_own(post, monkeypatch):
    threads = []
    monkeypatch.setattr(
        schemas,
        "parse",
        lambda *arguments: threads.append(threading.current_thread().name) or parse(*arguments),
    )
    for text in ("a" * 18_000, "a"):
        post("/v1/embeddings", input=text, truncate=True)
    assert [name.startswith("bodies") for name in threads] == [True, False]


def test_every_route_with_a_body_refuses_those_that_would_take_long(client):
    operations = client.get("/openapi.json").json()["paths"].items()
    paths = [
        path
        for path, methods in operations
        for operation in methods.values()
        if "requestBody" in operation
    ]
    assert len(paths) >= 6
    for path in paths:
        error = error_of(client.post(path, json={"input": ["a"] * STRINGS}), 413)
        assert (
            error["message"] == f"the body has more than {STRINGS} strings; send several requests"
        )


def test_parsed_as_json_does():
    for value in ([1, -2.5e3, True, None, {"a": ["é", "\n", '"\\']}], "a", {}):
        for ascii_only in (True, False):
            assert parse(ANYTHING, json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_one_text_or_several():
    texts = TypeAdapter(Texts)
    assert texts.validate_python("a") == ["a"]
    assert texts.validate_python(["a", "b"]) == ["a", "b"]
    for wrong in ([], 7, ["a", 7], None, {"a": "b"}):
        with pytest.raises(ValidationError):
            texts.validate_python(wrong)
    assert [kind["type"] for kind in texts.json_schema()["anyOf"]] == ["string", "array"]


def test_every_list_of_a_request_has_a_limit_in_the_description(client):
    description = client.get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    seen = set()
    lists = []

    def walk(schema):
        if isinstance(schema, list):
            for value in schema:
                walk(value)
        elif isinstance(schema, dict):
            name = str(schema.get("$ref", "")).rpartition("/")[2]
            if name and name not in seen:
                seen.add(name)
                walk(schemas[name])
            if schema.get("type") == "array":
                lists.append(schema.get("maxItems"))
            walk([value for key, value in schema.items() if key != "examples"])

    for operations in description["paths"].values():
        walk([operation.get("requestBody") for operation in operations.values()])
    assert len(lists) >= 10
    assert set(lists) <= {1, MOST_ITEMS}
    texts = schemas["MatchRequest"]["properties"]["texts"]["anyOf"]
    assert (texts[0]["maxLength"], texts[1]["items"]["maxLength"]) == (
        MAX_CHARACTERS,
        MAX_CHARACTERS,
    )


async def test_long_responses_are_written_in_short_pieces(monkeypatch):
    """Writers take turns after each moment, and no piece has more than the innermost lists."""
    monkeypatch.setattr(queues, "_DRAWN", 2)
    turns = Turns(1, "test")
    begun = []
    sizes = []
    to_json = schemas.to_json

    def measured(value):
        sizes.append(len(value))
        return to_json(value)

    def rows(name):
        for number in range(3):
            begun.append(f"{name}{number}")
            yield {"masks": [[FilledWord("x", 0.5)] * 5] * 40}

    monkeypatch.setattr(schemas, "to_json", measured)
    responses = await asyncio.gather(*(json_of(turns, {"data": rows(name)}) for name in "ab"))
    assert [len(json.loads(response.body)["data"]) for response in responses] == [3, 3]
    assert set(sizes) == {5}
    assert begun.index("b0") < begun.index("a2")


async def test_answers_are_compact_ascii_without_what_is_none(monkeypatch):
    rows = [
        {"a": "\u202eé", "b": None, "c": [FilledWord("x", 0.25)]},
        {"a": "\ud800"},
        {"d": [0.1, 1e-9]},
        3,
    ]
    turns = Turns(1, "test")
    for at_once in (1, 1000):
        monkeypatch.setattr(schemas, "_AT_ONCE", at_once)
        response = await json_of(turns, {"data": rows, "none": None, "n": {"k": None, "m": "ü"}})
        assert set(response.body) <= {*range(33, 127)}  # neither spaces nor what is not ASCII
        first = {"a": "\u202eé", "c": [{"word": "x", "probability": 0.25}]}
        assert json.loads(response.body) == {"data": [first, *rows[1:]], "n": {"m": "ü"}}
