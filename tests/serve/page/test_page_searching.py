"""The page's search shows what the searcher finds, with both scores and small pictures."""

import asyncio
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgetower.analysis.formats import number, percent
from bridgetower.predictor import Predictor
from bridgetower.processor import open_image, open_reduced
from bridgetower.search.build import build_index
from bridgetower.search.searcher import Searcher
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.page.actions import Actions
from bridgetower.serve.page.searching import Searching, thumbnail
from bridgetower.serve.service import Service
from served import PNGS
from shapes import write_pictures

CARD = re.compile(
    r'<p class="bt-path">(.*?)</p>.*?<dl>(?:<dt>match</dt><dd>(.*?)</dd>)?<dt>cosine</dt><dd>(.*?)</dd>', re.DOTALL
)


def found(searcher: Searcher, text: str | None, picture: str | None = None, top: int = 5, where: str = "") -> str:
    async def run() -> str:
        service = Service(searcher.predictor, ServeConfig(), searcher)
        async with service.running():
            return await Searching(service, Actions(service)).search(text, picture, top, where)

    return asyncio.run(run())


def test_text_and_picture(searcher: Searcher, tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(PNGS[0])
    for text, picture in (("red bar", None), ("red bar", file), (None, file)):
        shown = found(searcher, text, picture and str(picture), top=7, where="path > '20.png'")
        hits = searcher.search(text, picture, top=7, where="path > '20.png'")
        assert CARD.findall(shown) == [
            (hit.path, "" if hit.probability is None else percent(hit.probability), number(hit.cosine, digits=3))
            for hit in hits
        ]
        assert shown.count("data:image/jpeg;base64,") == 7


def test_what_cannot_be_done(searcher: Searcher, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert "nothing to search for" in found(searcher, " ")
        assert "where: &#x27;pg_sleep&#x27; is not allowed" in found(searcher, "a bar", where="pg_sleep(9)")
        assert "top: Input should be less than or equal to 100" in found(searcher, "a bar", top=10**9)
        assert "No picture meets the condition" in found(searcher, "a bar", where="width > 1000")
    assert not caplog.text  # nothing of this is a failure of the server


def test_a_picture_that_is_gone(predictor: Predictor, tmp_path: Path) -> None:
    build_index(write_pictures(tmp_path), tmp_path / "shapes.lance", predictor)
    searcher = Searcher(tmp_path / "shapes.lance", predictor)
    query = tmp_path / "query"
    query.write_bytes(PNGS[0])
    first = searcher.search(image=query, top=1)[0]
    first.file.unlink()
    shown = found(searcher, None, str(query), top=2)
    assert shown.count("cannot be opened where the index has it") == 1
    assert str(tmp_path) not in shown


def test_thumbnails_keep_their_proportions(tmp_path: Path) -> None:
    for size, small in (((1000, 500), (360, 180)), ((20, 10), (20, 10))):
        Image.new("RGB", size).save(tmp_path / "picture.png")
        image = thumbnail(tmp_path / "picture.png")
        assert image is not None
        assert image.size == small


def test_photos_are_not_decoded_in_full(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1600, 2000, 3), dtype=np.uint8)
    file = tmp_path / "photo.jpg"
    Image.fromarray(noise).save(file)

    def small(image: Image.Image) -> bytes:
        image.thumbnail((360, 360), Image.Resampling.LANCZOS)
        return image.tobytes()

    image = thumbnail(file)
    assert image is not None
    assert image.tobytes() == small(open_reduced(file, 360)[0])
    assert image.tobytes() != small(open_image(file))  # of which the two differ where they may
