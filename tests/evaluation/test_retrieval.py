"""Retrieval evaluation against a brute-force one that scores every pair with the whole model."""

from dataclasses import replace

import pytest
import torch

import bridgetower.evaluation.retrieval as scoring
from bridgetower.checkpoints import ITC_ALONE, UNMEASURED, Reranking, read_checkpoint
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import ITC_WEIGHTS, GroundTruth, chance_recalls, hit_chances
from bridgetower.evaluation.retrieval import (
    evaluate_all_pairs,
    evaluate_matching,
    evaluate_retrieval,
)
from bridgetower.model.heads import RankHead
from helpers.retrieval import (
    cosine_table,
    itm_table,
    list_pairs,
    plain_recalls,
    plain_two_stage,
    score_table,
    topk_mask,
    truth_of,
    with_scores,
)
from helpers.sets import caption_images, records_of, write_set

ALL_STAGES = ("itc", "matching", "two_stage", "chance")


@pytest.fixture
def retrieve(tiny_model, images):
    def call(*, reranking=UNMEASURED, **config):
        return evaluate_retrieval(
            tiny_model, images, RetrievalConfig(**config), reranking=reranking
        )

    return call


@pytest.fixture(scope="module")
@torch.no_grad()
def all_candidates(tiny_checkpoint, tiny_dataset, tiny_processor):
    """Contrastive similarity and match logits [i, t, 2] of all pairs, each text through `model.forward` on its own."""
    model = read_checkpoint(tiny_checkpoint).model()
    images = caption_images(tiny_dataset, "test", tiny_processor)
    captions, _ = images.texts()
    similarity = torch.empty(len(images), len(captions))
    logits = torch.empty(len(images), len(captions), 2)
    pixel_values = images.pixel_values(range(len(images)))
    image = model.image_embeds(model.encode_image(pixel_values))
    for column, caption in enumerate(captions):  # alone, so that nothing is padded
        text = images.processor.texts([caption]).input_ids
        logits[:, column] = model.itm_logits(
            model(pixel_values, text.expand(len(images), -1)).pooled
        )
        similarity[:, column] = image @ model.text_embeds(model.encode_text(text))[0]
    return similarity, logits


def two_stage_recalls(similarity, scores, count, owner, protocol="standard"):
    """Recalls of tables: each side ranks its own candidates, or both those of either."""
    sides = topk_mask(similarity, count, dim=1), topk_mask(similarity, count, dim=0)
    return plain_recalls(*plain_two_stage(scores, *sides, protocol), truth_of(owner)).metrics("any")


@pytest.mark.parametrize("protocol", ["standard", "paper"])
@pytest.mark.parametrize("max_captions", [None, 1])
def test_two_stages(retrieve, images, all_candidates, protocol, max_captions):
    captions, owner = images.texts(max_captions)
    result = retrieve(candidates=3, protocol=protocol, max_captions=max_captions, batch_size=4)
    text_rows = [images.texts()[0].index(caption) for caption in captions]
    similarity, logits = (scores[:, text_rows] for scores in all_candidates)
    torch.testing.assert_close(cosine_table(result), similarity, atol=1e-5, rtol=0)
    itm = itm_table(result)
    scored = ~itm.isnan()
    match = logits[..., 1] if protocol == "paper" else logits[..., 1] - logits[..., 0]
    torch.testing.assert_close(itm[scored], match[scored], atol=1e-5, rtol=0)
    for recalls in (result.recalls["matching"], result.recalls["two_stage"]):
        assert recalls.metrics("any") == pytest.approx(
            two_stage_recalls(similarity, match, 3, owner, protocol)
        )
    assert result.recalls["itc"].metrics("any") == pytest.approx(
        two_stage_recalls(similarity, similarity, 99, owner)
    )
    assert torch.equal(result.truth.text_image_index, owner)
    assert result.recalls["chance"] == chance_recalls(truth_of(owner))


