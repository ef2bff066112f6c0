"""The command serve."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from bridgetower.cli import reported
from bridgetower.cli.options import LOADED, Loading, LoadOptions, Model
from bridgetower.cli.output import log_to
from bridgetower.cli.parsing import meant
from bridgetower.extras import require
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.replicas import Replica, limit_arenas, supervise, wait_passively

if TYPE_CHECKING:
    from bridgetower.serve.service import Service

KEY = "BRIDGETOWER_API_KEY"
_VARIABLES = "BRIDGETOWER_SERVE_"
# Imported once for all replicas.
_PRELOADED = (
    "bridgetower.cli.serve",
    "bridgetower.serve.server",
    "bridgetower.inference.predictor",
)


def serve_command(
    *,
    model: Model | None = None,
    index: str | None = None,
    root: Path | None = None,
    answer_model: Model | None = None,
    options: Annotated[ServeConfig, arg(name="")] = ServeConfig(),  # noqa: B008 - frozen
    loading: Loading = LOADED,
) -> None:
    """Serve a model over HTTP: embeddings as in the OpenAI API, reranking, search, matching, answers.

    Few models can both find images and answer questions; a second one may be served for questions.

    Requests of all kinds that arrive together are computed together. When more wait than the queue takes, further
    ones get status 429 with the header Retry-After. On SIGTERM or Ctrl-C requests that were accepted are finished
    first. Options can also be given in the environment, such as BRIDGETOWER_SERVE_MAX_BATCH=32. BRIDGETOWER_API_KEY
    belongs there, where no other user of the machine sees it. The description of all requests, with examples, is at
    /openapi.json; a page is at /.

    Examples: bridgetower serve --model MODEL
              bridgetower serve --index photos.lance
              curl http://127.0.0.1:8000/v1/embeddings -H 'Content-Type: application/json' -d '{"input": "two dogs"}'

    Args:
        model: Model to load; default: the model that the index was made with.
        index: What `bridgetower index` made, for searches, or the word demo; default: none.
        root: Folder of the index's images, if it is elsewhere now.
        answer_model: Model that answers questions; default: the model itself if it has a head for that. --revision,
            --subfolder, --image-size, --tokenizer and --answers are for the other.
        options: How it is served.
        loading: How the model is loaded.
    """
    require("serve")
    limit_arenas()
    wait_passively()
    from bridgetower.serve.server import take_port

    config = options if options.api_key else replace(options, api_key=os.environ.get(KEY))
    sources = {"model": model, "index": index, "root": root, "answer_model": answer_model}
    with take_port(config) as port:
        if config.replicas == 1:
            _run_server(config, sources, loading, port)
        else:
            _log_with_time()
            address = (port.getsockname(), port.family)
            supervise(
                config.replicas,
                partial(_run_replica, config, sources, loading, address),
                _PRELOADED,
            )


def with_environment(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Returns the arguments of `serve`, the first as an option, with those that they lack from BRIDGETOWER_SERVE_…."""
    completed = list(arguments)
    if completed and not completed[0].startswith("-"):
        is_index = completed[0].rstrip("/").endswith(".lance")
        completed.insert(0, "--index" if is_index else "--model")
    present = {
        argument.partition("=")[0].replace("--no-", "--").replace("_", "-")
        for argument in completed
    }

    # Every option has a variable.
    defaults: dict[str, Any] = dict.fromkeys(("model", "index", "root", "answer_model"))
    defaults |= vars(ServeConfig())
    defaults |= vars(LOADED)
    variables = {f"{_VARIABLES}{name.upper()}": name for name in defaults}
    for variable in sorted(environment):
        if variable.startswith(_VARIABLES) and variable not in variables:
            raise ValueError(
                f"there is no {variable}; {meant(variable, variables)}see `bridgetower serve --help`"
            )

    for variable, name in variables.items():
        value = environment.get(variable)
        option = "--" + name.replace("_", "-")
        if not value or option in present:
            continue
        if isinstance(defaults[name], bool):
            flags = {"true": option, "false": option.replace("--", "--no-", 1)}
            if value not in flags:
                raise ValueError(f"{variable} is {value!r}; expected true or false")
            completed.append(flags[value])
        else:
            is_list = isinstance(defaults[name], tuple)
            completed += [option, *(value.split(",") if is_list else [value])]
    return completed


def _run_server(
    config: ServeConfig,
    sources: Mapping[str, Any],
    loading: LoadOptions,
    port: socket,
    name: str = "",
) -> None:
    """Serves in this process, whose log entries begin with a name."""
    from bridgetower.serve.metrics import ACCESS_LOG
    from bridgetower.serve.server import serve as run

    _log_with_time(name)
    if config.access_log:
        ACCESS_LOG.addHandler(logging.StreamHandler(sys.stdout))
        ACCESS_LOG.setLevel(logging.INFO)
        ACCESS_LOG.propagate = False
    run(service(config, loading, **sources), port)


def _run_replica(
    config: ServeConfig,
    sources: Mapping[str, Any],
    loading: LoadOptions,
    address: tuple[Any, int],
    replica: Replica,
) -> None:
    """Serves in one of several processes, each of which listens at the port itself."""
    replica.settle()
    limit_arenas()
    wait_passively()
    from bridgetower.serve.server import shared_port

    with reported():
        if loading.engine in ("torch", "auto"):
            loading = replace(loading, device=replica.device(loading.device))
        _run_server(
            config, sources, loading, shared_port(*address), f"replica {replica.number + 1}: "
        )


def service(
    config: ServeConfig,
    loading: LoadOptions,
    *,
    model: str | None = None,
    index: str | None = None,
    root: Path | None = None,
    answer_model: str | None = None,
) -> Service:
    """Loads the model and the index to serve, by the arguments of the command."""
    from bridgetower.serve.service import Service

    searcher = None
    if index is None:
        if model is None:
            raise ValueError(
                "neither a model nor an index is given; give --model MODEL, --index INDEX.lance or both"
            )
        if root is not None:
            raise ValueError(
                f"root is {root}, where an index's images are, but there is no index; add --index"
            )
        predictor = loading.load(model)
    else:
        require("search")
        searcher = loading.open_index(index, root, model)
        predictor = searcher.predictor
    answering = None
    if answer_model is not None:
        answering = predictor
        if answer_model != predictor.source:
            loading = replace(
                loading,
                revision=None,
                subfolder=None,
                image_size=None,
                tokenizer=None,
                answers=None,
            )
            answering = loading.load(answer_model, answers_questions=True)
        try:
            answering.class_names("vqa")
        except ValueError as error:
            raise ValueError(
                f"answer_model {answer_model} cannot answer questions: {error}"
            ) from error
    if answering is predictor:
        answering = None
    return Service(predictor, config, searcher, answering)


def _log_with_time(name: str = "") -> None:
    """Logs as a server does: with colours on a terminal, one line per entry elsewhere."""
    from rich.console import Console
    from rich.logging import RichHandler

    if sys.stderr.isatty():
        log_to(
            RichHandler(console=Console(stderr=True), show_path=False),
            f"{name}%(message)s",
            alone=True,
        )
    else:
        log_to(logging.StreamHandler(), f"%(asctime)s %(levelname)s {name}%(message)s", alone=True)
