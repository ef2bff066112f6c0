"""Sets at URLs against a real S3 server that drops connections and refuses: the same rows as on a disk, or an error."""

import io
import pickle
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import asked
import bridgetower.data.remote as remote
from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.data.config import DataConfig
from bridgetower.data.prepared import PreparedImages
from bridgetower.data.remote_sets import local_sets
from bridgetower.data.schema import SCHEMAS
from bridgetower.processor import Processor
from shapes import write_pictures
from sources import served, write_tar
from stores import Store

SPLITS = ("train", "validation")


@pytest.fixture
def url(sharded_dataset: Path, store: Store) -> str:
    """The set in the store, written anew for each test."""
    return store.upload(sharded_dataset, "bucket/set")


@pytest.fixture
def config(url: str, tmp_path: Path) -> DataConfig:
    return DataConfig(folders=(url,), shard_cache=str(tmp_path / "cache"), shuffle_shards=2)


def check_same(found: PreparedImages, expected: PreparedImages) -> None:
    numbers = range(len(expected))
    for column in expected.schema.image_columns:
        assert [found.content(n, column) for n in numbers] == [expected.content(n, column) for n in numbers]
    assert list(found.entries()) == list(expected.entries())
    assert [found.entries_of(n) for n in numbers] == [expected.entries_of(n) for n in numbers]
    assert list(found.image_ids) == list(expected.image_ids)


def cached(config: DataConfig) -> list[str]:
    """What the folders of the cache were made from."""
    return [path.read_text() for path in Path(str(config.shard_cache)).glob("*/content.json")]


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_rows_are_those_of_a_disk(
    share: float, store: Store, config: DataConfig, sharded_dataset: Path, tiny_processor: Processor
) -> None:
    local = CaptionImages(DataConfig(folders=(str(sharded_dataset),)), SPLITS, tiny_processor)
    store.unreliable(share)
    with local_sets(config, SPLITS) as sets:
        found = CaptionImages(sets, SPLITS, tiny_processor)
        assert len(found) == len(local) == 36
        assert not any("copy of" in content for content in cached(config))  # texts are read without images
        check_same(found, local)
        assert sorted(found.digests().values()) == sorted(local.digests().values())
        assert all(name.startswith(f"{config.folders[0]}/") for name in found.digests())
        check_same(pickle.loads(pickle.dumps(found)), local)
        assert [found.remote, local.remote] == [True, False]
    before = len(store.asked)
    with local_sets(config, SPLITS) as sets:
        check_same(CaptionImages(sets, SPLITS, tiny_processor), local)
    again = [path for method, path in store.asked[before:] if method == "GET" and "dataset.json" not in path]
    assert again == []
    assert not list((Path(str(config.shard_cache)) / "views").glob("*/*"))


@pytest.mark.parametrize("kind", ["vqa", "nlvr2"])
def test_questions_and_pairs_of_images(
    kind: str, store: Store, config: DataConfig, tmp_path: Path, tiny_processor: Processor
) -> None:
    folder = asked.write_set(tmp_path / kind, kind)
    place = store.upload(folder, f"bucket/{kind}")
    schema = SCHEMAS[kind]
    with local_sets(replace(config, folders=(place,)), SPLITS) as sets:
        found = PreparedImages(sets, "train", tiny_processor, schema=schema)
        check_same(found, PreparedImages(DataConfig(folders=(str(folder),)), "train", tiny_processor, schema=schema))
        names = {path.name for path in Path(sets.folders[0]).glob("*.json")}
    assert names == {"dataset.json", "place.json", *(["answers.json"] if kind == "vqa" else [])}


