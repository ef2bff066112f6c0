"""Embeds in forked processes that are killed before each change of the table or the output, and completes each.

Called as `python killing_embed.py MODEL PHOTOS FOLDER SUFFIX`; PHOTOS has three images and a broken one. Prints what
each completed run left.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lancedb.table
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from test_embed import read

from bridgetower.data import store
from bridgetower.predictor import load
from bridgetower.search.config import EmbedConfig
from bridgetower.search.embed import embed_source

CONFIG = EmbedConfig(batch_size=1, commit_seconds=0, max_errors=1, num_workers=0)


def forked(work: Callable[[], object]) -> int:
    """Does some work in a process; returns its exit code, or minus the signal that ended it."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def counted(owner: Any, name: str, number: list[int]) -> None:
    """Kills this process before a call, once so many came before."""
    call = getattr(owner, name)

    def counting(*given: Any, **options: Any) -> Any:
        number[0] -= 1
        if not number[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **options)

    setattr(owner, name, counting)


def main(model: Path, photos: Path, folder: Path, suffix: str) -> list[dict[str, Any]]:
    """Runs everything; returns what each completed run left."""
    predictor, found = load(model, device="cpu"), []
    out, report = folder / "out" / f"v.{suffix}", folder / "report.json"

    def killed(number: int) -> None:
        left = [number]
        for name in ("add", "delete", "drop_columns", "optimize"):
            counted(lancedb.table.LanceTable, name, left)
        for name in ("replace", "rename", "unlink"):
            counted(os, name, left)
        counted(store, "remove_folder", left)
        embed_source(photos, out, predictor, CONFIG)

    def complete() -> None:
        bad = embed_source(photos, out, predictor, CONFIG).bad
        names, vectors = read(out)
        beside = sorted(path.name for path in out.parent.iterdir())
        report.write_text(
            json.dumps({"bad": bad, "names": names, "vectors": np.array(vectors).tolist(), "beside": beside})
        )

    for number in range(1, 60):
        if forked(partial(killed, number)) == 0:
            return found
        assert forked(complete) == 0, number
        found.append(json.loads(report.read_text()))
        shutil.rmtree(out.parent)
    return []


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:4]), sys.argv[4])))  # noqa: T201
