"""Near-duplicates are grouped as by comparing all pairs. The command prints them and draws a sheet."""

import shutil

import numpy as np
import pytest
from PIL import Image

from bridgetower import cli
from bridgetower.search import duplicates
from bridgetower.search.duplicates import near_duplicates
from bridgetower.search.index import Index, IndexInfo


@pytest.fixture
def chained_index(tmp_path):
    """150 vectors near 40 directions, which chains connect in part. Every image has its own number of pixels."""
    random = np.random.default_rng(0)
    directions = random.normal(size=(40, 6))
    vectors = (
        directions[random.integers(40, size=150)] + 0.12 * random.normal(size=(150, 6))
    ).astype(np.float32)
    info = IndexInfo(fingerprint="f", model="none", root=str(tmp_path), image_width=6, pair_width=6)
    index = Index.create(tmp_path / "a.lance", info)
    fields = {"digest": "d", "height": 1, "captions": [], "text_vectors": [], "pair_vectors": []}
    rows = [
        {**fields, "path": f"{n:03}", "width": 1 + n, "image_vector": vector}
        for n, vector in enumerate(vectors)
    ]
    for start in range(0, 150, 40):
        index.upsert(rows[start : start + 40])
    return index


def groups_by_hand(index, threshold):
    """Groups as connected parts of all pairs, by repeated products."""
    rows = {
        row["path"]: np.array(row["image_vector"])
        for row in index.rows(index.paths(), ["path", "image_vector"])
    }
    unit = np.stack([vector / np.linalg.norm(vector) for vector in rows.values()])
    near = reached = unit @ unit.T >= threshold
    for _ in range(len(unit)):
        reached = reached @ near
    paths = np.array(list(rows))
    return {frozenset(paths[row].tolist()) for row in reached if row.sum() > 1}, dict(
        zip(rows, unit, strict=True)
    )


@pytest.mark.parametrize(("tile", "block"), [(2048, 2**28), (7, 2**28), (16, 900)])
def test_groups_are_those_of_all_pairs(chained_index, monkeypatch, tile, block):
    monkeypatch.setattr(duplicates, "_TILE", tile)
    monkeypatch.setattr(duplicates, "BLOCK", block)
    groups_by_threshold = {
        threshold: near_duplicates(chained_index, threshold) for threshold in (0.97, 0.99)
    }
    for threshold, groups in groups_by_threshold.items():
        expected, unit = groups_by_hand(chained_index, threshold)
        assert {frozenset(image.path for image in group) for group in groups} == expected
        assert [len(group) for group in groups] == sorted(map(len, expected), reverse=True)
        for group in groups:
            assert group[0].path == max(image.path for image in group)  # which has the most pixels
            assert max(image.cosine for image in group) <= 1
            assert [image.cosine for image in group] == pytest.approx(
                [unit[image.path] @ unit[group[0].path] for image in group]
            )
    assert groups_by_threshold[0.97] != groups_by_threshold[0.99]
    assert (
        min(image.cosine for group in groups_by_threshold[0.97] for image in group) < 0.97
    )  # of a chain


def test_the_first_has_the_most_pixels_then_bytes_and_ties_are_by_path(tmp_path):
    info = IndexInfo(fingerprint="f", model="none", root=str(tmp_path), image_width=2, pair_width=2)
    index = Index.create(tmp_path / "a.lance", info)
    sizes = {
        **{"g": (2, 6, 8), "f": (4, 4, 1), "e": (5, 3, 9), "d": (2, 6, 7), "c": (2, 6, 7)},
        **{"z": (1, 1, 1), "y": (1, 2, 1), "b": (1, 1, 1), "a": (1, 1, 1)},
    }
    directions = dict.fromkeys("gfedc", (1.0, 0.0)) | dict.fromkeys("ba", (0.0, 1.0))
    rows = []
    for name, (width, height, size) in sizes.items():
        vectors = {
            "image_vector": directions.get(name, (-1.0, 0.0)),
            "text_vectors": [],
            "pair_vectors": [],
        }
        fields = {
            "path": name,
            "digest": name,
            "width": width,
            "height": height,
            "size": size,
            "captions": [],
        }
        rows.append(fields | vectors)
    index.upsert(rows)
    groups = near_duplicates(index, 1.0)
    assert [[image.path for image in group] for group in groups] == [
        ["f", "e", "g", "c", "d"],
        ["a", "b"],
        ["y", "z"],
    ]


def test_copies_are_found_whatever_rounding_makes_of_their_cosine(tmp_path):
    info = IndexInfo(
        fingerprint="f", model="none", root=str(tmp_path), image_width=64, pair_width=2
    )
    index = Index.create(tmp_path / "a.lance", info)
    vectors = np.random.default_rng(0).standard_normal((300, 64))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    assert ((unit @ unit.T).diagonal() < 1).any()
    fields = {
        "digest": "d",
        "width": 1,
        "height": 1,
        "captions": [],
        "text_vectors": [],
        "pair_vectors": [],
    }
    index.upsert(
        [fields | {"path": f"{n % 300} {n}", "image_vector": vectors[n % 300]} for n in range(600)]
    )
    assert [len(group) for group in near_duplicates(index, 1.0)] == [2] * 300


def test_command(album, run, refused, tmp_path, capsys):
    album.build()
    cli.main(["duplicates", str(album.out), "--threshold", "0.9999999"])
    assert capsys.readouterr() == ("", "No images are that similar; see a lower --threshold.\n")
    shutil.copy(album.folder / "00.png", album.folder / "sub" / "copy.png")
    album.build()
    (row,) = run(
        "duplicates", album.out, "--threshold", "0.9999999", "--sheet", tmp_path / "sheet.png"
    )
    assert [image["path"] for image in row["images"]] == ["00.png", "sub/copy.png"]
    assert row["images"][1]["file"] == str(album.folder / "sub" / "copy.png")
    assert Image.open(tmp_path / "sheet.png").height > 400
    assert refused("duplicates", album.folder).endswith(
        "and the ending .lance, such as photos.lance"
    )
    assert "threshold is 1.5; expected a cosine above 0 and at most 1" in refused(
        "duplicates", album.out, "--threshold", "1.5"
    )
