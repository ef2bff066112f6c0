"""Bringing an index up to date: what is embedded, what is not, and what broken files and other models do."""

import base64
import errno
import json
import os
import shlex
import shutil
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import lancedb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from album import NAMES
from PIL import Image

from bridgetower.checkpoints import read_checkpoint, write_checkpoint
from bridgetower.data.sources import fetch
from bridgetower.data.sources.example import Example
from bridgetower.data.sources.example import Image as SourceImage
from bridgetower.data.sources.reader import read
from bridgetower.inference.embed import decode_examples
from bridgetower.inference.predictor import load
from bridgetower.inference.vector_files import write_lock
from bridgetower.processor import images
from bridgetower.search.build import build_index
from bridgetower.search.index import Index
from bridgetower.search.searcher import Searcher
from helpers.sources import SOURCE_CAPTIONS, serve_files
from helpers.sources import SOURCE_NAMES as NAMES_OF


class TestContent:
    def test_rows_are_what_the_model_says(self, album, predictor):
        captions = {
            "01.png": ["a red bar"],
            "sub/04.png": ["a green square", "a bar", "red on black"],
        }
        for name, texts in captions.items():
            (album.folder / name).with_suffix(".txt").write_text("\n".join(texts))
        assert album.counts(batch_size=4) == (6, 6, 0, 0)
        rows = album.rows()
        assert sorted(rows) == NAMES
        album.check_vectors({name: album.folder / name for name in NAMES})
        for name, row in rows.items():
            file = album.folder / name
            texts = captions.get(name, [])
            assert (row["width"], row["height"], row["size"]) == (24, 24, file.stat().st_size)
            assert row["captions"] == texts
            of_texts, of_pairs = (
                torch.tensor(row[column]) for column in ("text_vectors", "pair_vectors")
            )
            if texts:
                torch.testing.assert_close(
                    of_texts, predictor.embed_texts(texts), atol=1e-5, rtol=0
                )
                pairs = predictor.embed_pairs([file] * len(texts), texts)
                torch.testing.assert_close(of_pairs, pairs, atol=1e-5, rtol=0)
            assert len(of_texts) == len(of_pairs) == len(texts)

    def test_captions_of_tables_and_folders_and_those_that_are_too_long(self, album):
        (album.folder / "list.jsonl").write_text(
            '{"path": "sub/05.png", "captions": ["one", "two"]}\n'
        )
        assert album.counts(album.folder / "list.jsonl") == (1, 1, 0, 0)
        assert album.captions() == {"sub/05.png": ["one", "two"]}
        assert album.counts(captions_from="folder") == (6, 5, 1, 0)
        assert album.captions()["sub/05.png"] == ["sub"]
        (album.folder / "00.txt").write_text("red bar on black " * 9)
        report = album.build(max_errors=1, truncate=False)
        assert report.images == 5
        assert "the limit is 24" in report.bad[0]
        report = album.build()
        assert (report.images, report.added, report.cut) == (6, 1, 1)
        assert len(album.rows()["00.png"]["text_vectors"]) == 1


