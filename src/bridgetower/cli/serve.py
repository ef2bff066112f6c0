"""The verb serve."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from typing import Annotated

from tyro.conf import arg

from bridgetower.cli.options import AS_USUAL, Loading, Model
from bridgetower.serve.config import ServeConfig

KEY = "BRIDGETOWER_API_KEY"


def serve(
    *,
    model: Model,
    options: Annotated[ServeConfig, arg(name="")] = ServeConfig(),  # noqa: B008 - frozen
    loading: Loading = AS_USUAL,
) -> None:
    """Answer other programs over HTTP: embeddings as OpenAI's API has them.

    Requests that come together are computed together, whatever they ask for. When more wait than the queue takes,
    further ones get status 429 and are told when to come back. On SIGTERM or Ctrl-C what was taken in is finished
    first. The key can also be given in the environment variable BRIDGETOWER_API_KEY, where no other user of the
    machine sees it. The description of all requests, with examples, is at /openapi.json.

    Examples: bridgetower serve --model MODEL
              curl http://127.0.0.1:8000/v1/embeddings --json '{"input": "two dogs in the snow"}'

    Args:
        model: What to load.
        options: How it is served.
        loading: How the model is loaded.
    """
    from bridgetower.engines.packages import require

    require("fastapi", "uvicorn", extra="serve")
    from bridgetower.serve.server import listen
    from bridgetower.serve.server import serve as run
    from bridgetower.serve.service import Service

    _log_with_time()
    config = options if options.api_key else replace(options, api_key=os.environ.get(KEY))
    with listen(config) as listener:
        run(Service(loading.load(model), config), listener)


def _log_with_time() -> None:
    """Logs as a server does: with colours on a terminal, one line per entry elsewhere."""
    from rich.console import Console
    from rich.logging import RichHandler

    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    form = "%(asctime)s %(levelname)s %(message)s"
    if sys.stderr.isatty():
        handlers, form = [RichHandler(console=Console(stderr=True), show_path=False)], "%(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=handlers, force=True)
