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


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_weights_without_their_folder(name: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / name, {"weight": torch.ones(2)})
    with pytest.raises(ValueError, match="weights without their config; pass its folder, ") as caught:
        predictor.load(tmp_path / name)
    assert str(caught.value).endswith(str(tmp_path))


class TestBytes:
    @pytest.mark.parametrize("kept", [0, 100, -1])
    @pytest.mark.parametrize(
        ("kind", "file"),
        [("own", "model.safetensors"), ("own", "carried.safetensors"), ("safe", "model.safetensors")],
    )
    def test_truncated_safetensors(self, request: pytest.FixtureRequest, kind: str, file: str, kept: int) -> None:
        folder: Path = request.getfixturevalue(kind)
        (folder / file).write_bytes((folder / file).read_bytes()[:kept])
        with pytest.raises(ValueError, match=f"{file} is not a whole safetensors file"):
            read_checkpoint(folder)

    @pytest.mark.parametrize("kept", [0, 100, -1])
    def test_truncated_bin(self, pickled: Path, kept: int) -> None:
        file = pickled / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            read_checkpoint(pickled)

    @pytest.mark.parametrize("kept", [0, 100, -1])
    def test_truncated_ckpt(self, tmp_path: Path, kept: int) -> None:
        file = official.make().save(tmp_path / "model.ckpt")
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"model\.ckpt"):
            read_checkpoint(file, overrides=official.OVERRIDES)

    def test_missing_shard(self, sharded: Path) -> None:
        next(sharded.glob("model-00002-*.safetensors")).unlink()
        with pytest.raises(FileNotFoundError, match=r"model-00002-.* is missing"):
            read_checkpoint(sharded)

    def test_shard_outside_the_folder(self, sharded: Path, safe: Path) -> None:
        (safe / "model.safetensors").rename(sharded.parent / "x.safetensors")
        index = sharded / "model.safetensors.index.json"
        edit_json(index, lambda values: values["weight_map"].update({QUERY: "../x.safetensors"}))
        with pytest.raises(ValueError, match=r"points to \.\./x\.safetensors, outside its folder"):
            read_checkpoint(sharded)

    def test_a_shard_that_is_not_listed_is_not_read(self, sharded: Path) -> None:
        index = sharded / "model.safetensors.index.json"
        left = json.loads(index.read_text())["weight_map"]["mlm_score.bias"]
        edit_json(
            index,
            lambda values: values.update(
                weight_map={name: shard for name, shard in values["weight_map"].items() if shard != left}
            ),
        )
        with pytest.raises(ValueError, match="lacks tensors"):
            read_checkpoint(sharded)


