"""Damaged, foreign and malicious folders: refused with a reason, never read in part and never executed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import official
from bridgetower import predictor
from bridgetower.checkpoints import read_checkpoint
from bridgetower.checkpoints.tensors import read_safetensors, write_safetensors
from payload import Payload

QUERY = "bridgetower.text_model.encoder.layer.0.attention.self.query.weight"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in read_safetensors(path).items()}
    change(tensors)
    write_safetensors(path, tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_weights_without_their_folder(name: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / name, {"weight": torch.ones(2)})
    with pytest.raises(ValueError, match=f"weights without their config; pass its folder, {tmp_path}"):
        read_checkpoint(tmp_path / name)


class TestBytes:
    @pytest.mark.parametrize("kept", [0, 100, -1])
    @pytest.mark.parametrize(
        ("kind", "file"),
        [
            ("own", "model.safetensors"),
            ("own", "carried.safetensors"),
            ("safe", "model.safetensors"),
            ("pickled", "pytorch_model.bin"),
        ],
    )
    def test_truncated(self, request: pytest.FixtureRequest, kind: str, file: str, kept: int) -> None:
        folder: Path = request.getfixturevalue(kind)
        (folder / file).write_bytes((folder / file).read_bytes()[:kept])
        with pytest.raises(ValueError, match=f"{file} (is not a whole|was refused)"):
            read_checkpoint(folder)

    @pytest.mark.parametrize("kept", [0, 100, -1])
    def test_truncated_ckpt(self, tmp_path: Path, kept: int) -> None:
        file = official.make().save(tmp_path / "model.ckpt")
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"model\.ckpt"):
            read_checkpoint(file, overrides=official.OVERRIDES)

    def test_shards(self, sharded: Path, safe: Path) -> None:
        index = sharded / "model.safetensors.index.json"
        whole = index.read_text()
        left = json.loads(whole)["weight_map"]["mlm_score.bias"]
        listed = {name: shard for name, shard in json.loads(whole)["weight_map"].items() if shard != left}
        edit_json(index, lambda values: values.update(weight_map=listed))
        with pytest.raises(ValueError, match="lacks tensors"):  # which lie in a file that is not listed
            read_checkpoint(sharded)
        index.write_text(whole)
        (safe / "model.safetensors").rename(sharded.parent / "x.safetensors")
        edit_json(index, lambda values: values["weight_map"].update({QUERY: "../x.safetensors"}))
        with pytest.raises(ValueError, match=r"points to \.\./x\.safetensors, outside its folder"):
            read_checkpoint(sharded)
        index.write_text(whole)
        next(sharded.glob("model-00002-*.safetensors")).unlink()
        with pytest.raises(FileNotFoundError, match=r"model-00002-.* is missing"):
            read_checkpoint(sharded)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("safe", lambda it: it.update({f"{QUERY}s": it.pop(QUERY)}), rf"safe lacks tensors: {QUERY}$"),
        ("safe", lambda it: it.update(mystery=torch.rand(1)), r"safe has unknown tensors: mystery$"),
        ("own", lambda it: it.pop("fusion.text_norm.bias"), r"own lacks tensors: fusion\.text_norm\.bias$"),
        *(
            (
                "safe",
                lambda it, shape=shape: it.update({QUERY: torch.rand(shape)}),
                rf"wrongly shaped tensors: {QUERY} \[{', '.join(map(str, shape))}\] \(expected \[48, 48\]\)",
            )
            for shape in ((47, 48), (48, 47), (48,), (48, 48, 1), ())
        ),
    ],
)
def test_other_tensors(request: pytest.FixtureRequest, kind: str, change: Any, message: str) -> None:
    folder = request.getfixturevalue(kind)
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder)


class TestConfigs:
    @pytest.mark.parametrize("kind", ["own", "safe"])
    @pytest.mark.parametrize("content", ["", "{", "[]", "null"])
    def test_broken_json(self, request: pytest.FixtureRequest, kind: str, content: str) -> None:
        folder: Path = request.getfixturevalue(kind)
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|holds a)"):
            read_checkpoint(folder)

    @pytest.mark.parametrize(
        ("place", "change", "message"),
        [
            *(((), {"version": value}, f"of format version {value}; this release reads 1") for value in (0, 2, None)),
            (("model", "fusion"), {"colour": "red"}, r"model config\.fusion has unknown fields \['colour'\]"),
            *(((), {"model": value}, "model config is") for value in (None, 3, [])),
            (("model", "text"), {"hidden_size": "48"}, r"model config\.text\.hidden_size is '48'; expected int$"),
            (("model", "text"), {"num_heads": 5}, r"text\.hidden_size 48 is not a multiple of text\.num_heads 5"),
        ],
    )
    def test_of_this_package(self, own: Path, place: tuple[str, ...], change: dict[str, Any], message: str) -> None:
        def edit(values: dict[str, Any]) -> None:
            for name in place:
                values = values[name]
            values.update(change)

        edit_json(own / "config.json", edit)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(own)

    def test_without_a_model(self, own: Path) -> None:
        edit_json(own / "config.json", lambda values: values.pop("model"))
        with pytest.raises(ValueError, match=r"config\.json has no model"):
            read_checkpoint(own)

    @pytest.mark.parametrize(
        ("part", "change", "reason"),
        [
            (None, {"model_type": "bert"}, "safe is of model type 'bert'; expected 'bridgetower' .*--text"),
            (None, {"model_type": None}, "safe is of model type None"),
            (None, {"share_link_tower_layers": True}, "share_link_tower_layers is true"),
            (None, {"link_tower_type": "multiply"}, "link_tower_type is 'multiply'"),
            (None, {"hidden_act": "silu"}, "hidden_act is silu, not one of gelu, gelu_new"),
            (None, {"hidden_size": 64}, "hidden_size 64 differs from the text tower's"),
            (None, {"num_hidden_layers": 5}, "expected increasing layers between 1 and 3"),
            (None, {"num_hidden_layers": 10**9}, "less than 1 or more than 1000 layers"),
            ("text_config", {"hidden_act": "tanh"}, "hidden_act is tanh, not one of"),
            ("vision_config", {"remove_last_layer": True}, "image tower is shallower"),
            ("vision_config", {"num_hidden_layers": 2}, "image tower is shallower"),
            ("vision_config", {"image_size": [32, 64]}, "is not square"),
        ],
    )
    def test_of_transformers(self, safe: Path, part: str | None, change: dict[str, Any], reason: str) -> None:
        edit_json(safe / "config.json", lambda values: (values if part is None else values[part]).update(change))
        with pytest.raises(ValueError, match=reason):
            read_checkpoint(safe)

    def test_of_transformers_that_names_only_what_differs(self, safe: Path) -> None:
        """The defaults are those of transformers."""

        def shorten(values: dict[str, Any]) -> None:
            for name in ("layer_norm_eps", "link_tower_type", "share_link_tower_layers", "contrastive_hidden_size"):
                del values[name]
            for name in ("layer_norm_eps", "pad_token_id", "type_vocab_size", "hidden_dropout_prob"):
                del values["text_config"][name]
            del values["vision_config"]["layer_norm_eps"], values["vision_config"]["patch_size"]
            values["vision_config"]["image_size"] = [32, 32]

        expected = read_checkpoint(safe).config
        edit_json(safe / "config.json", shorten)
        assert read_checkpoint(safe).config == expected.override({"heads.itc_size": 512})


class TestMalice:
    @staticmethod
    def poison(file: Path, key: str | None, trace: Path) -> None:
        content = torch.load(file, weights_only=True)
        (content if key is None else content[key]).update({QUERY: Payload(trace)})
        torch.save(content, file)

    @pytest.mark.parametrize("key", [None, "state_dict", "hyper_parameters", "callbacks"])
    def test_pickles_are_refused(self, request: pytest.FixtureRequest, tmp_path: Path, key: str | None) -> None:
        trace = tmp_path / "trace"
        if key is None:
            source: Path = request.getfixturevalue("pickled")
            file = source / "pytorch_model.bin"
        else:
            source = file = official.make().save(tmp_path / "model.ckpt")
        self.poison(file, key, trace)
        for read in (read_checkpoint, predictor.load):
            with pytest.raises(ValueError, match=rf"{file.name} was refused"):
                read(source, overrides={} if key is None else official.OVERRIDES)
        assert not trace.exists()
        torch.load(file, weights_only=False)  # the control
        assert trace.exists()

    def test_safetensors_win_over_a_pickle_beside_them(self, pickled: Path, tmp_path: Path) -> None:
        """And the pickle is not opened at all."""
        file, trace = pickled / "pytorch_model.bin", tmp_path / "trace"
        tensors = {name: value for name, value in torch.load(file).items() if not name.endswith("_ids")}
        write_safetensors(pickled / "model.safetensors", tensors)
        self.poison(file, None, trace)
        read_checkpoint(pickled)
        assert not trace.exists()
