"""Embeds or indexes in forked processes that are killed before each change that they make, and completes each."""

import json
import os
import shutil
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import lancedb.table
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from test_embed import read_vectors

from bridgetower.data.sets import store
from bridgetower.inference.config import EmbedConfig
from bridgetower.inference.predictor import load
from bridgetower.inference.vector_files import embed_source
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index
from helpers.processes import exit_code_of

# a commit per image
OFTEN = {
    "batch_size": 1,
    "commit_seconds": 0,
    "num_workers": 0,
    "max_errors": 1,
}


def start_fork(work):
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def killed(work, number):
    def counting(owner, name):
        call = getattr(owner, name)

        def counted(*arguments, **options):
            nonlocal number
            # as in the removal of a folder that has another name already
            number -= "dir_fd" not in options
            if not number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        setattr(owner, name, counted)

    def dying():
        for name in (
            "add",
            "merge_insert",
            "delete",
            "update",
            "drop_columns",
            "create_index",
            "optimize",
        ):
            counting(lancedb.table.LanceTable, name)
        for name in ("replace", "rename", "unlink"):
            counting(os, name)
        counting(store, "remove_folder")
        work()

    return exit_code_of(start_fork(dying))


def killed_after_writes(work, out, number):
    """Kills a process as soon as so many files were added to its output. Returns how it ended."""
    seen = set(out.rglob("*"))
    process = start_fork(lambda: (work(), signal.pause()))
    while len(set(out.rglob("*")) - seen) < number:
        pass
    os.kill(process, signal.SIGKILL)
    return exit_code_of(process)


def index_rows(out):
    table_rows = lancedb.connect(out.parent).open_table(out.stem).to_arrow().to_pylist()
    assert len(Index(out)) == len({row["path"] for row in table_rows}) == len(table_rows)
    return {row.pop("path"): row for row in table_rows}


def killed_embedding(predictor, photos, folder, suffix):
    out = folder / suffix / f"v.{suffix}"
    report = folder / "report.json"
    runs = list[dict[str, Any]]()

    def run():
        return embed_source(photos, out, predictor, EmbedConfig(**OFTEN)).bad

    def complete():
        bad = run()
        (names, vectors) = read_vectors(out)
        beside = sorted(path.name for path in out.parent.iterdir())
        summary = {
            "bad": bad,
            "names": names,
            "vectors": np.array(vectors).tolist(),
            "beside": beside,
        }
        report.write_text(json.dumps(summary))

    # the first changes, those of the table, are the same
    for number in range(1 if suffix == "lance" else 6, 60):
        if killed(run, number) == 0:
            break
        assert exit_code_of(start_fork(complete)) == 0, number
        runs.append(json.loads(report.read_text()))
        shutil.rmtree(out.parent)
    return runs


def killed_indexing(predictor, photos, folder):
    before, out, whole, report = (
        folder / name for name in ("before.lance", "out.lance", "whole.lance", "rows.json")
    )

    def build(uri):
        build_index(photos, uri, predictor, IndexConfig(**OFTEN))

    def tell(uri):
        report.write_text(json.dumps(index_rows(uri), default=str))

    def told(work):
        assert exit_code_of(start_fork(work)) == 0
        return json.loads(report.read_text())

    told(lambda: (build(before), tell(before)))
    (photos / "00.png").unlink()
    (photos / "01.png").rename(photos / "renamed.png")
    for name in ("02.png", "new.png"):
        Image.new("RGB", (24, 24), "red").save(photos / name)
    expected = told(lambda: (build(whole), tell(whole)))
    runs = list[dict[str, Any]]()

    def is_killed(kill, number):
        shutil.copytree(before, out)
        ended = kill(lambda: build(out), number=number)
        interrupted = told(lambda: tell(out))
        completed = told(lambda: (build(out), tell(out)))
        runs.append(
            {
                "left": len(interrupted),
                "was_whole": interrupted == expected,
                "is_whole": completed == expected,
            }
        )
        shutil.rmtree(out)
        return ended != 0

    number = 1
    while is_killed(killed, number):
        number += 1
    for number in (1, 3, 8):
        is_killed(partial(killed_after_writes, out=out), number)
    return runs


if __name__ == "__main__":
    predictor = load(Path(sys.argv[1]), device="cpu")
    folder = Path(sys.argv[2])
    runs = {
        suffix: killed_embedding(predictor, folder / "few", folder, suffix)
        for suffix in ("lance", "npy")
    }
    print(json.dumps(runs | {"index": killed_indexing(predictor, folder / "photos", folder)}))  # noqa: T201
