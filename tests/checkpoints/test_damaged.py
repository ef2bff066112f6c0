"""Damaged, foreign, malicious and absurd files: refused in one line with a reason, never read in part or executed."""

import json
import math
import resource
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from bridgetower import checkpoints
from bridgetower.checkpoints import read_checkpoint
from bridgetower.checkpoints.microsoft import Settings, read_official
from bridgetower.checkpoints.tensors import read_safetensors, read_sharded, write_safetensors
from bridgetower.data.config import DataConfig, MaskingConfig, PrepareConfig
from bridgetower.data.sets.custom import PairsConfig
from bridgetower.data.sets.store import Table
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.inference import predictor
from bridgetower.model.config import (
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from bridgetower.objectives.config import Phase, RankingConfig
from bridgetower.plain import from_plain
from bridgetower.processor import Processor
from bridgetower.search.config import IndexConfig
from bridgetower.serve.config import ServeConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig
from bridgetower_demo.toysets.scenes import ScenesConfig
from helpers.checkpoints import OFFICIAL_OVERRIDES, FilePayload, make_official

VALUES = (
    math.nan,
    -math.inf,
    -1,
    0,
    0.5,
    1e300,
    10**9,
    10**30,
    "a",
    None,
    True,
    [],
    {"a": 1},
    [1e9, math.nan, -1],
)
MEMORY = 2**30
SECONDS = 600
CONFIGS = (
    *(
        VisionConfig,
        TextConfig,
        FusionConfig,
        HeadsConfig,
        OptimizerConfig,
        RunConfig,
        Phase,
        RankingConfig,
    ),
    *(
        RetrievalConfig,
        DataConfig,
        MaskingConfig,
        PrepareConfig,
        PairsConfig,
        ScenesConfig,
        IndexConfig,
        ServeConfig,
    ),
)
WORDS = {
    "bridgetower_folder": "text.word_embedding.weight",
    "safe": "bridgetower.text_model.embeddings.word_embeddings.weight",
    "official": "text_transformer.embeddings.word_embeddings.weight",
}
QUERY = "bridgetower.text_model.encoder.layer.0.attention.self.query.weight"


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in read_safetensors(path).items()}
    change(tensors)
    write_safetensors(path, tensors)


@contextmanager
def guarded():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)

    def hangs(number, frame):
        raise TimeoutError(f"still at it after {SECONDS} seconds")

    handler = signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def altered(values):
    """Yields copies of nested values in which the whole, or a part of them at any depth, is absurd."""
    for value in VALUES:
        yield f" = {value!r}", value
    if isinstance(values, dict | list):
        for key, element in values.items() if isinstance(values, dict) else enumerate(values):
            for path, other in altered(element):
                copy = values.copy()
                copy[key] = other
                yield f".{key}{path}", copy


def problem(load):
    try:
        with guarded():
            load()
    except (ValueError, OSError) as error:
        return (
            None if "\n" not in str(error) and 0 < len(str(error)) < 3000 else f"no line: {error}"
        )
    except Exception as error:  # noqa: BLE001 - which is what is looked for
        return repr(error)
    return None


def load(folder):
    return predictor.load(folder, device="cpu")


def load_processor(folder):
    is_own_format = (folder / "processor.json").exists()
    return (
        Processor.load(folder)
        if is_own_format
        else Processor.from_huggingface(folder, patch_size=16)
    )


def problems(folder, file, load):
    """Returns the errors of a folder in which a setting of a JSON file is absurd. The next one gets other values."""
    content = json.loads((folder / file).read_text())
    errors = {}
    for path, values in islice(altered(content), None, None, 5):
        (folder / file).write_text(json.dumps(values))
        if error_text := problem(lambda: load(folder)):
            errors[path] = error_text
    (folder / file).write_text(json.dumps(content))
    load(folder)  # the control: as it was, it loads
    return errors


