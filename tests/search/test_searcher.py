"""Search in two stages, held against the model called by hand on all images."""

import logging
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bridgetower.checkpoints import (
    ITC_ALONE,
    Calibration,
    Gain,
    Reranking,
    read_checkpoint,
    write_checkpoint,
)
from bridgetower.inference.predictor import load
from bridgetower.search.build import build_index, new_index
from bridgetower.search.index import Index, Unrelated
from bridgetower.search.indexed import Hit
from bridgetower.search.searcher import Searcher
from bridgetower.search.unrelated import TEXTS, note_unrelated
from helpers.shapes import SHAPES_MODEL, write_tiny_checkpoint

TEXT = "red circle on black"


@pytest.fixture(scope="module")
def searched_index(shapes_folder, predictor, tmp_path_factory):
    uri = tmp_path_factory.mktemp("index") / "shapes.lance"
    build_index(shapes_folder / "shapes.csv", uri, predictor)
    return Index(uri)


@pytest.fixture(scope="module")
def shape_files(shapes_folder):
    return sorted(shapes_folder.glob("*.png"))


@pytest.fixture
def shapes_searcher(searched_index, predictor):
    return Searcher(searched_index, predictor)


def names_by_score(files: list[Path], scores: torch.Tensor) -> list[str]:
    return [files[number].name for number in scores.argsort(descending=True)]


def paths_of(hits: list[Hit]) -> list[str]:
    return [hit.path for hit in hits]


def captioned(searcher: Searcher, files: list[Path]) -> tuple[list[Path], list[str], list[int]]:
    """Images as often as they have captions, these captions, and how many each image has."""
    by_name = {entry.path: entry.captions for entry in searcher.index.examples(len(files))}
    pairs = [(file, caption) for file in files for caption in by_name[file.name]]
    return (
        [file for file, _ in pairs],
        [caption for _, caption in pairs],
        [len(by_name[file.name]) for file in files],
    )