class TestSources:
    def test_at_urls(self, album, source_paths, predictor, tmp_path, monkeypatch):
        image = source_paths["folder"] / "03.png"
        shards = tmp_path / "shards.lance"
        table = tmp_path / "urls.csv"
        with serve_files(source_paths["folder"].parent) as url:
            table.write_text(
                "url\n" + "".join(f"{url}/folder/{name}.png\n" for name in (*NAMES_OF, "none"))
            )
            report = album.build(table, max_errors=1)
            missing = f"'{url}/folder/none.png': no file at {url}/folder/none.png"
            assert (report.images, report.added, report.bad) == (5, 5, (missing,))
            assert album.build(table, max_errors=1).added == 0
            searcher = Searcher(album.out, predictor)
            (hit,) = searcher.search(image=image, top=1)
            assert hit.file == hit.path == f"{url}/folder/03.png"
            assert searcher.index.content(hit) == image.read_bytes()
            assert len(searcher.search("a bar")) == 5
            with pytest.raises(
                ValueError, match="is at a URL, which is not fetched because an index names it"
            ):
                searcher.index.content(hit, fetch=False)
            for added in (5, 0):
                assert (
                    build_index(f"{url}/shards/shard-{{0..1}}.tar", shards, predictor).added
                    == added
                )
            searcher = Searcher(shards, predictor)
            (hit,) = searcher.search(image=image, top=1)
            assert (hit.path, searcher.index.content(hit)) == (
                "shard-1.tar/03.png",
                image.read_bytes(),
            )
        pauses = []
        monkeypatch.setattr(fetch.time, "sleep", pauses.append)
        with pytest.raises(OSError, match="cannot be read"):
            searcher.index.content(hit)
        assert len(pauses) == 2  # as somebody waits for it
        with pytest.raises(
            ValueError, match=r"is of the images in .*, not of .*; choose another name"
        ):
            build_index(source_paths["folder"], shards, predictor)

    def test_tables_of_one_name(self, album, tmp_path):
        for split, number in (("test", 0), ("train", 1)):
            (tmp_path / "hf" / split).mkdir(parents=True)
            cells = {
                "image": [(album.folder / f"{number:02}.png").read_bytes()],
                "text": [SOURCE_CAPTIONS[number]],
            }
            pq.write_table(pa.table(cells), tmp_path / "hf" / split / "0.parquet")
        expected = {
            "test/0.parquet/1": [SOURCE_CAPTIONS[0]],
            "train/0.parquet/1": [SOURCE_CAPTIONS[1]],
        }
        assert album.counts(tmp_path / "hf") == (2, 2, 0, 0)
        assert album.captions() == expected
        # What an index has under other names is replaced.
        table = lancedb.connect(tmp_path).open_table("photos")
        table.update(where="path LIKE 'test/%'", values={"path": "0.parquet/1", "version": ""})
        assert album.counts(tmp_path / "hf") == (2, 1, 0, 1)
        assert album.captions() == expected
        album.check_vectors(
            {path: album.folder / f"{n:02}.png" for n, path in enumerate(sorted(expected))}
        )

    def test_ids_that_come_twice(self, album, tmp_path):
        first, second = ((album.folder / f"{number:02}.png").read_bytes() for number in (0, 1))
        cells = {"id": [1, 1, 1], "image": [first, second, first], "text": ["one", "two", "three"]}
        pq.write_table(pa.table(cells), tmp_path / "a.parquet")
        report = album.build(tmp_path / "a.parquet", max_errors=1)
        assert (report.added, album.captions()) == (1, {"1": ["one", "three"]})
        assert (
            "a.parquet row 2: '1' already names another image, that of a.parquet row 1"
            in report.bad[0]
        )
        apart = {"id": [1, 2, 1], "image": [first, second, second]}  # not after each other
        pq.write_table(pa.table(apart), tmp_path / "a.parquet")
        for _ in range(2):
            (bad,) = album.build(tmp_path / "a.parquet", max_errors=1).bad
            assert "row 3: '1' already names another image; give each" in bad
        assert sorted(album.rows()) == ["1", "2"]

    def test_a_second_folder_is_added_by_the_command_that_the_error_names(
        self, album, predictor, tmp_path
    ):
        album.build()
        more_photos = shutil.copytree(album.folder / "sub", tmp_path / "more photos")
        shutil.copy(album.folder / "01.png", more_photos / "00.png")  # two of one name
        for sources in (
            [more_photos],
            [album.folder, more_photos],
            [more_photos, album.folder / "sub"],
        ):
            with pytest.raises(
                ValueError, match=r"is of the images in .*photos, not of .*; for both: "
            ) as caught:
                album.build(*sources)
            command, index, *command_sources, out, name, _, model = shlex.split(
                str(caught.value).partition("for both: ")[2]
            )
            assert (command, index, out, model) == (
                "bridgetower",
                "index",
                "--out",
                predictor.source,
            )
            assert sorted(command_sources) == sorted([str(more_photos), str(album.folder)])
        assert build_index(command_sources, name, predictor).images == 9
        names = [
            *(f"photos/{name}" for name in NAMES),
            *(f"more photos/{name}.png" for name in ("00", "04", "05")),
        ]
        assert sorted(Index(name).paths()) == sorted(names)
        assert len(album.rows()) == 6

    def test_several_sources(self, album, predictor, tmp_path):
        tables = [tmp_path / folder / "t.csv" for folder in "ab"]
        for number, table in enumerate(tables):
            table.parent.mkdir()
            table.write_text(f"image\n{album.folder}/{number:02}.png\n")
        album.build(*tables)
        hits = Searcher(album.out, predictor).search("red", rerank=2)
        assert sorted(str(hit.file) for hit in hits) == [
            f"{album.folder}/00.png",
            f"{album.folder}/01.png",
        ]
        index = tmp_path / "others.lance"
        second_folder = tmp_path / "others"
        second_folder.mkdir()
        (album.folder / "00.png").rename(second_folder / "00.png")
        assert build_index([album.folder, second_folder], index, predictor).added == 6
        (second_folder / "00.png").unlink()  # of a source that is empty nothing is deleted
        with pytest.raises(
            ValueError, match="others has nothing that can be read; expected images"
        ):
            build_index([album.folder, second_folder], index, predictor)
        assert len(Index(index)) == 6

    def test_rows_without_an_image(self, album):
        table = album.folder / "a.jsonl"
        table.write_text('{"text": "a"}\n{"path": "00.png"}\n{"path": "01.png", "text": "b"}\n')
        bad = album.build(table, max_errors=1).bad
        assert bad == ("a.jsonl line 1 has no image; `index` takes images, `embed` texts too",)
        assert album.captions() == {"00.png": [], "01.png": ["b"]}
        (album.folder / "a.txt").write_text("one")
        with pytest.raises(
            ValueError, match=r"names no image; nothing was removed: .* line 1 has no image"
        ):
            album.build(album.folder / "a.txt", max_errors=1)

    def test_photos_of_phones(self, album):
        pytest.importorskip("pillow_heif")
        Image.open(album.folder / "00.png").save(album.folder / "photo.HEIC", "HEIF")
        assert album.counts()[:2] == (7, 7)

    def test_images_that_are_not_read_are_bad_ones(self, album, monkeypatch, caplog):
        """HEIC without its extra, and JPEG XL: with advice in the error, which is all that is said."""
        heads = {"a.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "b.jxl": b"\xff\x0a" + bytes(20)}
        for name, content in heads.items():
            (album.folder / name).write_bytes(content)
        monkeypatch.setattr(images, "_FORMATS", ("PNG",))
        advice = (
            r"'a\.heic': .*it is HEIC: pip install '\.\[heic\]'",
            r"'b\.jxl': .*it is JPEG XL: save it as PNG",
        )
        with pytest.raises(
            ValueError, match=rf"2 bad items, allowed are 0 .*{advice[0]} \| {advice[1]}"
        ):
            album.build()
        assert len(album.build(max_errors=2).bad) == 2
        assert caplog.text == ""

    def test_files_that_are_skipped_are_told_once(self, album, caplog):
        (album.folder / "a.raw").touch()
        album.build()
        assert caplog.text.count("files that are not read were skipped: 1 .raw") == 1

    def test_images_as_base64_have_no_place(self, album):
        encoded = base64.b64encode((album.folder / "01.png").read_bytes()).decode()
        rows = [{"image": "00.png"}, {"image": encoded}]
        (album.folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (bad,) = album.build(album.folder / "t.jsonl", max_errors=1).bad
        assert (
            bad
            == "t.jsonl line 2 has its image as base64, which `index` cannot point to; save it as a file"
        )
        assert album.captions() == {"00.png": []}

    def test_captions_of_one_image_in_rows_far_from_each_other(self, album, encoded_batches):
        lines = "image,caption\n00.png,a\n00.png,b\n01.png,c\nsub/04.png,d\n00.png,e\n01.png,f\n"
        (album.folder / "list.csv").write_text(lines)
        assert album.counts(album.folder / "list.csv") == (3, 3, 0, 0)
        assert album.captions() == {
            "00.png": ["a", "b", "e"],
            "01.png": ["c", "f"],
            "sub/04.png": ["d"],
        }
        del encoded_batches[:]
        assert (album.counts(album.folder / "list.csv"), encoded_batches) == ((3, 0, 0, 0), [])


class TestUpdate:
    def test_only_what_is_new_or_changed_is_embedded(self, album, encoded_batches):
        album.build()
        version = lancedb.connect(album.out.parent).open_table("photos").version
        del encoded_batches[:]
        assert (album.counts(), encoded_batches) == ((6, 0, 0, 0), [])
        assert lancedb.connect(album.out.parent).open_table("photos").version == version
        Image.new("RGB", (30, 40), "red").save(album.folder / "00.png")
        Image.new("RGB", (10, 40), "blue").save(album.folder / "new.png")
        (album.folder / "01.png").unlink()
        assert (album.counts(), encoded_batches) == ((6, 1, 1, 1), [2])
        rows = album.rows()
        assert sorted(rows) == sorted({*NAMES, "new.png"} - {"01.png"})
        assert (rows["00.png"]["width"], rows["00.png"]["height"]) == (30, 40)
        album.check_vectors({name: album.folder / name for name in ("00.png", "new.png")})
        (album.folder / "02.txt").write_text("a caption")
        assert (album.build().changed, album.captions()["02.png"]) == (1, ["a caption"])
        for name, colour, added, changed in (
            ("a", "red", 1, 0),
            ("a", "blue", 0, 1),
            ("b", "green", 1, 0),
        ):
            Image.new("RGB", (8, 8), colour).save(album.folder / f"{name}.bmp")  # all of one size
            report = album.build()
            assert (report.added, report.changed, report.reused) == (added, changed, 0)
        album.check_vectors({name: album.folder / name for name in ("a.bmp", "b.bmp")})

    def test_content_that_the_index_has_is_not_embedded_again(self, album, encoded_batches):
        folder = album.folder
        (folder / "01.txt").write_text("a caption")
        album.build()
        before = album.rows()
        del encoded_batches[:]
        # two that swap names, and their folder moves
        (folder / "sub" / "04.png").rename(folder / "x")
        (folder / "sub" / "05.png").rename(folder / "sub" / "04.png")
        (folder / "x").rename(folder / "sub" / "05.png")
        (folder / "sub").rename(folder / "moved")
        (folder / "00.png").rename(folder / "renamed.png")
        shutil.copy(folder / "02.png", folder / "copy.png")
        os.utime(folder / "03.png", (1, 1))
        report = album.build()
        changes = report.images, report.added, report.changed, report.removed, report.reused
        assert (encoded_batches, changes) == ([], (7, 4, 1, 3, 5))
        rows = album.rows()
        names = {
            "moved/04.png": "sub/05.png",
            "moved/05.png": "sub/04.png",
            "renamed.png": "00.png",
        }
        names |= {"copy.png": "02.png"} | {name: name for name in ("01.png", "02.png", "03.png")}
        assert rows.keys() == names.keys()
        for name, earlier in names.items():
            same = (
                "digest",
                "size",
                "width",
                "captions",
                "image_vector",
                "text_vectors",
                "pair_vectors",
            )
            assert [rows[name][column] for column in same] == [
                before[earlier][column] for column in same
            ]
            assert (
                round(rows[name]["mtime"].timestamp() * 1e6)
                == (folder / name).stat().st_mtime_ns // 1000
            )
        assert album.counts() == (7, 0, 0, 0)
        # with no caption now, which is part of the vectors
        (folder / "01.png").rename(folder / "other.png")
        assert (album.build().reused, encoded_batches) == (0, [1])

    def test_images_in_a_shard_that_moves(self, album, predictor):
        with tarfile.open(album.folder / "a.tar", "w") as archive:
            archive.add(album.folder / "00.png", "00.png")
        album.build(album.folder / "a.tar")
        (album.folder / "a.tar").rename(album.folder / "b.tar")
        report = album.build(album.folder / "b.tar")
        assert (report.added, report.removed, report.reused) == (1, 1, 1)
        (hit,) = Searcher(album.out, predictor).search("red", top=1, rerank=1)
        assert (
            Searcher(album.out, predictor).index.content(hit)
            == (album.folder / "00.png").read_bytes()
        )

    def test_what_was_embedded_is_written_every_few_seconds(self, album, interrupt, monkeypatch):
        upsert = Index.upsert
        written = list[int]()

        def noting(index, rows):
            written.extend([len(rows)] if rows else [])
            upsert(index, rows)

        monkeypatch.setattr(Index, "upsert", noting)
        interrupt(4, lambda: album.build(batch_size=1, commit_seconds=0))
        assert written == [1, 1, 1]
        assert album.counts(commit_seconds=1000) == (6, 3, 0, 0)
        assert written[3:] == [3]

    def test_groups_on_request_and_an_index_by_uri(self, album, predictor, tmp_path):
        for ann in (False, True):
            album.build(ann=ann)
            assert Index(album.out).has_ann_index == ann
        uri = f"file://{tmp_path}/in/a/store.lance"  # stands for s3:// and the like, which take the same way
        assert build_index(album.folder, uri, predictor).added == 6
        (album.folder / "00.png").unlink()
        album.build()
        assert Index(album.out).has_ann_index
        assert build_index(album.folder, uri, predictor).removed == 1
        assert Index(uri).root == album.folder
        assert len(Index(tmp_path / "in" / "a" / "store.lance")) == 5


class TestParts:
    @pytest.mark.parametrize(
        ("kind", "last"), [("shards", "shard-1.tar"), ("bytes.parquet", ""), ("saved", None)]
    )
    def test_unchanged_ones_are_not_read(
        self, kind, last, album, source_paths, read_names, tmp_path
    ):
        source = tmp_path / kind
        files = [source_paths["folder"] / f"{name}.png" for name in NAMES_OF]
        (shutil.copytree if source_paths[kind].is_dir() else shutil.copy)(
            source_paths[kind], source
        )
        assert album.counts(source) == (5, 5, 0, 0)
        searcher = Searcher(album.out, album.predictor)
        expected = album.predictor.match(files, "a green square", all_pairs=True)[:, 0].tolist()
        hits = {hit.captions[0]: hit for hit in searcher.search("a green square")}
        scores = {caption: hit.score for caption, hit in hits.items()}
        assert scores == pytest.approx(dict(zip(SOURCE_CAPTIONS, expected, strict=True)), abs=1e-5)
        assert searcher.index.content(hits[SOURCE_CAPTIONS[0]]) == files[0].read_bytes()
        assert len(read_names) == len(set(read_names)) > 0
        assert sum(row["part_size"] for row in album.rows().values()) == 5
        del read_names[:]
        assert (album.counts(source), read_names) == ((5, 0, 0, 0), [])
        if last is not None:
            os.utime(source / last, (1, 1)) if last else os.utime(source, (1, 1))
            for _ in range(2):
                album.build(source)
                assert read_names == [last or kind]

    def test_other_columns_are_another_content(self, album, shapes_folder, tmp_path):
        cells = {
            "image": [(shapes_folder / "00.png").read_bytes()],
            "caption": ["one"],
            "other": ["two"],
        }
        pq.write_table(pa.table(cells), tmp_path / "a.parquet")
        for column in ("caption", "other"):
            album.build(tmp_path / "a.parquet", caption_column=column)
            assert list(album.captions().values()) == [cells[column]]

    def test_a_run_that_ended_within_one(
        self, album, shapes_folder, read_names, encoded_batches, interrupt, tmp_path
    ):
        tars = tmp_path / "tars"
        tars.mkdir()

        def write(name, numbers):
            with tarfile.open(tars / name, "w") as archive:
                for number in numbers:
                    archive.add(shapes_folder / f"{number:02}.png", f"{number:02}.png")

        def run():
            del read_names[:]
            return album.build(tars), [*read_names]

        write("a.tar", range(5))
        write("b.tar", range(5, 9))
        interrupt(8, lambda: album.build(tars, batch_size=1, commit_seconds=0))
        del encoded_batches[:]
        report, names = run()
        assert (report.images, report.added, names, sum(encoded_batches)) == (9, 2, ["b.tar"], 2)
        assert run()[1] == []
        write("b.tar", range(5, 12))  # three more behind the others
        report, names = run()
        assert (report.images, report.added, report.reused, names) == (12, 3, 4, ["b.tar"])
        write("b.tar", range(5, 7))
        report, _ = run()
        assert (report.images, report.added, report.changed, report.removed) == (7, 0, 2, 5)
        report, names = run()
        assert (report.changed, names) == (0, [])

    def test_one_with_something_bad_is_read_again(self, album, shapes_folder, read_names, tmp_path):
        contents = [
            (shapes_folder / "00.png").read_bytes(),
            b"not an image",
            (shapes_folder / "01.png").read_bytes(),
        ]
        pq.write_table(pa.table({"id": list("abc"), "image": contents}), tmp_path / "a.parquet")
        first, again = (album.build(tmp_path / "a.parquet", max_errors=1) for _ in range(2))
        assert (first.bad, again.images, again.added, len(read_names)) == (again.bad, 2, 0, 2)


class TestUnreadableFolders:
    """A folder that cannot be read for a moment, as on a network disk, takes nothing out of an index."""

    @pytest.fixture
    def failing(self, monkeypatch):
        scan = os.scandir
        stat = Path.stat

        def call(folder):
            def scandir(path="."):
                if Path(path) == folder:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
                return scan(path)

            def status(path, **options):
                if folder in path.parents:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
                return stat(path, **options)

            monkeypatch.setattr(os, "scandir", scandir)
            monkeypatch.setattr(Path, "stat", status)

        return call

    def test_its_images_stay(self, album, failing):
        album.build()
        (album.folder / "00.png").unlink()
        failing(album.folder / "sub")
        with pytest.raises(
            ValueError, match=r"1 bad item, allowed are 0.*'sub': Stale file handle"
        ):
            album.build()
        assert sorted(album.rows()) == NAMES[1:]
        report = album.build(max_errors=1)
        assert (report.bad, report.images, report.removed) == (("'sub': Stale file handle",), 5, 0)
        failing(album.folder)
        with pytest.raises(ValueError, match="Stale file handle"):
            album.build()
        assert len(album.rows()) == 5

    def test_among_several_sources(self, album, failing, tmp_path):
        second_folder = tmp_path / "others"
        second_folder.mkdir()
        shutil.copy(album.folder / "00.png", second_folder / "00.png")
        album.build(album.folder, second_folder)
        failing(album.folder / "sub")
        with pytest.raises(ValueError, match="'photos/sub': Stale file handle"):
            album.build(album.folder, second_folder)
        assert len(Index(album.out)) == 7

    def test_a_changed_image_that_cannot_be_read_for_a_moment(self, album, monkeypatch):
        album.build()
        os.utime(album.folder / "00.png", (1, 1))

        def fail(image):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(SourceImage, "read", fail)
        report = album.build(max_errors=1)
        assert (report.bad, report.images, report.removed) == (
            ("'00.png': [Errno 5] Input/output error",),
            6,
            0,
        )

    def test_files_that_a_table_names(self, album, failing):
        (album.folder / "list.csv").write_text("image\n" + "".join(f"{name}\n" for name in NAMES))
        album.build(album.folder / "list.csv")
        (album.folder / "00.png").unlink()
        failing(album.folder / "sub")
        report = album.build(album.folder / "list.csv", max_errors=3)
        assert (len(report.bad), report.removed) == (3, 1)
        assert sorted(album.rows()) == NAMES[1:]

    @pytest.mark.parametrize("name", ["list.csv", "captions.txt"])
    def test_the_rest_of_a_table_that_breaks_off(self, name, album, tmp_path):
        table = album.folder / name
        second_folder = tmp_path / "others"
        second_folder.mkdir()
        shutil.copy(album.folder / "03.png", second_folder / "03.png")
        (second_folder / "list.csv").write_text("image\n03.png\n")

        def write(end):
            table.write_bytes(
                b"image,caption\n00.png,a\n01.png," + b"red " * 5000 + b"\n../photos/02.png," + end
            )

        source = table if name == "list.csv" else album.folder
        for sources in ([source], [source, second_folder / "list.csv"]):
            shutil.rmtree(album.out, ignore_errors=True)
            write("ä".encode())
            album.build(*sources)
            before = album.rows()
            assert len(before) == 2 + len(sources)
            write(b"\xe4")
            with pytest.raises(ValueError, match="it is not UTF-8"):
                album.build(*sources)
            assert album.rows().keys() == before.keys()
            table.write_text("image,caption\n00.png,a\n")
            assert album.build(*sources).removed == 2


class TestFiles:
    def test_a_folder_with_all_in_it(self, album):
        (album.folder / "sub" / "04.txt").write_text("a red bar\n\n  on black \n")
        os.mkfifo(album.folder / "pipe.jpg")
        (album.folder / "link.png").symlink_to("nowhere.png")
        for name in (" a.png", "a\n.png", "caf\udce9.png"):
            (album.folder / name).write_bytes((album.folder / "00.png").read_bytes())
        report = album.build(max_errors=9)
        rows = album.rows()
        assert sorted(rows) == sorted([" a.png", "a\n.png", *NAMES])
        name = r"the name 'caf\udce9.png' is not UTF-8; rename the file"
        expected = [
            "'pipe.jpg': it is no regular file",
            "'link.png': No such file or directory",
            name,
        ]
        assert all(any(message in bad for bad in report.bad) for message in expected)
        assert len(report.bad) == 3
        status = (album.folder / "sub" / "04.png").stat()
        row = rows["sub/04.png"]
        assert (row["size"], row["captions"], row["location"]) == (
            status.st_size,
            ["a red bar", "on black"],
            "",
        )
        assert round(row["mtime"].timestamp() * 1e6) == status.st_mtime_ns // 1000

    def test_names_of_any_kind(self, album, predictor, tmp_path):
        folder = album.folder.rename(tmp_path / "caf\udce9")
        for number, name in enumerate((" a.png", "it's\n.png", "\tü.png")):
            (folder / f"{number:02}.png").rename(folder / name)
        assert [album.counts(folder) for _ in range(2)] == [(6, 6, 0, 0), (6, 0, 0, 0)]
        hits = Searcher(album.out, predictor).search("red")
        assert all(Path(hit.file).is_file() for hit in hits)
        for hit in hits[1:]:
            Path(hit.file).unlink()
        assert album.counts(folder) == (1, 0, 0, 5)

    def test_a_table(self, album):
        cells = (
            ("00.png", "1"),
            ("sub/../00.png", " 2 "),
            ("sub/04.png", ""),
            ("no.png", "3"),
            ("0\0.png", "4"),
        )
        lines = [json.dumps({"image": image, "caption": caption}) for image, caption in cells]
        (album.folder / "list.jsonl").write_text("\n".join(lines))
        bad = album.build(album.folder / "list.jsonl", max_errors=9).bad
        assert album.captions() == {"00.png": ["1", "2"], "sub/04.png": []}
        messages = (
            "no file 'no.png' (No such file or directory)",
            r"'0\x00.png' has a zero character, which no",
        )
        assert all(any(message in problem for problem in bad) for message in messages)

    @pytest.mark.parametrize(("second", "year"), [(2**40, 9999), (-(2**40), 1)])
    def test_times_outside_of_the_calendar(self, second, year, album):
        with TemporaryDirectory(dir="/dev/shm") as folder:  # a tmpfs: ext4 has no such times
            Image.new("RGB", (4, 4), "red").save(Path(folder) / "00.png")
            os.utime(Path(folder) / "00.png", (second, second))
            album.build(Path(folder))
            assert album.build(Path(folder)).changed == 0
        table = lancedb.connect(album.out.parent).open_table("photos").to_arrow()
        (time,) = table["mtime"].cast("int64").to_pylist()
        assert abs(time / 31_556_952_000_000 + 1970 - year) < 2

    def test_broken_ones_come_back_with_the_reason(self, album, predictor):
        photos = album.folder
        whole = (photos / "00.png").read_bytes()
        (photos / "00.png").write_bytes(whole[: len(whole) // 2])
        (photos / "01.png").write_bytes(b"")
        (photos / "02.png").write_text("not an image")
        Image.new("1", (20_000, 20_000)).save(photos / "03.png")  # 50 kB that would be 1.2 GB
        gone = Example(
            id="gone", images=(SourceImage(name="gone.png", location=str(photos / "gone.png")),)
        )
        decoded, pixels = decode_examples(
            predictor.processor, "images", False, [*read(photos), gone]
        )
        reasons = ("cut off", "empty", "cannot be read as an image", "limit")
        for example, reason in zip(decoded, reasons, strict=False):
            assert example.problem.startswith("it ")
            assert reason in example.problem
            assert str(photos) not in example.problem
        assert [example.example.id for example in decoded if example.width] == [
            "sub/04.png",
            "sub/05.png",
        ]
        assert (len(pixels), decoded[-1].may_pass) == (2, False)
        assert "no image file at " in decoded[-1].problem

    def test_are_named_and_left_out_as_far_as_allowed(self, album):
        album.build()
        (album.folder / "00.png").write_text("not an image")
        (album.folder / "01.png").unlink()
        (album.folder / "01.png").symlink_to("nowhere")
        with (album.folder / "02.png").open("r+b") as file:
            file.truncate(2**36)
        report = album.build(max_errors=3)
        assert (report.images, report.removed) == (3, 3)
        assert report.bad[0] == "'01.png': No such file or directory"
        assert report.bad[1].startswith("'00.png': it cannot be read as an image")
        assert report.bad[2].startswith("'02.png': it has 68719476736 bytes; expected at most")
        assert album.build(max_errors=3).bad == report.bad

    def test_more_than_allowed_are_an_error_once_the_others_are_in(self, album):
        for number in range(12):
            (album.folder / f"bad{number}.jpg").write_text("not an image")
        message = r"12 bad items, allowed are 11 \(max_errors=N .*the other 6 are in .*'bad0\.jpg': it.* and 2 more$"
        with pytest.raises(ValueError, match=message):
            album.build(max_errors=11)
        assert sorted(album.rows()) == NAMES


def test_what_a_full_disk_cut_off_before_a_kill_is_embedded_again(album, monkeypatch):
    monkeypatch.setattr(Index, "optimize", lambda *_: None)
    album.build()
    written = {*(album.out / "data").iterdir()}
    shutil.copy(album.folder / "00.png", album.folder / "copy.png")
    album.build()
    (file,) = {*(album.out / "data").iterdir()} - written
    os.truncate(file, file.stat().st_size - 8)
    assert album.counts() == (7, 1, 0, 0)
    album.check_vectors({"copy.png": album.folder / "copy.png"})


@pytest.mark.parametrize("column", ["image_vector", "width"])
def test_damage_is_noticed_by_a_run_that_writes(album, column):
    album.build()
    changed = (
        {"values": {column: [0.5] * 8}} if column == "image_vector" else {"values": {column: 7}}
    )
    lancedb.connect(album.out.parent).open_table(album.out.stem).update(
        where="path = '02.png'", **changed
    )
    assert album.build().changed == 0
    (album.folder / "03.png").unlink()
    with pytest.raises(
        OSError, match=r"photos\.lance has a damaged row, that of '02\.png'; make the index again"
    ):
        album.build()


@pytest.mark.parametrize("column", ["path", "image_vector", "captions"])
def test_vectors_of_a_damaged_row_are_not_reused(album, column):
    album.build()
    values = {"path": "'0.png'", "image_vector": f"{[0.5] * 8}", "captions": "['a bar']"}
    lancedb.connect(album.out.parent).open_table(album.out.stem).update(
        where="path = '00.png'", values_sql={column: values[column]}
    )
    (album.folder / "00.png").rename(album.folder / "new.png")
    report = album.build()
    assert (report.added, report.removed, report.reused) == (1, 1, 0)
    assert album.captions() == {name: [] for name in ["new.png", *NAMES[1:]]}
    album.check_vectors({"new.png": album.folder / "new.png"})


def test_refusals(album, tiny_checkpoint, tmp_path):
    write_checkpoint(read_checkpoint(tiny_checkpoint).without_itc(), tmp_path / "model")
    with pytest.raises(ValueError, match="no contrastive"):
        build_index(album.folder, album.out, tmp_path / "model")
    assert not album.out.exists()
    album.build()
    other = load(tiny_checkpoint, image_size=40, device="cpu")
    before = album.rows()
    fingerprint = Index(album.out).info.fingerprint
    with pytest.raises(
        ValueError, match=rf"made with model {fingerprint}.*is {other.fingerprint}; use that model"
    ):
        build_index(album.folder, album.out, other)
    with pytest.raises(
        ValueError, match=r"is of the images in .*photos, not of .*sub; name all its sources"
    ):
        album.build(album.folder / "sub")
    with write_lock(album.out), pytest.raises(FileExistsError, match="another process works in"):
        album.build()
    assert album.rows() == before
