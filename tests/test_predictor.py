"""The loaded model: every kind of input, any batch size, both precisions, and clear refusals."""

import gc
import io
import pickle
import socket
import sys
import time
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import bridgetower
from bridgetower import explain, hidden_states
from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.sources import fetch
from bridgetower.engines import engine
from bridgetower.engines.engine import TorchEngine
from bridgetower.inference import items as inference
from bridgetower.inference.items import (
    decoded,
    two_stage_order,
)
from bridgetower.inference.predictor import Predictor, load
from bridgetower.model.fusion import Encoded

TEXTS = ["red circle on black", "a bar", "a square that is blue on a grey ground"]
MASKED = [f"{text} <mask>" for text in TEXTS]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, shape, dtype=np.uint8)
        for shape in ((24, 24, 3), (30, 20, 3), (20, 40, 3))
    ]


@pytest.fixture(scope="module")
def picture_files(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    return paths


def assert_same_results(actual, expected):
    assert len(actual) == len(expected) == 3
    if isinstance(actual, Tensor):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    else:
        assert [[w.word for w in masks[0]] for masks in actual] == [
            [w.word for w in masks[0]] for masks in expected
        ]


def all_results(model, files, **how):
    """Vectors of images, texts and pairs, and how well these match, and all with each other."""
    return [
        model.embed_images(files, **how),
        model.embed_texts(TEXTS, batch_size=how.get("batch_size", 32)),
        model.embed_pairs(files, TEXTS, **how),
        model.match(files, TEXTS, **how),
        model.match(files, TEXTS[:2], all_pairs=True, **how),
    ]


@pytest.fixture
def predictor_without(tiny_checkpoint):
    """Makes a predictor whose model lacks a head."""

    def make(head):
        checkpoint = read_checkpoint(tiny_checkpoint)
        config = checkpoint.config.override({f"heads.{head}": None if head == "itc" else False})
        tensors = {
            name: tensor
            for name, tensor in checkpoint.tensors.items()
            if not name.startswith(f"{head}_head")
        }
        lacking = replace(checkpoint, config=config, tensors=tensors)
        return Predictor(lacking, TorchEngine(lacking.model(), CPU))

    return make


class TestInputs:
    def test_every_kind_of_picture_gives_the_same_vectors(self, predictor, picture_files, arrays):
        kinds = {
            "path": list(picture_files),
            "string": list(map(str, picture_files)),
            "bytes": [path.read_bytes() for path in picture_files],
            "PIL": [Image.open(path) for path in picture_files],
            "array": list(arrays),
            "array of channels first": [np.moveaxis(array, -1, 0) for array in arrays],
            "tensor": [torch.from_numpy(array).permute(2, 0, 1) for array in arrays],
            "tensor of channels last": [torch.from_numpy(array) for array in arrays],
            "in memory": [io.BytesIO(path.read_bytes()) for path in picture_files],
            "bytearray": [bytearray(path.read_bytes()) for path in picture_files],
            "memoryview": [memoryview(path.read_bytes()) for path in picture_files],
            "open file": [path.open("rb") for path in picture_files],
            "URL": [path.as_uri() for path in picture_files],
        }
        expected = predictor.embed_images(picture_files)
        assert expected.shape == (3, 8)
        for images in kinds.values():
            assert torch.equal(predictor.embed_images(images), expected)
            assert torch.equal(predictor.embed_images(tuple(images)), expected)
            torch.testing.assert_close(
                predictor.embed_images(images[1]), expected[1:2], atol=1e-5, rtol=0
            )

        stacked = np.stack([arrays[0], arrays[0][::-1]])  # an array of four axes is several images
        expected = predictor.embed_images(list(stacked))
        assert torch.equal(predictor.embed_images(stacked), expected)
        assert torch.equal(
            predictor.embed_images(torch.from_numpy(stacked).permute(0, 3, 1, 2)), expected
        )

    def test_images_at_urls_in_every_call(self, predictor, picture_files):
        url = picture_files[0].as_uri()
        states = predictor.hidden_states(url, "a bar").pooled
        assert torch.equal(states, predictor.hidden_states(picture_files[0], "a bar").pooled)
        assert torch.equal(
            explain(predictor, url, "a bar").maps,
            explain(predictor, picture_files[0], "a bar").maps,
        )

    def test_a_host_that_refuses_is_left_in_seconds(self, predictor, monkeypatch):
        pauses = []
        monkeypatch.setattr(fetch.time, "sleep", pauses.append)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        with pytest.raises(OSError, match=r"/a\.png cannot be read"):
            predictor.embed_images(url)
        assert sum(pauses) < 2

    def test_a_url_without_an_image(self, predictor, tmp_path):
        with pytest.raises(FileNotFoundError, match="no file at file:///"):
            predictor.embed_images((tmp_path / "nothing.png").as_uri())
        with pytest.raises(
            ValueError,
            match="is a URL, which is not fetched here; give it to a method of a predictor",
        ):
            predictor.processor.images(["https://example.com/a.png"])

    def test_one_goes_with_all_of_the_others(self, predictor, picture_files):
        calls = [predictor.match, predictor.embed_pairs, predictor.fill_mask]
        for call, texts in zip(calls, (TEXTS, TEXTS, MASKED), strict=True):
            of_first_image = call([picture_files[0]] * 3, texts)
            for image in (picture_files[0], picture_files[:1]):
                assert_same_results(call(image, texts), of_first_image)
            of_second_text = call(picture_files, [texts[1]] * 3)
            for text in (texts[1], texts[1:2]):
                assert_same_results(call(picture_files, text), of_second_text)

    def test_texts_are_batched_by_length_and_come_back_in_order(self, predictor):
        texts = [TEXTS[2], "red", TEXTS[0], "blue", "a bar", TEXTS[2] + " and a bar"]
        vectors = predictor.embed_texts(texts, batch_size=2)
        alone = torch.cat([predictor.embed_texts(text) for text in texts])
        torch.testing.assert_close(vectors, alone, atol=1e-5, rtol=0)
        assert torch.cdist(alone, alone).add(torch.eye(len(texts))).min() > 1e-3, (
            "so another order would show"
        )


class TestResults:
    def test_are_those_of_the_model(self, predictor, picture_files):
        model = predictor.model
        processor = predictor.processor
        pixel_values = processor.images(picture_files)
        text = processor.texts(TEXTS)
        with torch.no_grad():
            image = model.encode_image(pixel_values)
            words = model.encode_text(text.input_ids, text.attention_mask)
            pooled = model(pixel_values, text.input_ids, text.attention_mask).pooled
            match = model.itm_logits(pooled).softmax(dim=-1)[:, 1]
            expected = [
                model.image_embeds(image),
                model.text_embeds(words),
                model.pair_embeds(pooled),
                match,
            ]
        for result, expected_row in zip(
            all_results(predictor, picture_files), expected, strict=False
        ):
            torch.testing.assert_close(result, expected_row, atol=1e-5, rtol=0)
            assert result.dtype == torch.float32

    def test_batch_size_and_processes_change_nothing(self, predictor, picture_files):
        for size in (1, 2):
            for actual, other in zip(
                all_results(predictor, picture_files),
                all_results(predictor, picture_files, batch_size=size),
                strict=True,
            ):
                torch.testing.assert_close(actual, other, atol=1e-5, rtol=0)
        inputs = [
            *picture_files,
            Image.open(picture_files[0]),
            picture_files[0].read_bytes(),
            picture_files[0],
        ]
        alone = predictor.embed_images(inputs, batch_size=2)
        assert torch.equal(predictor.embed_images(inputs, batch_size=2, num_workers=2), alone)
        assert torch.equal(alone[0], alone[-1])
        scores = predictor.match(picture_files, TEXTS, all_pairs=True, batch_size=2)
        assert torch.equal(
            predictor.match(picture_files, TEXTS, all_pairs=True, batch_size=2, num_workers=2),
            scores,
        )

    def test_for_a_gpu_threads_decode_one_batch_ahead(self, predictor, picture_files, monkeypatch):
        begun = []
        pictures = [*picture_files, Image.open(picture_files[1])] * 3
        monkeypatch.setattr(inference, "fetched", lambda image: begun.append(image) or image)
        plain, ahead = (
            decoded(predictor.processor, pictures, 2, 0, torch.device(name))
            for name in ("cpu", "meta")
        )
        first = next(ahead)
        while len(begun) < 4:  # the next batch, while nobody asks for it
            time.sleep(0.01)
        for actual, other in zip(plain, chain([first], ahead), strict=True):
            assert torch.equal(actual, other)

    def test_all_pairs_are_pair_by_pair(self, predictor, picture_files):
        texts = [*TEXTS, "yellow"]
        scores = predictor.match(picture_files, texts, all_pairs=True)
        expected = torch.stack(
            [torch.cat([predictor.match(file, text) for text in texts]) for file in picture_files]
        )
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
        assert expected.std() > 1e-3

    def test_items_are_encoded_once(self, predictor, picture_files):
        expected = predictor.embed_pairs(
            [picture_files[1], picture_files[0], picture_files[0]], TEXTS
        )
        first, second = map(predictor.processor.prepare, picture_files[:2])
        counts = {predictor.model.vision: 0, predictor.model.text: 0}

        def count(module, inputs, output):
            counts[module] += len(inputs[0])

        hooks = [tower.register_forward_hook(count) for tower in counts]
        predictor.match(picture_files, TEXTS * 2, all_pairs=True, batch_size=3)
        assert list(counts.values()) == [3, 6]
        vectors = predictor.embed_pairs([second, first, first], TEXTS)  # an image that comes again
        assert list(counts.values()) == [3 + 2, 6 + 3]
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(("memory", "times"), [(4.0, 1), (1e-9, 15)])
    def test_texts_are_encoded_once_or_with_each_block_of_images(
        self, predictor, arrays, memory, times
    ):
        images = [np.roll(array, shift, axis=0) for array in arrays for shift in range(5)]
        whole = predictor.match(images, TEXTS, all_pairs=True, batch_size=64)
        encoded = []
        hook = predictor.model.text.register_forward_hook(
            lambda _, inputs, __: encoded.append(len(inputs[0]))
        )
        scores = predictor.match(images, TEXTS, all_pairs=True, batch_size=4, memory_gib=memory)
        hook.remove()
        assert encoded == [len(TEXTS)] * times
        torch.testing.assert_close(scores, whole, atol=1e-5, rtol=0)

    def test_all_pairs_in_little_memory(self, predictor, arrays):
        images = [np.roll(array, shift, axis=0) for array in arrays for shift in range(8)]
        texts = [f"{text}{' a' * number}" for text in TEXTS for number in range(8)]
        held = []

        def measure(*_):
            sizes = []
            for candidate in gc.get_objects():
                if type(candidate) is Encoded:
                    candidate.map(lambda tensor: sizes.append(tensor.nbytes) or tensor)
            held.append(sum(sizes))

        gc.freeze()  # so that only what is made from here on is looked through
        hook = predictor.model.fusion.register_forward_pre_hook(measure)
        whole = predictor.match(images, texts, all_pairs=True, batch_size=48)
        most = max(held)
        room = max(held) // 12
        held.clear()
        in_blocks = predictor.match(
            images, texts, all_pairs=True, batch_size=4, memory_gib=4 * room / 2**30
        )
        hook.remove()
        gc.unfreeze()
        torch.testing.assert_close(in_blocks, whole, atol=1e-6, rtol=0)
        assert whole.std() > 1e-3
        assert max(held) < 4 * room < most / 2

    def test_half_of_the_memory_is_for_encoded_images(self, predictor, arrays):
        images = [np.roll(array, shift, axis=0) for array in arrays for shift in range(5)]
        with torch.inference_mode():
            encoded = predictor.engine.cache_image(
                predictor.model.encode_image(predictor.processor.images(images[:1]))
            )
        sizes = []
        encoded.map(lambda tensor: sizes.append(tensor.nbytes) or tensor)
        num_bytes = sum(sizes) - encoded.cls.nbytes
        blocks = []
        hook = predictor.model.vision.register_forward_hook(
            lambda _, inputs, __: blocks.append(len(inputs[0]))
        )
        for bytes_, expected in (
            (2 * 4 * num_bytes, [4, 4, 4, 3]),
            (2 * 4 * num_bytes - 2, [3] * 5),
            (1, [1] * 15),
        ):
            blocks.clear()
            predictor.match(images, TEXTS[:1], all_pairs=True, memory_gib=bytes_ / 2**30)
            assert blocks == expected
        hook.remove()

    def test_bfloat16_is_close(self, tiny_checkpoint, predictor, picture_files):
        coarse = load(tiny_checkpoint, device="cpu", precision="bf16")
        pairs = list(
            zip(
                all_results(coarse, picture_files),
                all_results(predictor, picture_files),
                strict=True,
            )
        )
        for ours, exact in pairs:
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, exact, atol=0.06, rtol=0)
            assert not torch.equal(ours, exact)
        for vectors, _ in pairs[:3]:
            torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
        outputs = []  # of the head, which are not rounded again
        coarse.model.head("itc").image.register_forward_hook(
            lambda *arguments: outputs.append(arguments[2])
        )
        vectors = coarse.embed_images(picture_files)
        assert outputs[0].dtype == torch.bfloat16
        torch.testing.assert_close(
            vectors, F.normalize(outputs[0].float(), dim=-1), atol=1e-7, rtol=1e-6
        )

    def test_the_bar_leaves_standard_output_alone(
        self, predictor, picture_files, capsys, monkeypatch
    ):
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
        vectors = predictor.embed_images(picture_files, batch_size=1, progress=True)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "batches" in captured.err
        assert torch.equal(vectors, predictor.embed_images(picture_files, batch_size=1))

    def test_few_calls_lead_to_the_fusion_encoder(self, predictor, picture_files):
        called = []

        def look(*_):
            frame = sys._getframe()
            while frame := frame.f_back:
                if "bridgetower" in frame.f_globals["__name__"]:
                    called.append(frame.f_code.co_qualname)

        hook = predictor.model.fusion.register_forward_pre_hook(look)
        predictor.match(picture_files, TEXTS)
        hook.remove()
        # one checks the arguments, one reads a batch when the next has begun
        assert len(called) <= 8, called


