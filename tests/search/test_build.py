"""Bringing an index up to date: what is embedded, what is not, and what broken files and other models do."""

import errno
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bridgetower.checkpoints import read_checkpoint, write_checkpoint
from bridgetower.data.reader import Columns, Part
from bridgetower.predictor import Predictor, load
from bridgetower.search import build as build_module
from bridgetower.search.build import IndexReport, _Seen, _Update, build_index
from bridgetower.search.index import Index, write_lock
from bridgetower.search.searcher import Searcher
from bridgetower.search.sheet import contact_sheet
from sources import CAPTIONS, served
from sources import NAMES as NAMES_OF

Build = Callable[..., IndexReport]
NAMES = ["00.png", "01.png", "02.png", "03.png", "sub/04.png", "sub/05.png"]


def rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    table = lancedb.connect(tmp_path).open_table("photos").to_arrow()
    return {row["path"]: row for row in table.to_pylist()}


def counts(report: IndexReport) -> tuple[int, ...]:
    return report.images, report.added, report.changed, report.removed


class TestContent:
    def test_rows_are_what_the_model_says(
        self, build: Build, photos: Path, predictor: Predictor, tmp_path: Path
    ) -> None:
        captions = {"01.png": ["a red bar"], "sub/04.png": ["a green square", "a bar", "red on black"]}
        for name, texts in captions.items():
            (photos / name).with_suffix(".txt").write_text("\n".join(texts))
        report = build(batch_size=4)
        assert counts(report) == (6, 6, 0, 0)
        assert report.bad == ()
        found = rows(tmp_path)
        assert sorted(found) == NAMES
        for name, row in found.items():
            file, texts = photos / name, captions.get(name, [])
            assert (row["width"], row["height"], row["size"]) == (24, 24, file.stat().st_size)
            assert row["captions"] == texts
            vectors = {"image_vector": predictor.embed_images(file)[0]}
            if texts:
                vectors |= {
                    "text_vectors": predictor.embed_texts(texts),
                    "pair_vectors": predictor.embed_pairs([file] * len(texts), texts),
                }
            for column in ("image_vector", "text_vectors", "pair_vectors"):
                stored = torch.tensor(row[column])
                torch.testing.assert_close(stored, vectors.get(column, torch.empty(0)), atol=1e-5, rtol=0)

    def test_a_table_and_captions_from_folders(self, build: Build, photos: Path, tmp_path: Path) -> None:
        (photos / "list.jsonl").write_text('{"path": "sub/05.png", "captions": ["one", "two"]}\n')
        assert counts(build(photos / "list.jsonl")) == (1, 1, 0, 0)
        assert rows(tmp_path)["sub/05.png"]["captions"] == ["one", "two"]
        assert counts(build(captions_from="folder")) == (6, 5, 1, 0)
        assert rows(tmp_path)["sub/05.png"]["captions"] == ["sub"]

    def test_captions_that_are_too_long(self, build: Build, photos: Path, tmp_path: Path) -> None:
        (photos / "00.txt").write_text("red bar on black " * 9)
        report = build(max_errors=1, truncate=False)
        assert counts(report) == (5, 5, 0, 0)
        assert "the limit is 24" in report.bad[0]
        report = build()
        assert (counts(report), report.cut) == ((6, 1, 0, 0), 1)
        assert len(rows(tmp_path)["00.png"]["text_vectors"]) == 1


