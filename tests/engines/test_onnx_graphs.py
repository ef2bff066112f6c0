"""Graphs name ranges of a safetensors file, and hold neither weights nor names of this machine."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridgetower.engines.onnx_graphs import layout, tensor_ranges


def test_ranges_are_those_of_the_tensors(bridges: Path) -> None:
    weights = bridges / "model.safetensors"
    content, tensors, ranges = weights.read_bytes(), load_file(weights), tensor_ranges(weights)
    assert ranges.keys() == tensors.keys()
    for name, (offset, length) in ranges.items():
        assert content[offset : offset + length] == tensors[name].numpy().tobytes()


def test_graphs_hold_no_weights(bridges: Path) -> None:
    table = load_file(bridges / "model.safetensors")["text.word_embedding.weight"]
    assert table[3].numpy().tobytes() in (bridges / "model.safetensors").read_bytes()
    graphs = [path.read_bytes() for path in bridges.glob("*.onnx")]
    assert len(graphs) == 6
    assert not any(table[3].numpy().tobytes() in graph for graph in graphs)
    assert not any(b".py" in graph for graph in graphs)


def test_int8_weights_have_a_scale_for_each_output_channel(int8: Path) -> None:
    onnx = pytest.importorskip("onnx")
    for path in int8.glob("*.onnx"):
        held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        weights = {name: held[name] for name in held if name.endswith("_quantized")}
        assert len(weights) > 3
        for name, weight in weights.items():
            scale = held[name.removesuffix("_quantized") + "_scale"]
            assert scale.shape == (weight.shape[-1],)
            assert len(set(scale.tolist())) > 1


class TestLayout:
    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, tmp_path / "weights")
        return tmp_path / "weights"

    def test_ignores_values(self, weights: Path, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, tmp_path / "others")
        assert layout(tmp_path / "others") == layout(weights)

    @pytest.mark.parametrize(
        "others",
        [
            {"a": torch.ones(3, 2), "b": torch.ones(4)},
            {"a": torch.ones(2, 3), "c": torch.ones(4)},
            {"a": torch.ones(2, 3), "b": torch.ones(8, dtype=torch.float16)},
        ],
        ids=["shape", "name", "format"],
    )
    def test_sees_all_that_a_graph_relies_on(
        self, weights: Path, tmp_path: Path, others: dict[str, torch.Tensor]
    ) -> None:
        save_file(others, tmp_path / "others")
        assert layout(tmp_path / "others") != layout(weights)
