"""What the demo leaves, and where; importable without torch."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path("bridgetower-demo")
"""Where the demo writes by default, and where `bridgetower` looks for what the word `demo` names."""

ANSWERS = "answers"
"""Stage in which a pre-trained model learns to answer questions."""


def run_folder(out: Path, arm: str, seed: int, stage: str = "") -> Path:
    """Folder of one training; the last stage of pre-training has no name."""
    return out / "runs" / "-".join(filter(None, (arm, str(seed), stage)))


def trained_model(out: Path, arm: str = "bridgetower", seed: int = 0, stage: str = "") -> Path:
    """Folder of the last checkpoint of a training."""
    return run_folder(out, arm, seed, stage) / "last"


def answering_model(out: Path, arm: str = "bridgetower", seed: int = 0) -> Path:
    """Folder of the last checkpoint that answers questions."""
    return trained_model(out, arm, seed, ANSWERS)


def held_out_images(out: Path) -> Path:
    """Folder of the images that no training saw, as files with their captions beside them."""
    return out / "held-out"


def held_out_index(out: Path) -> Path:
    """Index of these images, made with the first BridgeTower."""
    return out / "held-out.lance"