class TestFillMask:
    def test_ranks_the_vocabulary(self, predictor, picture_files):
        text = "a <mask> that is <mask> on black"
        candidates = predictor.fill_mask(picture_files[0], text, top=3)
        assert [len(words) for words in candidates] == [3, 3]
        ids = predictor.processor.texts([text]).input_ids
        with torch.no_grad():
            fused = predictor.model(predictor.processor.images(picture_files[:1]), ids)
            probabilities = predictor.model.mlm_logits(fused.text[0]).softmax(dim=-1)
        positions = (ids[0] == predictor.processor.mask_token_id).nonzero()[:, 0]
        for words, position in zip(candidates, positions, strict=True):
            best = probabilities[position].topk(3)
            assert [word.probability for word in words] == pytest.approx(
                best.values.tolist(), abs=1e-6
            )
            decoded = [
                predictor.processor.decode([number]).strip() for number in best.indices.tolist()
            ]
            assert [word.word for word in words] == decoded

    def test_words_of_64_masks_at_most_are_ranked_at_once(self, predictor, picture_files):
        rows = []
        hook = predictor.model.head("mlm").register_forward_hook(
            lambda _, inputs, __: rows.append(len(inputs[0]))
        )
        filled = predictor.fill_mask(picture_files[0], ["<mask> " * 10] * 15, top=1)
        hook.remove()
        assert sum(map(len, filled)) == sum(rows) == 150
        assert rows == [64, 64, 22]

    def test_several_are_one_by_one(self, predictor, picture_files):
        texts = ["a <mask>", "a <mask> that is <mask> on a grey ground", "<mask> bar <mask> <mask>"]
        together = predictor.fill_mask(picture_files, texts, top=2, batch_size=2)
        assert [len(masks) for masks in together] == [1, 2, 3]
        for file, text, masks in zip(picture_files, texts, together, strict=True):
            alone = predictor.fill_mask(file, text, top=2)
            for words, expected in zip(masks, alone, strict=True):
                assert [word.word for word in words] == [word.word for word in expected]
                assert [w.probability for w in words] == pytest.approx(
                    [w.probability for w in expected], abs=1e-5
                )
        other = predictor.fill_mask(picture_files[::-1], texts, top=2)
        assert other[0][0][0].probability != pytest.approx(together[0][0][0].probability, abs=1e-5)

    def test_errors(self, predictor, picture_files, predictor_without):
        assert predictor.fill_mask(picture_files[:1], ["a <mask>"]) == [
            predictor.fill_mask(picture_files[0], "a <mask>")
        ]
        long = "<mask> " + "red circle on black " * 30
        with pytest.raises(ValueError, match="truncate=True"):
            predictor.fill_mask(picture_files[0], long)
        assert len(predictor.fill_mask(picture_files[0], long, truncate=True)) == 1
        with pytest.raises(ValueError, match="no mask in"):
            predictor.fill_mask(
                picture_files[0], long.replace("<mask>", "") + "<mask>", truncate=True
            )
        with pytest.raises(ValueError, match="3 images and 2 texts"):
            predictor.fill_mask(picture_files, ["a <mask>"] * 2)
        with pytest.raises(ValueError, match="no mask in 'a bar'; put <mask> where"):
            predictor.fill_mask(picture_files[:2], ["a <mask>", "a bar"])
        with pytest.raises(ValueError, match=r"no masked-language \(MLM\) head"):
            predictor_without("mlm").fill_mask(picture_files[0], "a <mask>")