def test_weights_without_their_folder_or_truncated(bridgetower_folder, tmp_path):
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"):
        write_safetensors(tmp_path / name, {"weight": torch.ones(2)})
        with pytest.raises(
            ValueError, match=f"weights without their config; pass its folder, {tmp_path}"
        ):
            read_checkpoint(tmp_path / name)
    (bridgetower_folder / "carried.safetensors").write_bytes(
        (bridgetower_folder / "carried.safetensors").read_bytes()[:-1]
    )
    with pytest.raises(ValueError, match=r"carried\.safetensors is not a whole"):
        read_checkpoint(bridgetower_folder)


class TestConfigs:
    @pytest.mark.parametrize(
        ("keys", "change", "message"),
        [
            ((), {"version": 2}, "of format version 2; this release reads 1"),
            ((), {"model": None}, r"own/config\.json: model is None; expected names"),
            (
                ("model", "fusion"),
                {"colour": "red"},
                r"model\.fusion has unknown fields \['colour'\]",
            ),
        ],
    )
    def test_of_this_package(self, bridgetower_folder, keys, change, message):
        values = section = json.loads((bridgetower_folder / "config.json").read_text())
        for name in keys:
            section = section[name]
        section.update(change)
        (bridgetower_folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            read_checkpoint(bridgetower_folder)

    @pytest.mark.parametrize(
        ("section", "change", "reason"),
        [
            (
                None,
                {"model_type": "bert"},
                "safe is of model type 'bert'; expected 'bridgetower' .*--text",
            ),
            (None, {"model_type": None}, "safe is of model type None"),
            (None, {"share_link_tower_layers": True}, "share_link_tower_layers is true"),
            (None, {"link_tower_type": "multiply"}, "link_tower_type is 'multiply'"),
            (None, {"hidden_act": "silu"}, "hidden_act is silu, not one of gelu, gelu_new"),
            (None, {"hidden_size": 64}, "hidden_size 64 differs from the text tower's"),
            (None, {"num_hidden_layers": 5}, "expected increasing layers between 1 and 3"),
            (None, {"num_hidden_layers": 10**9}, "less than 1 or more than 1000 layers"),
            ("text_config", {"hidden_act": "tanh"}, "hidden_act is tanh, not one of"),
            ("text_config", {"vocab_size": "a"}, "text_config.vocab_size is 'a'; expected int"),
            ("vision_config", {"remove_last_layer": True}, "image tower is shallower"),
            ("vision_config", {"num_hidden_layers": 2}, "image tower is shallower"),
            ("vision_config", {"image_size": [32, 64]}, "is not square"),
        ],
    )
    def test_of_transformers(self, safe, section, change, reason):
        edit_json(
            safe / "config.json",
            lambda values: (values if section is None else values[section]).update(change),
        )
        with pytest.raises(ValueError, match=reason):
            read_checkpoint(safe)

    def test_of_transformers_that_names_only_what_differs(self, safe):
        def shorten(values):
            for name in (
                "layer_norm_eps",
                "link_tower_type",
                "share_link_tower_layers",
                "contrastive_hidden_size",
            ):
                del values[name]
            for name in (
                "layer_norm_eps",
                "pad_token_id",
                "type_vocab_size",
                "hidden_dropout_prob",
            ):
                del values["text_config"][name]
            del values["vision_config"]["layer_norm_eps"], values["vision_config"]["patch_size"]
            values["vision_config"] |= {"image_size": [32, 32], "pad_token_id": None}

        expected = read_checkpoint(safe).config
        edit_json(safe / "config.json", shorten)
        assert read_checkpoint(safe).config == expected.override({"heads.itc_size": 512})

    def test_every_field_of_the_model_stands_in_the_file(self, bridgetower_folder):
        model = json.loads((bridgetower_folder / "config.json").read_text())["model"]
        sections = {
            "vision": VisionConfig,
            "text": TextConfig,
            "fusion": FusionConfig,
            "heads": HeadsConfig,
        }
        assert sections.keys() == {field.name for field in fields(ModelConfig)}
        assert all(
            model[name].keys() == {field.name for field in fields(section)}
            for name, section in sections.items()
        )


def poison(file, key, trace):
    content = torch.load(file, weights_only=True)
    (content if key is None else content[key]).update({QUERY: FilePayload(trace)})
    torch.save(content, file)


@pytest.mark.parametrize("key", ["state_dict", "hyper_parameters", "callbacks"])
def test_official_pickles_are_refused(tmp_path, key):
    file = make_official().save(tmp_path / "model.ckpt")
    trace = tmp_path / "trace"
    poison(file, key, trace)
    for read in (read_checkpoint, predictor.load):
        with pytest.raises(ValueError, match=r"model\.ckpt was refused"):
            read(file, overrides=OFFICIAL_OVERRIDES)
    assert not trace.exists()


def test_a_pickle_is_refused_and_not_opened_where_safetensors_are_beside_it(pickled, tmp_path):
    file = pickled / "pytorch_model.bin"
    trace = tmp_path / "trace"
    tensors = {name: value for name, value in torch.load(file).items() if not name.endswith("_ids")}
    poison(file, None, trace)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was refused"):
        read_checkpoint(pickled)
    write_safetensors(pickled / "model.safetensors", tensors)
    read_checkpoint(pickled)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the control
    assert trace.exists()


class TestAbsurd:
    @pytest.mark.slow
    def test_settings_of_folders(self, bridgetower_folder, safe):
        for folder, *files in (
            (bridgetower_folder, "processor.json"),
            (safe, "preprocessor_config.json", "tokenizer_config.json"),
        ):
            assert problems(folder, "config.json", load) == {}
            for file in files:
                assert problems(folder, file, load_processor) == {}

    def test_index_of_shards(self, safe):
        (safe / "model.safetensors").rename(safe / "a.safetensors")
        names = list(read_safetensors(safe / "a.safetensors"))[:3]
        index = safe / "model.safetensors.index.json"
        index.write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")})
        )
        assert problems(safe, index.name, lambda folder: read_sharded(folder / index.name)) == {}

    def test_official_settings(self):
        made = make_official()
        errors = {}

        def read(settings):
            return read_official("model.ckpt", settings, made.state_dict, OFFICIAL_OVERRIDES)

        read(made.run_config)  # the control
        for field in fields(Settings):
            for value in VALUES:
                settings = {**made.run_config, field.name: value}
                if error_text := problem(lambda settings=settings: read(settings)):
                    errors[f"{field.name} = {value!r}"] = error_text
        assert errors == {}

    @pytest.mark.parametrize("config", CONFIGS)
    def test_settings_of_runs_and_verbs(self, config):
        errors = {}
        for field in fields(config):
            for value in VALUES:
                values = {field.name: value}
                if error_text := problem(
                    lambda values=values: from_plain(config, values, "settings")
                ):
                    errors[f"{field.name} = {value!r}"] = error_text
            if str(field.type).removesuffix(" | None") in ("int", "float"):
                for value in (math.nan, math.inf, 10**30, True, "a"):
                    with pytest.raises(ValueError, match=f"{field.name} is {value!r}"):
                        config(**{field.name: value})
        assert errors == {}

    @pytest.mark.parametrize("depth", [900, 100_000])
    @pytest.mark.parametrize("file", ["config.json", "processor.json", "tokenizer.json"])
    def test_settings_nested_without_end_or_too_large_for_the_memory(
        self, bridgetower_folder, file, depth
    ):
        for content in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            (bridgetower_folder / file).write_text(content)
            assert problem(lambda: load(bridgetower_folder)) is None
            with pytest.raises(ValueError, match=file if depth > 900 else "."):
                load(bridgetower_folder)
        with (bridgetower_folder / file).open("w") as stream:
            stream.truncate(2**36)  # of which nothing is stored
        with (
            pytest.raises(
                ValueError, match=rf"{file} has 68719476736 bytes; expected at most 268435456"
            ),
            guarded(),
        ):
            load(bridgetower_folder)

    @pytest.mark.parametrize(
        ("absurd", "words"),
        [
            (
                lambda settings: settings["model"]["vocab"].update(red=280),
                "ids up to 280, but text.vocab_size is 280; give",
            ),
            (
                lambda settings: settings["model"]["vocab"].update(red=2**32 - 1),
                "ids up to 4294967295, but text.vocab_size is 280",
            ),
            (
                lambda settings: settings["added_tokens"].extend(
                    settings["added_tokens"][0] | {"content": f"<{n}>"} for n in range(9)
                ),
                "ids up to 285, but",
            ),
            (
                lambda settings: settings["post_processor"].update(sep=["</s>", 300]),
                r"puts \[0, 300\] around a text",
            ),
        ],
    )
    def test_token_ids_that_have_no_embedding(self, bridgetower_folder, absurd, words):
        edit_json(bridgetower_folder / "tokenizer.json", absurd)
        with pytest.raises(ValueError, match=words), guarded():
            load(bridgetower_folder)

    def test_header_of_weights_nested_without_end(self, bridgetower_folder):
        header = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
        (bridgetower_folder / "model.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header
        )
        with (
            pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"),
            guarded(),
        ):
            load(bridgetower_folder)


