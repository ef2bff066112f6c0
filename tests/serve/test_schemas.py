"""What requests share."""

from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

from bridgetower.serve.config import MOST_ITEMS
from bridgetower.serve.inputs import IMAGE, MAX_CHARACTERS, is_image
from bridgetower.serve.schemas import Texts


def test_one_text_or_several() -> None:
    texts = TypeAdapter(Texts)
    assert texts.validate_python("a") == ["a"]
    assert texts.validate_python(["a", "b"]) == ["a", "b"]
    for wrong in ([], 7, ["a", 7], None, {"a": "b"}):
        with pytest.raises(ValidationError):
            texts.validate_python(wrong)
    assert [kind["type"] for kind in texts.json_schema()["anyOf"]] == ["string", "array"]


def test_every_list_of_a_request_has_a_limit_in_the_description(client: httpx.Client) -> None:
    description = client.get("/openapi.json").json()
    schemas, seen, lists = description["components"]["schemas"], set(), []

    def walk(schema: Any) -> None:
        if isinstance(schema, list):
            for part in schema:
                walk(part)
        elif isinstance(schema, dict):
            name = str(schema.get("$ref", "")).rpartition("/")[2]
            if name and name not in seen:
                seen.add(name)
                walk(schemas[name])
            if schema.get("type") == "array":
                lists.append(schema.get("maxItems"))
            walk([part for key, part in schema.items() if key != "examples"])

    for operations in description["paths"].values():
        walk([operation.get("requestBody") for operation in operations.values()])
    assert len(lists) >= 10
    assert set(lists) <= {1, MOST_ITEMS}
    texts = schemas["MatchRequest"]["properties"]["texts"]["anyOf"]
    assert (texts[0]["maxLength"], texts[1]["items"]["maxLength"]) == (MAX_CHARACTERS, MAX_CHARACTERS)


def test_the_image_of_the_examples_is_one() -> None:
    assert is_image(IMAGE)