class TestErrors:
    def test_inputs(self, predictor, picture_files):
        calls = [
            (lambda: predictor.embed_images([]), "no images given; expected at least one"),
            (lambda: predictor.embed_pairs([], TEXTS), "no images given"),
            (lambda: predictor.match([], TEXTS, all_pairs=True), "no images given"),
            (lambda: predictor.embed_texts([]), "no texts given; expected at least one"),
            (lambda: predictor.match(picture_files, []), "no texts given"),
            (lambda: predictor.match(picture_files, [], all_pairs=True), "no texts given"),
            (
                lambda: predictor.embed_pairs(picture_files, TEXTS[:2]),
                "3 images and 2 texts; expected one text per image",
            ),
            (
                lambda: predictor.match(picture_files, TEXTS[:2]),
                "3 images and 2 texts; expected one text per image",
            ),
        ]
        for call, message in calls:
            with pytest.raises(ValueError, match=message):
                call()

    def test_missing_heads(self, picture_files, predictor_without):
        with pytest.raises(ValueError, match=r"no contrastive \(ITC\) head"):
            predictor_without("itc").embed_images(picture_files)
        with pytest.raises(ValueError, match=r"no contrastive \(ITC\) head"):
            predictor_without("itc").embed_texts(TEXTS)
        for all_pairs in (False, True):
            with pytest.raises(ValueError, match=r"no matching \(ITM\) head"):
                predictor_without("itm").match(picture_files, TEXTS, all_pairs=all_pairs)
        assert predictor_without("itc").embed_pairs(picture_files, TEXTS).shape == (3, 16)

    def test_too_long_texts(self, predictor, picture_files):
        long = "red circle on black " * 30
        limit = predictor.processor.config.max_length
        calls = [
            lambda **options: predictor.embed_texts(["a", "b", long], batch_size=1, **options),
            lambda **options: predictor.embed_pairs(
                picture_files, ["a", "b", long], batch_size=1, **options
            ),
            lambda **options: predictor.match(
                picture_files, ["a", "b", long], batch_size=1, **options
            ),
            lambda **options: predictor.match(
                picture_files, ["a", "b", long], all_pairs=True, **options
            ),
        ]
        for call in calls:
            with pytest.raises(
                ValueError, match=rf"text 2, 'red circle.*the limit is {limit}; .*truncate=True"
            ):
                call()
            assert len(call(truncate=True)) == 3

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_unreadable_pictures_are_numbered(
        self, predictor, picture_files, tmp_path, num_workers
    ):
        (tmp_path / "empty.png").write_bytes(b"")
        (tmp_path / "text.png").write_text("no picture")
        (tmp_path / "cut.png").write_bytes(picture_files[0].read_bytes()[:-200])
        for name, message in {
            "empty.png": "empty",
            "text.png": "text.png",
            "cut.png": "cut off or damaged",
        }.items():
            with pytest.raises(ValueError, match=rf"image 3: .*{message}"):
                predictor.embed_images(
                    [*picture_files, tmp_path / name], batch_size=2, num_workers=num_workers
                )
        with pytest.raises(ValueError, match=r"image 2: .*the image of 5 bytes"):
            predictor.match([*picture_files[:2], b"12345"], TEXTS, all_pairs=True, batch_size=1)
        with pytest.raises(FileNotFoundError, match="no image file at"):
            predictor.embed_images(tmp_path / "nothing.png", num_workers=num_workers)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_a_picture_of_a_hundred_megapixels(self, predictor):
        stream = io.BytesIO()
        Image.new("1", (10_000, 10_000)).save(stream, "PNG")
        with pytest.raises(ValueError, match="100000000 pixels, the limit is 64000000"):
            predictor.embed_images(stream.getvalue())


