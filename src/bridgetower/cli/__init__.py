"""The `bridgetower` command: verbs to functions; torch is imported only when a verb runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

import tyro

from bridgetower.cli import answering, evaluation, files, inspect, prepare, profile, runs, search, serve, use
from bridgetower.cli.output import with_options, with_whole_entries

VERBS: dict[str, Callable[..., None]] = {
    "embed": use.embed,
    "match": use.match,
    "fill-mask": use.fill_mask,
    "answer": answering.answer,
    "entail": answering.entail,
    "reason": answering.reason,
    "explain": use.explain,
    "index": search.index,
    "search": search.search,
    "serve": serve.serve,
    "convert": files.convert,
    "inspect": inspect.inspect,
    "profile": profile.profile,
    "export": files.export,
    "train": runs.train,
    "evaluate": evaluation.evaluate,
    "demo": runs.demo,
}

app = tyro.extras.SubcommandApp()
for name, verb in VERBS.items():
    app.command(name=name)(with_whole_entries(verb))
app.command(prepare.app, name="prepare", help="Make a data set: prepared Parquet files and dataset.json.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; user errors end with one line and exit code 2, Ctrl-C with one line and 130."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("bridgetower").setLevel(logging.INFO)
    try:
        try:
            app.cli(
                args=argv,
                prog="bridgetower",
                description="BridgeTower: embed, match and describe pictures; train and evaluate the model.",
                config=(tyro.conf.ConsolidateSubcommandArgs, tyro.conf.CascadeSubcommandArgs),
            )
        finally:
            sys.stdout.flush()  # a reader that left is noticed here, not at the end of the interpreter
    except KeyboardInterrupt:
        print("bridgetower: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # such as `| head`: what is left to print has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError, FloatingPointError) as error:  # OSError: missing, not permitted, a full disk
        print(f"bridgetower: {with_options(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