class TestTensors:
    def test_renamed(self, safe: Path) -> None:
        edit_weights(safe, lambda tensors: rename(tensors, QUERY, QUERY + "s"))
        with pytest.raises(ValueError, match=rf"safe lacks tensors: {QUERY}$"):
            read_checkpoint(safe)

    def test_extra(self, safe: Path) -> None:
        edit_weights(safe, lambda tensors: tensors.update(mystery=torch.rand(1)))
        with pytest.raises(ValueError, match=r"safe has unknown tensors: mystery$"):
            read_checkpoint(safe)

    def test_missing(self, own: Path) -> None:
        edit_weights(own, lambda tensors: tensors.pop("fusion.text_norm.bias"))
        with pytest.raises(ValueError, match=r"own lacks tensors: fusion\.text_norm\.bias$"):
            read_checkpoint(own)

    @pytest.mark.parametrize("shape", [(47, 48), (48, 47), (48,), (48, 48, 1), ()], ids=str)
    def test_wrong_shape(self, safe: Path, shape: tuple[int, ...]) -> None:
        """Also of a part of what is one matrix here."""
        edit_weights(safe, lambda tensors: tensors.update({QUERY: torch.rand(shape)}))
        with pytest.raises(ValueError, match="safe has wrongly shaped tensors") as caught:
            read_checkpoint(safe)
        assert f"{QUERY} {list(shape)} (expected [48, 48])" in str(caught.value)

    def test_several_at_once(self, own: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            del tensors["fusion.text_norm.bias"], tensors["vision.class_embedding"]

        edit_weights(own, change)
        with pytest.raises(ValueError, match=r"lacks tensors: fusion\.text_norm\.bias, vision\.class_embedding$"):
            read_checkpoint(own)

    def test_values_that_are_no_tensors(self, pickled: Path) -> None:
        file = pickled / "pytorch_model.bin"
        torch.save({**torch.load(file), QUERY: [1.0, 2.0], "other": None}, file)
        with pytest.raises(
            ValueError, match=f"pytorch_model.bin holds {QUERY}, other, which are no named, dense tensors"
        ):
            read_checkpoint(pickled)


class TestConfigs:
    @pytest.mark.parametrize("kind", ["own", "safe"])
    @pytest.mark.parametrize("content", ["", "{", "[]", "null"])
    def test_broken_json(self, request: pytest.FixtureRequest, kind: str, content: str) -> None:
        folder: Path = request.getfixturevalue(kind)
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|holds a)"):
            read_checkpoint(folder)

    @pytest.mark.parametrize("model_type", ["bert", None, "BridgeTower"])
    def test_unknown_model_type(self, safe: Path, model_type: str | None) -> None:
        edit_json(safe / "config.json", lambda values: values.update(model_type=model_type))
        with pytest.raises(ValueError, match=f"safe is of model type {model_type!r}; expected 'bridgetower' .*--text"):
            read_checkpoint(safe)

    @pytest.mark.parametrize("version", [0, 2, None, "1"])
    def test_unknown_format_version(self, own: Path, version: Any) -> None:
        edit_json(own / "config.json", lambda values: values.update(version=version))
        with pytest.raises(ValueError, match=f"own is of format version {version}; this release reads 1"):
            read_checkpoint(own)

    def test_unknown_field(self, own: Path) -> None:
        edit_json(own / "config.json", lambda values: values["model"]["fusion"].update(colour="red"))
        with pytest.raises(ValueError, match=r"model config\.fusion has unknown fields \['colour'\]"):
            read_checkpoint(own)

    @pytest.mark.parametrize("value", [None, 3, "x", []])
    def test_no_fields(self, own: Path, value: Any) -> None:
        edit_json(own / "config.json", lambda values: values.update(model=value))
        with pytest.raises(ValueError, match="model config is"):
            read_checkpoint(own)

    def test_no_model(self, own: Path) -> None:
        edit_json(own / "config.json", lambda values: values.pop("model"))
        with pytest.raises(ValueError, match=r"config\.json has no model"):
            read_checkpoint(own)

    @pytest.mark.parametrize("value", ["48", None, [48], {}])
    def test_a_value_of_the_wrong_type(self, own: Path, value: Any) -> None:
        edit_json(own / "config.json", lambda values: values["model"]["text"].update(hidden_size=value))
        with pytest.raises(ValueError, match=r"model config\.text\.hidden_size is .*; expected int$"):
            read_checkpoint(own)

    def test_an_impossible_value(self, own: Path) -> None:
        edit_json(own / "config.json", lambda values: values["model"]["text"].update(num_heads=5))
        with pytest.raises(ValueError, match=r"text\.hidden_size 48 is not a multiple of text\.num_heads 5"):
            read_checkpoint(own)

    @pytest.mark.parametrize(
        ("part", "change", "reason"),
        [
            (None, {"share_link_tower_layers": True}, "share_link_tower_layers is true"),
            (None, {"link_tower_type": "multiply"}, "link_tower_type is 'multiply'"),
            (None, {"hidden_act": "silu"}, "hidden_act is silu, not one of gelu, gelu_new"),
            (None, {"hidden_size": 64}, "hidden_size 64 differs from the text tower's"),
            ("text_config", {"hidden_act": "tanh"}, "hidden_act is tanh, not one of"),
            ("vision_config", {"remove_last_layer": True}, "image tower is shallower"),
            ("vision_config", {"num_hidden_layers": 2}, "image tower is shallower"),
        ],
    )
    def test_what_is_not_supported(self, safe: Path, part: str | None, change: dict[str, Any], reason: str) -> None:
        edit_json(safe / "config.json", lambda values: (values if part is None else values[part]).update(change))
        with pytest.raises(ValueError, match=f"a model that is not supported: .*{reason}"):
            read_checkpoint(safe)

    def test_an_image_that_is_not_square(self, safe: Path) -> None:
        edit_json(safe / "config.json", lambda values: values["vision_config"].update(image_size=[32, 64]))
        with pytest.raises(ValueError, match="is not square"):
            read_checkpoint(safe)

    def test_a_square_given_as_two_sides(self, safe: Path) -> None:
        edit_json(safe / "config.json", lambda values: values["vision_config"].update(image_size=[32, 32]))
        assert read_checkpoint(safe).config.vision.image_size == 32

    def test_more_fusion_layers_than_tower_layers(self, safe: Path) -> None:
        edit_json(safe / "config.json", lambda values: values.update(num_hidden_layers=5))
        with pytest.raises(ValueError, match="expected increasing layers between 1 and 3"):
            read_checkpoint(safe)

    def test_a_config_that_names_only_what_differs(self, safe: Path) -> None:
        """The defaults are those of transformers."""

        def shorten(values: dict[str, Any]) -> None:
            for name in ("layer_norm_eps", "link_tower_type", "share_link_tower_layers", "contrastive_hidden_size"):
                del values[name]
            for name in ("layer_norm_eps", "pad_token_id", "type_vocab_size", "hidden_dropout_prob"):
                del values["text_config"][name]
            del values["vision_config"]["layer_norm_eps"], values["vision_config"]["patch_size"]

        expected = read_checkpoint(safe).config
        edit_json(safe / "config.json", shorten)
        assert read_checkpoint(safe).config == expected.override({"heads.itc_size": 512})


