"""Case f: encodings, similarities, reranking scores of the two-stage evaluation, and its recalls."""

import re

import pytest
import torch
from recompute import bridged_layers

from bridgetower.evaluation.metrics import retrieval_recalls, topk_candidates, two_stage_scores
from bridgetower.evaluation.places import NON_CANDIDATE_SCORE
from golden import case, check, wrong

STAGES = ("plain", "chunked", "gather_inputs", "save_memory")  # of the official code, one result


@pytest.fixture(scope="module")
def recorded():
    return case("f_irtr")


@pytest.fixture(scope="module")
def model(recorded):
    return recorded.load()


@pytest.fixture(scope="module")
def encoded(recorded, model):
    inputs = recorded.inputs
    return model.encode_image(inputs["images"]), model.encode_text(inputs["text_ids"], inputs["text_masks"])


@pytest.fixture(scope="module")
def similarity(model, encoded):
    return model.image_embeds(encoded[0]) @ model.text_embeds(encoded[1]).T


@pytest.fixture(scope="module")
def sides(recorded, similarity):
    """Candidates of each image, and of each text."""
    return [topk_candidates(similarity, recorded.meta["k_test"], dim=dim) for dim in (1, 0)]


def score_pairs(model, image, text, wanted, batch_size):
    """Matching logits of the wanted pairs, NaN elsewhere."""
    logits = torch.full((*wanted.shape, 2), torch.nan)
    for pairs in wanted.nonzero().split(batch_size):
        rows, columns = pairs.unbind(dim=1)
        logits[rows, columns] = model.itm_logits(model.fuse(image[rows], text[columns], outputs="pooled").pooled)
    return logits


@pytest.fixture(scope="module")
def itm(recorded, model, encoded, sides):
    """Match logit of the candidate pairs, scored in batches."""
    batch_size = recorded.meta["config"]["per_gpu_eval_batchsize_text"]
    return score_pairs(model, *encoded, sides[0] | sides[1], batch_size)[..., 1]


@pytest.fixture(scope="module")
def candidates(recorded):
    """Candidates from the recorded similarities."""
    return [topk_candidates(recorded.outputs["sims_matrix"], recorded.meta["k_test"], dim=dim) for dim in (1, 0)]


@pytest.fixture(scope="module")
def scored(recorded):
    """The official match scores, unknown (NaN) where neither side scored the pair."""
    scores = recorded.outputs["scores"]
    return scores.masked_fill(scores == NON_CANDIDATE_SCORE, torch.nan)


def official_recalls(recalls, ks):
    """Our recalls under the official names."""
    figures = {f"ir_r{k}": recalls.text_to_image[k] for k in ks} | {f"tr_r{k}": recalls.image_to_text[k] for k in ks}
    means = {"ir_mean": sum(recalls.text_to_image.values()) / len(ks)}
    means["tr_mean"] = sum(recalls.image_to_text.values()) / len(ks)
    return figures | means | {"r_mean": (means["ir_mean"] + means["tr_mean"]) / 2}


def ranks(figures):
    return sorted({int(found[1]) for name in figures if (found := re.fullmatch(r"ir_r(\d+)", name))})


class TestEncodings:
    def test_bridged_layers(self, recorded, model, encoded):
        for name, part, token_type in (("image_embedss", encoded[0], 1), ("text_embedss", encoded[1], 0)):
            expected = recorded.outputs[name]
            ours = bridged_layers(model, part, token_type)[:, : expected.shape[1]]
            assert wrong({name: ours}, recorded.outputs) == {}

    def test_features_and_similarities(self, recorded, model, encoded, similarity):
        image, text = model.image_embeds(encoded[0]), model.text_embeds(encoded[1])
        ours = {"unimodal_feats_image": image, "unimodal_feats_text": text, "sims_matrix": similarity}
        assert wrong(ours, recorded.outputs) == {}

    def test_each_text_with_its_image(self, recorded, model, encoded):
        pooled = model.fuse(encoded[0][recorded.inputs["text_image_index"]], encoded[1]).pooled
        ours = {"paired_cls_feats": pooled, "paired_itm_logits": model.itm_head(pooled)}
        assert wrong(ours, recorded.outputs) == {}

    def test_control_the_next_image_fails(self, recorded, model, encoded):
        index = recorded.inputs["text_image_index"]
        pooled = model.fuse(encoded[0][(index + 1) % len(encoded[0])], encoded[1]).pooled
        assert wrong({"paired_cls_feats": pooled}, recorded.outputs) != {}


