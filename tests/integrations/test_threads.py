"""One predictor used from several threads and from asyncio gives what it gives to one caller after the other."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

import tiny
from bridgetower.engines.engine import TorchEngine
from bridgetower.predictor import load
from served import PNGS

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


def check(predictors, calls):
    for call in calls:  # the first use of the second predictor is by all threads at once
        expected = [call(predictors[0], number) for number in range(len(TEXTS))]
        found = in_threads(lambda number, call=call: call(predictors[1], number % len(TEXTS)), 2 * len(TEXTS))
        assert len({tuple(row.flatten().tolist()) for row in expected}) >= len(PNGS), "so that a mix-up would show"
        for number, row in enumerate(found):
            torch.testing.assert_close(row, expected[number % len(TEXTS)], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_results_of_threads_are_those_of_one(exported, engine, precision):
    check([load(exported, engine=engine, precision=precision, device="cpu") for _ in "ab"], CALLS)


def test_weights_are_packed_once_by_threads_that_start_together():
    for _ in range(10):
        model, engine = tiny.build(), TorchEngine(tiny.build(), torch.device("cpu"))
        with torch.inference_mode():
            expected = model.encode_text(*tiny.texts([5, 3])).cls
            found = in_threads(lambda _, engine=engine: engine.encode_text(*tiny.texts([5, 3])).cls, THREADS)
        for cls in found:
            torch.testing.assert_close(cls, expected, atol=1e-5, rtol=0)
        assert all(module.weight.is_mkldnn for module in engine.model.text.modules() if isinstance(module, nn.Linear))
