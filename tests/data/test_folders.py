"""Sets from original files: whole or not there, continued after any end, damage noticed in one line."""

import os
import shutil

import lancedb
import numpy as np
import pytest

from bridgetower.data.config import PrepareConfig, WritingConfig
from bridgetower.data.sets import prepared_set
from bridgetower.data.sets.datasets import prepare_set
from bridgetower.data.sets.prepared_set import DatasetInfo, PreparedSet, SetWriter, read_info
from bridgetower.data.sets.schema import CAPTIONS
from bridgetower.data.sources.example import Image
from bridgetower.files import locked
from helpers.checkpoints import folder_snapshot
from helpers.published_sets import change_json, coco_name, noise_jpeg, write_coco, write_file
from helpers.sets import png_of_shade, read_rows

NUM_PICTURES = 120


@pytest.fixture
def prepared_coco(tmp_path):
    write_coco(tmp_path / "coco")
    return tmp_path / "coco"


def write_many(folder):
    """Writes a larger training split."""
    images = []
    for number in range(NUM_PICTURES):
        name = coco_name(number, "train2014")
        sentences = [{"raw": f"Picture {number}."}]
        images.append(
            {"filepath": "train2014", "filename": name, "split": "train", "sentences": sentences}
        )
        write_file(folder / "train2014" / name, noise_jpeg(number, size=(64, 64)))
    write_file(folder / "dataset_coco.json", {"images": images})


class TestBad:
    def test_missing_and_broken_pictures_are_named(self, prepared_coco, tmp_path):
        missing = prepared_coco / "train2014" / coco_name(9, "train2014")
        broken = prepared_coco / "val2014" / coco_name(391895, "val2014")
        missing.unlink()
        broken.write_bytes(broken.read_bytes()[:200])
        with pytest.raises(
            ValueError, match=rf"1 bad item.*'train2014/{missing.name}': there is no such file"
        ):
            prepare_set("coco", prepared_coco, tmp_path / "out", PrepareConfig(splits=("train",)))
        with pytest.raises(
            ValueError, match=rf"2 bad items.*{missing.name}.*{broken.name}': .*damaged"
        ):
            prepare_set("coco", prepared_coco, tmp_path / "out", PrepareConfig(max_errors=1))
        assert not (tmp_path / "out" / "dataset.json").exists()
        info = prepare_set("coco", prepared_coco, tmp_path / "out", PrepareConfig(max_errors=2))
        assert [info.splits[name].images for name in ("train", "test")] == [6, 1]
        names = [message.partition(":")[0] for message in info.some_left_out["cannot be used"]]
        assert names == [missing.name, broken.name]
        with pytest.raises(ValueError, match=r"2 bad item.*allowed are 0"):  # of a complete set
            prepare_set("coco", prepared_coco, tmp_path / "out")
        assert read_info(tmp_path / "out") == info

    def test_only_repaired_and_changed_pictures_are_read_again(
        self, prepared_coco, tmp_path, monkeypatch
    ):
        changed, broken = (
            prepared_coco / "train2014" / coco_name(number, "train2014") for number in (57870, 9)
        )
        whole = broken.read_bytes()
        broken.write_bytes(b"no picture")
        with pytest.raises(ValueError, match="1 bad item"):
            prepare_set("coco", prepared_coco, tmp_path / "out")
        broken.write_bytes(whole)
        changed.write_bytes(noise_jpeg(1, size=(64, 64)))
        read = prepared_set._read_image
        reads = []
        monkeypatch.setattr(
            prepared_set, "_read_image", lambda image: (reads.append(image.name), read(image))[1]
        )
        info = prepare_set("coco", prepared_coco, tmp_path / "out")
        assert info.splits["train"].images == 7
        assert "cannot be used" not in info.left_out
        assert sorted(reads) == sorted(f"train2014/{picture.name}" for picture in (changed, broken))
        assert read_rows(tmp_path / "out", "train")[0]["images"] == [changed.read_bytes()]

    def test_a_missing_annotation_file(self, prepared_coco, tmp_path):
        (prepared_coco / "dataset_coco.json").unlink()
        message = r"no file dataset_coco\.json or karpathy/dataset_coco\.json in"
        for max_errors in (0, 100):
            with pytest.raises(FileNotFoundError, match=message):
                prepare_set(
                    "coco", prepared_coco, tmp_path / "out", PrepareConfig(max_errors=max_errors)
                )
        with pytest.raises(
            FileNotFoundError, match=r"no folder .*nowhere; give the folder with the original files"
        ):
            prepare_set("coco", tmp_path / "nowhere", tmp_path / "out")

    def test_a_split_of_which_nothing_is_left(self, prepared_coco, tmp_path):
        for number in (391895, 60623):
            (prepared_coco / "val2014" / coco_name(number, "val2014")).write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"has no usable example of test \(.*; check"):
            prepare_set("coco", prepared_coco, tmp_path / "out", PrepareConfig(max_errors=2))
        assert not (tmp_path / "out" / "dataset.json").exists()