PIXELS = torch.zeros(2, 3, 20, 20)
IDS = torch.tensor([[0, 5, 2], [0, 6, 2]])
PICTURE = Image.new("RGB", (24, 24))

# What a user slips on, and the words that the answer has: what was given, and what was expected.
SLIPS = {
    "no image": (
        lambda model: model.embed_images(None),
        "images is None",
        "image .* or a list of images",
    ),
    "a number": (lambda model: model.embed_images(5), "images is 5", "path, URL, bytes"),
    "a table": (
        lambda model: model.embed_images({"a.png": 1}),
        "images is {'a.png': 1}",
        "list of images",
    ),
    "no text": (
        lambda model: model.embed_texts(None),
        "texts is None",
        "a text or a list of texts",
    ),
    "an image as text": (
        lambda model: model.embed_texts(PICTURE),
        "texts is of type Image",
        "list of texts",
    ),
    "images as texts": (
        lambda model: model.embed_texts([PICTURE]),
        "text 0 is a Image",
        "a string",
    ),
    "bytes as text": (
        lambda model: model.embed_texts(b"a bar"),
        "texts is of type bytes",
        "list of texts",
    ),
    "no image in a list": (
        lambda model: model.embed_images([PICTURE, None]),
        "image 1: .* NoneType",
        "a path",
    ),
    "pair exchanged": (
        lambda model: model.embed_pairs("a bar", PICTURE),
        "texts is of type Image",
        "list of texts",
    ),
    "pairs exchanged": (
        lambda model: model.match(TEXTS[:1], [PICTURE]),
        "text 0 is a Image",
        "a string",
    ),
    "batch as text": (
        lambda model: model.embed_texts("a", batch_size="8"),
        "batch_size is '8'",
        "at least 1",
    ),
    "batch of 0": (
        lambda model: model.match(PICTURE, "a", batch_size=0),
        "batch_size is 0",
        "at least 1",
    ),
    "batch of True": (
        lambda model: model.embed_texts("a", batch_size=True),
        "batch_size is True",
        "whole number",
    ),
    "half a batch": (
        lambda model: model.embed_texts("a", batch_size=0.5),
        "batch_size is 0.5",
        "whole number",
    ),
    "workers below 0": (
        lambda model: model.embed_images(PICTURE, num_workers=-1),
        "num_workers is -1",
        "at least 0",
    ),
    "truncate": (
        lambda model: model.embed_texts("a", truncate="no"),
        "truncate is 'no'",
        "True or False",
    ),
    "no answers": (lambda model: model.answer(PICTURE, "a?", top=0), "top is 0", "at least 1"),
    "no classes": (
        lambda model: model.classify(PICTURE, labels=["a", "b"], top=0),
        "top is 0",
        "at least 1",
    ),
    "top as text": (
        lambda model: model.fill_mask(PICTURE, "<mask>", top="1"),
        "top is '1'",
        "whole number",
    ),
    "no memory": (
        lambda model: model.match(PICTURE, "a", memory_gib=0),
        "memory_gib is 0",
        "a number above 0",
    ),
    "memory unknown": (
        lambda model: model.match(PICTURE, "a", memory_gib=torch.nan),
        "memory_gib is nan",
        "above 0",
    ),
    "one label": (
        lambda model: model.classify(PICTURE, labels="cat"),
        "labels is 'cat'",
        "a list of texts",
    ),
    "labels of numbers": (
        lambda model: model.classify(PICTURE, labels=[1, 2]),
        r"labels is \[1, 2\]",
        "list of texts",
    ),
    "labels once": (
        lambda model: model.classify(PICTURE, labels=map(str, "ab")),
        "labels is of type map",
        "a list",
    ),
    "a template": (
        lambda model: model.classify(PICTURE, labels=["a", "b"], templates="{}"),
        "templates is '{}'",
        "a list of texts",
    ),
    "layers listed": (
        lambda model: model.hidden_states(PICTURE, "a", layers=[1]),
        r"layers is \[1\]",
        "'fusion': ",
    ),
    "layers of no part": (
        lambda model: hidden_states(model.model, PIXELS, IDS, layers={"visoin": [1]}),
        "layers is {'visoin': .*}",
        "such as {'vision'",
    ),
    "one layer": (
        lambda model: hidden_states(model.model, PIXELS, IDS, layers={"text": 1}),
        "layers is {'text': 1}",
        "'text': ",
    ),
    "states of one image": (
        lambda model: hidden_states(model.model, PIXELS[0], IDS),
        r"pixel_values is Tensor of float32 \[3, 20, 20\]",
        "b 3 h w",
    ),
    "explain exchanged": (
        lambda model: explain(model, "a bar", PICTURE),
        "text is of type Image",
        "a text",
    ),
    "explain a name": (
        lambda model: explain("demo", PICTURE, "a bar"),
        "predictor is 'demo'",
        "Predictor",
    ),
    "explain a method": (
        lambda model: explain(model, PICTURE, "a bar", method="grad"),
        "method is 'grad'",
        "attention, gradcam",
    ),
    "one unbatched image": (
        lambda model: model.model(PIXELS[0], IDS),
        r"\[3, 20, 20\]",
        r"\[images, 3, height",
    ),
    "channels last": (
        lambda model: model.model(PIXELS.permute(0, 2, 3, 1), IDS),
        r"\[2, 20, 20, 3\]",
        r"\[images, 3",
    ),
    "one unbatched text": (
        lambda model: model.model(PIXELS, IDS[0]),
        r"input_ids .* \[3\]",
        r"\[texts, tokens\]",
    ),
    "tokens of another model": (
        lambda model: model.model(PIXELS, IDS + 50_000),
        "50000 to 50006",
        "expected 0 to ",
    ),
    "tokens below 0": (
        lambda model: model.model.encode_text(IDS - 7),
        "-7 to -1",
        "expected 0 to ",
    ),
    "what is prepared": (lambda model: model.processor(5), "images is 5", "list of images"),
    "nothing to load": (lambda model: load(""), "source is ''", "a hub id, a folder"),
    "load None": (lambda model: load(None), "source is None", "a hub id, a folder"),
    "no such precision": (
        lambda model: load("a/b", precision="bf61"),
        "precision is 'bf61'",
        "fp32, bf16",
    ),
    "no such engine": (
        lambda model: load("a/b", engine="tensorrt"),
        "engine is 'tensorrt'",
        "auto, torch",
    ),
    "a GPU that is not there": (
        lambda model: load("a/b", device=99),
        "device is 'cuda:99'",
        "use another or cpu",
    ),
    "items that are none": (
        lambda model: model.compute(None),
        "items is None",
        "a list of items",
    ),
    "a text as items": (
        lambda model: model.compute("a cat"),
        "items is 'a cat'",
        "a list of items",
    ),
    "pairs as items": (
        lambda model: model.compute([(PICTURE, "a cat")]),
        "items is ",
        "a list of items",
    ),
    "save to a store": (lambda model: model.save("s3://a/b"), "s3:/a/b is a URL", "a path"),
    "read nothing": (lambda model: read_checkpoint(""), "source is ''", "a hub id, a folder"),
}


