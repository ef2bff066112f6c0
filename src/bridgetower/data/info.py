"""What a prepared set is: the content of `dataset.json`."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bridgetower.data.splits import check_split_names, existing_folder
from bridgetower.files import read_json, write_json
from bridgetower.model.plain import from_plain

INFO_FILE = "dataset.json"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What one split's files hold.

    Attributes:
        images: Number of images (in nlvr2 of image pairs), which is the number of rows.
        texts: Number of captions, questions or statements of all images together.
        files: Hexadecimal SHA-256 of each file, by name.
    """

    images: int
    texts: int
    files: Mapping[str, str]

    @classmethod
    def of_shards(cls, shards: Iterable["SplitInfo"]) -> "SplitInfo":
        """Adds up what the files of one split hold."""
        shards = tuple(shards)
        return cls(
            images=sum(shard.images for shard in shards),
            texts=sum(shard.texts for shard in shards),
            files={name: digest for shard in shards for name, digest in shard.files.items()},
        )


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What an image set is.

    Attributes:
        format: Version of the on-disk form.
        name: What the set is called.
        kind: Name of the schema of its rows.
        seed: Seed of the split.
        split_rule: How images were given to splits, in words.
        protocol: What else was decided about the originals, in words.
        sources: Where the data comes from, each with its version or digest.
        licences: Licence of each part.
        settings: Everything else that decides the content.
        splits: Counts and digests of each split's files; none before the files are written.
        left_out: Names of what was left out, by reason; of very many the first.
        num_left_out: How many there are, of reasons that do not name all.
    """

    format: int = FORMAT
    name: str
    kind: str = "captions"
    seed: int
    split_rule: str
    protocol: str = ""
    sources: Mapping[str, str]
    licences: Mapping[str, str]
    settings: Mapping[str, object]
    splits: Mapping[str, SplitInfo] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]]
    num_left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the version and the names of the splits."""
        if self.format != FORMAT:
            raise ValueError(
                f"dataset {self.name!r} has format {self.format}, this version reads {FORMAT}; prepare it again"
            )
        check_split_names(self.splits)

    def digests(self) -> dict[str, str]:
        """Digest of every file, by name."""
        return {name: digest for split in self.splits.values() for name, digest in split.files.items()}

    def left_out_counts(self) -> dict[str, int]:
        """Number of things that were left out, by reason."""
        return {reason: self.num_left_out.get(reason, len(names)) for reason, names in self.left_out.items()}


def write_info(folder: Path, info: DatasetInfo) -> None:
    """Writes `dataset.json`; call it last, since its presence marks the dataset as complete."""
    write_json(Path(folder) / INFO_FILE, dataclasses.asdict(info))


def read_info(folder: Path) -> DatasetInfo:
    """Reads `dataset.json`.

    Raises:
        FileNotFoundError: If the folder or the file is missing.
        ValueError: If the file is not what `write_info` writes.
    """
    path = existing_folder(folder) / INFO_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {INFO_FILE} in {folder}: it is no complete dataset; run `bridgetower prepare` again"
        )
    content = read_json(path)
    if content.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path} has format {content['format']}, this version reads {FORMAT}; prepare it again")
    return from_plain(DatasetInfo, content, str(path))


def split_digests(folder: Path, split: str) -> Mapping[str, str]:
    """Digest of each file of a split as `dataset.json` has it, which tells whether the split was prepared anew.

    Raises:
        FileNotFoundError: If the folder or its `dataset.json` is missing.
        ValueError: If `dataset.json` is damaged or does not name the split.
    """
    info = read_info(folder)
    if split not in info.splits:
        raise ValueError(f"{INFO_FILE} in {folder} has no split {split!r}; run `bridgetower prepare` again")
    return info.splits[split].files