class TestErrors:
    NAME = "train-00002-of-00007.parquet"

    def test_a_shard_that_cannot_be_read_is_named(self, store: Store, config: DataConfig) -> None:
        store.fault = lambda path: "refused" if path.endswith(self.NAME) else None
        with (
            pytest.raises(ValueError, match=rf"has 1 bad .*, allowed are 0 .*set/{self.NAME} cannot be read"),
            local_sets(config, SPLITS),
        ):
            pass
        assert store.reads(self.NAME) > len(remote.PAUSES)

    def test_or_left_out(
        self, store: Store, config: DataConfig, tiny_processor: Processor, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.fault = lambda path: "refused" if path.endswith(self.NAME) else None
        with local_sets(replace(config, max_errors=1), SPLITS) as sets:
            found = CaptionImages(sets, "train", tiny_processor)
            assert len(found) == 23
            assert found.digests()[f"{config.folders[0]}/{self.NAME}"] == "left out"
            assert all(found.content(n, "image") for n in range(23))
        assert f"left out: {config.folders[0]}/{self.NAME} cannot be read" in caplog.text
        store.fault = lambda path: None  # next time it is there again
        with local_sets(replace(config, max_errors=1), SPLITS) as sets:
            assert len(CaptionImages(sets, "train", tiny_processor)) == 27

    def test_that_is_lost_later(self, store: Store, config: DataConfig, tiny_processor: Processor) -> None:
        with local_sets(config, SPLITS) as sets:
            found = CaptionImages(sets, "train", tiny_processor)
            store.fault = lambda path: "refused" if path.endswith(self.NAME) else None
            assert found.content(3, "image")
            with pytest.raises(OSError, match=rf"bucket/set/{self.NAME} cannot be read"):
                found.content(9, "image")

    def test_a_damaged_one(
        self, store: Store, config: DataConfig, sharded_dataset: Path, tiny_processor: Processor
    ) -> None:
        import fsspec

        content = bytearray((sharded_dataset / self.NAME).read_bytes())
        content[100] ^= 1
        fsspec.filesystem("s3").pipe_file(f"bucket/set/{self.NAME}", bytes(content))
        with local_sets(config, SPLITS) as sets:
            found = CaptionImages(sets, "train", tiny_processor)
            with pytest.raises(ValueError, match=rf"bucket/set/{self.NAME} has SHA-256 .*damaged, or was written anew"):
                found.content(9, "image")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"folders": ("s3://bucket/none",)}, r"no dataset\.json at s3://bucket/none; give the URL of a folder"),
            ({"folders": ("s3://nobucket/none",)}, r"no dataset\.json at s3://nobucket/none"),
            ({"folders": ("nostore://a/b",)}, r"Protocol not known: nostore"),
            ({"shard_cache_limit": 1e-6}, r"shard_cache_limit is 1e-06 GiB; 4 files, twice shuffle_shards, take up to"),
        ],
    )
    def test_what_is_no_set(self, changes: dict[str, Any], message: str, config: DataConfig) -> None:
        with pytest.raises((OSError, ValueError), match=message), local_sets(replace(config, **changes), SPLITS):
            pass

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("dataset.json", b"[]", r"set/dataset\.json holds a list; expected a JSON object"),
            ("dataset.json", b'{"a": 1}', r"set/dataset\.json has unknown fields \['a'\]"),
            ("train-00000-of-00007.parquet", b"", r"00000-of-00007\.parquet is no Parquet file"),
            ("train-00000-of-00007.parquet", b"x" * 3000, r"00000-of-00007\.parquet is no Parquet file"),
        ],
    )
    def test_what_is_none_there(self, name: str, content: bytes, message: str, config: DataConfig) -> None:
        import fsspec

        fsspec.filesystem("s3").pipe_file(f"bucket/set/{name}", content)
        with pytest.raises(ValueError, match=message), local_sets(config, SPLITS):
            pass

    def test_a_name_outside_of_the_set(self, config: DataConfig, sharded_dataset: Path) -> None:
        import fsspec

        content = (sharded_dataset / "dataset.json").read_text().replace('"train-00000', '"../train-00000')
        fsspec.filesystem("s3").pipe_file("bucket/set/dataset.json", content.encode())
        with (
            pytest.raises(ValueError, match=r"names '\.\./train-0.*expected Parquet files beside"),
            local_sets(config, SPLITS),
        ):
            pass


class TestCache:
    def test_stays_below_its_limit(self, config: DataConfig, sharded_dataset: Path, tiny_processor: Processor) -> None:
        largest = max(path.stat().st_size for path in sharded_dataset.glob("*.parquet"))
        limit = 7 * largest
        small = replace(config, shard_cache_limit=limit / 2**30, shuffle_shards=1)
        with local_sets(small, ("train",)) as sets:
            found = CaptionImages(sets, "train", tiny_processor)
            local = CaptionImages(DataConfig(folders=(str(sharded_dataset),)), "train", tiny_processor)
            for number in random.Random(0).choices(range(27), k=60):
                assert found.content(number, "image") == local.content(number, "image")
                files = [
                    path.stat() for path in Path(str(small.shard_cache)).glob("*/file") if path.stat().st_nlink == 1
                ]
                assert sum(file.st_size for file in files if file.st_nlink == 1) <= limit

    def test_each_shard_is_fetched_once_for_all(
        self, store: Store, config: DataConfig, tiny_processor: Processor
    ) -> None:
        with local_sets(config, ("train",)) as sets:
            readers = [CaptionImages(sets, "train", tiny_processor) for _ in range(4)]
            store.asked.clear()
            with ThreadPoolExecutor(4) as pool:
                contents = list(pool.map(lambda each: [each.content(n, "image") for n in range(27)], readers))
            assert contents[0] == contents[1] == contents[2] == contents[3]
            assert [store.reads(path.name) for path in Path(sets.folders[0]).glob("train*.parquet")] == [1] * 7

    def test_what_a_killed_process_left_is_removed(self, config: DataConfig) -> None:
        views = Path(str(config.shard_cache)) / "views"
        (views / "dead" / "0").mkdir(parents=True)
        with local_sets(config, SPLITS) as sets, local_sets(config, SPLITS):
            assert not (views / "dead").exists()
            assert Path(sets.folders[0]).is_dir()  # another process is alive
        assert [path.name for path in views.iterdir()] == [".lock"]


