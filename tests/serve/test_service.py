"""The model behind a queue: when it is ready, and what it admits."""

import pytest

from bridgetower.serve.config import ServeConfig
from bridgetower.serve.errors import ApiError
from bridgetower.serve.service import Service


@pytest.mark.anyio
async def test_ready_while_it_runs_and_admits_what_it_can_do(predictor):
    service = Service(predictor, ServeConfig(name="tiny", max_items=3))
    assert not service.ready
    async with service.running():
        assert service.ready
        with service.admission(3, "input", "tiny"):
            assert service.batcher.admitted == 3
        for given, words in (
            ((4, "input", None), "4 items, the limit is 3"),
            ((1, "input", "other"), "this server has 'tiny'"),
            ((1, "images", None, "answer"), "no vqa head .* name it with --answer-model when the server is started$"),
        ):
            with pytest.raises(ApiError, match=words), service.admission(*given):
                pass
        assert service.batcher.admitted == 0
    assert not service.ready