@pytest.mark.parametrize("kind", WORDS)
def test_what_is_no_float_or_no_number_is_refused_by_name(request, kind):
    made = make_official()
    name = WORDS[kind]
    whole = made.state_dict[name] if kind == "official" else None
    if kind != "official":
        folder = request.getfixturevalue(kind)
        whole = read_safetensors(folder / "model.safetensors")[name].clone()

    def read(tensor):
        if kind == "official":
            return read_official(
                "x", made.run_config, {**made.state_dict, name: tensor}, OFFICIAL_OVERRIDES
            )
        edit_weights(folder, lambda tensors: tensors.update({name: tensor}))
        return read_checkpoint(folder)

    for wrong in ("int64", "bool", "complex64", "float8_e4m3fn"):
        with pytest.raises(
            ValueError, match=rf"wrongly typed .*word_embedding\S*weight {wrong} \(expected floats"
        ):
            read(whole.to(getattr(torch, wrong)))
    for right in (torch.float16, torch.bfloat16, torch.float64):
        read(whole.to(right))
        for value in (math.nan, -math.inf):
            spoilt = whole.to(right, copy=True)
            spoilt.flatten()[-1] = value
            with pytest.raises(
                ValueError,
                match=r"NaN or infinite values in tensors: text\.word_embedding\.weight$",
            ):
                read(spoilt)


