"""What requests share."""

import pytest
from pydantic import TypeAdapter, ValidationError

from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import is_picture
from bridgetower.serve.schemas import PICTURE, Texts, paired


def test_one_text_or_several() -> None:
    texts = TypeAdapter(Texts)
    assert texts.validate_python("a") == ["a"]
    assert texts.validate_python(["a", "b"]) == ["a", "b"]
    for wrong in ([], 7, ["a", 7], None, {"a": "b"}):
        with pytest.raises(ValidationError):
            texts.validate_python(wrong)
    assert [kind["type"] for kind in texts.json_schema()["anyOf"]] == ["string", "array"]


def test_pairs() -> None:
    assert paired(["i", "j"], ["t", "u"]) == [(0, 0), (1, 1)]
    assert paired(["i", "j"], ["t"], all_pairs=True) == [(0, 0), (1, 0)]
    with pytest.raises(ApiError, match="2 images and 1 texts"):
        paired(["i", "j"], ["t"])


def test_the_picture_of_the_examples_is_one() -> None:
    assert is_picture(PICTURE)
