"""LanceDB's registry has the models of this package: tables embed what is added, and are searched by text and image."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from bridgetower.inference.predictor import load

lancedb = pytest.importorskip("lancedb")
from lancedb.embeddings import get_registry  # noqa: E402
from lancedb.pydantic import LanceModel, Vector  # noqa: E402

import bridgetower.integrations.lancedb  # noqa: E402

TEXTS = ["red circle on black", "a bar", "a square"]


def nearest(table, query):
    """The cosine of the query with every row."""
    rows = table.search(query).distance_type("cosine").limit(10).to_list()
    return {row["content"]: pytest.approx(1 - row["_distance"], abs=1e-5) for row in rows}


def table_of(folder, name, **options):
    """A table whose contents are embedded."""
    function = get_registry().get("bridgetower").create(name=name, device="cpu", **options)

    class Content(LanceModel):
        content: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    return lancedb.connect(folder).create_table("contents", schema=Content)


def test_images(predictor, image_files, tmp_path):
    table_of(tmp_path, predictor.source).add([{"content": image} for image in image_files])
    again = lancedb.connect(tmp_path).open_table("contents")  # the function is read from the table
    vectors = predictor.embed_images(image_files)
    by_text = vectors @ predictor.embed_texts(TEXTS[0])[0]
    assert nearest(again, TEXTS[0]) == dict(zip(image_files, by_text.tolist(), strict=True))
    by_image = vectors @ vectors[1]
    assert nearest(again, Image.open(image_files[1])) == dict(
        zip(image_files, by_image.tolist(), strict=True)
    )


def test_tables_of_two_models_load_each_once(predictor, tiny_checkpoint, monkeypatch, tmp_path):
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    loads = []

    def counting(name, **options):
        loads.append(name)
        return load(name, **options)

    monkeypatch.setattr(bridgetower.integrations.lancedb, "load", counting)
    functions = [
        get_registry().get("bridgetower").create(name=str(name))
        for name in (other, tiny_checkpoint)
    ]
    for _ in range(3):
        for function in functions:
            function.compute_query_embeddings("a bar")
    assert sorted(loads) == sorted([str(other), str(tiny_checkpoint)])


def test_texts(predictor, image_files, tmp_path):
    table = table_of(tmp_path, predictor.source, source="text")
    table.add([{"content": text} for text in TEXTS])
    cosines = predictor.embed_texts(TEXTS) @ predictor.embed_images(image_files[2])[0]
    assert nearest(table, Path(image_files[2]).read_bytes()) == dict(
        zip(TEXTS, cosines.tolist(), strict=True)
    )
    with pytest.raises(RuntimeError, match="tokens, the limit is 24"):  # LanceDB's, around ours
        table.add([{"content": "red circle on black " * 30}])
    assert table.count_rows() == 3
