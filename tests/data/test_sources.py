"""A user's tables and folders: every form gives the same rows, and what cannot be read is named."""

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from bridgetower.data.images import ImageRef
from bridgetower.data.sources import Row, read_rows
from miniature import links, write_shards


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(stream, "PNG")
    return stream.getvalue()


def rows(source: Path, **options: str) -> list[tuple[str, tuple[str, ...], str | None]]:
    return [(row.image.name, row.captions, row.split) for row in read_rows(source, **options)]  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "red.png").write_bytes(png("red"))
    (tmp_path / "sub" / "blue.png").write_bytes(png("blue"))
    return tmp_path


EXPECTED = [("red.png", ("a red, plain picture",), "train"), ("sub/blue.png", ("blue",), "validation")]


class TestTables:
    def test_csv(self, folder: Path) -> None:
        table = folder / "data.csv"
        table.write_text('image,caption,split\nred.png,"a red, plain picture",train\n./sub/blue.png,blue,VAL\n')
        assert rows(table) == EXPECTED
        assert next(read_rows(table)).image == ImageRef.of_file(folder, "red.png")

    def test_tsv_with_byte_order_mark_and_other_names(self, folder: Path) -> None:
        table = folder / "data.tsv"
        table.write_text("\ufeffFilePath\tText\tsplit\nred.png\ta red, plain picture\ttrain\nsub/blue.png\tblue\tdev\n")
        assert rows(table) == EXPECTED

    def test_json_lines(self, folder: Path) -> None:
        table = folder / "data.jsonl"
        lines = [
            {"path": "red.png", "captions": ["a red, plain picture"], "split": "train"},
            {"path": "sub/blue.png", "captions": "blue", "split": "valid"},
        ]
        table.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
        assert rows(table) == EXPECTED

    def test_parquet_with_paths(self, folder: Path) -> None:
        table = folder / "data.parquet"
        columns = {"file_name": ["red.png", "sub/blue.png"], "text": ["a red, plain picture", "blue"]}
        datasets.Dataset.from_dict({**columns, "split": ["train", "val"]}).to_parquet(str(table))
        assert rows(table) == EXPECTED

    @pytest.mark.parametrize("decoded", [True, False])
    def test_parquet_with_bytes(self, folder: Path, decoded: bool) -> None:
        table = folder / "data.parquet"
        cells = [{"bytes": png(colour), "path": "x.png"} for colour in ("red", "blue", "red")]
        data = datasets.Dataset.from_dict({"image": cells, "caption": ["r", "b", "again r"]})
        (data.cast_column("image", datasets.Image()) if decoded else data).to_parquet(str(table))
        pictures = [row.image for row in read_rows(table)]
        assert [picture.read() for picture in pictures] == [png("red"), png("blue"), png("red")]
        assert pictures[0].name == pictures[2].name != pictures[1].name  # by content, not by the path they share
        assert {picture.file_name for picture in pictures} == {"x.png"}

    def test_parquet_with_plain_binary(self, folder: Path) -> None:
        table = folder / "data.parquet"
        datasets.Dataset.from_dict({"img": [png("red")], "text": ["r"]}).to_parquet(str(table))
        row = next(read_rows(table))
        assert row.image.read() == png("red")
        assert row.image.file_signature == row.image.name == row.image.file_name

    def test_parquet_picture_that_is_only_a_path(self, folder: Path) -> None:
        table = folder / "data.parquet"
        cells = [{"bytes": None, "path": "red.png"}, {"bytes": png("blue"), "path": None}]
        datasets.Dataset.from_dict({"image": cells, "text": ["r", "b"]}).to_parquet(str(table))
        first, second = (row.image for row in read_rows(table))
        assert first == ImageRef.of_file(folder, "red.png")
        assert second.read() == png("blue")

    def test_named_columns(self, folder: Path) -> None:
        table = folder / "data.csv"
        table.write_text("image,path,caption,note\nwrong,red.png,wrong,right\n")
        with pytest.raises(
            ValueError, match=r"several image columns \(image, path\).*give the name of the image column"
        ):
            rows(table)
        assert rows(table, image_column="path", caption_column="note") == [("red.png", ("right",), None)]
        with pytest.raises(ValueError, match="no column picture, it has image, path, caption, note"):
            rows(table, image_column="picture")

    def test_empty_cells_stay_empty(self, folder: Path) -> None:
        table = folder / "data.csv"
        table.write_text("image,caption\n,text\nred.png\n")
        assert rows(table) == [("", ("text",), None), ("red.png", ("",), None)]
        assert next(read_rows(table)).image.file_signature is None

    def test_long_cells(self, folder: Path) -> None:
        name, caption = "a" * 300 + ".png", "b" * 200_000
        (folder / "data.csv").write_text(f"image,caption\n{name},{caption}\n")
        assert rows(folder / "data.csv") == [(name, (caption,), None)]
        assert next(read_rows(folder / "data.csv")).image.file_signature is None  # no file can have that name

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", b"image,caption\na.png,one, two\n", "line 2 has more cells than the header"),
            ("a.csv", b'image,caption\na.png,"one" two\n', "after line 1: .*write it as standard CSV"),
            ("a.csv", b"image,caption\na.png,caf\xe9\n", "is not UTF-8"),
            ("a.csv", b"image,caption,split\na.png,one,holdout\n", "line 2: split is 'holdout'; expected one of train"),
            ("a.csv", b"picture,caption\na.png,one\n", "no column image, image_path"),
            (
                "a.jsonl",
                b'{"image": "a.png", "text": "one"}\n{"image"\n',
                "line 2 is not valid JSON .*one JSON object per line",
            ),
            ("a.jsonl", b'["a.png", "one"]\n', "line 1 holds a list; expected a JSON object"),
            ("a.parquet", b"PAR1", "is no Parquet file"),
            ("a.parquet", b"PAR1" + b"a" * 99 + b"\x5f\0\0\0PAR1", r"is no Parquet file \([^\n]*\); copy it again"),
            ("a.xlsx", b"", r"is none of \.csv, \.tsv"),
        ],
    )
    def test_says_what_cannot_be_read(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            rows(tmp_path / name)


class TestFolders:
    def test_text_file_beside_each_picture(self, folder: Path) -> None:
        (folder / "red.txt").write_text("a red picture\n\nred all over\n")
        (folder / "._red.png").write_bytes(b"not a picture")
        (folder / "notes.md").write_text("not a picture either")
        assert rows(folder) == [("red.png", ("a red picture", "red all over"), None), ("sub/blue.png", (), None)]

    @pytest.mark.parametrize("name", ["red.txt", "captions.txt"])
    def test_captions_are_of_the_folder(self, folder: Path, name: str) -> None:
        inside = folder / "inside"
        inside.write_text("red.png,said inside\n")
        (folder / name).symlink_to(inside)
        assert "said inside" in rows(folder)[0][1][0]
        outside = inside.rename(folder.parent / "outside")
        (folder / name).unlink()
        (folder / name).symlink_to(outside)
        with pytest.raises(ValueError, match=rf"{name} is a link to a file outside of .* into the folder$"):
            rows(folder)

    @pytest.mark.parametrize("name", ["red.txt", "captions.txt", "data.csv", "data.jsonl"])
    def test_endless_lines_are_not_read(self, folder: Path, name: str) -> None:
        source = folder if name.endswith(".txt") else folder / name
        with (folder / name).open("wb") as file:
            file.truncate(2**36)
        with pytest.raises(ValueError, match=rf"{name}.* has more than 1048576 bytes or characters; expected"):
            rows(source)

    def test_folder_names(self, folder: Path) -> None:
        (folder / "sub").rename(folder / "deep_blue-sea")
        assert rows(folder, captions_from="folder") == [
            ("red.png", ("",), None),
            ("deep_blue-sea/blue.png", ("deep blue sea",), None),
        ]

    @pytest.mark.parametrize(
        "content",
        [
            'image,caption\nred.png,"red, they say ""so"""\nsub/blue.png,a blue one\nred.png,again\n',
            'red.png#0\tred, they say "so"\nsub/blue.png#0\ta blue one\nred.png#1\tagain\n',
        ],
    )
    def test_list_of_captions(self, folder: Path, content: str) -> None:
        (folder / "captions.txt").write_text(content)
        assert rows(folder) == [
            ("red.png", ('red, they say "so"',), None),
            ("sub/blue.png", ("a blue one",), None),
            ("red.png", ("again",), None),
        ]

    def test_names_are_kept_exactly(self, folder: Path) -> None:
        names = [" a.png", "a\n.png", "b .png", "dir /x.png", "\tc.png"]
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(png("red"))
        found = {row.image.name: row.image for row in read_rows(folder)}
        assert sorted(found) == sorted([*names, "red.png", "sub/blue.png"])
        assert all(picture.read() for picture in found.values())
        (folder / "data.jsonl").write_text("\n".join(json.dumps({"image": name, "text": "x"}) for name in names))
        assert [name for name, _, _ in rows(folder / "data.jsonl")] == names
        (folder / "data.csv").write_text('image,caption\n" a.png",one\n"a\n.png",two\n')
        assert [name for name, _, _ in rows(folder / "data.csv")] == names[:2]
        (folder / "captions.txt").write_text(" a.png,one\nb .png,two\n")
        assert [name for name, _, _ in rows(folder)] == [" a.png", "b .png"]

    def test_options_that_would_be_ignored(self, folder: Path) -> None:
        (folder / "data.csv").write_text("image,caption\n")
        with pytest.raises(ValueError, match="is a folder or archive, which has no columns"):
            rows(folder, caption_column="text")
        with pytest.raises(ValueError, match="captions from folder names need a folder"):
            rows(folder / "data.csv", captions_from="folder")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            rows(tmp_path / "none.csv")


def test_an_image_that_is_too_long_is_not_read(folder: Path) -> None:
    with (folder / "red.png").open("r+b") as file:
        file.truncate(2**36)
    with pytest.raises(ValueError, match=r"^red\.png has 68719476736 bytes; expected at most 545554432"):
        ImageRef.of_file(folder, "red.png").read()


def test_the_signature_follows_the_file(folder: Path) -> None:
    row = Row(image=ImageRef.of_file(folder, "red.png"), captions=("r",), place="row 1")
    before = row.image.file_signature
    assert row.image.file_signature == before
    (folder / "red.png").write_bytes(png("green") + b" ")
    assert row.image.file_signature != before


class TestShards:
    def test_one_or_a_folder_of_them(self, tmp_path: Path) -> None:
        write_shards(tmp_path / "shards", links(8))
        expected = [
            (f"0000{n // 3}.tar/0000{n // 3}000{n % 3}.jpg", (f"shade {n} , of many" if n != 2 else "",), None)
            for n in (0, 1, 2, 4, 5, 6)
        ]
        assert rows(tmp_path / "shards") == expected
        assert rows(tmp_path / "shards" / "00001.tar") == expected[3:5]
        assert next(read_rows(tmp_path / "shards")).place == "000000000 in 00000.tar"

    def test_beside_pictures_or_a_list_neither_is_ignored(self, folder: Path) -> None:
        write_shards(folder, links(2))
        with pytest.raises(ValueError, match=r"has both tar shards \(00000\.tar\) and red\.png; move the shards, or"):
            rows(folder)
        assert [name for name, _, _ in rows(folder, captions_from="folder")] == ["red.png", "sub/blue.png"]
        (folder / "red.png").unlink()
        with pytest.raises(ValueError, match=r"has both tar shards .* and sub/blue\.png;"):
            rows(folder)
        (folder / "captions.txt").write_text("sub/blue.png,blue\n")
        with pytest.raises(ValueError, match=r"has both tar shards .* and captions\.txt;"):
            rows(folder)

    def test_have_no_columns(self, tmp_path: Path) -> None:
        write_shards(tmp_path, links(2))
        with pytest.raises(ValueError, match="has no columns; leave the column names out"):
            rows(tmp_path / "00000.tar", caption_column="text")
