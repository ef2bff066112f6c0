"""The page as an application of its own, to be put under the routes of the API."""

from __future__ import annotations

from importlib.resources import files

import gradio as gr
from fastapi import FastAPI

from bridgetower.serve.page.gate import Gate
from bridgetower.serve.page.layout import build_page
from bridgetower.serve.service import Service


def page_app(service: Service) -> FastAPI:
    """Returns the application that shows the page at `/`; it works while its lifespan does."""
    app, page = FastAPI(openapi_url=None), build_page(service)
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    ).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=service.config.max_body * 2**20,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=files("bridgetower.serve.page").joinpath("page.css").read_text(encoding="utf-8"),
    )
    app.add_middleware(
        Gate,
        inputs={number: len(function.inputs) for number, function in page.fns.items()},
        sessions=page._queue.pending_messages_per_session,
    )
    return app
