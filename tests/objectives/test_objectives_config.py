"""What a task is told is checked when it is told."""

import pytest

from bridgetower.objectives.config import Phase, PretrainingConfig


class TestPhase:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"until": 0.0}, "a phase ends at 0.0; expected a share"),
            ({"until": 1.5}, "a phase ends at 1.5"),
            ({"mlm": -1.0}, r"loss weights mlm -1.0, .*expected >= 0"),
            ({"mlm": 0, "itm": 0, "itc": 0}, "one positive"),
            ({"negatives": "hrad"}, "negatives is 'hrad'; expected one of random, uniform, hard"),
            ({"negatives": "hard", "itm": 0}, "itm is 0, so that nothing draws them"),
        ],
    )
    def test_errors(self, values, message):
        with pytest.raises(ValueError, match=message):
            Phase(**values)


class TestPretraining:
    @pytest.mark.parametrize("ends", [(), (0.5,), (0.5, 0.5, 1.0), (0.7, 0.3, 1.0), (1.0, 0.5)])
    def test_phases_that_do_not_cover_the_run(self, ends):
        with pytest.raises(ValueError, match="expected increasing shares of which the last is 1"):
            PretrainingConfig(phases=tuple(Phase(until=end) for end in ends))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"negatives_from": "all"}, "negatives_from is 'all'; expected one of rank, world"),
            ({"phases": (Phase(negatives="uniform"),), "negatives_from": "world"}, "but no phase has hard negatives"),
            ({"mlm_normalization": "mean"}, "mlm_normalization is 'mean'; expected one of step, official"),
        ],
    )
    def test_errors(self, values, message):
        with pytest.raises(ValueError, match=message):
            PretrainingConfig(**values)

    def test_what_compares_the_pairs_of_a_batch(self):
        names = ((Phase(), []), (Phase(itc=1), ["ITC"]), (Phase(negatives="hard"), ["hard negatives"]))
        for phase, contrasts in names:
            assert PretrainingConfig(phases=(Phase(until=0.5), phase)).contrasts == contrasts

    def test_phase_in_force(self):
        phases = (Phase(until=0.25), Phase(until=0.5, itc=1), Phase(until=1.0, mlm=0))
        config = PretrainingConfig(phases=phases)
        shares = {0.0: 0, 0.2499: 0, 0.25: 1, 0.4999: 1, 0.5: 2, 0.99: 2, 1.0: 2}
        assert {share: phases.index(config.phase(share)) for share in shares} == shares