def best(vectors: torch.Tensor, query: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return torch.stack([similarities.max() for similarities in (vectors @ query).split(counts)])


class TestStages:
    def test_nearest_vectors(self, shapes_searcher, predictor, shape_files):
        cosine = predictor.embed_images(shape_files) @ predictor.embed_texts(TEXT)[0]
        hits = shapes_searcher.search(TEXT, rerank=0, top=45)
        assert paths_of(hits) == names_by_score(shape_files, cosine)
        expected = cosine.sort(descending=True).values
        torch.testing.assert_close(
            torch.tensor([hit.cosine for hit in hits]), expected, atol=1e-5, rtol=0
        )
        assert {hit.score for hit in hits} == {None}
        assert hits[0].file in shape_files
        assert (hits[0].width, hits[0].height) == (24, 24)

    def test_matching_of_the_candidates(self, shapes_searcher, predictor, shape_files):
        cosine = predictor.embed_images(shape_files) @ predictor.embed_texts(TEXT)[0]
        candidates = cosine.argsort(descending=True)[:8]
        match = torch.full((len(shape_files),), -1.0)
        match[candidates] = predictor.match(
            [shape_files[number] for number in candidates], [TEXT] * 8
        )
        hits = shapes_searcher.search(TEXT, rerank=8, top=5, batch_size=3)
        assert paths_of(hits) == names_by_score(shape_files, match)[:5]
        scores = torch.tensor([hit.score for hit in hits])
        torch.testing.assert_close(
            scores, match.sort(descending=True).values[:5], atol=1e-5, rtol=0
        )
        assert (
            paths_of(hits) != names_by_score(shape_files, cosine)[:5]
        )  # the control: matching changes the order
        assert set(paths_of(shapes_searcher.search(TEXT))) == set(
            names_by_score(shape_files, predictor.match(shape_files, [TEXT] * 45))[:10]
        )

    @pytest.mark.parametrize("itc_weight", [4.0, 64.0, ITC_ALONE])
    def test_matching_and_cosine_together(
        self, searched_index, tiny_checkpoint, shape_files, tmp_path, itc_weight
    ):
        write_checkpoint(
            replace(read_checkpoint(tiny_checkpoint), reranking=Reranking(itc_weight=itc_weight)),
            tmp_path / "model",
        )
        weighted = load(tmp_path / "model", device="cpu")  # the index was made without a weight
        cosine = weighted.embed_images(shape_files) @ weighted.embed_texts(TEXT)[0]
        candidates = cosine.argsort(descending=True)[:8]
        match = weighted.match([shape_files[number] for number in candidates], [TEXT] * 8)
        scores = torch.full((len(shape_files),), -torch.inf)
        scores[candidates] = match.logit() + itc_weight * cosine[candidates]
        hits = Searcher(searched_index, weighted).search(TEXT, rerank=8, top=8)
        assert paths_of(hits) == names_by_score(shape_files, scores)[:8]
        by_name = {
            shape_files[number].name: float(chance)
            for number, chance in zip(candidates, match, strict=True)
        }
        assert [hit.score for hit in hits] == pytest.approx(
            [by_name[hit.path] for hit in hits], abs=1e-5
        )
        ranked_by = scores.sort(descending=True).values[:8].tolist()
        assert [hit.rank_score for hit in hits] == pytest.approx(ranked_by, rel=1e-5, abs=1e-4)
        assert (paths_of(hits) == names_by_score(shape_files, cosine)[:8]) == (
            itc_weight == ITC_ALONE
        )

    def test_validation_decides_about_probabilities_and_matching(
        self, shapes_searcher, monkeypatch
    ):
        plain = shapes_searcher.search(TEXT, rerank=9, top=9)
        measured = Calibration(
            slope=0.5, intercept=-2.0, pairs=9, matching=1, ece_before=0.4, ece_after=0.1
        )
        monkeypatch.setattr(shapes_searcher.predictor, "reranking", Reranking(calibration=measured))
        hits = shapes_searcher.search(TEXT, rerank=9, top=9)
        assert paths_of(hits) == paths_of(plain)  # a calibration changes no order
        expected = (0.5 * torch.tensor([hit.score for hit in plain]).logit() - 2).sigmoid()
        torch.testing.assert_close(
            torch.tensor([hit.probability for hit in hits]), expected, atol=1e-5, rtol=0
        )
        assert {hit.score for hit in hits} == {hit.probability for hit in plain} == {None}
        for low, high, matched in ((0.01, 0.05, True), (-0.01, 0.03, False), (-0.05, -0.01, False)):
            gain = Gain(difference=(low + high) / 2, low=low, high=high, texts=9)
            monkeypatch.setattr(shapes_searcher.predictor, "reranking", Reranking(gain=gain))
            for rerank, is_matched in ((None, matched), (4, True), (0, False)):
                assert [
                    hit.score is not None
                    for hit in shapes_searcher.search(TEXT, top=3, rerank=rerank)
                ] == [is_matched] * 3

    def test_the_rest_follows_by_cosine(self, shapes_searcher):
        nearest = shapes_searcher.search(TEXT, rerank=0, top=9)
        hits = shapes_searcher.search(TEXT, rerank=4, top=9)
        assert set(paths_of(hits[:4])) == set(paths_of(nearest[:4]))
        assert paths_of(hits[4:]) == paths_of(nearest[4:])
        assert [hit.rank_score for hit in nearest + hits[4:]] == [
            hit.cosine for hit in nearest + hits[4:]
        ]
        assert [hit.score is None for hit in hits] == [False] * 4 + [True] * 5

    def test_an_image_and_both(self, shapes_searcher, predictor, shape_files):
        vectors = predictor.embed_images(shape_files)
        image = predictor.embed_images(shape_files[7])
        hits = shapes_searcher.search(image=shape_files[7], top=45)
        assert paths_of(hits) == names_by_score(shape_files, vectors @ image[0])
        assert hits[0].path == shape_files[7].name
        assert hits[0].cosine == pytest.approx(1)
        assert {hit.score for hit in hits} == {None}
        both = F.normalize(image[0] + predictor.embed_texts(TEXT)[0], dim=0)
        assert paths_of(
            shapes_searcher.search(TEXT, shape_files[7], rerank=0, top=45)
        ) == names_by_score(shape_files, vectors @ both)
        assert None not in {hit.score for hit in shapes_searcher.search(TEXT, shape_files[7])}

    def test_against_captions_and_pairs(self, shapes_searcher, predictor, shape_files):
        pictures, captions, counts = captioned(shapes_searcher, shape_files)
        hits = shapes_searcher.search(TEXT, against="captions", rerank=0, top=45)
        texts = predictor.embed_texts(captions)
        assert paths_of(hits) == names_by_score(
            shape_files, best(texts, predictor.embed_texts(TEXT)[0], counts)
        )
        assert TEXT in hits[0].captions
        caption_index = sum(counts[:3])
        pair = predictor.embed_pairs(shape_files[3], captions[caption_index])[0]
        hits = shapes_searcher.search(
            captions[caption_index], shape_files[3], against="pairs", rerank=0, top=45
        )
        expected = (
            best(predictor.embed_pairs(pictures, captions), pair, counts)
            .sort(descending=True)
            .values
        )
        torch.testing.assert_close(
            torch.tensor([hit.cosine for hit in hits]), expected, atol=1e-5, rtol=0
        )
        assert hits[0].path == shape_files[3].name

    def test_words_by_bm25(self, shapes_searcher, predictor, shape_files):
        query = "Red CIRCLES on a bar"
        hits = shapes_searcher.search(query, against="words", top=45)
        query_words = {"red", "circl", "bar"}  # stems; `on` and `a` are in too many texts
        stems = {"circle": "circl", "square": "squar", "triangle": "triangl"}
        documents = {
            row["path"]: [
                stems.get(word, word) for text in row["captions"] for word in text.lower().split()
            ]
            for row in shapes_searcher.index.rows(
                [file.name for file in shape_files], ("path", "captions")
            )
        }
        documents = {
            path: [word for word in words if word not in ("a", "on")]
            for path, words in documents.items()
        }
        average = sum(map(len, documents.values())) / len(documents)
        scores = dict.fromkeys(documents, 0.0)
        for word in query_words:
            among = sum(word in words for words in documents.values())
            rarity = math.log(1 + (len(documents) - among + 0.5) / (among + 0.5))
            for path, words in documents.items():
                often = words.count(word)
                scores[path] += (
                    rarity * often * 2.2 / (often + 1.2 * (0.25 + 0.75 * len(words) / average))
                )
        expected = {path: score for path, score in scores.items() if score > 0}
        scores_by_path = {hit.path: hit.rank_score for hit in hits}
        assert scores_by_path == pytest.approx(expected, rel=0.06)  # lengths are rounded
        assert max(expected.values()) > 2 * min(expected.values())
        assert hits == sorted(hits, key=lambda hit: (-hit.rank_score, hit.path))
        cosines = (
            predictor.embed_images([str(hit.file) for hit in hits])
            @ predictor.embed_texts(query)[0]
        )
        assert [hit.cosine for hit in hits] == pytest.approx(cosines.tolist(), abs=1e-5)
        assert shapes_searcher.search("zebra", against="words") == []

    @pytest.mark.parametrize(
        "query",
        [
            '"red circle"',
            'red "circle',
            "red AND NOT circle",
            "+red -circle",
            "red* circle~2 ^3",
            "captions:red (circle OR",
            "red\\ circle\\",
            "red\0circle",
            "{red} [circle] /.*/ !&|",
            "red circle “赤い円” ❤️ красный",
        ],
    )
    def test_words_have_no_syntax(self, shapes_searcher, query):
        expected = shapes_searcher.search("red circle", against="words", top=45)
        assert 0 < len(expected) < 45
        hits = shapes_searcher.search(query, against="words", top=45, truncate=True)
        assert {hit.path: hit.rank_score for hit in hits} == {
            hit.path: hit.rank_score for hit in expected
        }

    @pytest.mark.parametrize("query", ['"', '""', "+-*~^:()", "the", "❤️", '" ' * 2000])
    def test_text_without_words_finds_nothing_by_words(self, shapes_searcher, query):
        assert shapes_searcher.search(query, against="words", truncate=True) == []
        by_vectors = shapes_searcher.search(query, rerank=0, truncate=True)
        assert paths_of(
            shapes_searcher.search(query, against="hybrid", rerank=0, truncate=True)
        ) == paths_of(by_vectors)

    @pytest.mark.parametrize("rerank", [None, 0])
    def test_hybrid_is_reciprocal_rank_fusion(self, shapes_searcher, rerank):
        where = "path < '40'"
        nearest = shapes_searcher.search(TEXT, top=64, where=where, rerank=rerank)
        words = shapes_searcher.search(TEXT, top=64, where=where, against="words")
        scores = Counter()
        for ranking in (nearest, words):
            for rank, hit in enumerate(ranking, start=1):
                scores[hit.path] += 1 / (60 + rank)
        hits = shapes_searcher.search(TEXT, top=5, where=where, against="hybrid", rerank=rerank)
        assert [hit.rank_score for hit in hits] == pytest.approx(
            sorted(scores.values(), reverse=True)[:5]
        )
        assert all(hit.rank_score == pytest.approx(scores[hit.path]) for hit in hits)
        assert [hit.path for hit in hits] != [hit.path for hit in nearest[:5]]
        assert {hit.score is None for hit in hits if hit.against == "images"} == {rerank == 0}

    def test_a_text_alone_against_pairs_of_three_heads(
        self, tiny_dataset, shapes_folder, shape_files, tmp_path
    ):
        write_tiny_checkpoint(
            tiny_dataset, tmp_path / "model", SHAPES_MODEL.override({"heads.itc": "fused"})
        )
        build_index(shapes_folder / "shapes.csv", tmp_path / "shapes.lance", tmp_path / "model")
        searcher = Searcher(tmp_path / "shapes.lance")
        model = searcher.predictor
        (pictures, captions, counts) = captioned(searcher, shape_files)
        pairs = model.embed_pairs(pictures, captions)
        text = model.embed_texts(TEXT)
        image = model.embed_images(shape_files[3])
        for query, vector in (((TEXT, None), text[0]), ((None, shape_files[3]), image[0])):
            hits = searcher.search(*query, against="pairs", rerank=0, top=45)
            expected = best(pairs, vector, counts)
            assert paths_of(hits) == names_by_score(shape_files, expected)
            cosines = torch.tensor([hit.cosine for hit in hits])
            torch.testing.assert_close(
                cosines, expected.sort(descending=True).values, atol=1e-5, rtol=0
            )

    def test_models_of_two_heads_compare_a_text_alone_with_captions(
        self, shapes_searcher, shape_files, caplog
    ):
        assert shapes_searcher.search(TEXT, against="pairs") == shapes_searcher.search(
            TEXT, against="captions"
        )
        assert (
            "with that of a text alone, as its contrastive head has no part for pairs; it is"
            in caplog.text
        )
        assert shapes_searcher.search(
            image=shape_files[3], against="pairs"
        ) == shapes_searcher.search(image=shape_files[3])
        assert "compared with images instead: give both" in caplog.text
        shapes_searcher.search(TEXT, against="pairs")
        shapes_searcher.search(image=shape_files[3], against="pairs")
        assert (
            len([record for record in caplog.records if "vectors of pairs" in record.message]) == 2
        )


class TestConditions:
    def test_where(self, shapes_searcher):
        everything = shapes_searcher.search(TEXT, rerank=0, top=45)
        hits = shapes_searcher.search(
            TEXT, rerank=0, top=45, where="path < '10.png' AND width > 20"
        )
        assert paths_of(hits) == [hit.path for hit in everything if hit.path < "10.png"]
        assert len(shapes_searcher.search(TEXT, top=3, where="path < '10.png'")) == 3
        assert (
            shapes_searcher.search(TEXT, where="width > 800")
            == shapes_searcher.search(TEXT, where="width > 800 -- px")
            == []
        )
        assert len(shapes_searcher.search(TEXT, where="mtime > timestamp '2024-06-01'")) == 10
        captioned = shapes_searcher.search(
            TEXT, rerank=0, where="array_has(captions, 'red circle on black')"
        )
        assert paths_of(captioned) == ["00.png"]

    def test_what_is_no_condition(self, shapes_searcher):
        with pytest.raises(
            ValueError,
            match=r"^where is 'widdth > 800': No field named widdth; columns are [a-z, ]+$",
        ):
            shapes_searcher.search(TEXT, where="widdth > 800")
        for where in (
            "width > > 8",
            "DROP x",
            "",
            "width > 'a'",
            "captions = 'a'",
            "width / 0 > 1",
            "- path > 3",
            "width > 0 path > 'a'",
            "width > 0; DROP",
            "width > 0); DROP",
            "width > 0) path > 'a'",
        ):
            with pytest.raises(
                ValueError, match=r"where is .*; columns are path, size, mtime, width"
            ) as caught:
                shapes_searcher.search(TEXT, where=where)
            with pytest.raises(ValueError, match=r"where is .*; columns are path"):
                shapes_searcher.search(TEXT, where=where, against="words")
            assert not re.search(r"\.rs|[lL]ance|Arrow|Some\(|Utf8|Field \{", str(caught.value))

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ({}, "nothing to search for"),
            ({"text": "a", "top": 0}, "top is 0; expected at least 1$"),
            ({"text": "a", "batch_size": 0}, "batch_size is 0; expected at least 1$"),
            ({"text": "a", "rerank": -1}, "rerank is -1; expected at least 0$"),
            (
                {"text": " ", "image": "00.png"},
                "the text to search for is ' '; give words, or leave it out",
            ),
            (
                {"text": "a", "against": "texts"},
                "expected one of images, captions, pairs, words, hybrid",
            ),
            ({"image": "00.png", "against": "hybrid"}, "against is hybrid, but there are no words"),
            ({"text": "a", "against": "words", "rerank": 3}, "hits by words are not matched"),
            ({"image": "00.png", "rerank": 5}, "images are matched with a text"),
            ({"text": "red bar on black " * 9}, "the limit is 24"),
        ],
    )
    def test_refuses(
        self, shapes_searcher: Searcher, shapes_folder: Path, query: dict[str, object], message: str
    ) -> None:
        if "image" in query:
            query = query | {"image": shapes_folder / "00.png"}
        with pytest.raises(ValueError, match=message):
            shapes_searcher.search(**query)  # type: ignore[arg-type]
        assert len(shapes_searcher.search("red bar on black " * 9, truncate=True, top=2)) == 2


