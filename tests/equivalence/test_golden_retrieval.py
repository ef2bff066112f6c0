"""Case f: encodings, similarities, reranking scores of the two-stage evaluation, and its recalls."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from recompute import bridged_layers

from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import candidate_pairs, streamed_recalls
from golden import check, wrong
from helpers.retrieval import DROPPED, block_scores, score_table, truth_of, with_scores

CASE = "f_irtr"
STAGES = ("plain", "chunked", "gather_inputs", "save_memory")  # of the official code, one result


@pytest.fixture(scope="module")
def ours(recorded):
    model = recorded.load()
    inputs = recorded.inputs
    encoded = (
        model.encode_image(inputs["images"]),
        model.encode_text(inputs["text_ids"], inputs["text_masks"]),
    )
    similarity = model.image_embeds(encoded[0]) @ model.text_embeds(encoded[1]).T
    pairs = chosen(recorded, similarity)
    itm = score_pairs(
        model, *encoded, pairs, recorded.meta["config"]["per_gpu_eval_batchsize_text"]
    )[..., 1]
    return SimpleNamespace(
        model=model, encoded=encoded, similarity=similarity, pairs=pairs, itm=itm
    )


@pytest.fixture(scope="module")
def candidates(recorded):
    return chosen(recorded, recorded.outputs["sims_matrix"])


@pytest.fixture(scope="module")
def scored(recorded, candidates):
    return recorded.outputs["scores"][candidates.image, candidates.text]


def chosen(recorded, similarity, *, fewer=0):
    config = RetrievalConfig(candidates=recorded.meta["k_test"] - fewer)
    return candidate_pairs(
        block_scores(similarity), truth_of(recorded.inputs["text_image_index"]), config
    )


def score_pairs(model, image, text, pairs, batch_size):
    batches = zip(pairs.image.split(batch_size), pairs.text.split(batch_size), strict=True)
    return torch.cat(
        [
            model.itm_logits(model.fuse(image[rows], text[columns], outputs="pooled").pooled)
            for rows, columns in batches
        ]
    )


def two_stage_scores(pairs, itm, protocol):
    whole = score_table(pairs, itm)
    ranked = with_scores(pairs, itm, protocol)
    return [
        torch.where(score_table(pairs, side, other=False), whole, DROPPED) for side in ranked.sides
    ]


def official_recalls(recalls, ks):
    figures = {f"ir_r{k}": recalls.text_to_image[k] for k in ks} | {
        f"tr_r{k}": recalls.image_to_text[k] for k in ks
    }
    means = {"ir_mean": sum(recalls.text_to_image.values()) / len(ks)}
    means["tr_mean"] = sum(recalls.image_to_text.values()) / len(ks)
    return figures | means | {"r_mean": (means["ir_mean"] + means["tr_mean"]) / 2}


def recall_ranks(figures):
    return sorted(
        {int(match[1]) for name in figures if (match := re.fullmatch(r"ir_r(\d+)", name))}
    )


class TestEncodings:
    def test_bridged_layers_features_and_similarities(self, recorded, ours):
        actual = {
            "unimodal_feats_image": ours.model.image_embeds(ours.encoded[0]),
            "sims_matrix": ours.similarity,
        }
        actual["unimodal_feats_text"] = ours.model.text_embeds(ours.encoded[1])
        for name, encoded_side, token_type in (
            ("image_embedss", ours.encoded[0], 1),
            ("text_embedss", ours.encoded[1], 0),
        ):
            count = recorded.outputs[name].shape[1]
            actual[name] = bridged_layers(ours.model, encoded_side, token_type)[:, :count]
        assert wrong(actual, recorded.outputs) == {}

    def test_each_text_with_its_image(self, recorded, ours):
        index = recorded.inputs["text_image_index"]
        (image, text) = ours.encoded
        pooled = ours.model.fuse(image[index], text).pooled
        actual = {"paired_cls_feats": pooled, "paired_itm_logits": ours.model.itm_head(pooled)}
        assert wrong(actual, recorded.outputs) == {}
        pooled = ours.model.fuse(image[(index + 1) % len(image)], text).pooled  # control
        assert wrong({"paired_cls_feats": pooled}, recorded.outputs) != {}


def test_reranked_texts_of_an_image_and_images_of_a_text(recorded, ours):
    inputs = recorded.inputs
    pairs = ours.pairs
    scores = score_table(ours.pairs, ours.itm)
    row = int(inputs["image_rerank_image"])
    texts = inputs["image_rerank_texts"]
    assert set(texts.tolist()) == set(pairs.text[pairs.image_side & (pairs.image == row)].tolist())
    column = int(inputs["text_rerank_text"])
    images = inputs["text_rerank_images"]
    assert set(images.tolist()) == set(
        pairs.image[pairs.text_side & (pairs.text == column)].tolist()
    )
    actual = {
        "image_rerank_scores": scores[row, texts],
        "text_rerank_scores": scores[images, column],
    }
    assert wrong(actual, recorded.outputs) == {}


class TestMetrics:
    """Candidates, scores and recalls from the recorded similarities and match scores alone."""

    def test_candidates_are_the_official_ones(self, recorded, candidates):
        for side in ("image_side", "text_side"):
            name = f"scores_{side}"
            side = getattr(candidates, side)
            assert torch.equal(
                score_table(candidates, side, other=False), recorded.outputs[name] > DROPPED
            )

    def test_scores_of_both_protocols(self, recorded, candidates, scored):
        for_images, for_texts = two_stage_scores(candidates, scored, "standard")
        assert torch.equal(for_images, recorded.outputs["scores_image_side"])
        assert torch.equal(for_texts, recorded.outputs["scores_text_side"])
        for scores in two_stage_scores(candidates, scored, "paper"):
            assert torch.equal(scores, recorded.outputs["scores"])

    def test_control_mistakes_would_show(self, recorded, candidates, scored):
        index = recorded.inputs["text_image_index"]
        swapped = replace(
            candidates, image_side=candidates.text_side, text_side=candidates.image_side
        )
        standard = with_scores(candidates, scored, "standard").recalls()
        assert standard != with_scores(swapped, scored, "standard").recalls()
        assert standard != with_scores(candidates, scored, "paper").recalls()
        expected = recorded.meta["recalls"]["itc_only"]
        similarity = recorded.outputs["sims_matrix"]
        ks = recall_ranks(expected)
        shifted = streamed_recalls(block_scores(similarity), truth_of(index.roll(1)), ks=ks)
        assert official_recalls(shifted, ks) != pytest.approx(expected, abs=1e-6)


class TestTwoStages:
    def test_score_matrices(self, recorded, ours):
        image_side, text_side = two_stage_scores(ours.pairs, ours.itm, "standard")
        scores, _ = two_stage_scores(ours.pairs, ours.itm, "paper")
        actual = {"scores_image_side": image_side, "scores_text_side": text_side, "scores": scores}
        check(actual, {name: recorded.outputs[name] for name in actual})

    def test_recalls_of_each_stage(self, recorded, ours):
        assert set(recorded.meta["recalls"]) == {*STAGES, "itc_only"}
        for stage, expected in recorded.meta["recalls"].items():
            ks = recall_ranks(expected)
            if stage == "itc_only":
                truth = truth_of(recorded.inputs["text_image_index"])
                recalls = streamed_recalls(block_scores(ours.similarity), truth, ks=ks)
            else:
                recalls = with_scores(ours.pairs, ours.itm, "paper").recalls(ks=ks)
            assert official_recalls(recalls, ks) == pytest.approx(expected, abs=1e-6), stage

    def test_control_one_candidate_less_fails(self, recorded, ours):
        fewer = chosen(recorded, ours.similarity, fewer=1)
        itm = score_pairs(ours.model, *ours.encoded, fewer, batch_size=len(ours.similarity))[..., 1]
        scores, _ = two_stage_scores(fewer, itm, "paper")
        dropped = (scores == DROPPED) & (recorded.outputs["scores"] != DROPPED)
        assert bool(dropped.any())
        assert wrong({"scores": scores}, recorded.outputs) != {}

    def test_control_logits_of_no_match_fail(self, recorded, ours):
        logits = score_pairs(ours.model, *ours.encoded, ours.pairs, batch_size=8)[..., 0]
        scores, _ = two_stage_scores(ours.pairs, logits, "paper")
        assert wrong({"scores": scores}, recorded.outputs) != {}
