"""Files in the folder of a run that others read: its config and its metrics; importable without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG = "run.json"
METRICS = "metrics.jsonl"


def read_metrics(run: Path, kind: str) -> list[dict[str, float]]:
    """Returns the lines of a run's `metrics.jsonl` of one kind, `train` or `validation`."""
    if not (run / METRICS).exists():
        raise FileNotFoundError(f"{run} holds no run ({METRICS} is missing); expected the --out of bridgetower train")
    return [entry for _, entry in whole_lines(run / METRICS) if entry["kind"] == kind]


def whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every line with its content, but not the half line with which a killed run ends."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:
            continue
