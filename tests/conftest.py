"""Checks the shape annotations of the tensor code at every call, and lends a small set, model and checkpoint."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from bridgetower.model.bridgetower import BridgeTower
    from bridgetower.processor import Processor

# Left out are modules that refuse wrong values and shapes with a message of their own, which tests want to see.
CHECKED = [
    "bridgetower.model.bridgetower",
    "bridgetower.model.encodings",
    "bridgetower.model.fusion",
    "bridgetower.model.heads",
    "bridgetower.model.init",
    "bridgetower.model.layers",
    "bridgetower.model.text",
    "bridgetower.model.vision",
    "bridgetower.tasks.losses",
    "bridgetower.tasks.matching",
    "bridgetower.tasks.pretraining",
    "bridgetower.evaluation.masked_words",
    "bridgetower.evaluation.retrieval",
    "bridgetower.data.captions",
]

# Must come before the first import of the package; test modules and other conftest files then import as they like.
install_import_hook(CHECKED, "typechecks.checked")


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of 45 pictures of coloured shapes, 27 for training, 9 each for validation and test."""
    from shapes import prepare_shapes

    folder = tmp_path_factory.mktemp("shapes")
    return prepare_shapes(folder, folder / "set")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """A checkpoint folder: random weights off their defaults, all heads, a tokenizer trained on the set."""
    from shapes import write_tiny_checkpoint

    return write_tiny_checkpoint(tiny_dataset, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def tiny_model(tiny_checkpoint: Path) -> "BridgeTower":
    """The model of `tiny_checkpoint` in evaluation mode, fresh for each test."""
    from bridgetower.checkpoints import read_checkpoint

    return read_checkpoint(tiny_checkpoint).model()


@pytest.fixture(scope="session")
def tiny_processor(tiny_checkpoint: Path) -> "Processor":
    """The preprocessing of `tiny_checkpoint`."""
    from bridgetower.processor import Processor

    return Processor.load(tiny_checkpoint)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many KiB; skips the test where none can be mounted."""
    disk = tmp_path / "disk"

    def mount(kib: int) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            disk.rmdir()
            pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
        return disk

    yield mount
    if disk.exists():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
