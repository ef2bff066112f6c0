"""Settings of generated scenes."""

import pytest

from bridgetower.data.scenes.config import ScenesConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "poem"}, "kind is 'poem'.*expected one of captions, vqa, snli-ve, nlvr2"),
        ({"level": "absurd"}, "level is 'absurd'; expected one of easy, medium, hard"),
        ({"num_test": 0}, "num_test 0, .*expected at least 1"),
        ({"side": 10}, "side 10; expected .*30 pixels"),
    ],
)
def test_unfit_values(values, message):
    with pytest.raises(ValueError, match=message):
        ScenesConfig(**values)
