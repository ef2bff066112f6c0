"""Exported parts give what the model gives, for every batch and text length, padded or not."""

import ctypes
import mmap
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from bridgetower.checkpoints import read_checkpoint
from bridgetower.engines import parts
from bridgetower.engines.parts import (
    ExportedPart,
    PartsEngine,
    Runner,
    SignalStack,
    kept_signal_stack,
    part_names,
    signal_stack,
)
from bridgetower.model.bridgetower import SECOND_IMAGE
from helpers.models import build_model, changed_config, max_difference, random_images, random_texts

for package in ("onnxruntime", "openvino"):
    pytest.importorskip(package)

CLOSE = {"atol": 2e-5, "rtol": 0}


def opened_engine(folder, name="onnxruntime", precision="fp32"):
    return PartsEngine(read_checkpoint(folder).model(), Runner(name, folder, precision))


@pytest.fixture(scope="module", params=["exported", "other"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(folder, request):
    return opened_engine(folder, request.param)


@pytest.fixture(scope="module")
def with_two(other):
    """Of a model that takes two images."""
    return opened_engine(other)


def engine_tensors(runs, lengths, *, padded):
    """Everything that the heads of a model can read, for as many images and texts."""
    config = (runs.model if isinstance(runs, PartsEngine) else runs).config
    ids, mask = random_texts(lengths, config, width=config.text.max_length if padded else None)
    pixel_values = random_images(len(lengths), config)
    input_mask = None if len(set(lengths)) == 1 and not padded else mask
    image = runs.encode_image(pixel_values)
    text = runs.encode_text(ids, input_mask)
    tensors = {f"image {n}": layer for n, layer in enumerate(image.layers)}
    tensors |= {f"text {n}": layer[mask.bool()] for n, layer in enumerate(text.layers)}
    tensors |= {
        "image cls": image.cls,
        "text cls": text.cls,
        "pooled": runs.fuse(image, text).pooled,
    }
    if config.heads.itc:
        tensors["image cls alone"] = runs.encode_image(pixel_values, outputs="cls").cls
        tensors["text cls alone"] = runs.encode_text(ids, input_mask, outputs="cls").cls
    if config.heads.mlm:
        tensors["stream"] = runs.fuse(image, text, outputs="text").text[mask.bool()]
    return tensors


class TestEquality:
    @torch.inference_mode()
    @pytest.mark.parametrize("lengths", [[5], [5, 3, 4], [1], [*range(1, 15)]], ids=str)
    @pytest.mark.parametrize("padded", [False, True])
    def test_with_the_model(self, engine, lengths, padded):
        ours = engine_tensors(engine, lengths, padded=padded)
        expected = engine_tensors(engine.model, lengths, padded=padded)
        assert ours.keys() == expected.keys()
        for name, reference in expected.items():
            torch.testing.assert_close(
                ours[name], reference, msg=lambda text, name=name: f"{name}: {text}", **CLOSE
            )

    @torch.inference_mode()
    def test_of_the_second_image_of_a_pair(self, with_two):
        pixel_values = random_images(2)
        ours = with_two.encode_image(pixel_values, SECOND_IMAGE)
        expected = with_two.model.encode_image(pixel_values, SECOND_IMAGE)
        torch.testing.assert_close(ours.layers, expected.layers, **CLOSE)
        assert max_difference(ours.layers[0], with_two.encode_image(pixel_values).layers[0]) > 1e-2

    @torch.inference_mode()
    def test_control_another_model_or_padding_that_is_attended_to_shows(self, with_two):
        other = build_model(with_two.model.config)
        with torch.no_grad():
            other.text.layers[0].mlp.up.bias[0] += 0.01
        ours = engine_tensors(with_two, [5, 3], padded=False)
        expected = engine_tensors(other, [5, 3], padded=False)
        assert max_difference(ours["pooled"], expected["pooled"]) > 2e-5
        assert max_difference(ours["image cls"], expected["image cls"]) < 2e-5
        ids, mask = random_texts([5, 3])
        image = with_two.encode_image(random_images(2))
        text = with_two.encode_text(ids, mask)
        unmasked = replace(text, mask=torch.ones_like(mask, dtype=torch.bool))
        right = with_two.fuse(image, text).pooled
        wrong = with_two.fuse(image, unmasked).pooled
        torch.testing.assert_close(right[0], wrong[0], **CLOSE)
        assert max_difference(right[1], wrong[1]) > 1e-3


def test_openvino_reads_keys_by_rows(exported):
    """Each product with a copy of keys becomes one without a copy."""
    import openvino

    model = openvino.Core().read_model(exported / "fusion_pooled.onnx")

    def counts():
        return Counter(
            (product.get_attributes()["transpose_b"], tuple(axes.get_vector()))
            for product in model.get_ordered_ops()
            if product.get_type_name() == "MatMul"
            and (turned := product.input_value(1).get_node()).get_type_name() == "Transpose"
            and (axes := turned.input_value(1).get_node()).get_type_name() == "Constant"
        )

    before = counts()
    parts._read_keys_by_rows(model)
    after = counts()
    assert after[True, (0, 2, 1, 3)] == before[False, (0, 2, 3, 1)] > 0
    assert after[False, (0, 2, 3, 1)] == 0


@pytest.mark.parametrize(
    ("folder", "engine", "limit"), [("exported", "openvino", 0.1), ("int8", "onnxruntime", 0.15)]
)
@torch.inference_mode()
def test_coarse_precisions_are_near_the_model_but_not_equal(request, folder, engine, limit):
    if folder == "exported" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")
    coarse = opened_engine(
        request.getfixturevalue(folder), engine, "bf16" if folder == "exported" else "int8"
    )
    ours, expected = (
        engine_tensors(runs, [5, 3, 4, 9], padded=False) for runs in (coarse, coarse.model)
    )
    for name, reference in expected.items():
        assert max_difference(ours[name], reference) < limit * reference.abs().max(), name
    assert max_difference(ours["pooled"], expected["pooled"]) > 1e-5
    states = {ours[name].dtype for name in ("image 0", "text 0")}
    assert states == {torch.bfloat16 if engine == "openvino" else torch.float32}  # between parts
    assert (
        coarse.encode_image(random_images(1, coarse.model.config), token_type=1).layers[0].dtype
        in states
    )
    assert {ours[name].dtype for name in ("image cls", "text cls", "pooled")} == {torch.float32}


@torch.inference_mode()
def test_numbers_in_int8_depend_on_the_batch(int8):
    engine = opened_engine(int8)
    (ids, mask) = random_texts([5] * 8)
    expected = engine.model.encode_text(ids[:1], mask[:1]).cls
    batch = engine.encode_text(ids, mask).cls
    alone = engine.encode_text(ids[:1], mask[:1]).cls
    assert 0.1 < max_difference(batch[:1], alone) / max_difference(alone, expected) < 10


@torch.inference_mode()
def test_used_engines_are_pickled(engine):
    pixel_values = random_images(2, engine.model.config)
    expected = engine.encode_image(pixel_values).cls
    assert torch.equal(pickle.loads(pickle.dumps(engine)).encode_image(pixel_values).cls, expected)


def test_refusals(with_two):
    with pytest.raises(
        ValueError, match="images of 32 x 32 pixels; this engine was built for 24 x 24"
    ):
        with_two.encode_image(random_images(1, size=32))
    limit = with_two.model.config.text.max_length
    for kind in ("layers", "cls"):
        with pytest.raises(
            ValueError, match=f"text of {limit + 1} tokens; the position table holds {limit}"
        ):
            with_two.encode_text(torch.full((1, limit + 1), 5), outputs=kind)
    image = with_two.encode_image(random_images(2))
    text = with_two.encode_text(*random_texts([3, 3]))
    with pytest.raises(ValueError, match='outputs="all" is not exported'):
        with_two.fuse(image, text, outputs="all")
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        with_two.fuse(image, text[:1])


class TestParts:
    def test_only_what_heads_read(self):
        all_graphs = {"image", "image_cls", "text", "text_cls", "fusion_pooled", "fusion_text"}
        assert set(part_names(build_model())) == all_graphs
        few = {"heads__itc": None, "heads__mlm": False}
        assert part_names(build_model(changed_config(**few))) == ("image", "text", "fusion_pooled")

    @torch.no_grad()
    def test_examples_of_texts_are_padded_wherever_the_pad_is(self):
        for pad in (0, 1, 30, 49):
            model = build_model(changed_config(text__pad_token_id=pad, text__positions="bert"))
            ids, mask = ExportedPart(model, "text").inputs
            assert torch.equal(ids == pad, mask == 0)
            assert 0 <= ids.min() <= ids.max() < model.config.text.vocab_size
            assert torch.equal(mask.sum(dim=1), torch.tensor([8, 4]))


@pytest.mark.skipif(
    sys.platform != "linux", reason="other systems lay the structure out in another way"
)
class TestSignals:
    """They are handled after models of OpenVINO went, in whatever order."""

    def test_a_stack_that_was_installed_meanwhile_is_not_left(self):
        before = signal_stack()
        memory = mmap.mmap(-1, size := 64 * 1024)
        other = SignalStack(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0, size)
        with kept_signal_stack():
            ctypes.CDLL(None).sigaltstack(ctypes.byref(other), None)
            assert signal_stack().address == other.address != before.address
        after = signal_stack()
        assert (after.address, after.flags, after.size) == (
            before.address,
            before.flags,
            before.size,
        )

    def test_signals_after_openvino(self, exported, forked):
        command = [forked / "python", "-c", USE, exported]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "handled 15\n"), done.stderr


USE = """
import faulthandler, os, signal, sys
from pathlib import Path
from bridgetower.engines.parts import load_openvino

faulthandler.enable()
loaded = [load_openvino(Path(sys.argv[1]) / "image.onnx", "fp32") for _ in range(2)]
del loaded[0]
del loaded[0]
signal.signal(signal.SIGTERM, lambda number, frame: print("handled", number))
os.kill(os.getpid(), signal.SIGTERM)
"""
