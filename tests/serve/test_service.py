"""The model behind a queue: when it is ready, what it can do, what it counts."""

import asyncio
from pathlib import Path

import pytest
import torch

from bridgetower.analysis.attention import explain
from bridgetower.predictor import Predictor, load
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.errors import ApiError
from bridgetower.serve.service import PairInputs, Service
from served import PNGS, TEXTS, URIS


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


def test_named_after_its_source_unless_told(predictor: Predictor) -> None:
    assert Service(predictor, ServeConfig()).name == predictor.source
    assert Service(predictor, ServeConfig(name="mine")).name == "mine"


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


def test_questions_have_a_model_of_their_own(predictor: Predictor, answering_checkpoint: Path) -> None:
    answering = load(answering_checkpoint, device="cpu")
    service = Service(predictor, ServeConfig(name="tiny"), answering=answering)
    assert [model.name for model in service.models] == ["tiny", str(answering_checkpoint)]
    assert [service.uses(model) for model in service.models] == [
        ["embeddings", "match", "fill-mask", "explain"],
        ["answer", "entail", "reason"],
    ]

    given = PairInputs(images=URIS[:1], texts=TEXTS[:1])

    async def test() -> None:
        async with service.running():
            (choices, *_), _ = await service.pairs("answer", given, top=3)
            (score,), _ = await service.pairs("match", given)
        expected = answering.answer(PNGS[0], TEXTS[0], top=3)
        assert [choice.label for choice in choices] == [choice.label for choice in expected]
        assert score == pytest.approx(float(predictor.match(PNGS[0], TEXTS[0])), abs=1e-5)

    asyncio.run(test())


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


def test_pairs_are_the_direct_calls(predictor: Predictor) -> None:
    async def test() -> None:
        service = Service(predictor, ServeConfig(max_batch=2))
        async with service.running():
            outcomes, tokens = await service.pairs("match", PairInputs(images=URIS[:2], texts=TEXTS, all_pairs=True))
            images = await service.inputs.images(URIS[:2], "images")
        expected = predictor.match(images, TEXTS, all_pairs=True)
        assert outcomes == pytest.approx(expected.flatten().tolist(), abs=1e-5)
        ids = predictor.processor.token_ids(TEXTS)
        assert tokens == service.main.tokens(images, list(map(tuple, ids))) == 2 * 5 + sum(map(len, ids))

    asyncio.run(test())


def test_an_explanation_is_the_direct_call(predictor: Predictor) -> None:
    async def test() -> None:
        service = Service(predictor, ServeConfig())
        async with service.running():
            image, view = await service.inputs.seen(URIS[0], "image")
            ids = await service.inputs.texts([TEXTS[0], "<mask>"], "text", truncate=False)
            found = await service.attention(image, ids[0])
            with pytest.raises(ApiError, match="no word"):
                await service.attention(image, ids[1])
        expected = explain(predictor, PNGS[0], TEXTS[0])
        torch.testing.assert_close(found.maps, expected.maps, atol=1e-6, rtol=0)
        assert view.tobytes() == expected.view.tobytes()
        assert found.words == expected.words

    asyncio.run(test())
