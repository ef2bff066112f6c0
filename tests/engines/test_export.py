"""Exported folders: whole checkpoints, written once per content, and refused when something in them was changed."""

import json
import logging
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file
from torch import nn

from bridgetower import Extensions
from bridgetower.checkpoints import Checkpoint, Reranking, read_checkpoint, update_weights
from bridgetower.engines import export
from bridgetower.engines.config import FormSpec
from bridgetower.engines.export import (
    MANIFEST,
    cached_export,
    content_key,
    exported_model,
    is_exported,
    products_overflow,
    tensor_ranges,
    weights_fingerprint,
    write_exported,
    write_graph,
    write_int8_graph,
)
from bridgetower.engines.parts import ExportedPart, Runner
from bridgetower.extras import load_object
from bridgetower.model import cpu
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.extensions import NO_EXTENSIONS
from helpers import custom_modules
from helpers.models import changed_config, same_tensors


@pytest.fixture
def copied_folder(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture
def checkpoint(exported, monkeypatch):
    """A checkpoint whose graphs, which hold no weights, are copied instead of exported again."""

    def copy(folder, path):
        shutil.copy(exported / path.name, path)

    monkeypatch.setattr(export, "write_graph", copy)
    monkeypatch.setitem(export.WRITERS, "onnx", copy)
    return read_checkpoint(exported)


def part_of(module, inputs, *names):
    """What is exported of a small module, as of a part of a model, which takes seconds."""
    return SimpleNamespace(
        exported=lambda: torch.export.export(module, (inputs,)),
        dynamic=["inputs"],
        output_names=names,
    )


class TestWriting:
    def test_is_a_checkpoint_with_the_largest_differences(self, exported, tiny_checkpoint):
        ours = read_checkpoint(exported)
        source = read_checkpoint(tiny_checkpoint)
        assert ours.config == source.config
        assert same_tensors(ours.tensors, source.tensors)
        assert ours.processor is not None
        assert is_exported(exported, "openvino", "onnx")
        assert not is_exported(exported, "onnxruntime", "onnx-int8")
        assert not is_exported(tiny_checkpoint, "openvino", "onnx")
        differences = json.loads((exported / MANIFEST).read_text())["largest_difference"]
        assert differences.keys() == {"onnxruntime", "openvino"}
        for by_graph in differences.values():
            assert len(by_graph) == 6
            assert all(0 <= difference < 2e-5 for difference in by_graph.values())

    def test_files_of_openvino(self, checkpoint, exported, tmp_path):
        """Files run without the weights beside them, and a changed one is refused."""
        import openvino

        write_exported(checkpoint, tmp_path / "model", "openvino")
        files = {path.name for path in (tmp_path / "model").iterdir()}
        assert {
            f"{graph}.{suffix}"
            for graph in ("image", "text", "fusion_pooled")
            for suffix in ("xml", "bin")
        } < files
        assert not any(name.endswith(".onnx") for name in files)
        assert is_exported(tmp_path / "model", "openvino", "onnx")
        assert not is_exported(tmp_path / "model", "onnxruntime", "onnx")
        graph = ExportedPart(exported_model(tmp_path / "model", NO_EXTENSIONS), "image_cls")
        alone = Path(shutil.move(tmp_path / "model" / "image_cls.xml", tmp_path))
        shutil.move(tmp_path / "model" / "image_cls.bin", tmp_path)
        output = openvino.Core().compile_model(alone, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
            [value.numpy() for value in graph.inputs]
        )[0]
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(output), graph(*graph.inputs)[0], atol=1e-5, rtol=1e-4
            )
        with pytest.raises(FileNotFoundError, match=r"image_cls\.bin is missing"):
            exported_model(tmp_path / "model", NO_EXTENSIONS)

    def test_refuses_a_folder_in_use(self, exported, checkpoint):
        with pytest.raises(FileExistsError, match="is not empty"):
            write_exported(checkpoint, exported)

    def test_leaves_nothing_where_an_engine_differs(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setitem(export.FORMS, "onnx", FormSpec(tolerance=1e-12))
        with pytest.raises(ValueError, match=r"part image in onnxruntime differs .* at most 1e-12"):
            write_exported(checkpoint, tmp_path / "model")
        assert list(tmp_path.iterdir()) == []


class TestGraphs:
    def test_name_ranges_of_the_weights_and_hold_none(self, exported):
        weights = exported / "model.safetensors"
        content = weights.read_bytes()
        tensors = load_file(weights)
        ranges = tensor_ranges(weights)
        assert ranges.keys() == tensors.keys()
        for name, (offset, length) in ranges.items():
            assert content[offset : offset + length] == tensors[name].numpy().tobytes()
        graphs = [path.read_bytes() for path in exported.glob("*.onnx")]
        assert len(graphs) == 6
        assert not any(
            tensors["text.word_embedding.weight"][3].numpy().tobytes() in graph for graph in graphs
        )
        assert not any(b".py" in graph for graph in graphs)  # nor names of this machine
        for name in ("image", "text", "fusion_pooled"):
            kinds = Counter(
                node.op_type
                for node in onnx.load(
                    exported / f"{name}.onnx", load_external_data=False
                ).graph.node
            )
            assert kinds["Softmax"] > 1
            assert kinds["IsNaN"] == 0  # with which engines do not see attention
            # Projections are split in their weights, but for a last layer, which reads pieces of its own.
            assert kinds["Split"] == (2 if name == "fusion_pooled" else 0)

    def test_only_even_splits_of_the_last_axis_become_splits_of_weights(self, tmp_path):
        """Also of weights that are equal, which a graph holds once."""

        class Splits(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = nn.ModuleList([nn.Linear(5, 6), nn.Linear(5, 6)])
                self.model[1].bias.data.copy_(self.model[0].bias)

            def forward(self, inputs):
                first, second = self.model
                pieces = first(inputs).split([2, 4], -1), first(inputs).chunk(2, 1)
                pieces += first(inputs).chunk(2, -1), second(inputs).chunk(2, -1)
                return tuple(2 * piece for group in pieces for piece in group)

        module = Splits()
        inputs = torch.randn(2, 4, 5)
        split_graph = part_of(module, inputs, *(f"piece{number}" for number in range(8)))
        save_file(module.model.state_dict(), tmp_path / "model.safetensors")
        write_graph(split_graph, tmp_path / "text.onnx")
        graph = onnx.load(tmp_path / "text.onnx", load_external_data=False).graph
        assert [node.op_type for node in graph.node].count("Split") == 2
        outputs = Runner("onnxruntime", tmp_path, "fp32").run("text", [inputs])
        torch.testing.assert_close(
            outputs, [piece.detach() for piece in module(inputs)], atol=1e-6, rtol=0
        )

    def test_rely_on_a_layout(self, tmp_path):
        """Of names, formats and shapes, whatever the values."""
        layouts = []
        for tensors in (
            {"a": torch.ones(2, 3), "b": torch.ones(4)},
            {"a": torch.zeros(2, 3), "b": torch.ones(4)},
            {"a": torch.ones(3, 2), "b": torch.ones(4)},
            {"a": torch.ones(2, 3), "c": torch.ones(4)},
            {"a": torch.ones(2, 3), "b": torch.ones(8, dtype=torch.float16)},
        ):
            save_file(tensors, tmp_path / "model.safetensors")
            layouts.append(weights_fingerprint(tmp_path, "onnx"))
        assert layouts[0] == layouts[1]
        assert len(set(layouts)) == 4


class TestInt8:
    """Weights are signed where the processor has VNNI, as their products would overflow elsewhere."""

    @pytest.fixture
    def processor(self, tmp_path, monkeypatch):
        """Makes this one of x86 with some flags."""
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setattr(cpu, "_CPU_INFO", tmp_path / "cpuinfo")
        return lambda flags: (
            (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu sse2 {flags}\n") and None
        )

    def test_which_processors_overflow(self, processor):
        assert products_overflow()  # nothing is known of it yet
        for flags, overflow in (
            ("avx2", True),
            ("avx2 avx_vnni", False),
            ("avx512f avx512_vnni", False),
        ):
            processor(flags)
            assert products_overflow() == overflow

    def test_weights_have_the_right_sign_and_a_scale_for_each_output_channel(
        self, int8, tmp_path, monkeypatch
    ):
        signed = not products_overflow()
        other = tmp_path / "other.onnx"
        layers = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
        monkeypatch.setattr(export, "products_overflow", lambda: signed)
        write_int8_graph(part_of(layers, torch.randn(2, 5), "outputs"), other)
        for path, is_signed in (
            *((path, signed) for path in int8.glob("*.onnx")),
            (other, not signed),
        ):
            held = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
            weights = {name: held[name] for name in held if name.endswith("_quantized")}
            assert {stored.data_type for stored in weights.values()} == {
                TensorProto.INT8 if is_signed else TensorProto.UINT8
            }
            assert len(weights) > 3
            for name, weight in weights.items():
                scale = onnx.numpy_helper.to_array(held[name.removesuffix("_quantized") + "_scale"])
                assert scale.shape == (weight.dims[-1],)
                assert len(set(scale.tolist())) > 1

    def test_signed_ones_are_refused_where_they_overflow(self, int8, tmp_path, processor):
        shutil.copytree(int8, tmp_path / "model")
        manifest = json.loads((int8 / MANIFEST).read_text())
        (tmp_path / "model" / MANIFEST).write_text(json.dumps(manifest | {"signed": True}))
        processor("avx_vnni")
        exported_model(tmp_path / "model", NO_EXTENSIONS)
        processor("avx2")
        with pytest.raises(ValueError, match="for processors with VNNI"):
            exported_model(tmp_path / "model", NO_EXTENSIONS)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _other_version(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 9}))


def _half(path):
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "damage", "message"),
        [
            ("fusion_pooled.onnx", _cut, r"fusion_pooled.onnx is not what was exported"),
            ("text.onnx", Path.unlink, "text.onnx is missing; export the model again"),
            ("export.json", _other_version, "was exported as version 9; this release reads 3"),
            ("export.json", _cut, "is not valid JSON"),
            ("model.safetensors", _half, "is not what its parts were exported of"),
            ("model.safetensors", Path.unlink, "model.safetensors"),
            ("config.json", Path.unlink, "has no config.json"),
        ],
    )
    def test_is_refused(self, copied_folder, name, damage, message):
        damage(copied_folder / name)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            exported_model(copied_folder, NO_EXTENSIONS)

    def test_other_weights_of_the_same_layout_are_run(self, copied_folder):
        checkpoint = read_checkpoint(copied_folder)
        doubled = {name: 2 * tensor for name, tensor in checkpoint.tensors.items()}
        ids = torch.tensor([[0, 5, 2]])
        mask = torch.ones(1, 3, dtype=torch.int64)
        update_weights(replace(checkpoint, tensors=doubled), copied_folder)
        expected = exported_model(copied_folder, NO_EXTENSIONS).encode_text(ids, mask).cls
        output = Runner("onnxruntime", copied_folder, "fp32").run("text", [ids, mask])[-1]
        torch.testing.assert_close(output, expected.detach(), atol=2e-5, rtol=0)


