"""Tar shards: what belongs to one key is one sample, and damage is named."""

import io
import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from bridgetower.data.own import PairsConfig, prepare_own
from bridgetower.data.tars import tar_samples
from miniature import jpeg, links, write_shards


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_as_img2dataset_writes_them(tmp_path: Path) -> None:
    rows = links(8)
    write_shards(tmp_path, rows, per_shard=8)
    samples = list(tar_samples(tmp_path / "00000.tar"))
    assert [sample.key for sample in samples] == [f"00000000{n}" for n in (0, 1, 2, 4, 5, 6)]
    assert [sample.details["url"] for sample in samples] == [rows[n][0] for n in (0, 1, 2, 4, 5, 6)]
    assert samples[3].caption == samples[3].text == "shade 4 , of many"
    picture = samples[3].image
    assert picture is not None
    assert picture.read() == jpeg(4)
    assert (picture.name, picture.file_name) == ("00000.tar/000000004.jpg", "000000004.jpg")


def test_parts_of_a_sample(tmp_path: Path) -> None:
    members = {
        "a/0.json": b'{"caption": "of the details"}',
        "a/0.JPG": b"first",
        "a/0.png": b"second",
        "a/1.seg.png": b"not a picture of its own",
        "a/1.txt": "ünder \n".encode(),
        "b/1.webp": b"another key",
    }
    samples = list(tar_samples(write_tar(tmp_path / "x.tar", members)))
    assert [(sample.key, sample.caption) for sample in samples] == [
        ("a/0", "of the details"),
        ("a/1", "ünder"),
        ("b/1", ""),
    ]
    assert [sample.image and sample.image.read() for sample in samples] == [b"first", None, b"another key"]


def test_a_name_that_is_not_utf8_is_bad(tmp_path: Path) -> None:
    members = {
        name: content for key in ("a", "caf\udce9") for name, content in ((f"{key}.jpg", jpeg(1)), (f"{key}.txt", b"x"))
    }
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(
        ValueError, match=r"has 1 bad .*: the name 'x\.tar/caf\\udce9\.jpg' is not UTF-8; rename the file"
    ):
        prepare_own("pairs", tmp_path / "x.tar", tmp_path / "out")
    assert (
        prepare_own("pairs", tmp_path / "x.tar", tmp_path / "out", PairsConfig(max_errors=1)).splits["train"].images
        == 1
    )


def test_a_key_that_comes_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number, key in enumerate("xyx"):
            for name, content in ((f"{key}.jpg", jpeg(number)), (f"{key}.txt", b"of %d" % number)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"has 1 bad .*: x in x\.tar: the shard has its key twice"):
        prepare_own("pairs", tmp_path / "x.tar", tmp_path / "out")
    config = PairsConfig(max_errors=1, test_fraction=0, validation_fraction=0)
    split = prepare_own("pairs", tmp_path / "x.tar", tmp_path / "out", config).splits["train"]
    assert (split.images, split.texts) == (2, 2)


def test_many_members_are_not_kept(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {f"{n}.{ending}": b"1" for n in range(500) for ending in ("jpg", "txt")})
    assert len(list(tar_samples(tmp_path / "x.tar"))) == 500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt in .*x\.tar is not UTF-8"),
        ("a.txt", bytes(2**20 + 1), r"a\.txt in .*x\.tar has more than 1048576 bytes"),
        ("a.json", b"{", r"a\.json in .*x\.tar is not valid JSON"),
        ("a.json", b"[]", r"a\.json in .*x\.tar holds a list; expected a JSON object"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(tar_samples(write_tar(tmp_path / "x.tar", {name: content})))


def test_a_sparse_file_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    hole = tmp_path / "0.jpg"
    with hole.open("wb") as file:
        file.truncate(2**30)
    shard = tmp_path / "0.tar"
    subprocess.run(["tar", "--sparse", "-cf", shard, "-C", tmp_path, hole.name], check=True)
    assert shard.stat().st_size < 2**20
    with pytest.raises(ValueError, match=r"^0\.jpg in .*0\.tar is a sparse file"):
        list(tar_samples(shard))


def header(kind: bytes = tarfile.REGTYPE, size: int = 0, content: bytes = b"") -> bytes:
    member = tarfile.TarInfo("0.jpg")
    member.type, member.size = kind, len(content) or max(size, 0)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:  # as GNU's tar writes it
        block[124:136] = (2**96 + size).to_bytes(12)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (header(tarfile.GNUTYPE_LONGNAME, 2**32), r"a header of 4294967296 bytes"),
        (header(tarfile.XHDTYPE, 2**31), r"a header of 2147483648 bytes"),
        (header(tarfile.XGLTYPE, -1), r"a header of -1 bytes"),
        (header(tarfile.GNUTYPE_LONGNAME, content=b"name\0") * 20_000, r"recursion"),
        (header(tarfile.XHDTYPE, content=b"12 path=abc\n") * 20_000, r"recursion"),
        (header(size=-512), r"0\.jpg has -512 bytes"),  # the header of the next member is this one again
        (header(size=2**62), r"0\.jpg has 4611686018427387904 bytes"),
        (header(tarfile.XHDTYPE, content=b"23 size=%s\n" % (b"9" * 14)) + header(), r"0\.jpg has 9{14} bytes"),
        (header(tarfile.XHDTYPE, content=b"13 size=-512\n") + header(), r"0\.jpg has -512 bytes"),
    ],
)
def test_headers_that_take_memory_or_have_no_end(tmp_path: Path, start: bytes, message: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(start + bytes(1024))
    os.truncate(path, 2**33)  # of which no block is stored
    with pytest.raises(ValueError, match=rf"x\.tar is no tar archive, or cut off \(.*{message}"):
        list(tar_samples(path))


def test_a_shard_that_is_cut_off(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"1" * 2000, "b.jpg": b"2" * 2000})
    *_, last = tar_samples(path)
    os.truncate(path, 4000)
    assert last.image is not None
    with pytest.raises(ValueError, match=r"x\.tar ends in the middle of b\.jpg; copy it again"):
        last.image.read()
    for size in (4000, 2700):
        os.truncate(path, size)
        with pytest.raises(ValueError, match=r"x\.tar is no tar archive, or cut off"):
            list(tar_samples(path))
    path.write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"x\.tar is no tar archive, or cut off"):
        list(tar_samples(path))
