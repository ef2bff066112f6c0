"""The model behind a queue: when it is ready, what it can do, what it counts."""

import asyncio
from pathlib import Path

import pytest

from bridgetower.predictor import Predictor, load
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.errors import ApiError
from bridgetower.serve.service import PairInputs, Service


def test_ready_while_it_runs(predictor: Predictor) -> None:
    async def test() -> None:
        service = Service(predictor, ServeConfig())
        assert not service.ready
        with pytest.raises(RuntimeError, match="the service does not run"):
            service.batcher.admitted  # noqa: B018 - raises
        async with service.running():
            assert service.ready
        assert not service.ready

    asyncio.run(test())


def test_what_a_model_can_do(predictor: Predictor, answering_checkpoint: Path) -> None:
    service = Service(predictor, ServeConfig())
    assert service.models == [service.main]
    assert service.uses(service.main) == ["embeddings", "match", "fill-mask", "explain"]
    with pytest.raises(ApiError, match=r"no vqa head .* name it with --answer-model when the server is started$"):
        service.check_use("answer")
    answering = Service(load(answering_checkpoint, device="cpu"), ServeConfig())
    assert answering.uses(answering.main) == ["explain", "answer", "entail", "reason"]
    answering.check_use("answer")
    with pytest.raises(ApiError, match="no matching") as caught:
        answering.check_use("match")
    assert caught.value.code == "unsupported_by_model"


def test_admission(predictor: Predictor) -> None:
    async def test() -> None:
        service = Service(predictor, ServeConfig(name="tiny", max_items=3))
        async with service.running():
            with service.admission(3, "input", "tiny"):
                assert service.batcher.admitted == 3
            with pytest.raises(ApiError, match="4 items, the limit is 3"), service.admission(4, "input", None):
                pass
            with pytest.raises(ApiError, match="this server has 'tiny'"), service.admission(1, "input", "other"):
                pass
            assert service.batcher.admitted == 0

    asyncio.run(test())


def test_pairs() -> None:
    two = ["i", "j"]
    given = PairInputs(images=two, texts=["t", "u"])
    assert (given.count(), given.pairs()) == (2, [(0, 0), (1, 1)])
    given = PairInputs(images=two, texts=["t"], all_pairs=True)
    assert (given.count(), given.pairs()) == (2, [(0, 0), (1, 0)])
    for function in (PairInputs.count, PairInputs.pairs):
        with pytest.raises(ApiError, match="2 images and 1 texts"):
            function(PairInputs(images=two, texts=["t"]))
