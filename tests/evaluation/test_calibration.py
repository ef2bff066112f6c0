"""Reliability of probabilities, and their calibration."""

import pytest
import torch

from bridgetower.checkpoints import Calibration, Reranking
from bridgetower.evaluation.metrics import BINS, Bin, calibrate, expected_calibration_error, reliability


def test_bins_by_hand():
    bins = reliability(torch.tensor([0.0, 0.05, 0.61, 1.0]), torch.tensor([0.0, 1.0, 0.5, 1.0]))
    assert bins == [
        Bin(0, 2, pytest.approx(0.025), 0.5),
        Bin(6, 1, pytest.approx(0.61), 0.5),
        Bin(BINS - 1, 1, 1.0, 1.0),
    ]
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.475 + 0.11 + 0) / 4)


class TestCalibrate:
    @staticmethod
    def drawn(slope, intercept):
        """Draws what log-odds mean by a known calibration."""
        generator = torch.Generator().manual_seed(0)
        log_odds = 3 * torch.randn(20_000, generator=generator)
        matching = torch.rand(20_000, generator=generator) < (slope * log_odds + intercept).sigmoid()
        return log_odds, matching, torch.arange(20_000) % 2 == 1

    @pytest.mark.parametrize(("slope", "intercept"), [(0.5, -2.0), (1.5, 0.5), (0.05, -3.0)])
    def test_finds_what_the_log_odds_mean(self, slope, intercept):
        log_odds, matching, halves = self.drawn(slope, intercept)
        found = calibrate(log_odds, matching, halves)
        assert (found.slope, found.intercept) == pytest.approx((slope, intercept), abs=0.1)
        assert (found.pairs, found.matching) == (20_000, int(matching.sum()))
        assert found.ece_after < 0.02 < found.ece_before
        expected = (slope * log_odds + intercept).sigmoid()
        torch.testing.assert_close(Reranking(calibration=found).match(log_odds), expected, atol=0.02, rtol=0)

    def test_matching_that_knows_nothing_gives_the_share(self):
        log_odds, matching, halves = self.drawn(-1.0, -2.0)  # worse than nothing: large where there is no match
        found = calibrate(log_odds, matching, halves)
        assert found.slope == 0
        share = Reranking(calibration=found).match(log_odds)
        assert share.tolist() == pytest.approx([float(matching.float().mean())] * 20_000)

    def test_an_error_is_not_that_of_the_fit(self):
        """What a half alone shows does not hold on the other: a fit to both would look right."""
        log_odds, halves = torch.linspace(-3, 3, 1000), torch.arange(1000) % 2 == 1
        matching = torch.where(halves, log_odds > 0, log_odds < 0)
        found = calibrate(log_odds, matching, halves)
        assert found.ece_after > 0.4

    @pytest.mark.parametrize("value", [True, False])
    def test_needs_both_kinds_of_pairs_in_each_half(self, *, value):
        halves = torch.tensor([True, True, False, False])
        matching = torch.tensor([True, False, value, value])
        assert calibrate(torch.zeros(4), matching, halves) is None


def test_what_is_shown():
    log_odds = torch.tensor([0.0, 3.0])
    calibration = Calibration(slope=0.5, intercept=-1.5, pairs=9, matching=1, ece_before=0.5, ece_after=0.1)
    assert Reranking().named(log_odds) == [{"score": 0.5}, {"score": pytest.approx(0.9526, abs=1e-4)}]
    assert Reranking(calibration=calibration).named(log_odds) == [
        {"probability": pytest.approx(0.1824, abs=1e-4)},
        {"probability": 0.5},
    ]
