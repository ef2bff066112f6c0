"""Writing of a manifest: order, what is bad, and what of an earlier attempt is kept."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bridgetower.data.folder import read_split
from bridgetower.data.images import ImageRef
from bridgetower.data.manifest import Manifest, new_manifest
from bridgetower.data.records import is_own_parquet
from bridgetower.data.schema import CAPTIONS, SCHEMAS, Question, Statement
from bridgetower.data.writer import Shard, Written, plan_shards, write_shards
from bridgetower.files import sha256_of
from rows import png

NUM_PICTURES = 11


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(NUM_PICTURES):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@contextmanager
def listed(root: Path, *, text: str = "shade") -> Iterator[Manifest]:
    with new_manifest(CAPTIONS) as manifest:
        for number in range(NUM_PICTURES):
            picture = ImageRef.of_file(root, f"{number}.png")
            manifest.add(f"id-{number}", [picture], [f"{text} {number}"], split="train" if number < 8 else "test")
        manifest.finish()
        yield manifest


@pytest.fixture
def manifest(root: Path) -> Iterator[Manifest]:
    with listed(root) as made:
        yield made


def written(manifest: Manifest, out: Path, *, num_workers: int = 2) -> dict[Shard, Written]:
    done: list[int] = []
    shards = plan_shards(manifest, out, shard_rows=3)
    result = write_shards(manifest, shards, num_workers=num_workers, progress=done.append)
    assert sum(done) == sum(shard.count for shard in shards)
    return result


class TestPlan:
    def test_cuts_each_split(self, manifest: Manifest, out: Path) -> None:
        shards = plan_shards(manifest, out, shard_rows=3)
        assert [(shard.path.name, shard.split, shard.start, shard.count) for shard in shards] == [
            ("train-00000-of-00003.parquet", "train", 0, 3),
            ("train-00001-of-00003.parquet", "train", 3, 3),
            ("train-00002-of-00003.parquet", "train", 6, 2),
            ("test.parquet", "test", 0, 3),
        ]

    def test_fingerprints_follow_the_content(self, root: Path, out: Path) -> None:
        def fingerprints(text: str = "shade") -> list[str]:
            with listed(root, text=text) as made:
                return [shard.fingerprint for shard in plan_shards(made, out, shard_rows=3)]

        first = fingerprints()
        assert fingerprints() == first
        assert len(set(first)) == 4
        assert not set(fingerprints("other")) & set(first)
        (root / "4.png").write_bytes(png(4) + b" ")
        changed = fingerprints()
        assert [one == other for one, other in zip(first, changed, strict=True)] == [True, False, True, True]


class TestWrite:
    @pytest.mark.parametrize("num_workers", [1, 3])
    def test_rows_keep_their_order(self, manifest: Manifest, out: Path, num_workers: int) -> None:
        parts = written(manifest, out, num_workers=num_workers)
        rows = read_split(out, "train")
        assert rows.column("image_id").to_pylist() == [f"id-{number}" for number in range(8)]
        assert [rows.row(number)["image"] for number in range(8)] == [
            {"bytes": png(number), "path": f"{number}.png"} for number in range(8)
        ]
        assert [part.info.images for part in parts.values()] == [3, 3, 2, 3]
        for shard, part in parts.items():
            assert part.info.files == {shard.path.name: sha256_of(shard.path)}
            assert is_own_parquet(shard.path)

    def test_broken_pictures_are_named(self, root: Path, manifest: Manifest, out: Path) -> None:
        whole = (root / "4.png").read_bytes()
        (root / "4.png").write_bytes(whole[: len(whole) // 2])
        (root / "5.png").unlink()
        parts = list(written(manifest, out).values())
        assert [part.info.images for part in parts] == [3, 1, 2, 3]
        assert [len(part.bad) for part in parts] == [0, 2, 0, 0]
        assert parts[1].bad[0].startswith("'4.png': ")
        assert "'5.png': " in parts[1].bad[1]
        assert read_split(out, "train").column("image_id").to_pylist() == [
            "id-0",
            "id-1",
            "id-2",
            "id-3",
            "id-6",
            "id-7",
        ]

    def test_a_file_without_any_good_picture_is_read(self, root: Path, manifest: Manifest, out: Path) -> None:
        for number in (3, 4, 5):
            (root / f"{number}.png").write_bytes(b"none")
        written(manifest, out)
        assert read_split(out, "train").row(3)["image_id"] == "id-6"

    def test_questions_and_pairs(self, root: Path, out: Path) -> None:
        pictures = [ImageRef.of_file(root, f"{number}.png") for number in (1, 2)]
        question = Question(question_id=7, question="Why?", answers=("so",))
        statement = Statement(statement_id="a", text="Both.", label="True")
        for kind, used, text, split in (("vqa", 1, question, "test"), ("nlvr2", 2, statement, "train")):
            with new_manifest(SCHEMAS[kind]) as manifest:
                manifest.add("a", pictures[:used], [text], split=split)  # type: ignore[list-item]
                manifest.finish()
                written(manifest, out)
        assert read_split(out, "test", schema=SCHEMAS["vqa"]).row(0)["questions"][0]["answers"] == ["so"]
        row = read_split(out, "train", schema=SCHEMAS["nlvr2"]).row(0)
        assert (row["image"]["bytes"], row["image_2"]["bytes"]) == (png(1), png(2))
        assert row["statements"] == [{"statement_id": "a", "text": "Both.", "label": "True"}]


class TestKept:
    def test_finished_files_are(self, root: Path, manifest: Manifest, out: Path) -> None:
        (root / "4.png").write_bytes(b"none")
        first = written(manifest, out)
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
        (out / "test.parquet").unlink()
        again = written(manifest, out)
        assert again == first  # what was bad is remembered
        del before["test.parquet"]
        assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())

    def test_a_picture_that_was_repaired_without_a_change_of_size_is_read_again(
        self, root: Path, manifest: Manifest, out: Path
    ) -> None:
        whole = (root / "4.png").read_bytes()
        (root / "4.png").write_bytes(bytes(len(whole)))
        (root / "5.png").write_bytes(b"none")
        bad = [part.bad for part in written(manifest, out).values()]
        assert list(map(len, bad)) == [0, 2, 0, 0]
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
        (root / "4.png").write_bytes(whole)
        again = written(manifest, out)
        assert [len(part.bad) for part in again.values()] == [0, 1, 0, 0]
        assert read_split(out, "train").column("image_id").to_pylist()[3:5] == ["id-3", "id-4"]
        changed = {name for name, time in before.items() if (out / name).stat().st_mtime_ns != time}
        assert changed == {"train-00001-of-00003.parquet"}

    def test_damaged_and_other_ones_are_not(self, manifest: Manifest, out: Path) -> None:
        first = written(manifest, out)
        os.truncate(out / "train-00001-of-00003.parquet", 100)
        (out / "test.parquet").write_bytes((out / "train-00002-of-00003.parquet").read_bytes())
        assert written(manifest, out) == first
        assert read_split(out, "test").column("image_id").to_pylist() == ["id-8", "id-9", "id-10"]