class TestSlips:
    @pytest.mark.parametrize(("call", "given_text", "expected"), SLIPS.values(), ids=SLIPS)
    def test_are_answered_in_a_line_that_says_what_was_expected(
        self, predictor, call, given_text, expected
    ):
        with pytest.raises(ValueError, match=f"^[^\n]*{given_text}[^\n]*{expected}[^\n]*$"):
            call(predictor)

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (
                lambda model: model.embed_pairs(PICTURE, "a", batchsize=8),
                r"embed_pairs\(\) .*did you mean batch_size\?",
            ),
            (
                lambda model: model.match(PICTURE, "a", threads=8),
                r"match\(\) has no argument threads; it has all_pairs",
            ),
            (
                lambda model: model.embed_texts("a", truncated=True),
                r"embed_texts\(\) .*did you mean truncate\?",
            ),
            (
                lambda model: load("none/none", percision="bf16"),
                r"load\(\) .*did you mean precision\?",
            ),
            (lambda model: load(".", percision="bf16"), r"load\(\) .*did you mean precision\?"),
            (
                lambda model: model.embed_texts(),
                "embed_texts.* missing 1 required positional argument: 'texts'",
            ),
        ],
    )
    def test_unknown_arguments_are_named_with_the_public_method(self, predictor, call, words):
        with pytest.raises(TypeError, match=f"^[^\n]*{words}[^\n]*$"):
            call(predictor)

    def test_a_name_that_is_too_long_is_cut(self):
        with pytest.raises(FileNotFoundError, match=r"^x{60}… does not exist; expected a folder"):
            load("x" * 100_000)

    def test_a_text_in_the_place_of_an_image_is_no_path(self, predictor):
        for text in ("a cat on a mat", "a cat on a mat " * 400):
            with pytest.raises(
                FileNotFoundError, match=r"^no image file at a cat.*no URL and no image[^\n]*$"
            ):
                predictor.embed_images(text)

    def test_a_list_of_answers_that_is_not_there(self, tiny_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"no file nope\.json; check the path"):
            load(tiny_checkpoint, answers="nope.json")

    def test_right_calls_go_through(self, predictor, picture_files):
        expected = predictor.embed_images(picture_files)
        for images in ((path for path in picture_files), tuple(picture_files), iter(picture_files)):
            assert torch.equal(predictor.embed_images(images, batch_size=np.int64(32)), expected)
        vectors = predictor.embed_texts(TEXTS)
        for texts in (
            (text for text in TEXTS),
            tuple(TEXTS),
            np.array(TEXTS),
            dict.fromkeys(TEXTS).keys(),
        ):
            assert torch.equal(predictor.embed_texts(texts, truncate=np.True_), vectors)
        scores = predictor.match(picture_files, TEXTS, all_pairs=True, memory_gib=np.float32(1))
        assert torch.equal(
            predictor.match(iter(picture_files), iter(TEXTS), all_pairs=True, memory_gib=1), scores
        )
        choices = predictor.classify(picture_files, labels=["a", "b"], templates=("{}",))
        assert (
            predictor.classify(iter(picture_files), labels=np.array(["a", "b"]), templates=["{}"])
            == choices
        )
        layers = {"fusion": range(1, 2), "text": np.array([1])}
        assert set(predictor.hidden_states(picture_files, TEXTS, layers=layers).text) == {1}


