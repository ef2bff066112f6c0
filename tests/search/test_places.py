"""Names of indexes, and paths that move with them."""

from pathlib import Path

import pytest

from bridgetower.bulk.lance import Uri, split
from bridgetower.data.remote import is_url
from bridgetower.search.table import is_path, portable, resolved


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("photos.lance", (".", "photos")),
        ("/photos.lance", ("/", "photos")),
        ("a/b/my-photos_2.1.lance/", ("a/b", "my-photos_2.1")),
        (Path("a/b.lance"), ("a", "b")),
        ("s3://bucket/b.lance", ("s3://bucket", "b")),
        ("s3://bucket/a/b.lance", ("s3://bucket/a", "b")),
    ],
)
def test_folder_and_table(uri: Uri, parts: tuple[str, str]) -> None:
    assert split(uri) == parts
    assert is_url(uri) == str(uri).startswith("s3:")


@pytest.mark.parametrize("uri", ["photos", ".lance", "a/.lance", "my photos.lance", "fötos.lance", "", "s3://b/photos"])
def test_refuses_other_names(uri: str) -> None:
    with pytest.raises(ValueError, match=r"is no name for an index; .* such as photos\.lance"):
        split(uri)


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
