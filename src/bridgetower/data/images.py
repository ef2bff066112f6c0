"""Where the images of a source are, and how their bytes are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """Where an image's bytes are: in a file of its own, in a piece of a tar archive, or in a cell of a table.

    Attributes:
        path: The file.
        name: Identifies the image; rows with the same name are about the same image.
        file_name: Name to store it under.
        piece: Where in an archive its content starts, and its length, in bytes.
        cell: Its column and row in a Parquet or Arrow file.
        signature: Size in bytes, or a digest of the content; None to look at the file.
    """

    path: Path
    name: str
    file_name: str
    piece: tuple[int, int] | None = None
    cell: tuple[str, int] | None = None
    signature: str | None = None

    @classmethod
    def of_file(cls, root: Path, name: str) -> ImageRef:
        """An image in a file of its own, named from a folder on."""
        return cls(path=root / name, name=name, file_name=Path(name).name)

    @property
    def is_file(self) -> bool:
        """Whether the image is a file of its own."""
        return self.piece is None and self.cell is None

    @property
    def file_signature(self) -> str | None:
        """What changes when the image does; None if it is missing.

        It does not tell when the file was written: the same content unpacked again has the same signature.
        """
        if self.signature is not None:
            return self.signature
        return str(self.path.stat().st_size) if self.path.is_file() else None

    def read(self) -> bytes:
        """Returns the content of the image file.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If an archive ends before.
        """
        if self.cell:
            from bridgetower.data.tables import cell_bytes, open_table

            column, row = self.cell
            content = cell_bytes(open_table(self.path).row(row, [column])[column])
            assert content is not None  # a cell without bytes is no image
            return content
        if self.piece is None:
            return self.path.read_bytes()
        start, size = self.piece
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"{self.path} ends in the middle of {self.file_name}; copy it again")
        return content

    def packed(self) -> str:
        """Returns all that `unpacked` needs."""
        return json.dumps(vars(self), default=str)

    @classmethod
    def unpacked(cls, content: str) -> ImageRef:
        """Returns the image of which `content` is the packed form."""
        values = json.loads(content)
        places = {name: tuple(values[name]) if values[name] else None for name in ("piece", "cell")}
        return cls(**{**values, **places, "path": Path(values["path"])})
