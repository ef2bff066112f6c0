"""Images and texts of requests, prepared as the predictor prepares its own."""

import asyncio
import base64
import io
import json
import os
import threading

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from bridgetower.distributed import available_cores
from bridgetower.processor import Processor
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import MAX_CHARACTERS, Decoders, Inputs, is_data_uri
from helpers.servers import PNGS, SERVED_TEXTS, URIS, data_uri, noise_png

pytestmark = pytest.mark.anyio


@pytest.fixture
def request_inputs(predictor):
    inputs = Inputs(predictor.processor, Decoders(max_pixels=2000, memory=2**28))
    yield inputs
    inputs.close()


def test_as_the_predictor_prepares_them(request_inputs, predictor):
    images = asyncio.run(request_inputs.images(URIS, "images"))
    for image, content in zip(images, PNGS, strict=True):
        assert torch.equal(image, predictor.processor.resize(content))
    texts = asyncio.run(request_inputs.texts(SERVED_TEXTS, "texts", truncate=False))
    assert [list(ids) for ids in texts] == predictor.processor.token_ids(SERVED_TEXTS)


def test_decoders_leave_the_processor_to_the_server(request_inputs):
    asyncio.run(request_inputs.images(URIS[:1], "images"))
    (process,) = request_inputs.decoders.processes
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(19, os.nice(0) + 10)


def test_other_formats_and_any_spelling_of_the_type(request_inputs, predictor):
    for kind in ("JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        stream = io.BytesIO()
        Image.open(io.BytesIO(PNGS[0])).save(stream, kind)
        source = f"DATA:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode()
        (image,) = asyncio.run(request_inputs.images([source], "images"))
        assert torch.equal(image, predictor.processor.resize(stream.getvalue()))


@pytest.mark.parametrize("field", ["images", "texts"])
async def test_an_image_waits_neither_for_many_others_nor_for_long_texts(
    predictor, monkeypatch, field
):
    """It is next, as soon as one of the threads is free."""
    threads = available_cores()
    begun = []
    permits = threading.Semaphore(0)
    inputs = Inputs(predictor.processor, Decoders(max_pixels=2000, memory=2**28))

    def held(call):
        def wrapped(content, *arguments, **options):
            begun.append(content)
            assert permits.acquire(timeout=60)
            return call(content, *arguments, **options)

        return wrapped

    async def have_begun(number):
        async with asyncio.timeout(60):
            while len(begun) < number:
                await asyncio.sleep(0.001)

    monkeypatch.setattr(inputs.decoders, "open", held(inputs.decoders.open))
    monkeypatch.setattr(inputs._processor, "token_ids", held(inputs._processor.token_ids))
    images = [URIS[1]] * 8 * threads
    texts = ["a" * 20_000] * 20 * threads
    many = (
        inputs.images(images, "many")
        if field == "images"
        else inputs.texts(texts, "many", truncate=True)
    )
    requests = [asyncio.ensure_future(many)]
    await have_begun(threads)
    requests.append(asyncio.ensure_future(inputs.images(URIS[:1], "few")))
    await asyncio.sleep(0.01)  # it is asked for, and waits
    permits.release()
    await have_begun(threads + 1)
    assert begun[threads] == PNGS[0]
    permits.release(20 * threads)
    await asyncio.gather(*requests)
    inputs.close()


def test_too_many_pixels_and_characters(request_inputs, post_refused):
    with pytest.raises(
        ApiError, match=r"50x41 = 2050 pixels, the limit is 2000; shrink it first$"
    ) as caught:
        asyncio.run(request_inputs.images([URIS[0], data_uri(noise_png(0, 50, 41))], "images"))
    assert (caught.value.status, caught.value.param) == (400, "images.1")
    assert len(asyncio.run(request_inputs.images([data_uri(noise_png(0, 50, 40))], "images"))) == 1

    with pytest.raises(ApiError, match=f"{MAX_CHARACTERS + 1} characters"):
        asyncio.run(request_inputs.texts(["a" * (MAX_CHARACTERS + 1)], "texts", truncate=True))
    ((*ids,),) = asyncio.run(
        request_inputs.texts(["a " * (MAX_CHARACTERS // 2)], "texts", truncate=True)
    )
    assert len(ids) == 24
    details = post_refused("/v1/embeddings", 413, input=["a " * 10_000] * 210, truncate=True)
    assert (
        details["message"]
        == "input: 4200000 characters, the limit is 4194304; send several requests"
    )


def test_a_tokenizer_that_panics_fails_the_request_alone(predictor):
    tokenizer = predictor.processor.tokenizer
    assert tokenizer is not None
    values = json.loads(tokenizer.to_str()) | {
        "pre_tokenizer": {"type": "FixedLength", "length": 0}
    }
    failing = Processor(predictor.processor.config, Tokenizer.from_str(json.dumps(values)))
    inputs = Inputs(failing, Decoders(max_pixels=2000, memory=2**28))
    for text in ("a dog", "a dog " * 900):  # in the event loop, and in a thread
        with pytest.raises(
            ApiError, match=r"^input: the tokenizer cannot encode these texts \(.*\)"
        ) as caught:
            asyncio.run(inputs.texts([text], "input", truncate=True))
        assert caught.value.status == 400
    inputs.close()


def test_what_counts_as_an_image():
    assert is_data_uri(URIS[0])
    assert is_data_uri("data:image/svg+xml;base64,")
    assert not any(
        map(is_data_uri, ["data:text/plain;base64,aa", "a data:image/png;base64,", "image.png", ""])
    )


def test_base64_is_decoded_in_parts_as_at_once(request_inputs, predictor):
    block_size = 2**20  # characters that are decoded at once
    for length in (
        block_size // 4 * 3 - 1,
        block_size // 4 * 3,
        block_size // 4 * 3 + 1,
        block_size * 2,
    ):
        content = PNGS[0] + bytes(length - len(PNGS[0]))
        (image,) = asyncio.run(request_inputs.images([data_uri(content)], "images"))
        assert torch.equal(image, predictor.processor.resize(PNGS[0]))
    padded = base64.b64encode(bytes(block_size // 4 * 3 - 1)).decode()
    whole = base64.b64encode(bytes(block_size)).decode()
    for damaged in (padded + whole, whole[: block_size - 1] + "*" + whole, whole[:-1], whole + "="):
        with pytest.raises(ApiError, match="the base64 of an image is damaged"):
            asyncio.run(request_inputs.images([f"data:image/png;base64,{damaged}"], "images"))


def test_long_texts_are_read_in_slices(post, post_refused):
    texts = [f"{word} bar " * 1000 for word in ("red", "blue", "green") * 9]
    vectors = [
        row["embedding"] for row in post("/v1/embeddings", input=texts, truncate=True)["data"]
    ]
    for text, vector in zip(texts, vectors, strict=True):
        (row,) = post("/v1/embeddings", input=text, truncate=True)["data"]
        assert row["embedding"] == pytest.approx(vector, abs=1e-5)
    short = ["a bar"] * 900
    assert "'red bar red bar" in (
        message := post_refused("/v1/embeddings", input=[*short, *["a bar"] * 3, texts[0]])[
            "message"
        ]
    )
    assert "text 903, " in message