class TestWeak:
    """Hits that are no nearer than texts that have nothing to do with the index."""

    @pytest.fixture
    def limited(self, searched_index, predictor, tmp_path):
        """A searcher in a copy of the index, with limits as they are given."""

        def call(**limits):
            shutil.copytree(searched_index.uri, tmp_path / "copy.lance", dirs_exist_ok=True)
            copy = Index(tmp_path / "copy.lance", root=searched_index.root)
            copy.set_unrelated(Unrelated(rows=len(copy), **limits))
            return Searcher(copy, predictor)

        return call

    def test_limits_are_those_of_all_pairs(self, shapes_searcher, predictor, shape_files):
        texts = predictor.embed_texts(TEXTS, truncate=True)
        images = predictor.embed_images(shape_files)
        (_, captions, _) = captioned(shapes_searcher, shape_files)
        best = [vectors @ texts.T for vectors in (images, predictor.embed_texts(captions))]
        expected = [np.quantile(cosines.max(dim=0).values.numpy(), 0.95) for cosines in best]
        limits = shapes_searcher.index.unrelated
        assert (limits.rows, limits.pairs) == (len(shape_files), None)
        assert [limits.images, limits.captions] == pytest.approx(expected, abs=1e-5)
        assert abs(expected[0] - expected[1]) > 1e-3  # the control

    @pytest.mark.parametrize(("against", "kind"), [(None, "images"), ("captions", "captions")])
    @pytest.mark.parametrize("rerank", [0, 7])
    def test_weak_are_hits_no_nearer_than_the_limit(
        self, limited, shapes_searcher, against, kind, rerank
    ):
        settings = {"against": against, "rerank": rerank, "top": 12}
        cosines = [hit.cosine for hit in shapes_searcher.search(TEXT, **settings)]
        limit = sorted(cosines)[5]
        hits = limited(**{"images": -1.0, "captions": -1.0, kind: limit}).search(TEXT, **settings)
        assert [hit.weak for hit in hits] == [cosine <= limit for cosine in cosines]
        assert sum(hit.weak for hit in hits) == 6

    def test_what_probably_matches_is_not_weak(self, limited, monkeypatch):
        searcher = limited(images=1.0)
        measured = Calibration(
            slope=3.0, intercept=2.5, pairs=9, matching=1, ece_before=0.4, ece_after=0.1
        )
        monkeypatch.setattr(searcher.predictor, "reranking", Reranking(calibration=measured))
        hits = searcher.search(TEXT, rerank=30, top=40)
        probabilities = [hit.probability for hit in hits[:30]]
        assert min(probabilities) < 0.5 < max(probabilities)
        assert [hit.weak for hit in hits] == [value < 0.5 for value in probabilities] + [True] * 10

    def test_of_images_and_of_words_nothing_is_said(self, limited, shape_files):
        searcher = limited(images=1.0, captions=1.0)
        for query in (
            {"image": shape_files[0]},
            {"text": TEXT, "image": shape_files[0]},
            {"text": TEXT, "against": "words"},
        ):
            assert {hit.weak for hit in searcher.search(**query)} == {None}
        worded = {hit.path for hit in searcher.search("red", against="words", top=45)}
        hits = searcher.search("red", against="hybrid", top=45)
        assert {hit.path for hit in hits if hit.weak is None} == worded
        assert {hit.path for hit in hits if hit.weak} == {
            file.name for file in shape_files
        } - worded
        assert worded

    def test_limits_are_taken_anew_once_a_tenth_has_changed(self, predictor, tmp_path):
        index = new_index(tmp_path / "generated.lance", predictor, tmp_path)
        rng = np.random.default_rng(0)
        near = predictor.embed_texts(TEXTS[:1])[0].numpy()

        def write(first, end, vector=None):
            rows = []
            for number in range(first, end):
                vectors = {"text_vectors": [], "pair_vectors": []}
                vectors["image_vector"] = rng.standard_normal(8) if vector is None else 3 * vector
                fields = {
                    "path": f"{number}.png",
                    "digest": str(number),
                    "captions": [],
                    "width": 1,
                    "height": 1,
                }
                rows.append(fields | vectors)
            index.upsert(rows)
            note_unrelated(index, predictor)

        note_unrelated(index, predictor)
        assert index.unrelated is None  # of nothing
        write(0, 20)
        vectors = np.array(
            [row["image_vector"] for row in index.rows(index.paths(), ["image_vector"])]
        )
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        best = (predictor.embed_texts(TEXTS, truncate=True).numpy() @ unit.T).max(axis=1)
        assert index.unrelated == Unrelated(
            rows=20, images=pytest.approx(np.quantile(best, 0.95), abs=1e-5)
        )
        before = index.unrelated
        write(20, 22, near)
        assert index.unrelated == before
        write(22, 23, near)
        assert index.unrelated.rows == 23
        assert index.unrelated.images > before.images
        index.remove([f"{number}.png" for number in range(3)])
        note_unrelated(index, predictor)
        assert index.unrelated.rows == 20

    def test_a_damaged_note_is_an_error_of_the_index(self, limited):
        searcher = limited(images=0.5)
        metadata = {"bridgetower.unrelated": '{"rows": "many"}'}
        searcher.index._table.update_field_metadata({"path": "image_vector", "metadata": metadata})
        with pytest.raises(
            OSError, match=r"copy\.lance cannot be read: .*rows is 'many'.*; make the index again"
        ):
            Searcher(searcher.index, searcher.predictor).search(TEXT)


