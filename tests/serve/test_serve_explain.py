"""Attention over HTTP, equal to the direct call."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bridgetower.attention import explain
from bridgetower.predictor import Predictor
from served import PNGS, TEXTS, URIS


def test_maps_of_every_word(post: Callable[..., Any], predictor: Predictor) -> None:
    for number, text in enumerate(TEXTS):
        answer = post("/v1/explain", image=URIS[number], text=text)
        expected = explain(predictor, PNGS[number], text)
        assert answer["words"] == list(expected.words)
        assert np.array(answer["maps"]) == pytest.approx(expected.maps.numpy(), abs=1e-5)
        assert np.array(answer["prefix_shares"]) == pytest.approx(expected.prefix_shares.numpy(), abs=1e-5)
        assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
        assert answer["usage"]["total_tokens"] == 5 + len(predictor.processor.token_ids([text])[0])
        assert "view" not in answer


def test_the_view_is_what_the_model_sees(post: Callable[..., Any], predictor: Predictor) -> None:
    answer = post("/v1/explain", image=URIS[0], text="a bar", view=True)
    head, _, content = answer["view"].partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as view:
        expected = explain(predictor, PNGS[0], "a bar").view
        assert view.size == expected.size
        difference = np.abs(np.asarray(view, dtype=float) - np.asarray(expected, dtype=float))
        assert difference.mean() < 4


def test_refusals(refused: Callable[..., dict[str, Any]]) -> None:
    assert "no word" in refused("/v1/explain", image=URIS[0], text="")["message"]
    assert refused("/v1/explain", image="/etc/passwd", text="a")["param"] == "image"
    assert refused("/v1/explain", image=URIS[0], text="red circle " * 30)["param"] == "text"
    assert refused("/v1/explain", image=[URIS[0]], text="a")["param"] == "image"


def test_each_way_to_name_an_image_that_is_refused(refused: Callable[..., dict[str, Any]]) -> None:
    """Paths, devices, other hosts, drawings and images with too many pixels: on every route that takes an image."""
    drawing = base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>').decode()
    many = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0" + bytes(40)
    images = ["/etc/passwd", "/dev/zero", "file:///etc/passwd", "http://127.0.0.1/a.png", "https://example.org/a.png"]
    images += [f"data:image/svg+xml;base64,{drawing}", "data:image/png;base64," + base64.b64encode(many).decode()]
    images += ["data:text/html;base64,PGI+", "data:image/png,%89PNG"]
    for image in images:
        for path, fields in (
            ("/v1/explain", {"image": image, "text": "a"}),
            ("/v1/match", {"images": image, "texts": "a"}),
            ("/v1/fill-mask", {"images": image, "texts": "<mask>"}),
            ("/v1/search", {"image": image}),
            ("/v1/embeddings", {"input": image, "modality": "image"}),
        ):
            assert refused(path, **fields)["code"] == "invalid_image", (image[:40], path)
