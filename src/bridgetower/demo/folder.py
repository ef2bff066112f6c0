"""What the demo leaves, and where; importable without torch."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path("bridgetower-demo")
"""Where the demo writes by default; verbs without a model or an index look here."""


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Folder of one training."""
    return out / "runs" / f"{arm}-{seed}"


def trained_model(out: Path, arm: str = "bridgetower", seed: int = 0) -> Path:
    """Folder of the last checkpoint of a training."""
    return run_folder(out, arm, seed) / "last"


def answering_folder(out: Path, arm: str, seed: int) -> Path:
    """Folder of the training in which a pre-trained model learns to answer questions."""
    return out / "runs" / f"{arm}-{seed}-answers"


def answering_model(out: Path, arm: str = "bridgetower", seed: int = 0) -> Path:
    """Folder of the last checkpoint of such a training."""
    return answering_folder(out, arm, seed) / "last"


def held_out_pictures(out: Path) -> Path:
    """Folder of the images that no training saw, as files with their captions beside them."""
    return out / "held-out"


def held_out_index(out: Path) -> Path:
    """Index of these images, made with the first BridgeTower."""
    return out / "held-out.lance"