class TestModels:
    def test_that_of_the_index_is_the_default(
        self, searched_index, shapes_searcher, tiny_checkpoint
    ):
        assert Searcher(searched_index.uri).search(TEXT) == shapes_searcher.search(TEXT)
        assert (
            Searcher(searched_index, tiny_checkpoint).predictor.fingerprint
            == searched_index.info.fingerprint
        )
        other = load(tiny_checkpoint, image_size=40, device="cpu")
        with pytest.raises(
            ValueError,
            match=f"made with model {searched_index.info.fingerprint} .* is {other.fingerprint}",
        ):
            Searcher(searched_index, other)

    def test_a_model_that_is_elsewhere_now(self, album, tiny_checkpoint, tmp_path):
        shutil.copytree(tiny_checkpoint, tmp_path / "model")
        build_index(album.folder, album.out, tmp_path / "model")
        (tmp_path / "model").rename(tmp_path / "moved")
        with pytest.raises(
            FileNotFoundError,
            match=r"photos\.lance was made with the model at .*/model, which is not",
        ):
            Searcher(album.out)
        assert len(Searcher(album.out, tmp_path / "moved").search(TEXT)) == 6

    def test_a_model_without_matching_head(self, album, tiny_checkpoint, tmp_path):
        checkpoint = read_checkpoint(tiny_checkpoint)
        tensors = {
            name: value
            for name, value in checkpoint.tensors.items()
            if not name.startswith("itm_head")
        }
        config = checkpoint.config.override({"heads.itm": False})
        write_checkpoint(replace(checkpoint, config=config, tensors=tensors), tmp_path / "model")
        build_index(album.folder, album.out, tmp_path / "model")
        searcher = Searcher(album.out)
        assert {hit.score for hit in searcher.search(TEXT)} == {None}
        with pytest.raises(ValueError, match="no matching"):
            searcher.search(TEXT, rerank=3)


def test_images_that_are_gone(album, predictor, caplog):
    album.build()
    searcher = Searcher(album.out, predictor)
    before = searcher.search(TEXT)
    moved = album.folder.rename(album.folder.with_name("moved"))
    with pytest.raises(
        ValueError, match=r"none of the 6 images .* can be opened .*; give the folder"
    ):
        searcher.search(TEXT)
    searcher = Searcher(Index(album.out, root=moved), predictor)
    assert paths_of(searcher.search(TEXT)) == paths_of(before)
    (moved / "00.png").unlink()
    (moved / "01.png").write_text("not an image")
    with caplog.at_level(logging.WARNING):
        hits = searcher.search(TEXT)
    assert sorted(paths_of(hits)) == ["02.png", "03.png", "sub/04.png", "sub/05.png"]
    assert "2 of 6 images that were found cannot be opened and are left out" in caplog.text
    assert len(searcher.search(TEXT, rerank=0)) == 6