class TestSources:
    """Images in shards and tables and at URLs are found, opened again, and left alone while nothing changes."""

    @pytest.mark.parametrize("kind", ["shards", "saved", "parquet_folder", "bytes.parquet", "table.jsonl"])
    def test_as_in_a_folder(
        self, kind: str, build: Build, places: dict[str, Path], predictor: Predictor, tmp_path: Path, encoded: list[int]
    ) -> None:
        assert counts(build(places[kind])) == (5, 5, 0, 0)
        del encoded[:]
        assert counts(build(places[kind])) == (5, 0, 0, 0)
        assert encoded == []
        searcher = Searcher(tmp_path / "photos.lance", predictor)
        expected = predictor.match(
            [places["folder"] / f"{name}.png" for name in NAMES_OF], "a green square", all_pairs=True
        )
        hits = searcher.search("a green square")
        found = {hit.captions[0]: hit.score for hit in hits}
        assert found == pytest.approx(dict(zip(CAPTIONS, expected[:, 0].tolist(), strict=True)), abs=1e-5)
        contact_sheet(hits)
        one = next(hit for hit in hits if hit.captions[0] == CAPTIONS[0])
        assert searcher.index.content(one) == (places["folder"] / "00.png").read_bytes()

    def test_at_urls(self, build: Build, places: dict[str, Path], predictor: Predictor, tmp_path: Path) -> None:
        with served(places["folder"].parent) as url:
            lines = "".join(f"{url}/folder/{name}.png\n" for name in (*NAMES_OF, "none"))
            (tmp_path / "urls.csv").write_text("url\n" + lines)
            report = build(tmp_path / "urls.csv", max_errors=1)
            assert (counts(report), report.bad) == (
                (5, 5, 0, 0),
                (f"'{url}/folder/none.png': no file at {url}/folder/none.png",),
            )
            assert build(tmp_path / "urls.csv", max_errors=1).added == 0
            searcher = Searcher(tmp_path / "photos.lance", predictor)
            (hit,) = searcher.search(image=places["folder"] / "03.png", top=1)
            assert hit.file == hit.path == f"{url}/folder/03.png"
            assert searcher.index.content(hit) == (places["folder"] / "03.png").read_bytes()
            assert len(searcher.search("a bar")) == 5
            with pytest.raises(ValueError, match="is at a URL, which is not fetched because an index names it"):
                searcher.index.content(hit, fetch=False)
            shards = build_index(f"{url}/shards/shard-{{0..1}}.tar", tmp_path / "shards.lance", predictor)
            assert counts(shards) == (5, 5, 0, 0)
            of_shards = Searcher(tmp_path / "shards.lance", predictor)
            (hit,) = of_shards.search(image=places["folder"] / "03.png", top=1)
            assert hit.path == "shard-1.tar/03.png"
            assert of_shards.index.content(hit) == (places["folder"] / "03.png").read_bytes()
            with pytest.raises(ValueError, match=r"is of the images in .*, not of .*; choose another name"):
                build_index(places["folder"], tmp_path / "shards.lance", predictor)

    def test_tables_of_one_name(self, build: Build, photos: Path, predictor: Predictor, tmp_path: Path) -> None:
        for split, number in (("test", 0), ("train", 1)):
            (tmp_path / "hf" / split).mkdir(parents=True)
            content = (photos / f"{number:02}.png").read_bytes()
            pq.write_table(
                pa.table({"image": [content], "text": [CAPTIONS[number]]}), tmp_path / "hf" / split / "0.parquet"
            )
        expected = {"test/0.parquet/1": [CAPTIONS[0]], "train/0.parquet/1": [CAPTIONS[1]]}
        assert counts(build(tmp_path / "hf")) == (2, 2, 0, 0)
        assert {path: row["captions"] for path, row in rows(tmp_path).items()} == expected
        # What an index has under other names is replaced.
        table = lancedb.connect(tmp_path).open_table("photos")
        table.update(where="path LIKE 'test/%'", values={"path": "0.parquet/1", "version": ""})
        assert counts(build(tmp_path / "hf")) == (2, 1, 0, 1)
        for number, (path, row) in enumerate(sorted(rows(tmp_path).items())):
            assert (path, row["captions"]) == list(expected.items())[number]
            vector = predictor.embed_images(photos / f"{number:02}.png")[0]
            torch.testing.assert_close(torch.tensor(row["image_vector"]), vector, atol=1e-5, rtol=0)

    def test_ids_that_come_twice(self, build: Build, photos: Path, tmp_path: Path) -> None:
        first, second = ((photos / f"{number:02}.png").read_bytes() for number in (0, 1))
        cells = {"id": [1, 1, 1], "image": [first, second, first], "text": ["one", "two", "three"]}
        pq.write_table(pa.table(cells), tmp_path / "a.parquet")
        report = build(tmp_path / "a.parquet", max_errors=1)
        message = (
            "a.parquet row 2: '1' already names another image, that of a.parquet row 1; give each a name of its own"
        )
        assert (counts(report), report.bad) == ((1, 1, 0, 0), (message,))
        assert rows(tmp_path)["1"]["captions"] == ["one", "three"]

    def test_several_sources_with_absolute_paths(self, photos: Path, predictor: Predictor, tmp_path: Path) -> None:
        for folder, number in (("a", 0), ("b", 1)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "t.csv").write_text(f"image\n{photos}/{number:02}.png\n")
        build_index([tmp_path / "a" / "t.csv", tmp_path / "b" / "t.csv"], tmp_path / "photos.lance", predictor)
        hits = Searcher(tmp_path / "photos.lance", predictor).search("red", rerank=2)
        assert sorted(str(hit.file) for hit in hits) == [f"{photos}/00.png", f"{photos}/01.png"]

    def test_a_table_of_texts(self, build: Build, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one")
        with pytest.raises(
            ValueError, match=r"names no image; nothing was removed: .* line 1 has no image; `index` takes"
        ):
            build(tmp_path / "a.txt", max_errors=1)

    def test_rows_without_an_image(self, build: Build, photos: Path, tmp_path: Path) -> None:
        (photos / "a.jsonl").write_text('{"text": "a"}\n{"path": "00.png"}\n{"path": "01.png", "text": "b"}\n')
        report = build(photos / "a.jsonl", max_errors=1)
        assert report.bad == ("a.jsonl line 1 has no image; `index` takes images, `embed` texts too",)
        assert {path: row["captions"] for path, row in rows(tmp_path).items()} == {"00.png": [], "01.png": ["b"]}


class TestUpdate:
    def test_unchanged_images_are_left_alone(self, build: Build, encoded: list[int], tmp_path: Path) -> None:
        build()
        version = lancedb.connect(tmp_path).open_table("photos").version
        del encoded[:]
        assert counts(build()) == (6, 0, 0, 0)
        assert encoded == []
        assert lancedb.connect(tmp_path).open_table("photos").version == version

    def test_new_changed_and_dropped(
        self, build: Build, encoded: list[int], photos: Path, predictor: Predictor, tmp_path: Path
    ) -> None:
        build()
        del encoded[:]
        Image.new("RGB", (30, 40), "red").save(photos / "00.png")
        Image.new("RGB", (10, 40), "blue").save(photos / "new.png")
        (photos / "01.png").unlink()
        assert counts(build()) == (6, 1, 1, 1)
        assert encoded == [2]
        found = rows(tmp_path)
        assert sorted(found) == sorted({*NAMES, "new.png"} - {"01.png"})
        assert (found["00.png"]["width"], found["00.png"]["height"]) == (30, 40)
        for name in ("00.png", "new.png"):
            expected = predictor.embed_images(photos / name)[0]
            torch.testing.assert_close(torch.tensor(found[name]["image_vector"]), expected, atol=1e-5, rtol=0)

    def test_a_change_of_the_same_size_is_told_by_its_time(self, build: Build, photos: Path, tmp_path: Path) -> None:
        for colour in ("red", "blue"):
            Image.new("RGB", (8, 8), colour).save(photos / "00.bmp")
            if colour == "red":
                build()
        assert build().changed == 1
        (photos / "01.txt").write_text("a caption")
        assert build().changed == 1
        assert rows(tmp_path)["01.png"]["captions"] == ["a caption"]

    def test_files_that_swap_names(self, build: Build, photos: Path, predictor: Predictor, tmp_path: Path) -> None:
        build()
        (photos / "00.png").rename(photos / "x")
        (photos / "01.png").rename(photos / "00.png")
        (photos / "x").rename(photos / "01.png")
        assert build().changed == 2
        for name in ("00.png", "01.png"):
            expected = predictor.embed_images(photos / name)[0]
            torch.testing.assert_close(torch.tensor(rows(tmp_path)[name]["image_vector"]), expected, atol=1e-5, rtol=0)

    def test_content_that_the_index_has_is_not_embedded_again(
        self, build: Build, encoded: list[int], photos: Path, tmp_path: Path
    ) -> None:
        (photos / "01.txt").write_text("a caption")
        build()
        before = rows(tmp_path)
        del encoded[:]
        (photos / "sub").rename(photos / "moved")
        (photos / "00.png").rename(photos / "renamed.png")
        shutil.copy(photos / "02.png", photos / "copy.png")
        os.utime(photos / "03.png", (1, 1))
        report = build()
        assert (encoded, counts(report), report.reused) == ([], (7, 4, 1, 3), 5)
        found = rows(tmp_path)
        names = {"moved/04.png": "sub/04.png", "moved/05.png": "sub/05.png", "renamed.png": "00.png"}
        names |= {"copy.png": "02.png"} | {name: name for name in ("01.png", "02.png", "03.png")}
        assert found.keys() == names.keys()
        for name, earlier in names.items():
            same = ("digest", "size", "width", "captions", "image_vector", "text_vectors", "pair_vectors")
            assert [found[name][one] for one in same] == [before[earlier][one] for one in same]
            time = (photos / name).stat().st_mtime_ns // 1000
            assert round(found[name]["mtime"].timestamp() * 1e6) == time
        assert counts(build()) == (7, 0, 0, 0)
        (photos / "01.png").rename(photos / "other.png")  # with no caption now, which is part of the vectors
        assert (build().reused, encoded) == (0, [1])

    def test_another_content_of_the_same_length_is_embedded(
        self, build: Build, photos: Path, predictor: Predictor, tmp_path: Path
    ) -> None:
        for name, colour in (("a.bmp", "red"), ("b.bmp", "blue")):
            Image.new("RGB", (8, 8), colour).save(photos / name)
            assert (build().added, build().reused) == (7 if name == "a.bmp" else 1, 0)
        expected = predictor.embed_images(photos / "b.bmp")[0]
        torch.testing.assert_close(torch.tensor(rows(tmp_path)["b.bmp"]["image_vector"]), expected, atol=1e-5, rtol=0)

    def test_images_in_a_shard_that_moves(self, photos: Path, predictor: Predictor, encoded: list[int]) -> None:
        with tarfile.open(photos / "a.tar", "w") as archive:
            archive.add(photos / "00.png", "00.png")
        out = photos.parent / "photos.lance"
        build_index(photos / "a.tar", out, predictor)
        del encoded[:]
        (photos / "a.tar").rename(photos / "b.tar")
        report = build_index(photos / "b.tar", out, predictor)
        assert (counts(report), report.reused, encoded) == ((1, 1, 0, 1), 1, [])
        (hit,) = Searcher(out, predictor).search("red", top=1, rerank=1)
        assert Searcher(out, predictor).index.content(hit) == (photos / "00.png").read_bytes()

    def test_a_source_that_is_empty_deletes_nothing(
        self, build: Build, photos: Path, predictor: Predictor, tmp_path: Path
    ) -> None:
        build()
        shutil.rmtree(photos)
        photos.mkdir()
        with pytest.raises(ValueError, match="photos has nothing that can be read; expected images"):
            build()
        assert len(Index(photos.parent / "photos.lance")) == 6

    def test_of_several_sources_one_that_is_empty_deletes_nothing(
        self, photos: Path, predictor: Predictor, tmp_path: Path
    ) -> None:
        others = tmp_path / "others"
        others.mkdir()
        (photos / "00.png").rename(others / "00.png")
        out = tmp_path / "both.lance"
        assert counts(build_index([photos, others], out, predictor)) == (6, 6, 0, 0)
        (others / "00.png").unlink()
        with pytest.raises(ValueError, match="others has nothing that can be read; expected images"):
            build_index([photos, others], out, predictor)
        assert len(Index(out)) == 6

    @pytest.mark.parametrize(("seconds", "kept"), [(0.0, 3), (1000.0, 0)])
    def test_what_was_embedded_is_written_every_few_seconds(
        self, seconds: float, kept: int, build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        take, taken, flush = _Update._take, list[str](), _Update._flush

        def killed(update: _Update, one: Any) -> None:
            taken.append(one.example.id)
            if len(taken) > 3:
                monkeypatch.setattr(_Update, "_flush", lambda update: None)
                raise KeyboardInterrupt
            take(update, one)

        monkeypatch.setattr(_Update, "_take", killed)
        with pytest.raises(KeyboardInterrupt):
            build(batch_size=1, commit_seconds=seconds)
        assert len(Index(tmp_path / "photos.lance")) == kept
        monkeypatch.setattr(_Update, "_take", take)
        monkeypatch.setattr(_Update, "_flush", flush)
        assert counts(build()) == (6, 6 - kept, 0, 0)

    def test_groups_on_request(self, build: Build, photos: Path) -> None:
        uri = photos.parent / "photos.lance"
        build()
        assert not Index(uri).has_ann_index
        build(ann=True)
        (photos / "00.png").unlink()
        build()
        assert Index(uri).has_ann_index

    def test_by_uri(self, photos: Path, predictor: Predictor, tmp_path: Path) -> None:
        uri = f"file://{tmp_path}/in/a/store.lance"  # stands for s3:// and the like, which take the same way
        assert build_index(photos, uri, predictor).added == 6
        (photos / "00.png").unlink()
        assert counts(build_index(photos, uri, predictor)) == (5, 0, 0, 1)
        assert Index(uri).root == photos
        assert len(Index(tmp_path / "in" / "a" / "store.lance")) == 5


class TestParts:
    """Files with many images in them are read only if they changed, or were not read to their end."""

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the files that are read."""
        names: list[str] = []
        read_part = build_module.read_part

        def noting(part: Part, columns: Columns) -> Any:
            names.append(part.files[0].name)
            return read_part(part, columns)

        monkeypatch.setattr(build_module, "read_part", noting)
        return names

    @pytest.mark.parametrize(
        ("kind", "last"), [("shards", "shard-1.tar"), ("bytes.parquet", "bytes.parquet"), ("saved", None)]
    )
    def test_unchanged_ones_are_not_read(
        self, kind: str, last: str | None, build: Build, places: dict[str, Path], read: list[str], tmp_path: Path
    ) -> None:
        source = tmp_path / kind
        (shutil.copytree if places[kind].is_dir() else shutil.copy)(places[kind], source)
        assert counts(build(source)) == (5, 5, 0, 0)
        assert len(read) == len(set(read)) > 0
        before = rows(tmp_path)
        assert not [row for row in before.values() if row["version"].endswith("?")]
        del read[:]
        assert counts(build(source)) == (5, 0, 0, 0)
        assert read == []
        if last is not None:
            os.utime(source / last if source.is_dir() else source, (1, 1))
            build(source)
            assert read == [last]
            assert counts(build(source)) == (5, 0, 0, 0)
            assert read == [last]

    def test_a_run_that_ended_within_one(
        self,
        build: Build,
        shapes_folder: Path,
        read: list[str],
        encoded: list[int],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        def write(name: str, numbers: range) -> None:
            with tarfile.open(tmp_path / "tars" / name, "w") as archive:
                for number in numbers:
                    archive.add(shapes_folder / f"{number:02}.png", f"{number:02}.png")

        (tmp_path / "tars").mkdir()
        write("a.tar", range(5))
        write("b.tar", range(5, 9))
        take, taken = _Update._take, list[str]()

        def killed(update: _Update, one: Any) -> None:
            taken.append(one.example.id)
            if len(taken) == 8:
                raise KeyboardInterrupt
            take(update, one)

        with monkeypatch.context() as patch:
            patch.setattr(_Update, "_take", killed)
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / "tars", batch_size=1, commit_seconds=0)
        del read[:], encoded[:]
        assert counts(build(tmp_path / "tars")) == (9, 2, 0, 0)
        assert (read, sum(encoded)) == (["b.tar"], 2)
        del read[:], encoded[:]
        assert counts(build(tmp_path / "tars")) == (9, 0, 0, 0)
        assert read == []
        write("b.tar", range(5, 12))  # three more behind the others
        report = build(tmp_path / "tars")
        assert (report.images, report.added, report.reused, read) == (12, 3, 4, ["b.tar"])
        write("b.tar", range(5, 7))
        assert counts(build(tmp_path / "tars")) == (7, 0, 2, 5)
        del read[:]
        assert counts(build(tmp_path / "tars")) == (7, 0, 0, 0)
        assert read == []

    def test_one_with_something_bad_is_read_again(
        self, build: Build, shapes_folder: Path, read: list[str], tmp_path: Path
    ) -> None:
        contents = [(shapes_folder / "00.png").read_bytes(), b"not an image", (shapes_folder / "01.png").read_bytes()]
        pq.write_table(pa.table({"id": list("abc"), "image": contents}), tmp_path / "a.parquet")
        first = build(tmp_path / "a.parquet", max_errors=1)
        again = build(tmp_path / "a.parquet", max_errors=1)
        assert (first.bad, counts(again)) == (again.bad, (2, 0, 0, 0))
        assert len(read) == 2

    def test_captions_of_one_image_in_rows_far_from_each_other(
        self, build: Build, photos: Path, encoded: list[int], tmp_path: Path
    ) -> None:
        lines = "image,caption\n00.png,a\n00.png,b\n01.png,c\nsub/04.png,d\n00.png,e\n01.png,f\n"
        (photos / "list.csv").write_text(lines)
        assert counts(build(photos / "list.csv")) == (3, 3, 0, 0)
        found = {path: row["captions"] for path, row in rows(tmp_path).items()}
        assert found == {"00.png": ["a", "b", "e"], "01.png": ["c", "f"], "sub/04.png": ["d"]}
        del encoded[:]
        assert counts(build(photos / "list.csv")) == (3, 0, 0, 0)
        assert encoded == []


def test_what_came_before_is_known() -> None:
    seen, drawn, before = _Seen(), random.Random(0), set[int]()
    for count in (1, 3, 50, 7, 1, 200, 40):
        given = [drawn.randrange(-300, 300) for _ in range(count)]
        expected = [one not in before and one not in given[:place] for place, one in enumerate(given)]
        assert seen.new(given) == expected
        before |= set(given)


class TestUnreadableFolders:
    """A folder that cannot be read for a moment, as on a network disk, takes nothing out of an index."""

    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
        """Makes a folder fail, for a super-user too."""
        scan, stat = os.scandir, Path.stat

        def call(folder: Path) -> None:
            def scandir(path: Any = ".") -> Any:
                if Path(path) == folder:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
                return scan(path)

            def status(path: Path, **options: Any) -> os.stat_result:
                if folder in path.parents:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
                return stat(path, **options)

            monkeypatch.setattr(os, "scandir", scandir)
            monkeypatch.setattr(Path, "stat", status)

        return call

    def test_its_images_stay(self, build: Build, photos: Path, failing: Callable[[Path], None], tmp_path: Path) -> None:
        build()
        (photos / "00.png").unlink()
        failing(photos / "sub")
        message = "'sub': Stale file handle"
        with pytest.raises(ValueError, match="1 bad item, allowed are 0") as error:
            build()
        assert message in str(error.value)
        assert sorted(rows(tmp_path)) == NAMES[1:]
        report = build(max_errors=1)
        assert (report.bad, counts(report)) == ((message,), (5, 0, 0, 0))

    def test_among_several_sources(
        self, photos: Path, predictor: Predictor, failing: Callable[[Path], None], tmp_path: Path
    ) -> None:
        others, out = tmp_path / "others", tmp_path / "both.lance"
        others.mkdir()
        shutil.copy(photos / "00.png", others / "00.png")
        build_index([photos, others], out, predictor)
        failing(photos / "sub")
        with pytest.raises(ValueError, match="'photos/sub': Stale file handle"):
            build_index([photos, others], out, predictor)
        assert len(Index(out)) == 7

    def test_all_of_it(self, build: Build, photos: Path, failing: Callable[[Path], None], tmp_path: Path) -> None:
        build()
        failing(photos)
        with pytest.raises(ValueError, match="Stale file handle"):
            build()
        assert len(rows(tmp_path)) == 6

    def test_files_that_a_table_names(
        self, build: Build, photos: Path, failing: Callable[[Path], None], tmp_path: Path
    ) -> None:
        (photos / "list.csv").write_text("image\n" + "".join(f"{name}\n" for name in NAMES))
        build(photos / "list.csv")
        (photos / "00.png").unlink()
        failing(photos / "sub")
        report = build(photos / "list.csv", max_errors=3)
        assert (len(report.bad), report.removed) == (3, 1)
        assert sorted(rows(tmp_path)) == NAMES[1:]


class TestBadPictures:
    def test_are_named_and_left_out_as_far_as_allowed(self, build: Build, photos: Path, tmp_path: Path) -> None:
        build()
        (photos / "00.png").write_text("not an image")
        (photos / "01.png").unlink()
        (photos / "01.png").symlink_to("nowhere")
        with (photos / "02.png").open("r+b") as file:
            file.truncate(2**36)
        report = build(max_errors=3)
        assert counts(report) == (3, 0, 0, 3)
        assert report.bad[0] == "'01.png': No such file or directory"
        assert report.bad[1].startswith("'00.png': it cannot be read as an image")
        assert report.bad[2].startswith("'02.png': it has 68719476736 bytes; expected at most")
        assert build(max_errors=3).bad == report.bad

    def test_more_than_allowed_are_an_error_once_the_others_are_in(
        self, build: Build, photos: Path, tmp_path: Path
    ) -> None:
        for number in range(12):
            (photos / f"bad{number}.jpg").write_text("not an image")
        with pytest.raises(
            ValueError, match=r"12 bad items, allowed are 11 \(max_errors=N allows more\); the other 6 are in the"
        ):
            build(max_errors=11)
        with pytest.raises(ValueError, match=r"'bad0\.jpg': it cannot .* and 2 more$"):
            build()
        assert sorted(rows(tmp_path)) == NAMES


class TestRefusals:
    def test_another_model(self, build: Build, photos: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
        build()
        other = load(tiny_checkpoint, image_size=40, device="cpu")
        before = rows(tmp_path)
        with pytest.raises(ValueError, match=rf"made with model {Index(tmp_path / 'photos.lance').info.fingerprint}"):
            build_index(photos, tmp_path / "photos.lance", other)
        with pytest.raises(ValueError, match=f"is {other.fingerprint}; use that model"):
            build_index(photos, tmp_path / "photos.lance", other)
        assert rows(tmp_path) == before

    def test_another_folder(self, build: Build, photos: Path, tmp_path: Path) -> None:
        build()
        with pytest.raises(ValueError, match=r"is of the images in .*photos, not of .*sub; choose another name"):
            build(photos / "sub")
        assert sorted(rows(tmp_path)) == NAMES

    def test_a_model_without_contrastive_head(self, photos: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
        write_checkpoint(read_checkpoint(tiny_checkpoint).without_itc(), tmp_path / "model")
        with pytest.raises(ValueError, match="no contrastive"):
            build_index(photos, tmp_path / "photos.lance", tmp_path / "model")
        assert not (tmp_path / "photos.lance").exists()

    def test_an_index_that_another_process_writes(self, build: Build, tmp_path: Path) -> None:
        with write_lock(tmp_path / "photos.lance"), pytest.raises(FileExistsError, match="another process works in"):
            build()