class TestMalice:
    @staticmethod
    def poison(file: Path, place: Callable[[dict[str, Any], Payload], object], trace: Path) -> None:
        content = torch.load(file, weights_only=True)
        place(content, Payload(trace))
        torch.save(content, file)

    def test_bin(self, pickled: Path, tmp_path: Path) -> None:
        file, trace = pickled / "pytorch_model.bin", tmp_path / "trace"
        self.poison(file, lambda content, payload: content.update({QUERY: payload}), trace)
        for read in (read_checkpoint, predictor.load):
            with pytest.raises(ValueError, match=r"pytorch_model\.bin was refused"):
                read(pickled)
        assert not trace.exists()

    @pytest.mark.parametrize("key", ["state_dict", "hyper_parameters", "callbacks"])
    def test_ckpt(self, tmp_path: Path, key: str) -> None:
        file, trace = official.make().save(tmp_path / "model.ckpt"), tmp_path / "trace"
        self.poison(file, lambda content, payload: content[key].update(payload=payload), trace)
        for read in (read_checkpoint, predictor.load):
            with pytest.raises(ValueError, match=r"model\.ckpt was refused"):
                read(file, overrides=official.OVERRIDES)
        assert not trace.exists()

    def test_safetensors_win_over_a_pickle_beside_them(self, pickled: Path, tmp_path: Path) -> None:
        """And the pickle is not opened at all."""
        file, trace = pickled / "pytorch_model.bin", tmp_path / "trace"
        tensors = {name: value for name, value in torch.load(file).items() if not name.endswith("_ids")}
        write_safetensors(pickled / "model.safetensors", tensors)
        self.poison(file, lambda content, payload: content.update(payload=payload), trace)
        read_checkpoint(pickled)
        assert not trace.exists()

    def test_control_the_payload_works(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        torch.save({"payload": Payload(trace)}, tmp_path / "x.bin")
        torch.load(tmp_path / "x.bin", weights_only=False)["payload"].close()
        assert trace.exists()