class TestTars:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        """Three shards of two pictures each."""
        write_pictures(tmp_path)
        names = [f"{number:02}.png" for number in range(6)]
        contents = {name: (tmp_path / name).read_bytes() for name in names}
        (tmp_path / "tars").mkdir()
        for number in range(3):
            rows = [(name, f"picture {name}") for name in names[2 * number : 2 * number + 2]]
            write_tar(tmp_path / "tars" / f"{number:05}.tar", rows, contents)
        return tmp_path / "tars"

    def check(self, sets: DataConfig, shards: Path, processor: Processor) -> None:
        found = CaptionImages(sets, "train", processor)
        pictures = [(shards.parent / f"{number:02}.png").read_bytes() for number in range(6)]
        assert [found.content(number, "image") for number in range(6)] == pictures
        assert list(found.captions) == [[f"picture {number:02}.png"] for number in range(6)]
        assert list(found.image_ids)[:2] == ["00000.tar/00.png", "00000.tar/01.png"]
        assert all(len(digest) == 64 for digest in found.digests().values())

    @pytest.mark.parametrize("name", ["{00000..00002}.tar", "*.tar"])
    def test_in_a_store(
        self, name: str, shards: Path, store: Store, config: DataConfig, tiny_processor: Processor
    ) -> None:
        place = store.upload(shards, "bucket/tars")
        store.unreliable(0.4)
        with local_sets(replace(config, folders=(f"{place}/{name}",)), SPLITS) as sets:
            self.check(sets, shards, tiny_processor)

    def test_over_http_beside_a_set(
        self, shards: Path, config: DataConfig, sharded_dataset: Path, tiny_processor: Processor, store: Store
    ) -> None:
        with served(shards) as place:
            mixed = replace(config, folders=(str(sharded_dataset),), train_only=(f"{place}/{{00000..00002}}.tar",))
            with local_sets(mixed, SPLITS) as sets:
                assert sets.folders == mixed.folders
                found = CaptionImages(sets, "train", tiny_processor)
                assert len(found) == 33
                tars = replace(sets, folders=sets.train_only, train_only=())
                self.check(tars, shards, tiny_processor)
                assert found.shards_of(CaptionPairs(found, None).image_numbers).unique().tolist() == list(range(10))

    @pytest.mark.parametrize(
        ("rows", "problem"),
        [
            ({"a.txt": b"words"}, "a in .*00001.tar: no image"),
            ({"a.png": b"no png", "a.txt": b"words"}, "a in .*00001.tar: .*image"),
            ({"a.png": b"no png"}, "a in .*00001.tar: "),
        ],
    )
    def test_samples_that_cannot_be_used(
        self,
        rows: dict[str, bytes],
        problem: str,
        shards: Path,
        config: DataConfig,
        tiny_processor: Processor,
        store: Store,
    ) -> None:
        with tarfile.open(shards / "00001.tar", "a") as archive:
            for name, content in rows.items():
                header = tarfile.TarInfo(name)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
        tars = replace(config, folders=(f"{shards.as_uri()}/*.tar",))
        for _ in range(2):  # also when the texts are there
            with pytest.raises(ValueError, match=f"has 1 bad .*{problem}"), local_sets(tars, SPLITS):
                pass
        with local_sets(replace(tars, max_errors=1), SPLITS) as sets:
            self.check(sets, shards, tiny_processor)

    def test_shards_that_are_none(self, shards: Path, config: DataConfig, store: Store) -> None:
        (shards / "00001.tar").write_bytes(b"no archive")
        tars = replace(config, folders=(f"{shards.as_uri()}/{{00000..00003}}.tar",))
        with (
            pytest.raises(ValueError, match=r"2 bad .*tars/00001\.tar is no tar.*no file at .*00003\.tar"),
            local_sets(tars, SPLITS),
        ):
            pass
