"""One predictor used from several threads and from asyncio gives what it gives to one caller after the other."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from bridgetower.engines.engine import TorchEngine
from bridgetower.inference.predictor import load
from bridgetower.model.cpu import pack_weights
from helpers.models import build_model, random_images, random_texts
from helpers.servers import PNGS

THREADS = 4
ENGINES = [("torch", "fp32"), ("torch", "bf16"), ("onnxruntime", "fp32"), ("openvino", "fp32")]
TEXTS = [f"{' '.join(['red'] * (number % 3 + 1))} bar and square {number}" for number in range(6)]
CALLS = [
    lambda predictor, number: predictor.embed_texts(TEXTS[number]),
    lambda predictor, number: predictor.embed_images(PNGS[number % len(PNGS)]),
    lambda predictor, number: predictor.match(PNGS[number % len(PNGS)], TEXTS[number]),
    lambda predictor, number: predictor.embed_pairs(PNGS[number % len(PNGS)], TEXTS[-number]),
]


def in_threads(call, count):
    """What a call gives for numbers, from threads that start together."""
    barrier = Barrier(THREADS)

    def started(number):
        if number < THREADS:
            barrier.wait()
        return call(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(started, range(count)))


def check_calls(predictors, calls):
    for call in calls:  # the first use of the second predictor is by all threads at once
        expected = [call(predictors[0], number) for number in range(len(TEXTS))]
        rows = in_threads(
            lambda number, call=call: call(predictors[1], number % len(TEXTS)), 2 * len(TEXTS)
        )
        assert len({tuple(row.flatten().tolist()) for row in expected}) >= len(PNGS), (
            "so that a mix-up would show"
        )
        for number, row in enumerate(rows):
            torch.testing.assert_close(row, expected[number % len(TEXTS)], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_results_of_threads_are_those_of_one(exported, engine, precision):
    check_calls(
        [load(exported, engine=engine, precision=precision, device="cpu") for _ in "ab"], CALLS
    )


def test_threads_that_start_together_with_different_parts_wait_until_theirs_is_packed(monkeypatch):
    model = build_model()
    other = build_model()
    texts = random_texts([5, 3])
    images = random_images(2)
    uses = [
        (other.text, lambda model: model.encode_text(*texts)),
        (other.vision, lambda model: model.encode_image(images)),
    ]
    engine = TorchEngine(other, torch.device("cpu"))
    packed = []

    def slowly(tower, **options):
        time.sleep(0.1)  # in which the others come
        pack_weights(tower, **options)
        packed.append(tower)

    monkeypatch.setattr("bridgetower.engines.engine.pack_weights", slowly)

    @torch.inference_mode()
    def used(number):
        tower, encode = uses[number % 2]
        cls = encode(engine).cls
        assert all(
            layer.weight.is_mkldnn for layer in tower.modules() if isinstance(layer, nn.Linear)
        )
        torch.testing.assert_close(cls, encode(model).cls, atol=1e-5, rtol=0)

    in_threads(used, THREADS)
    assert packed[0] is other
    assert {*packed[1:]} == {other.text, other.vision}
    assert len(packed) == 3
