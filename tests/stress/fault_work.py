"""What faults befall: small jobs of training, preparing, indexing and evaluating, and what each keeps after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fault_attempts import in_fork
from PIL import Image, ImageDraw

from bridgetower.checkpoints.tensors import read_state_json
from bridgetower.data.sets import prepared_set
from bridgetower.tasks.run_config import CONFIG, read_metrics
from bridgetower.training.state import newest

COLOURS = ("red", "green", "blue", "yellow", "white")
STEPS = 24
INTERVAL = 4
SIZE = 96  # pixels of the sides of an image

Found = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A command that can be killed and started again.

    Attributes:
        name: In the table.
        command: Arguments of `bridgetower` for an output folder.
        result: Digests of what it leaves, which are always the same.
        found: What is safe in the output folder, by name.
        lost: How much of what was safe, or was done since, is lost, from `found` before and after the next attempt.
        unit: Of what is lost.
        allowed: Most that may be lost.
        processes: Of a run.
        kib: Room of a disk that is too small.
    """

    name: str
    command: Callable[[Path], list[str]]
    result: Callable[[Path], Found]
    found: Callable[[Path], Found]
    lost: Callable[[Found, Found], int]
    unit: str
    allowed: int = 0
    processes: int = 1
    kib: int


def write_images(folder: Path, count: int) -> Path:
    """Writes noisy images of coloured circles and the table of their captions."""
    source = random.Random(0)
    lines = ["image,caption"]
    folder.mkdir()
    for number in range(count):
        colour, ground = source.sample(COLOURS, 2)
        image = Image.frombytes("RGB", (SIZE, SIZE), source.randbytes(3 * SIZE * SIZE))
        ImageDraw.Draw(image).ellipse(
            (10, 10, 20 + source.randrange(60), 80), fill=colour, outline=ground
        )
        image.save(folder / f"{number:04}.png")
        lines.append(f"{number:04}.png,a {colour} circle with a {ground} line; number {number}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder / "captions.csv"


def preparing(table: Path, work: Path) -> Work:
    """Preparing of the images, of which about twenty are in a commit."""
    prepared_set._COMMIT_BYTES = 20 * 3 * SIZE * SIZE  # of the forks, too
    options = ["--test-fraction", "0.3", "--num-workers", "1"]
    return Work(
        name="prepare",
        command=lambda out: ["prepare", "pairs", str(table), "--out", str(out), *options],
        result=_prepared,
        found=partial(_rows, name="images", key="name", work=work),
        lost=_num_changed,
        unit="images",
        kib=1_000,
    )


def training_work(data: Path, *, processes: int = 1, asynchronous: bool = False) -> Work:
    """Training of a tiny model through all objectives, saved every few steps."""
    tower = ["hidden-size=8", "num-layers=2", "num-heads=2", "intermediate-size=12"]
    options = {
        "vision": ["image-size=20", "patch-size=10", *tower],
        "text": ["vocab-size=300", "max-positions=34", "dropout=0.1", *tower],
        "fusion": ["dropout=0.1", *tower],
        "heads": ["itc-size=8"],
    }
    values = [
        f"--model.{section}.{value}" for section, entries in options.items() for value in entries
    ]
    values += [
        "--batch-size=8",
        "--data.max-length=24",
        "--log-every=1",
        "--evaluation.candidates=4",
    ]
    values += [f"--max-steps={STEPS}", f"--checkpoint-every={INTERVAL}", "--evaluate-every=10"]
    command = ["train", "pretrain-nano", "--data.folders", str(data)]
    command += ["--async-checkpoints"] if asynchronous else []
    arguments = [argument for value in values for argument in value.split("=")]
    written = "written in the background" if asynchronous else "written at once"
    return Work(
        name=f"train, {processes} process{'es' if processes > 1 else ''}, states {written}",
        command=lambda out: [
            *command,
            *arguments,
            "--out",
            str(out),
            *(["--resume"] if (out / CONFIG).exists() else []),
        ],
        result=lambda out: _digests(out, "last/model.safetensors", "best/model.safetensors"),
        found=_steps,
        lost=lambda before, after: before["done"] - before["saved"],
        unit="steps",
        # One state may be written at a time: meanwhile the run goes on, up to the next one.
        allowed=2 * INTERVAL if asynchronous else INTERVAL,
        processes=processes,
        kib=250,
    )


def evaluating(data: Path, model: Path) -> Work:
    """Retrieval on the test split, in several parts."""
    settings = ["--candidates", "100", "--batch-size", "32"]

    def command(out: Path) -> list[str]:
        paths = ["--work", str(out / "work"), "--out", str(out / "result")]
        return ["evaluate", str(model), "retrieval", "--data", str(data), *settings, *paths]

    return Work(
        name="evaluate",
        command=command,
        result=lambda out: _digests(out, "result/metrics.json", "result/predictions.jsonl"),
        found=lambda out: {
            "finished": (out / "result" / "metrics.json").exists(),
            **_written(out, "work/*/process-*/*.safetensors"),
        },
        lost=lambda before, after: 0 if after["finished"] else _num_changed(before, after),
        unit="parts",
        kib=24,
    )


def indexing(photos: Path, model: Path, work: Path) -> Work:
    """An index of the images, written image by image."""
    options = ["--batch-size", "1", "--commit-seconds", "0", "--num-workers", "0"]
    rows = partial(_rows, name="photos", key="path", work=work)

    def result(out: Path) -> Found:
        return {"rows": hashlib.sha256(json.dumps(rows(out), sort_keys=True).encode()).hexdigest()}

    return Work(
        name="index",
        command=lambda out: [
            "index",
            str(photos),
            "--model",
            str(model),
            "--out",
            str(out / "photos.lance"),
            *options,
        ],
        result=result,
        found=rows,
        lost=_num_changed,
        unit="rows",
        kib=60,
    )


def _rows(out: Path, name: str, key: str, work: Path) -> Found:
    """Digest of each row of a table, by what names its image. Read in a fork, as LanceDB starts threads."""
    if not (out / f"{name}.lance").exists():
        return {}
    report = work / "rows.json"

    def read() -> None:
        from bridgetower.data.sets.store import Table

        rows: list[dict[str, Any]] = []
        if Table.exists(out / f"{name}.lance"):
            rows = Table(out / f"{name}.lance").lance.to_arrow().to_pylist()
        digests = {
            row[key]: hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest() for row in rows
        }
        if len(digests) != len(rows):
            raise RuntimeError(f"{len(rows) - len(digests)} images are in {name}.lance twice")
        report.write_text(json.dumps(digests))

    code = os.waitstatus_to_exitcode(os.waitpid(in_fork(read, work / "rows.log"), 0)[1])
    if code:
        raise RuntimeError(f"{name}.lance in {out} cannot be read; see {work / 'rows.log'}")
    rows: Found = json.loads(report.read_text())
    return rows


def _prepared(out: Path) -> Found:
    """The digests of all rows. The number of commits, which `dataset.json` has too, may be another after a kill."""
    path = out / "dataset.json"
    return {"rows": json.loads(path.read_text())["digest"]} if path.exists() else {}


def _digests(out: Path, *patterns: str) -> Found:
    paths = sorted(path for pattern in patterns for path in out.glob(pattern))
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }


def _written(out: Path, pattern: str) -> Found:
    statuses = {str(path.relative_to(out)): path.stat() for path in out.glob(pattern)}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in statuses.items()}


def _num_changed(before: Found, after: Found) -> int:
    return sum(after.get(name) != content for name, content in before.items())


def _steps(out: Path) -> Found:
    path = newest(out)
    saved = 0 if path is None else int(read_state_json(path)["state"]["step"])
    logged = (
        [entry["step"] for entry in read_metrics(out, "train")]
        if (out / "metrics.jsonl").exists()
        else []
    )
    return {"done": max(logged, default=0), "saved": saved}