class TestComplete:
    def test_is_left_alone_and_another_one_refused(self, prepared_coco, tmp_path):
        first = prepare_set("coco", prepared_coco, tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} <= {
            ".lock",
            "dataset.json",
            "images.lance",
            "examples.lance",
        }
        before = folder_snapshot(tmp_path / "out")
        assert (
            prepare_set(
                "coco", prepared_coco, tmp_path / "out", PrepareConfig(num_workers=1, max_errors=3)
            )
            == first
        )
        assert folder_snapshot(tmp_path / "out") == before
        with pytest.raises(ValueError, match="holds a set that differs in splits; choose"):
            prepare_set("coco", prepared_coco, tmp_path / "out", PrepareConfig(splits=("test",)))
        change_json(
            prepared_coco / "dataset_coco.json",
            lambda content: content["images"][0]["sentences"][0].update(raw="another"),
        )
        with pytest.raises(
            ValueError, match=r"holds a set of another dataset_coco\.json; choose another folder"
        ):
            prepare_set("coco", prepared_coco, tmp_path / "out")

    @pytest.mark.parametrize("name", ["images", "examples"])
    def test_a_table_of_somebody_else_is_kept(self, prepared_coco, tmp_path, name):
        lancedb.connect(tmp_path / "out").create_table(name, [{"mine": 1}])
        with pytest.raises(
            ValueError, match=rf"{name}\.lance was not written by `bridgetower prepare`"
        ):
            prepare_set("coco", prepared_coco, tmp_path / "out")
        assert lancedb.connect(tmp_path / "out").open_table(name).to_arrow().to_pylist() == [
            {"mine": 1}
        ]

    def test_nobody_else_may_write(self, prepared_coco, tmp_path):
        with (
            locked(tmp_path / "out"),
            pytest.raises(FileExistsError, match="another process works in"),
        ):
            prepare_set("coco", prepared_coco, tmp_path / "out")


def test_digests_follow_the_content_and_not_the_time(prepared_coco, tmp_path):
    first = prepare_set("coco", prepared_coco, tmp_path / "first")
    for path in (prepared_coco / "train2014").iterdir():
        os.utime(path, (0, 0))
    assert prepare_set("coco", prepared_coco, tmp_path / "second") == first
    (prepared_coco / "train2014" / coco_name(9, "train2014")).write_bytes(noise_jpeg(10))
    assert prepare_set("coco", prepared_coco, tmp_path / "third").digest != first.digest


class TestFaults:
    def test_a_full_disk(self, tmp_path, small_disk):
        write_many(tmp_path / "coco")
        disk = small_disk(300)
        with pytest.raises(
            OSError, match=r"images\.lance cannot be written: .*make room on the disk"
        ):
            prepare_set("coco", tmp_path / "coco", disk / "set", PrepareConfig(splits=("train",)))
        assert not (disk / "set" / "dataset.json").exists()

    @pytest.mark.parametrize("table", ["images", "examples"])
    def test_every_flipped_bit_of_what_is_read_is_noticed(self, prepared_coco, tmp_path, table):
        """Also one in columns without checksums, which decide what is trained on."""
        prepare_set("coco", prepared_coco, tmp_path / "out")

        def content():
            opened = PreparedSet(tmp_path / "out", ["train", "test"])
            rows = list(opened.scan())
            assert opened.examples(range(len(rows))) == rows
            return [opened.groups.tolist(), rows, opened.images([row["images"][0] for row in rows])]

        whole = content()
        draw = np.random.default_rng(3)
        errors = []
        file = max(
            (tmp_path / "out" / f"{table}.lance" / "data").iterdir(),
            key=lambda path: path.stat().st_size,
        )
        written = file.read_bytes()
        for _ in range(25):
            damaged = bytearray(written)
            damaged[draw.integers(len(damaged))] ^= 1 << draw.integers(8)
            file.write_bytes(damaged)
            try:
                assert content() == whole  # padding, or a name that is not read
            except OSError as error:
                errors.append(str(error))
        assert len(errors) > 5
        assert all(f"{table}.lance" in error and "\n" not in error for error in errors)
        shutil.rmtree(tmp_path / "out" / f"{table}.lance")
        with pytest.raises(FileNotFoundError, match=rf"no table .*/out/{table}\.lance$"):
            PreparedSet(tmp_path / "out", ["train"])


def test_an_attempt_of_other_settings_leaves_no_image_of_its_own(tmp_path):
    """Its images have the same names."""
    for shade in (1, 2):
        with SetWriter(tmp_path, CAPTIONS, WritingConfig()) as writer:
            writer.add(
                [Image(name="a.png", location="", content=png_of_shade(shade))],
                ["grey"],
                split="train",
            )
            writer.finish("here", DatasetInfo(name="a", split_rule="by hand"))
    assert [row["images"] for row in read_rows(tmp_path, "train")] == [[png_of_shade(2)]]


class TestInAStore:
    """Of which the tests have a real server."""

    def test_is_the_same_also_where_requests_fail(self, store, tiny_dataset):
        url = store.upload(tiny_dataset, "bucket/set")
        splits = ["train", "test"]
        here = PreparedSet(tiny_dataset, splits)
        rows = list(here.scan())
        numbers = [row["images"][0] for row in rows]
        store.unreliable(0.1)
        remote = PreparedSet(url, splits)
        assert list(remote.scan()) == remote.examples(range(len(rows))) == rows
        assert remote.images(numbers) == here.images(numbers)

    def test_is_not_there(self, store):
        with pytest.raises(FileNotFoundError, match=r"no dataset\.json in s3://bucket/other"):
            PreparedSet("s3://bucket/other", ["train"])