class TestReranking:
    def test_texts_of_an_image(self, recorded, itm, sides):
        row, texts = int(recorded.inputs["image_rerank_image"]), recorded.inputs["image_rerank_texts"]
        assert set(texts.tolist()) == set(sides[0][row].nonzero()[:, 0].tolist())
        assert wrong({"image_rerank_scores": itm[row, texts]}, recorded.outputs) == {}

    def test_images_of_a_text(self, recorded, itm, sides):
        column, images = int(recorded.inputs["text_rerank_text"]), recorded.inputs["text_rerank_images"]
        assert set(images.tolist()) == set(sides[1][:, column].nonzero()[:, 0].tolist())
        assert wrong({"text_rerank_scores": itm[images, column]}, recorded.outputs) == {}

    def test_only_candidates_are_scored(self, itm, sides):
        assert torch.equal(itm.isnan(), ~(sides[0] | sides[1]))


class TestMetrics:
    """Candidates, scores and recalls from the recorded similarities and match scores alone."""

    def test_candidates_are_the_official_ones(self, recorded, candidates):
        for side, name in zip(candidates, ("scores_image_side", "scores_text_side"), strict=True):
            assert torch.equal(side, recorded.outputs[name] > NON_CANDIDATE_SCORE)

    def test_honest_scores_are_each_sides_own(self, recorded, candidates, scored):
        for_images, for_texts = two_stage_scores(scored, *candidates, protocol="honest")
        assert torch.equal(for_images, recorded.outputs["scores_image_side"])
        assert torch.equal(for_texts, recorded.outputs["scores_text_side"])

    def test_paper_scores_are_the_maximum(self, recorded, candidates, scored):
        for scores in two_stage_scores(scored, *candidates, protocol="paper"):
            assert torch.equal(scores, recorded.outputs["scores"])

    def test_control_mistakes_would_show(self, recorded, candidates, scored):
        index = recorded.inputs["text_image_index"]
        for_images, for_texts = two_stage_scores(scored, *candidates, protocol="honest")
        honest = retrieval_recalls(for_images, index, text_to_image_scores=for_texts)
        assert honest != retrieval_recalls(for_texts, index, text_to_image_scores=for_images)
        assert honest != retrieval_recalls(recorded.outputs["scores"], index)
        expected, similarity = recorded.meta["recalls"]["itc_only"], recorded.outputs["sims_matrix"]
        ks = ranks(expected)
        shifted = retrieval_recalls(similarity, index.roll(1), ks=ks)
        assert official_recalls(shifted, ks) != pytest.approx(expected, abs=1e-6)


class TestTwoStages:
    def test_score_matrices(self, recorded, itm, sides):
        image_side, text_side = two_stage_scores(itm, *sides, protocol="honest")
        scores, _ = two_stage_scores(itm, *sides, protocol="paper")
        ours = {"scores_image_side": image_side, "scores_text_side": text_side, "scores": scores}
        check(ours, {name: recorded.outputs[name] for name in ours})

    def test_every_output_is_compared_in_this_file(self, recorded):
        assert set(recorded.outputs) == {
            *("text_embedss", "image_embedss", "unimodal_feats_text", "unimodal_feats_image", "sims_matrix"),
            *("paired_cls_feats", "paired_itm_logits", "image_rerank_scores", "text_rerank_scores"),
            *("scores_image_side", "scores_text_side", "scores"),
        }

    @pytest.mark.parametrize("stage", STAGES)
    def test_recalls(self, recorded, itm, sides, stage):
        expected = recorded.meta["recalls"][stage]
        scores, other = two_stage_scores(itm, *sides, protocol="paper")
        index, ks = recorded.inputs["text_image_index"], ranks(expected)
        recalls = retrieval_recalls(scores, index, text_to_image_scores=other, ks=ks)
        assert official_recalls(recalls, ks) == pytest.approx(expected, abs=1e-6)

    def test_recalls_of_the_first_stage(self, recorded, similarity):
        expected = recorded.meta["recalls"]["itc_only"]
        ks = ranks(expected)
        recalls = retrieval_recalls(similarity, recorded.inputs["text_image_index"], ks=ks)
        assert official_recalls(recalls, ks) == pytest.approx(expected, abs=1e-6)

    def test_every_recorded_recall_is_compared(self, recorded):
        assert set(recorded.meta["recalls"]) == {*STAGES, "itc_only"}

    def test_control_one_candidate_less_fails(self, recorded, model, encoded, similarity):
        sides = [topk_candidates(similarity, recorded.meta["k_test"] - 1, dim=dim) for dim in (1, 0)]
        itm = score_pairs(model, *encoded, sides[0] | sides[1], batch_size=len(similarity))[..., 1]
        scores, _ = two_stage_scores(itm, *sides, protocol="paper")
        dropped = (scores == NON_CANDIDATE_SCORE) & (recorded.outputs["scores"] != NON_CANDIDATE_SCORE)
        assert bool(dropped.any())
        assert wrong({"scores": scores}, recorded.outputs) != {}

    def test_control_logits_of_no_match_fail(self, recorded, model, encoded, sides):
        logits = score_pairs(model, *encoded, sides[0] | sides[1], batch_size=len(sides[0]))[..., 0]
        scores, _ = two_stage_scores(logits, *sides, protocol="paper")
        assert wrong({"scores": scores}, recorded.outputs) != {}