@pytest.fixture(scope="module")
def broken(tiny_checkpoint, tmp_path_factory):
    """A model of numbers so large that what comes out of it is none."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    checkpoint = read_checkpoint(tiny_checkpoint)
    huge = {
        name: torch.full_like(value, 3e38)
        for name, value in checkpoint.tensors.items()
        if "embedding" in name
    }
    checkpoints.write_checkpoint(replace(checkpoint, tensors=checkpoint.tensors | huge), folder)
    return folder


class TestResults:
    def test_are_not_shown(self, broken, tmp_path, refused):
        picture = tmp_path / "a.png"
        index = tmp_path / "index.lance"
        Image.new("RGB", (24, 24), "red").save(picture)
        for command in (
            ("embed", broken, "--texts", "a bar"),
            ("fill-mask", broken, "--images", picture, "--texts", "a <mask>"),
            ("index", tmp_path, "--out", index, "--model", broken),
        ):
            line = refused(*command, "--device", "cpu")
            assert line.startswith("bridgetower: the model gives NaN; its weights or settings")
        assert not Table.exists(index)

    def test_are_not_served(self, broken, forked):
        command = [
            forked / "bridgetower",
            "serve",
            "--model",
            broken,
            "--port",
            "0",
            "--device",
            "cpu",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode > 0
        assert "the model gives NaN" in done.stderr