class TestBothScores:
    @pytest.mark.parametrize("itc_weight", [1.0, 16.0, ITC_ALONE])
    def test_brute_force(self, retrieve, images, all_candidates, itc_weight):
        result = retrieve(candidates=5, reranking=Reranking(itc_weight=itc_weight))
        (similarity, logits) = all_candidates
        (_, owner) = images.texts()
        # not below what is dropped
        scores = logits[..., 1] - logits[..., 0] + itc_weight * (similarity + 1)
        expected = two_stage_recalls(similarity, scores, 5, owner)
        assert result.recalls["two_stage"].metrics("any") == pytest.approx(expected)
        assert result.reranking == Reranking(itc_weight=itc_weight)
        assert result.recalls["matching"] == retrieve(candidates=5).recalls["two_stage"]

    def test_the_fit_is_the_best_of_the_weights(self, retrieve):
        fitted = retrieve(candidates=5, reranking=None)
        sums = {weight: fitted.candidates.recalls(weight).rsum for weight in ITC_WEIGHTS}
        assert len(set(sums.values())) > 2  # or any weight would be the best
        best = fitted.reranking.itc_weight
        assert fitted.metrics()["two_stage_rsum"] == max(sums.values()) == sums[best]

    def test_the_paper_has_no_weight_and_no_calibration(self, retrieve):
        rerankings = (UNMEASURED, None, Reranking(itc_weight=16.0))
        results = [
            retrieve(candidates=3, protocol="paper", reranking=reranking)
            for reranking in rerankings
        ]
        assert results[0].metrics() == results[1].metrics() == results[2].metrics()
        assert not {"itc_weight", "ece"} & set(results[0].metrics())
        assert {(result.reranking, result.ece) for result in results} == {(None, None)}

    @pytest.mark.parametrize(
        ("itm_signal", "itc_signal", "gain"), [(0.0, 1.0, 0.0), (1.0, 1.0, 0.2), (1.0, 0.0, 0.1)]
    )
    def test_a_fitted_weight_is_never_worse_than_itc_on_other_data(
        self, itm_signal, itc_signal, gain
    ):
        """Random matching does not spoil ITC, and informative matching helps, on data that the fit has not seen."""
        validation, test = (made_up_candidates(seed, itm_signal, itc_signal) for seed in (0, 1))
        alone = test.recalls(ITC_ALONE).rsum
        fitted = test.recalls(validation.fit_reranking().itc_weight).rsum
        assert fitted >= alone + gain
        assert bool(validation.fit_reranking().helps) == (gain > 0)
        if not itm_signal:  # the control: that is what matching alone does
            assert test.recalls(0.0).rsum < alone - 0.5

    def test_of_equal_weights_the_middle(self):
        perfect = made_up_candidates(0, 100.0, 100.0)
        assert {perfect.recalls(weight).rsum for weight in ITC_WEIGHTS} == {6.0}
        assert perfect.fit_reranking().itc_weight == ITC_WEIGHTS[len(ITC_WEIGHTS) // 2]

    def test_calibrated_probabilities_hold_on_other_data(self):
        validation, test = (made_up_candidates(seed, 1.0, 1.0) for seed in (0, 1))
        fitted = validation.fit_reranking()
        calibration = fitted.calibration
        num_matching = (validation.text_side & validation.is_match).sum()
        assert (calibration.pairs, calibration.matching) == (16 * 100, num_matching)
        # of scores with means 0 and 6 and variance 9
        assert calibration.slope == pytest.approx(2 / 3, abs=0.1)
        assert calibration.ece_before > 0.2
        assert calibration.ece_after < 0.03
        assert validation.calibration_error(UNMEASURED) == pytest.approx(calibration.ece_before)
        assert test.calibration_error(fitted) < 0.03 < 0.2 < test.calibration_error(UNMEASURED)

    def test_a_gain_is_not_that_of_the_fit(self):
        """Matching is right in one half and wrong in the other: the best weight of a half is bad for the other."""
        right = torch.eye(40, dtype=torch.bool)
        half = torch.arange(40) % 2 == 1
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(40, 40, generator=generator)
        itm = torch.where(
            half[:, None], torch.where(right, 200.0, noise), torch.where(right, -200.0, noise)
        )
        cosine = torch.where(half[:, None] & right, -0.2, torch.where(right, 0.2, noise / 10))
        everything = torch.ones(40, 40, dtype=torch.bool)
        pairs = list_pairs(truth_of(torch.arange(40)), everything, cosine=cosine)
        gain = with_scores(pairs, itm).fit_reranking().gain
        assert gain.difference < -0.3

    def test_the_interval_is_one_of_95_percent(self):
        """With a text for each image it is the mean ± 1.96 standard errors."""
        candidates = made_up_candidates(6, 0.5, 1.0)
        gain = candidates.fit_reranking().gain
        images = torch.arange(100) % 2
        hits = {}
        for weight in ITC_WEIGHTS:
            best_ranks = candidates.best_ranks(weight)
            hits[weight] = [
                sum(hit_chances(side, k) for k in (1, 5, 10)) / 3 for side in best_ranks
            ]
        difference = torch.empty(100, dtype=torch.float64)
        for half in (0, 1):
            means = {
                weight: float(sum(both)[images != half].mean()) for weight, both in hits.items()
            }
            best = [
                weight
                for weight, mean in means.items()
                if mean == pytest.approx(max(means.values()), abs=1e-12)
            ]
            weight = best[len(best) // 2]
            difference[images == half] = (hits[weight][1] - hits[ITC_ALONE][1])[images == half]
        assert gain.difference == pytest.approx(float(difference.mean()))
        error = float(difference.std()) / 10
        assert (gain.low, gain.high) == pytest.approx(
            (gain.difference - 1.96 * error, gain.difference + 1.96 * error)
        )

    def test_calibration_and_gain_need_eight_images(self):
        whole = made_up_candidates(0, 1.0, 1.0)
        seven, eight = (cut(whole, torch.arange(count)).fit_reranking() for count in (7, 8))
        assert (seven.calibration, seven.gain) == (None, None)
        assert eight.gain.texts == 8

    def test_folds_are_measured_apart(self):
        whole = made_up_candidates(0, 1.0, 1.0)
        in_folds = whole.image // 50 == whole.text // 50
        fields = ("image", "text", "image_side", "text_side", "cosine", "itm")
        values = {name: getattr(whole, name)[in_folds] for name in fields}
        halves = replace(whole, **values, config=RetrievalConfig(fold_size=50))
        folds = [cut(whole, torch.arange(50)), cut(whole, torch.arange(50, 100))]
        assert halves.recalls(8.0).rsum == pytest.approx(
            sum(fold.recalls(8.0).rsum for fold in folds) / 2
        )
        gain = halves.fit_reranking().gain
        assert gain.low < gain.difference < gain.high
        assert gain.texts == 100

    def test_texts_of_one_image_widen_the_interval(self):
        """Each image and text four times, so the same 100 draws: their number must not make the interval narrower."""
        once = made_up_candidates(0, 1.0, 1.0)
        repeated = cut(once, torch.arange(100), torch.arange(100).repeat_interleave(4))
        gains = [candidates.fit_reranking().gain for candidates in (once, repeated)]
        widths = [gain.high - gain.low for gain in gains if gain is not None]
        assert widths[1] == pytest.approx(widths[0], rel=0.1)


def cut(candidates, images, texts=None):
    """Leaves some images, and the texts of these or those that are given, of which one may come more than once."""
    texts = images if texts is None else texts
    values = (candidates.itm, candidates.cosine, candidates.image_side, candidates.text_side)
    itm, cosine, *sides = (
        score_table(candidates, value, other=0)[images][:, texts] for value in values
    )
    truth = GroundTruth(torch.searchsorted(images, texts), torch.arange(len(images)))
    return with_scores(list_pairs(truth, *sides, cosine=cosine), itm)


def made_up_candidates(seed, itm_signal, itc_signal):
    """Scores of 100 images with a text each: noise, and a signal on the right pairs."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.eye(100)
    itm = 3 * (2 * itm_signal * right + torch.randn(100, 100, generator=generator))
    cosine = (0.1 * (2 * itc_signal * right + torch.randn(100, 100, generator=generator))).clamp(
        -1, 1
    )
    sides = topk_mask(cosine, 16, dim=1), topk_mask(cosine, 16, dim=0)
    return with_scores(list_pairs(truth_of(torch.arange(100)), *sides, cosine), itm)


def test_without_candidates_there_is_one_stage(retrieve):
    alone = retrieve(candidates=0)
    both = retrieve(candidates=3)
    assert (alone.candidates, alone.recalls.keys(), alone.itm_accuracy) == (
        None,
        {"itc", "chance"},
        None,
    )
    assert alone.recalls["itc"] == both.recalls["itc"]
    assert alone.metrics()["rsum"] == alone.recalls["itc"].rsum


def test_one_image_at_a_time_gives_the_same_metrics(tiny_model, images, retrieve, monkeypatch):
    whole = retrieve(candidates=3, batch_size=4)
    encoded = []
    tiny_model.vision.register_forward_hook(
        lambda module, inputs, output: encoded.append(len(output[-1]))
    )
    monkeypatch.setattr(scoring, "_CHUNK_BYTES", 1)
    metrics = retrieve(candidates=3, batch_size=4)
    assert encoded == [1] * len(images)
    assert metrics.metrics() == pytest.approx(whole.metrics(), abs=1e-6)
    torch.testing.assert_close(
        itm_table(metrics), itm_table(whole), atol=1e-5, rtol=0, equal_nan=True
    )


class TestAllPairs:
    def test_matching_logits_rank_as_two_stages_with_all_candidates(self, tiny_model, images):
        for fold_size in (None, 3):
            config = RetrievalConfig(candidates=100, fold_size=fold_size)
            expected = evaluate_retrieval(tiny_model, images, config).metrics()
            metrics = evaluate_all_pairs(
                tiny_model, images, replace(config, candidates=1, batch_size=5)
            )
            for name, expected_name in (("rsum", "two_stage_rsum"), ("chance_rsum", "chance_rsum")):
                assert metrics[name] == pytest.approx(expected[expected_name])
            assert metrics["one_stage_text_to_image_r1"] == pytest.approx(
                expected["two_stage_text_to_image_r1"]
            )

    def test_the_ranking_head_goes_first(self, tiny_model, images):
        config = RetrievalConfig(protocol="paper")  # which ranks by the logit of a match alone
        by_match = evaluate_all_pairs(tiny_model, images, config)
        head = tiny_model.itm_head
        tiny_model.rank_head = RankHead(16)
        for kind in ("weight", "bias"):
            both = getattr(head.fc, kind)
            getattr(tiny_model.rank_head.fc, kind).data.copy_(both[1:])
        scores = evaluate_all_pairs(tiny_model, images, config)
        assert scores == by_match  # it is the same number
        tiny_model.rank_head.fc.weight.data.neg_()
        turned = evaluate_all_pairs(tiny_model, images, config)
        assert turned != by_match
        tiny_model.itm_head = tiny_model.itc_head = None
        assert evaluate_all_pairs(tiny_model, images, config) == turned
        # one number, in either protocol
        assert evaluate_all_pairs(tiny_model, images, RetrievalConfig()) == turned


class TestFolds:
    def test_equals_evaluating_each_fold_alone(self, tiny_model, images, tiny_dataset, tmp_path):
        config = RetrievalConfig(candidates=2, fold_size=3)
        result = evaluate_retrieval(tiny_model, images, config)
        alone = []
        for start in range(0, 9, 3):
            fold_set = write_set(
                tmp_path / str(start), {"test": records_of(tiny_dataset, "test")[start : start + 3]}
            )
            fold = caption_images(fold_set, "test", images.processor)
            alone.append(evaluate_retrieval(tiny_model, fold, replace(config, fold_size=None)))
        for stage in ALL_STAGES:
            recalls = [fold.recalls[stage].metrics("any") for fold in alone]
            means = {name: sum(fold[name] for fold in recalls) / 3 for name in recalls[0]}
            assert result.recalls[stage].metrics("any") == pytest.approx(means)
        whole = evaluate_retrieval(tiny_model, images, replace(config, fold_size=None))
        assert whole.recalls["two_stage"] != result.recalls["two_stage"]
        assert whole.itm_accuracy == result.itm_accuracy

    def test_unequal_folds(self, tiny_model, images):
        for evaluate in (evaluate_retrieval, evaluate_all_pairs):
            with pytest.raises(
                ValueError, match="9 images do not split into folds of 4; expected a multiple"
            ):
                evaluate(tiny_model, images, RetrievalConfig(fold_size=4))


class TestAccuracy:
    def test_own_and_one_other_image_of_each_text(self, tiny_model, images, all_candidates):
        captions, owner = images.texts()
        seen = []
        tiny_model.itm_head.register_forward_hook(
            lambda module, inputs, output: seen.append(output.clone())
        )
        accuracy = evaluate_matching(tiny_model, images, RetrievalConfig(batch_size=5))
        scored = torch.cat(seen)
        _, logits = all_candidates
        # which pair each of the scored ones is
        nearest = torch.cdist(scored, logits.flatten(0, 1)).argmin(dim=1)
        rows = nearest // len(captions)
        columns = nearest % len(captions)
        assert torch.bincount(columns).tolist() == [2] * len(captions)
        is_matching = rows == owner[columns]
        assert torch.bincount(columns[is_matching]).tolist() == [1] * len(captions)
        right = (scored[:, 1] > scored[:, 0]) == is_matching
        assert accuracy == pytest.approx(float(right.float().mean()))

    def test_matching_alone_gives_the_same_figure(self, tiny_model, images):
        expected = evaluate_retrieval(
            tiny_model, images, RetrievalConfig(batch_size=5)
        ).itm_accuracy
        tiny_model.itc_head = None
        assert evaluate_matching(tiny_model, images, RetrievalConfig(batch_size=5)) == expected
        with pytest.raises(ValueError, match="no contrastive"):
            evaluate_retrieval(tiny_model, images, RetrievalConfig())

    def test_without_matching_head(self, tiny_model, images, retrieve):
        tiny_model.itm_head = None
        result = retrieve()
        assert (result.candidates, result.recalls.keys()) == (None, {"itc", "chance"})
        assert (result.itm_accuracy, result.reranking) == (None, None)
        assert result.metrics()["rsum"] == result.recalls["itc"].rsum
        for evaluate in (evaluate_matching, evaluate_all_pairs):
            with pytest.raises(ValueError, match=r"no matching \(ITM\) head"):
                evaluate(tiny_model, images, RetrievalConfig())


class TestWork:
    @pytest.mark.parametrize("evaluate", [evaluate_retrieval, evaluate_matching])
    def test_each_image_is_encoded_once_for_its_pairs_and_texts_with_theirs(
        self, tiny_model, images, evaluate
    ):
        seen = {"vision": 0, "text": 0, "fusion": 0}

        def count(name, output):
            seen[name] += len(output)

        tiny_model.vision.register_forward_hook(
            lambda module, inputs, output: count("vision", output[-1])
        )
        tiny_model.text.register_forward_hook(
            lambda module, inputs, output: count("text", output[-1])
        )
        tiny_model.fusion.register_forward_hook(
            lambda module, inputs, output: count("fusion", output[0])
        )
        evaluate(tiny_model, images, RetrievalConfig(candidates=3, batch_size=4))
        captions, _ = images.texts()
        assert seen["vision"] == len(images)
        assert len(captions) <= seen["text"] <= seen["fusion"]
        candidates = 3 * (len(images) + len(captions)) if evaluate is evaluate_retrieval else 0
        assert seen["fusion"] <= candidates + 2 * len(captions)

    def test_shared_candidates_are_scored_once(self, tiny_model, images):
        scored = []
        tiny_model.fusion.register_forward_hook(
            lambda module, inputs, output: scored.append(len(output[0]))
        )
        captions, _ = images.texts()
        evaluate_retrieval(tiny_model, images, RetrievalConfig(candidates=1000))
        assert sum(scored) == len(images) * len(captions)


def test_names_of_metrics(retrieve):
    metrics = retrieve().metrics()
    sides = [f"{side}_r{k}" for side in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    stages = [f"{stage}_{name}" for stage in ALL_STAGES for name in (*sides, "rsum")]
    assert set(metrics) == {*stages, "itm_accuracy", "itc_weight", "ece", "rsum"}
    assert metrics["rsum"] == metrics["two_stage_rsum"]
