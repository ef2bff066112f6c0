"""Search over HTTP finds what the searcher finds, and reads nothing but what the index has."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import lancedb
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bridgetower.checkpoints import Reranking, read_checkpoint, write_checkpoint
from bridgetower.inference.predictor import Predictor, load
from bridgetower.search import index as index_module
from bridgetower.search.build import build_index
from bridgetower.search.conditions import condition_sql
from bridgetower.search.index import Index, IndexInfo
from bridgetower.search.indexed import Hit
from bridgetower.search.searcher import Searcher
from bridgetower.serve.inputs import Decoders
from helpers.servers import PNGS, URIS, changed_server, error_of
from helpers.shapes import write_shape_pictures

PATH = "/v1/search"
NO_MATCHES = {"rerank": 0}


def check_search_hits(answer: dict[str, Any], hits: list[Hit]) -> None:
    data = answer["data"]
    assert [row["rank"] for row in data] == list(range(1, len(hits) + 1))
    assert [row["path"] for row in data] == [hit.path for hit in hits]
    for row, hit in zip(data, hits, strict=True):
        assert row["cosine"] == pytest.approx(hit.cosine, abs=1e-5)
        assert row["rank_score"] == pytest.approx(hit.rank_score, abs=1e-4)
        assert row["against"] == hit.against
        assert row.get("weak") == hit.weak
        assert row.get("score") == (hit.score and pytest.approx(hit.score, abs=1e-5))
        assert (row["width"], row["height"], tuple(row["captions"])) == (
            hit.width,
            hit.height,
            hit.captions,
        )


@pytest.mark.parametrize(
    ("query", "image", "settings"),
    [
        *(
            ("red circle", None, settings)
            for settings in (
                {},
                NO_MATCHES,
                {"rerank": 5},
                {"top": 20, "rerank": 12, "where": {"path": {"gt": "20.png"}}},
                {"against": "captions", "rerank": 3},
                {"where": {"captions": {"contains": "red bar on black"}}},
                {"where": {"width": {"gt": 1000}}},
                {"where": {"width": {"gte": 24}, "path": {"in": ["01.png", "02.png", "it's.png"]}}},
                {"against": "pairs"},
                {"against": "words", "top": 12},
                {"against": "hybrid", "where": {"path": {"lt": "40.png"}}},
            )
        ),
        (None, 0, {}),
        ("red bar", 0, {}),
        ("red bar", 0, {"against": "pairs", "rerank": 4}),
    ],
)
def test_what_the_searcher_finds(post, searcher, predictor, query, image, settings):
    query_fields = {"query": query, "image": None if image is None else URIS[image]}
    answer = post(
        PATH,
        **{name: value for name, value in query_fields.items() if value is not None},
        **settings,
    )
    sql = {"where": condition_sql(settings["where"])} if "where" in settings else {}
    hits = searcher.search(query, None if image is None else PNGS[image], **(settings | sql))
    check_search_hits(answer, hits)
    texts = len(predictor.processor.token_ids([query])[0]) if query else 0
    matched = sum(hit.score is not None for hit in hits)
    if settings.get("rerank", 0) <= len(hits) and "rerank" in settings:
        assert answer["usage"]["total_tokens"] == texts + 5 * (matched + (image is not None))


def test_both_scores_by_the_weight_of_the_model(server, searcher, tiny_checkpoint, tmp_path):
    write_checkpoint(
        replace(read_checkpoint(tiny_checkpoint), reranking=Reranking(itc_weight=64.0)),
        tmp_path / "model",
    )
    weighted = load(tmp_path / "model", device="cpu")
    expected = Searcher(searcher.index, weighted).search("red circle")
    assert [hit.path for hit in expected] != [hit.path for hit in searcher.search("red circle")]
    with changed_server(server, Searcher(searcher.index, weighted)) as client:
        check_search_hits(client.post(PATH, json={"query": "red circle"}).json(), expected)


def test_exact_compares_what_an_approximate_search_leaves_out(server, predictor, tmp_path):
    searcher = Searcher(grouped_index(predictor, tmp_path), predictor)
    texts = ["red circle", "a bar", "blue", "a square on grey"]

    def expected(exact):
        return [searcher.search(text, top=50, rerank=0, exact=exact) for text in texts]

    assert expected(exact=True) != expected(exact=False)
    with changed_server(server, searcher) as client:
        for exact in (True, False):
            for text, hits in zip(texts, expected(exact), strict=True):
                body = {"query": text, "top": 50, "rerank": 0, "exact": exact}
                check_search_hits(client.post(PATH, json=body).json(), hits)


def grouped_index(predictor: Predictor, folder: Path) -> Index:
    """An index of generated vectors in groups, of which a search leaves most out."""
    vectors = F.normalize(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    fields = {"fingerprint": predictor.fingerprint, "model": predictor.source, "root": str(folder)}
    index = Index.create(
        folder / "generated.lance", IndexInfo(**fields, image_width=8, pair_width=16)
    )
    none = {"captions": [], "text_vectors": np.empty((0, 8)), "pair_vectors": np.empty((0, 16))}
    index.upsert(
        [
            {
                "path": f"{number:03}.png",
                "digest": f"{number}",
                "width": 1,
                "height": 1,
                "image_vector": vector,
                **none,
            }
            for number, vector in enumerate(vectors.numpy())
        ]
    )
    index.create_ann_index()
    return index


def test_no_more_is_matched_than_a_request_may_have(server, searcher):
    with changed_server(server, max_items=9) as client:
        answer = client.post(PATH, json={"query": "red bar"}).json()
        check_search_hits(answer, searcher.search("red bar", rerank=8))
        together = client.post(PATH, json={"query": "red bar", "image": URIS[0]}).json()
        check_search_hits(together, searcher.search("red bar", PNGS[0], rerank=7))
        error = error_of(client.post(PATH, json={"query": "red bar", "rerank": 9}), 413)
        assert error["message"] == "rerank: 10 items, the limit is 9; send several requests"
    with changed_server(server, max_items=1) as client:
        check_search_hits(
            client.post(PATH, json={"query": "red bar"}).json(),
            searcher.search("red bar", rerank=0),
        )
    with changed_server(server, max_items=46) as client:  # 45 images: no more room is taken for 256
        answer = client.post(PATH, json={"query": "red bar", "rerank": 256, "top": 50})
        assert [row["rank"] for row in answer.json()["data"]] == list(range(1, 46))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "nothing to search for"),
        ({"query": "a", "top": 0}, "top"),
        ({"query": "a", "rerank": 257}, "rerank"),
        ({"image": URIS[0], "rerank": 3}, "matched with a text"),
        ({"query": "a", "where": {"nothing": {"gt": 3}}}, "'nothing' is no column"),
        ({"query": "a", "where": {"width": {"gt": "a"}}}, "expected a whole number"),
        ({"query": "a", "where": "width > 0"}, "where"),
        ({"query": "red circle " * 30}, "the limit is 24"),
    ],
)
def test_refusals(post_refused, body, words):
    message = post_refused(PATH, **body)["message"]
    assert words in message
    assert ".rs" not in message


def test_no_index(two_models):
    error = error_of(two_models.client.post(PATH, json={"query": "a"}), 404)
    assert error["code"] == "no_index"
    assert PATH not in two_models.client.get("/openapi.json").json()["paths"]


def test_what_is_matched_is_what_was_indexed(server, predictor, tmp_path):
    """Another file in its place, a link to one, a pipe, or too large a file is left out. A link to a copy is not."""
    photos = tmp_path / "photos"
    elsewhere = tmp_path / "elsewhere"
    photos.mkdir()
    elsewhere.mkdir()
    write_shape_pictures(photos)
    Image.new("RGB", (1200, 1000)).save(photos / "large.png")
    build_index(photos, tmp_path / "photos.lance", predictor)
    Image.new("RGB", (30, 30), "red").save(elsewhere / "secret.png")
    names = sorted(path.name for path in photos.glob("*.png"))
    shutil.move(photos / names[3], elsewhere / "copy.png")
    for name in names[:3]:
        (photos / name).unlink()
    (photos / names[0]).write_bytes((elsewhere / "secret.png").read_bytes())
    (photos / names[1]).symlink_to(elsewhere / "secret.png")
    os.mkfifo(photos / names[2])
    (photos / names[3]).symlink_to(elsewhere / "copy.png")
    decoders = Decoders(max_pixels=10**6, memory=2**28)
    with changed_server(
        server, Searcher(tmp_path / "photos.lance", predictor), decoders=decoders
    ) as client:
        rows = client.post(PATH, json={"query": "red", "top": 60, "rerank": 60}).json()["data"]
        assert {row["path"] for row in rows} == {*names} - {*names[:3], "large.png"}
        assert all("score" in row for row in rows)
        for image in photos.glob("*.png"):
            image.unlink()
        error = error_of(client.post(PATH, json={"query": "a"}), 404)
        assert error["code"] == "no_images"
        assert str(tmp_path) not in error["message"]
        assert len(client.post(PATH, json={"query": "a"} | NO_MATCHES).json()["data"]) == 10
    decoders.close()


def check_unavailable(client: httpx.Client, ask: dict[str, Any]) -> None:
    """Checks that every route that reads the index says that it cannot."""
    answers = [
        client.get(f"/v1/{path}") for path in ("index", f"images/{'0' * 64}", f"videos/{'0' * 64}")
    ]
    for answer in (client.post(PATH, json=ask), *answers):
        error = error_of(answer, 503)
        assert (error["code"], error["message"][:27]) == (
            "index_unavailable",
            "the index cannot be read; t",
        )


def test_an_index_that_changes_while_it_is_served(
    server, predictor, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(index_module, "_REFRESH_SECONDS", -1.0)
    pictures = write_shape_pictures(tmp_path)
    uri = tmp_path / "photos.lance"
    build_index(pictures, uri, predictor)
    checkpoint = read_checkpoint(tiny_checkpoint)
    weights = {name: 1.1 * value for name, value in checkpoint.tensors.items()}
    write_checkpoint(replace(checkpoint, tensors=weights), tmp_path / "other")
    ask = {"query": "a", "top": 50} | NO_MATCHES
    with changed_server(server, Searcher(uri, predictor)) as client:
        count = len(client.post(PATH, json=ask).json()["data"])
        Image.new("RGB", (30, 30), "red").save(tmp_path / "one-more.png")
        pictures.write_text(f"{pictures.read_text().rstrip()}\none-more.png,all red\n")
        build_index(pictures, uri, predictor)
        assert len(client.post(PATH, json=ask).json()["data"]) == count + 1
        for file in (uri / "data").iterdir():  # damaged
            file.write_bytes(file.read_bytes()[:50])
        check_unavailable(client, ask | {"where": {"width": {"gt": 0}}})
        shutil.rmtree(uri)
        check_unavailable(client, ask)
        lancedb.connect(tmp_path).create_table(uri.stem, pa.table({"a": [1]}))  # something else
        check_unavailable(client, ask)
        shutil.rmtree(uri)
        build_index(pictures, uri, load(tmp_path / "other", device="cpu"))
        error = error_of(client.post(PATH, json=ask), 503)
        assert error["code"] == "index_unavailable"
        assert str(tmp_path) not in error["message"]
        assert client.get("/health").status_code == 200
