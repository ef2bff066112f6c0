"""The one reader: every kind of source gives the same examples, and what cannot be used is named and skipped."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

from bridgetower.data.reader import Columns, parts_of, read, read_part

COLOURS = {name: number * 60 for number, name in enumerate("abcd")}
CAPTIONS = {name: (f"the {name}", f"again {name}") for name in COLOURS}


def png(name: str) -> bytes:
    stream = io.BytesIO()
    Picture.new("RGB", (8, 6), (COLOURS[name], 10, 200)).save(stream, "PNG")
    return stream.getvalue()


def images(folder: Path, names: str = "abcd") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(png(name))


def _folder(root: Path) -> Path:
    images(root)
    for name, texts in CAPTIONS.items():
        (root / f"{name}.txt").write_text("\n".join(texts) + "\n\n")
    return root


def _captions_file(root: Path) -> Path:
    images(root)
    lines = [f'{name}.png#{n}\t"{text}"' for name, texts in CAPTIONS.items() for n, text in enumerate(texts)]
    (root / "captions.txt").write_text("image\tcaption\n" + "\n".join(lines))
    return root


def _csv(root: Path, delimiter: str = ",", name: str = "table.csv", open_: Callable[..., io.TextIOBase] = open) -> Path:
    images(root / "img")
    with open_(root / name, "wt", encoding="utf-8") as file:
        file.write(delimiter.join(["image", "caption", "n"]) + "\n")
        for name_, texts in CAPTIONS.items():
            for number, text in enumerate(texts):
                file.write(delimiter.join([f"img/{name_}.png", f'"{text}"', str(number)]) + "\n")
    return root / name


def _json_lines(root: Path) -> Path:
    images(root)
    rows = [json.dumps({"file_name": f"{name}.png", "caption": list(texts)}) for name, texts in CAPTIONS.items()]
    (root / "t.jsonl").write_text("\n".join(rows))
    return root / "t.jsonl"


def _json(root: Path) -> Path:
    images(root)
    rows = [{"file_name": f"{name}.png", "caption": list(texts)} for name, texts in CAPTIONS.items()]
    (root / "t.json").write_text(json.dumps({"info": "x", "rows": rows}))
    return root / "t.json"


def _metadata(root: Path) -> Path:
    images(root / "train")
    rows = [json.dumps({"file_name": f"{name}.png", "text": list(texts)}) for name, texts in CAPTIONS.items()]
    (root / "train" / "metadata.jsonl").write_text("\n".join(rows))
    return root


def _dataset() -> datasets.Dataset:
    columns = {
        "image": [{"bytes": png(name), "path": None} for name in CAPTIONS],
        "text": [list(texts) for texts in CAPTIONS.values()],
        "label": [0, 1, 1, 0],
    }
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return made.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))


def _repository(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    (root / "README.md").write_text("---\n")
    _dataset().to_parquet(str(root / "data" / "train-00000-of-00001.parquet"))
    return root


def _saved(root: Path) -> Path:
    datasets.DatasetDict({"train": _dataset()}).save_to_disk(str(root))
    return root


def _tar(root: Path) -> Path:
    root.mkdir(parents=True)
    with tarfile.open(root / "shard-000.tar", "w") as archive:
        for name, texts in CAPTIONS.items():
            for ending, content in ((".png", png(name)), (".json", json.dumps({"caption": texts[0]}).encode())):
                info = tarfile.TarInfo(f"x/{name}{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return root / "shard-000.tar"


SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": _folder,
    "captions.txt": _captions_file,
    "csv": _csv,
    "semicolons": lambda root: _csv(root, ";"),
    "tsv": lambda root: _csv(root, "\t", "table.tsv"),
    "csv.gz": lambda root: _csv(root, name="table.csv.gz", open_=gzip.open),
    "jsonl": _json_lines,
    "json": _json,
    "metadata": _metadata,
    "repository": _repository,
    "save_to_disk": _saved,
    "tar": _tar,
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    root = tmp_path / "source"
    if request.param not in ("repository", "save_to_disk", "tar"):
        root.mkdir()
    return SOURCES[request.param](root)


def test_every_kind_of_source_has_the_same_images_and_captions(source: Path) -> None:
    found: dict[bytes, list[str]] = {}
    for example in read(source):
        assert not example.problem
        (image,) = example.images
        found.setdefault(image.read(), []).extend(example.texts)
        assert replace(image, content=None).read() == image.read()  # from its place, as an index reads it later
    number = 1 if source.suffix == ".tar" else 2
    assert found == {png(name): list(texts[:number]) for name, texts in CAPTIONS.items()}


def test_parts_are_read_on_their_own(source: Path) -> None:
    parts = [example for part in parts_of(source) for example in read_part(part, Columns())]
    assert parts == list(read(source))


@pytest.mark.parametrize("make", [_metadata, _repository, _saved])
def test_splits_and_classes_are_those_of_the_source(make: Callable[[Path], Path], tmp_path: Path) -> None:
    examples = list(read(make(tmp_path / "s")))
    assert {example.split for example in examples} == {"train"}
    if make is not _metadata:
        assert [example.fields["label"] for example in examples] == ["cat", "dog", "dog", "cat"]


def test_class_folders_with_splits(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("cat", "big_dog"):
            images(tmp_path / split / name, "a")
    found = {(one.split, one.fields["label"]) for one in read(tmp_path)}
    assert found == {(split, name) for split in ("train", "validation", "test") for name in ("cat", "big_dog")}
    by_folder = read(tmp_path, Columns(captions_from="folder"))
    assert {one.texts for one in by_folder} == {("cat",), ("big dog",)}


def test_bad_rows_are_named_by_line_and_the_next_ones_are_read(tmp_path: Path) -> None:
    images(tmp_path)
    (tmp_path / "t.csv").write_text(
        "image,caption,split\na.png,one,train\nb.png,x,nowhere\nc.png,a,b,c\nd.png,two,dev\n"
    )
    examples = list(read(tmp_path / "t.csv"))
    assert [(one.place, bool(one.problem)) for one in examples] == [
        ("t.csv line 2", False),
        ("t.csv line 3", True),
        ("t.csv line 4", True),
        ("t.csv line 5", False),
    ]
    assert [one.split for one in examples if not one.problem] == ["train", "validation"]
    (tmp_path / "t.jsonl").write_text('{"image": "a.png"}\n{broken\n[1]\n\n{"image": "b.png", "caption": NaN}\n')
    lines = list(read(tmp_path / "t.jsonl"))
    assert [(one.place, bool(one.problem), one.texts) for one in lines] == [
        ("t.jsonl line 1", False, ()),
        ("t.jsonl line 2", True, ()),
        ("t.jsonl line 3", True, ()),
        ("t.jsonl line 5", False, ()),
    ]


def test_pairs_of_images(tmp_path: Path) -> None:
    images(tmp_path)
    (tmp_path / "t.csv").write_text("left,right,text\na.png,b.png,both\n")
    (example,) = read(tmp_path / "t.csv")
    assert [image.read() for image in example.images] == [png("a"), png("b")]
    (tmp_path / "u.csv").write_text("first,second,text\na.png,b.png,both\n")
    (named,) = read(tmp_path / "u.csv", Columns(image="first,second"))
    assert named.images == example.images


def test_what_is_skipped_is_counted_and_what_cannot_be_read_has_a_problem(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images(tmp_path, "a")
    for name in ("x.heic", "y.heic", "z.psd"):
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "main.ts").write_text("export const x = 1")
    (tmp_path / ".hidden.png").write_bytes(png("b"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    examples = list(read(tmp_path))
    assert [one.id for one in examples if not one.problem] == ["a.png"]
    assert {one.id for one in examples if one.problem} == {"pipe.png", "gone.png"}
    assert "2 .heic" in caplog.text
    assert "1 .psd" in caplog.text
    assert "1 .ts" in caplog.text


def test_a_folder_that_cannot_be_listed_has_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path / "open", "a")
    images(tmp_path / "shut", "b")
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if str(folder).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    examples = list(read(tmp_path))
    assert [(one.id, one.problem) for one in examples] == [("open/a.png", ""), ("shut", "Permission denied")]


def test_captions_through_a_link_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    images(tmp_path / "photos", "a")
    (tmp_path / "secret.txt").write_text("a secret")
    (tmp_path / "photos" / "a.txt").symlink_to(tmp_path / "secret.txt")
    (example,) = read(tmp_path / "photos")
    assert "link" in example.problem
    assert example.texts == ()


@pytest.mark.parametrize("cut", [100, 600, 1024, 3000])
def test_a_shard_that_is_cut_off_has_a_problem(cut: int, tmp_path: Path) -> None:
    shard = _tar(tmp_path / "s")
    shard.write_bytes(shard.read_bytes()[:cut])
    examples = list(read(shard))
    assert examples[-1].problem


def test_a_key_that_comes_again_has_a_problem(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("a", "b", "a"):
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(png(name))
            archive.addfile(info, io.BytesIO(png(name)))
    assert [bool(one.problem) for one in read(tmp_path / "s.tar")] == [False, False, True]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("x.parquet", b"PAR1 no", "no Parquet or Arrow file"),
        ("x.csv", "image\nä".encode("latin-1"), "after line 1 it is not UTF-8"),
        ("x.json", b"[1,", "not valid JSON"),
        ("x.csv.gz", gzip.compress(b"image\na.png\n" * 9, mtime=0)[:-9], "the rest of it is not read"),
        ("x.csv.bz2", b"BZh91AY&SY" + b"?" * 99, "the rest of it is not read"),
        ("x.csv.zst", b"(\xb5/\xfd" + b"?" * 99, "the rest of it is not read"),
        ("x.csv.xz", b"\xfd7zXZ" + b"?" * 99, "the rest of it is not read"),
        ("x.csv", b"a" * 2**21, "more than 1048576 characters"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_one_bad_row(name: str, content: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    last = list(read(tmp_path / name))[-1]
    assert last.place == name
    assert error in last.problem


def test_a_source_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read(tmp_path / "none")
    (tmp_path / "x.heic").touch()
    with pytest.raises(ValueError, match="nothing that can be read"):
        read(tmp_path / "x.heic")


def test_a_missing_column_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no row of t\.jsonl has a column quote"):
        list(read(_json_lines(tmp_path), Columns(text="quote")))


def test_row_groups_are_read_one_at_a_time(tmp_path: Path) -> None:
    table = pa.table({"image": [png(name) for name in "abcd"], "caption": list("abcd")})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1)
    examples = list(read(tmp_path / "t.parquet"))
    assert [replace(one.images[0], content=None).read() for one in examples] == [png(name) for name in "abcd"]