class TestCache:
    def test_exports_once_in_float32_and_says_so(self, checkpoint, tmp_path, caplog):
        half = {name: tensor.half() for name, tensor in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=half, reranking=Reranking(itc_weight=16.0))
        damaged = tmp_path / f"{content_key(checkpoint)}-onnx"
        killed = tmp_path / f".{damaged.name}.partial-killed"
        of_another = tmp_path / ".converted.partial-live"
        for leftover in (damaged, killed, of_another):
            leftover.mkdir()
        (damaged / "text.onnx").touch()
        with caplog.at_level(logging.INFO, logger="bridgetower"):
            folder, model = cached_export(checkpoint, tmp_path, "onnx")
            assert cached_export(checkpoint, tmp_path, "onnx")[0] == folder == damaged
        warning, line = [
            record.getMessage()
            for record in caplog.records
            if record.name.startswith("bridgetower")
        ]
        assert f"{folder} is damaged (no file {folder / 'export.json'}" in warning
        assert f"exporting it for this engine, once, to {folder}" in line
        assert not killed.exists()
        assert of_another.exists()
        exported = read_checkpoint(folder)
        assert {tensor.dtype for tensor in exported.tensors.values()} == {torch.float32}
        assert model.state_dict().keys() == exported.tensors.keys()
        assert exported.reranking.itc_weight == 16

    def test_key_depends_on_every_weight_the_config_and_versions_alone(
        self, checkpoint, monkeypatch
    ):
        cloned = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
        keys = [content_key(checkpoint), content_key(checkpoint.resized(40))]
        assert content_key(replace(checkpoint, source="elsewhere", tensors=cloned)) == keys[0]
        for name in ("vision.class_embedding", "itm_head.fc.bias"):
            changed = checkpoint.tensors[name].clone()
            changed[0] += 1e-6
            keys.append(
                content_key(replace(checkpoint, tensors=checkpoint.tensors | {name: changed}))
            )
        config = checkpoint.config.override({"vision.layer_norm_eps": 1e-6})
        keys.append(content_key(replace(checkpoint, config=config)))
        for package in ("bridgetower", "torch"):
            monkeypatch.setattr(sys.modules[package], "__version__", "99.0")
            keys.append(content_key(checkpoint))
        assert len(set(keys)) == 7

    def test_key_depends_on_the_code_that_own_parts_inherit(self, tmp_path):
        file = tmp_path / "own_base.py"
        file.write_text(Path(custom_modules.__file__).read_text())
        patches = load_object("extensions", f"{file}:Patches", type)

        class Tower(patches):
            pass

        config = changed_config(vision__architecture="patches")
        extensions = Extensions(vision_towers={"patches": Tower})
        tensors = BridgeTower(config, extensions).state_dict()
        checkpoint = Checkpoint(
            source="mine", config=config, tensors=tensors, extensions=extensions
        )
        key = content_key(checkpoint)
        assert content_key(checkpoint) == key
        assert (
            content_key(
                replace(checkpoint, extensions=Extensions(vision_towers={"patches": patches}))
            )
            != key
        )
        file.write_text(file.read_text().replace("torch.tanh", "torch.sin"))
        assert content_key(checkpoint) != key
