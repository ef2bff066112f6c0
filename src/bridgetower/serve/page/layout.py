"""The page: its tabs and fields."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from html import escape
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read whenever Gradio would call home
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # that are kept for statistics,
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"  # which are never made

import gradio as gr
from gradio.utils import LRUCache

from bridgetower.serve.errors import ApiError
from bridgetower.serve.page import markup
from bridgetower.serve.page.actions import Actions
from bridgetower.serve.served_model import Use
from bridgetower.serve.service import Service

_MOST_HITS = 48
_SESSIONS = 32  # of which Gradio keeps what was shown
_UNFETCHED = (
    128  # sessions whose results wait for a browser that may never ask for them; Gradio would keep 2000 and more
)
_KEPT = (600, 3600)  # seconds: how often uploads are looked through, and how old they get

_Action = Callable[..., Awaitable[str]]


@dataclass(frozen=True, kw_only=True)
class Tab:
    """A tab with a picture, a text and what comes of both.

    Attributes:
        title: Of the tab.
        use: What the model must have a head for.
        action: Takes the path of the picture and the text.
        label, example: Of the text's field.
        lines: That it shows.
        button: What it is called.
        wide: Whether the result takes the whole width instead of standing beside the picture.
    """

    title: str
    use: Use | None
    action: _Action
    label: str
    example: str
    button: str
    lines: int = 1
    wide: bool = False


def build_page(service: Service) -> gr.Blocks:
    """Returns the page of a service, whose tabs ask it as its routes do."""
    actions = Actions(service)
    mask = service.predictor.processor.mask_token
    tabs = [
        Tab(
            title="Ask",
            use="answer",
            action=actions.ask,
            label="Question",
            example="how many circles are there?",
            button="Ask",
        ),
        Tab(
            title="Match",
            use="match",
            action=actions.match,
            label="Texts, one per line",
            example="a red flag\na smiling face",
            button="Match",
            lines=4,
        ),
        Tab(
            title="Fill the mask",
            use="fill-mask",
            action=actions.fill,
            label=f"Text with {mask} where a word is missing",
            example=f"a flag with a {mask} band",
            button="Fill",
        ),
        Tab(
            title="See why",
            use=None,
            action=actions.explain,
            label="Text",
            example="three horizontal bands",
            button="Show where each word looks",
            wide=True,
        ),
    ]
    with gr.Blocks(title="BridgeTower", analytics_enabled=False, delete_cache=_KEPT) as page:
        gr.HTML(f"<h1>BridgeTower</h1><p>{escape(service.name)}</p>", elem_classes="bt-head")
        with gr.Tabs():
            with gr.Tab("Search"):
                _search(service, actions)
            for tab in tabs:
                with gr.Tab(tab.title):
                    _fields(tab, service)
    page.state_session_capacity = _SESSIONS
    page.queue(max_size=service.config.queue, default_concurrency_limit=None)
    page._queue.pending_messages_per_session = LRUCache(_UNFETCHED)
    page._queue.pending_event_ids_session = LRUCache(_UNFETCHED)
    return page


def _search(service: Service, actions: Actions) -> None:
    """Fills the tab of searches."""
    if service.searcher is None:
        gr.HTML(markup.note("This server has no index. Make one with bridgetower index, and serve it with --index."))
        return
    from bridgetower.serve.page.searching import Searching

    with gr.Row(equal_height=False):
        with gr.Column(scale=3):
            text = gr.Textbox(label="What should be seen", placeholder="a red flag")
            with gr.Accordion("Options", open=False):
                top = gr.Slider(1, _MOST_HITS, value=12, step=1, label="Pictures to show")
                where = gr.Textbox(
                    label="Where: a condition in SQL on path, size, mtime, width, height and captions",
                    placeholder="width > 800",
                )
            button = gr.Button("Search", variant="primary")
        with gr.Column(scale=1, min_width=240):
            picture = _picture("Like this picture (optional)")
    result = _result()
    _on(button, text, Searching(service, actions).search, [text, picture, top, where], result)


def _fields(tab: Tab, service: Service) -> None:
    """Fills a tab with its fields, or with what the model lacks for it."""
    if tab.use is not None:
        try:
            service.check_use(tab.use)
        except ApiError as error:
            gr.HTML(markup.note(f"Not with this model: {error.message}."))
            return
        if (model := service.model_for(tab.use)) is not service.main:
            gr.HTML(markup.note(f"Here {model.name} answers."))
    with gr.Row(equal_height=False):
        with gr.Column(min_width=280):
            picture = _picture("Picture")
        with gr.Column(min_width=280):
            text = gr.Textbox(label=tab.label, placeholder=tab.example, lines=tab.lines, max_lines=tab.lines)
            button = gr.Button(tab.button, variant="primary")
            if not tab.wide:
                result = _result()
    if tab.wide:
        result = _result()
    _on(button, text, tab.action, [picture, text], result)


def _on(button: gr.Button, text: gr.Textbox, action: _Action, inputs: list[Any], result: gr.HTML) -> None:
    """Lets the button, and Enter in the field of the text, start an action."""
    gr.on([button.click, text.submit], action, inputs, result, api_visibility="private")


def _picture(label: str) -> gr.Image:
    return gr.Image(
        type="filepath", image_mode=None, sources=["upload", "clipboard"], label=label, height=240, buttons=[]
    )


def _result() -> gr.HTML:
    return gr.HTML(elem_classes="bt-result", html_template='<div aria-live="polite">${value}</div>')
