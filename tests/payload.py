"""A Python object that does harm when it is unpickled."""

from pathlib import Path
from typing import Any


class Payload:
    """Creates a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))
