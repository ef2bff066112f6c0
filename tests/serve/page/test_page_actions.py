"""What the page's buttons show is what the predictor says; what cannot be done is told."""

import asyncio
import html
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bridgetower.analysis.attention import explain
from bridgetower.analysis.formats import percent
from bridgetower.predictor import Predictor, load
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.page import markup
from bridgetower.serve.page.actions import Actions
from bridgetower.serve.service import Service
from served import PNGS, TEXTS

ROW = re.compile(r'<th scope="row">(.*?)</th><td class="bt-number">(.*?)</td>')


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "picture").write_bytes(PNGS[0])
    return str(tmp_path / "picture")


def answers(predictor: Predictor, ask: Callable[[Actions], Awaitable[str]], **settings: float) -> str:
    """Starts a service and returns what the page shows."""

    async def run() -> str:
        service = Service(predictor, ServeConfig(**settings))  # type: ignore[arg-type]
        async with service.running():
            return await ask(Actions(service))

    return asyncio.run(run())


def rows(shown: str) -> list[tuple[str, str]]:
    return [(html.unescape(name), html.unescape(value)) for name, value in ROW.findall(shown)]


def test_match(predictor: Predictor, file: str) -> None:
    shown = answers(predictor, lambda actions: actions.match(file, "\n".join(["", *TEXTS, "  "])))
    scores = zip(TEXTS, predictor.match(PNGS[0], TEXTS, all_pairs=True)[0].tolist(), strict=True)
    assert rows(shown) == [(text, percent(score)) for text, score in sorted(scores, key=lambda row: -row[1])]


def test_fill(predictor: Predictor, file: str) -> None:
    shown = answers(predictor, lambda actions: actions.fill(file, "a <mask> bar on <mask>"))
    masks = predictor.fill_mask(PNGS[0], "a <mask> bar on <mask>", top=5)
    assert rows(shown) == [(word.word, percent(word.probability)) for words in masks for word in words]
    assert "Mask 2" in shown


def test_ask(answering_checkpoint: Path, file: str) -> None:
    predictor = load(answering_checkpoint, device="cpu")
    shown = answers(predictor, lambda actions: actions.ask(file, "which colour?"))
    assert rows(shown) == [
        (answer.label, percent(answer.probability)) for answer in predictor.answer(PNGS[0], "which colour?", top=5)
    ]


def test_explain(predictor: Predictor, file: str) -> None:
    shown = answers(predictor, lambda actions: actions.explain(file, TEXTS[0]))
    assert shown == markup.maps(explain(predictor, file, TEXTS[0]))
    assert shown != markup.maps(explain(predictor, file, TEXTS[1]))


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda actions, file: actions.match(None, "a bar"), "give a picture and a text"),
        (lambda actions, file: actions.match(file, " \n "), "give a picture and a text"),
        (lambda actions, file: actions.ask(file, None), "give a picture and a question"),
        (lambda actions, file: actions.explain(file, ""), "give a picture and a text"),
        (lambda actions, file: actions.explain(file, "<mask>"), "no word"),
        (lambda actions, file: actions.explain(file, "red " * 99), "the limit is 24; shorten it</p>"),
        (lambda actions, file: actions.fill(file, "a bar"), "no mask in text 0"),
        (lambda actions, file: actions.match(__file__, "a bar"), "picture: "),
        (lambda actions, file: actions.match(file, "a\n" * 2000), "2000 items, the limit is 1024"),
    ],
)
def test_what_cannot_be_done(
    predictor: Predictor, file: str, ask: Callable[[Actions, str], Awaitable[str]], words: str
) -> None:
    shown = answers(predictor, lambda actions: ask(actions, file))
    assert shown.startswith('<p class="bt-problem" role="alert">')
    assert words in html.unescape(shown)
    assert __file__ not in shown


def test_full_late_and_failed(predictor: Predictor, file: str, caplog: pytest.LogCaptureFixture) -> None:
    async def busy(actions: Actions) -> str:
        with actions._service.admission(1024, "texts", None):
            return await actions.match(file, "a bar")

    assert "the server is busy" in answers(predictor, busy, queue=1024)
    with slow(predictor):
        assert "no answer within 0.3 s" in answers(predictor, lambda actions: actions.match(file, "a bar"), timeout=0.3)
    with caplog.at_level(logging.ERROR):
        shown = answers(predictor, lambda actions: actions.match("/nowhere/at/all", "a bar"))
    assert "its log has the reason" in shown
    assert "nowhere" not in shown
    assert "nowhere" in caplog.text


@contextmanager
def slow(predictor: Predictor) -> Iterator[None]:
    """Lets the text tower take a second for texts of requests, which are longer than the service's own first one."""
    import time

    hook = predictor.model.text.word_embedding.register_forward_pre_hook(
        lambda module, inputs: time.sleep(1) if inputs[0].shape[1] > 2 else None
    )
    try:
        yield
    finally:
        hook.remove()
