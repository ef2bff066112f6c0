"""Paths that move with an index, and places that an index from elsewhere may name."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bridgetower.search.index import Indexed, file_of, is_path, portable, read_indexed, resolved

CONTENT = b"0123456789"


def test_paths_and_hub_ids(tmp_path: Path) -> None:
    for path in (tmp_path / "a" / "model", tmp_path / "model"):
        assert is_path(portable(tmp_path / "a" / "b.lance", path))
    assert not is_path("owner/model@1a2b")


def test_what_lies_beside_moves_along(tmp_path: Path) -> None:
    index, moved = tmp_path / "a" / "b.lance", tmp_path / "c" / "b.lance"
    beside, elsewhere = tmp_path / "a" / "photos" / "2024", tmp_path / "photos"
    assert resolved(moved, portable(index, beside)) == str(tmp_path / "c" / "photos" / "2024")
    assert resolved(moved, portable(index, index.parent)) == str(moved.parent)
    assert resolved(moved, portable(index, elsewhere)) == str(elsewhere)
    assert resolved("s3://bucket/b.lance", portable("s3://bucket/b.lance", beside)) == str(beside)
    assert resolved(moved, "owner/model@1a2b") == "owner/model@1a2b"


class TestPlacesOfOthers:
    """An index may be from someone else: no place in it makes a process wait, read devices or more than it says."""

    @pytest.fixture
    def read(self, tmp_path: Path) -> Callable[[dict[str, object], int], bytes]:
        (tmp_path / "shard.tar").write_bytes(CONTENT)
        os.mkfifo(tmp_path / "pipe")

        def call(place: dict[str, object], size: int) -> bytes:
            digest = hashlib.sha256(CONTENT[2:5]).hexdigest()
            image = Indexed(
                digest=digest, path="a.png", size=size, width=1, height=1, captions=(), place=json.dumps(place)
            )
            return read_indexed(file_of(image, tmp_path), image)

        return call

    def test_a_piece(self, read: Callable[[dict[str, object], int], bytes]) -> None:
        assert read({"file": "shard.tar", "piece": [2, 3]}, 3) == CONTENT[2:5]

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ({"file": 5}, "as the place of 'a.png'; make the index again"),
            ({"url": ["a"]}, "as the place of"),
            ({"file": "shard.tar", "piece": [0, -1]}, "as the place of"),
            ({"file": "shard.tar", "piece": [-3, 3]}, "as the place of"),
            ({"file": "shard.tar", "piece": [0, True]}, "as the place of"),
            ({"file": "shard.tar", "piece": 3}, "as the place of"),
            ({"file": "shard.tar", "cell": ["image", -1]}, "as the place of"),
            ({"file": "shard.tar", "cell": [0, 0]}, "as the place of"),
            ({"file": "shard.tar", "piece": [0, 2**40]}, f"3 bytes, and {2**40} as the length"),
            ({"file": "shard.tar", "piece": [0, 3]}, "has changed since"),
            ({"file": "shard.tar", "piece": [2**40, 3]}, "ends in the middle"),
            ({"file": "pipe", "piece": [0, 3]}, "is no regular file"),
            ({"file": "pipe", "cell": ["image", 0]}, "is no regular file"),
            ({"file": "/dev/zero", "piece": [0, 3]}, "is no regular file"),
        ],
    )
    def test_refused(
        self, read: Callable[[dict[str, object], int], bytes], place: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            read(place, 3)

    def test_more_than_an_image(self, read: Callable[[dict[str, object], int], bytes]) -> None:
        with pytest.raises(ValueError, match="expected at most"):
            read({"file": "shard.tar", "piece": [0, 2**40]}, 2**40)