class TestEngines:
    def test_give_the_same_results(self, exported, predictor, picture_files):
        pytest.importorskip("onnxruntime")
        other = load(exported, engine="onnxruntime")
        assert not isinstance(other.engine, TorchEngine)
        for actual, expected in zip(
            all_results(other, picture_files, batch_size=2),
            all_results(predictor, picture_files),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
        ours, theirs = (
            model.fill_mask(picture_files[0], "a <mask> bar") for model in (other, predictor)
        )
        assert [word.word for word in ours[0]] == [word.word for word in theirs[0]]
        assert torch.equal(
            pickle.loads(pickle.dumps(other)).match(picture_files, TEXTS),
            other.match(picture_files, TEXTS),
        )

    def test_another_image_size_is_another_export(self, exported, tmp_path, monkeypatch):
        def exporting(checkpoint, cache, *_, **__):
            assert (checkpoint.config.vision.image_size, cache) == (40, tmp_path)
            raise NotImplementedError

        monkeypatch.setattr(engine, "cached_export", exporting)
        with pytest.raises(NotImplementedError):
            load(exported, engine="onnxruntime", cache=tmp_path, image_size=40)


class TestLoad:
    def test_fast_decoding_is_another_preprocessing(self, tiny_checkpoint, predictor, tmp_path):
        fast = load(tiny_checkpoint, device="cpu", fast_decode=True)
        assert fast.fingerprint != predictor.fingerprint
        Image.radial_gradient("L").resize((600, 400)).save(tmp_path / "large.jpg")
        off = (
            fast.embed_images(tmp_path / "large.jpg")
            - predictor.embed_images(tmp_path / "large.jpg")
        ).abs()
        assert 0 < off.max() < 0.05

    def test_a_checkpoint(self, tiny_checkpoint):
        predictor = bridgetower.load(tiny_checkpoint)
        assert predictor.source == str(tiny_checkpoint)
        assert not predictor.model.training
        assert not any(parameter.requires_grad for parameter in predictor.model.parameters())
        checkpoint = replace(read_checkpoint(tiny_checkpoint), processor=None)
        with pytest.raises(ValueError, match=r"has no preprocessing; expected processor\.json"):
            Predictor(checkpoint, TorchEngine(checkpoint.model(), CPU))


@pytest.mark.parametrize(
    ("cosine", "match", "order"),
    [
        ([0.1, 0.9, 0.5], [torch.nan, torch.nan, torch.nan], [1, 2, 0]),
        ([0.1, 0.9, 0.5], [0.2, 0.1, torch.nan], [0, 1, 2]),
        (
            [0.1, 0.9, 0.5, 0.7],
            [-5.0, torch.nan, -5.0, torch.nan],
            [2, 0, 1, 3],
        ),  # equal scores: by cosine
        ([0.5, 0.5, 0.5], [torch.nan, 0.3, torch.nan], [1, 0, 2]),
        ([], [], []),
    ],
)
def test_what_was_matched_comes_first_then_the_nearest(cosine, match, order):
    assert two_stage_order(torch.tensor(cosine), torch.tensor(match)).tolist() == order


def test_queries_are_ranked_each_on_its_own():
    generator = torch.Generator().manual_seed(0)
    cosine, match = torch.rand(2, 4, 6, generator=generator).unbind()
    match[match < 0.5] = torch.nan
    rows = [two_stage_order(*row) for row in zip(cosine, match, strict=True)]
    assert torch.equal(two_stage_order(cosine, match), torch.stack(rows))
