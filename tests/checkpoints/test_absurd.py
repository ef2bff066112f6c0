"""Absurd settings: every setting of every file with values that cannot be meant loads, or is refused in one line."""

import json
import math
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import official
from bridgetower import checkpoints, cli, predictor
from bridgetower.checkpoints.microsoft import Settings, read_checkpoint
from bridgetower.checkpoints.tensors import read_safetensors, read_sharded, write_safetensors
from bridgetower.data.config import DataConfig, MaskingConfig, PrepareConfig
from bridgetower.data.own import PairsConfig
from bridgetower.data.store import Table
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import FusionConfig, HeadsConfig, ModelConfig, TextConfig, VisionConfig
from bridgetower.model.plain import from_plain
from bridgetower.objectives.config import Phase, RankingConfig
from bridgetower.processor import Processor
from bridgetower.search.config import IndexConfig
from bridgetower.serve.config import ServeConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig
from bridgetower_demo.toysets.scenes import ScenesConfig

VALUES = (math.nan, -math.inf, -1, 0, 0.5, 1e300, 10**9, 10**30, "a", None, True, [], {"a": 1}, [1e9, math.nan, -1])
MEMORY, SECONDS = 2**30, 600
CONFIGS = (
    *(VisionConfig, TextConfig, FusionConfig, HeadsConfig, OptimizerConfig, RunConfig, Phase, RankingConfig),
    *(RetrievalConfig, DataConfig, MaskingConfig, PrepareConfig, PairsConfig, ScenesConfig, IndexConfig, ServeConfig),
)
NAMES = {
    "own": "text.word_embedding.weight",
    "safe": "bridgetower.text_model.embeddings.word_embeddings.weight",
    "official": "text_transformer.embeddings.word_embeddings.weight",
}
Place = tuple[str | int, ...]


@contextmanager
def guarded() -> Iterator[None]:
    """Lets memory grow by a gibibyte, and ends what hangs."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)

    def hangs(number: int, frame: types.FrameType | None) -> None:
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


def places(values: Any, place: Place = ()) -> Iterator[Place]:
    """Yields where something is in nested values, the whole and every group included."""
    yield place
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from places(value, (*place, key))


def replaced(values: Any, place: Place, value: object) -> Any:
    """A copy with another value somewhere."""
    if not place:
        return value
    copy = values.copy()
    copy[place[0]] = replaced(values[place[0]], place[1:], value)
    return copy


def problem(load: Any) -> str | None:
    """What is wrong with a way to load; None if it ends in one line of ValueError or OSError, or in nothing."""
    try:
        with guarded():
            load()
    except (ValueError, OSError) as error:
        return None if "\n" not in str(error) and 0 < len(str(error)) < 3000 else f"no line: {error}"
    except Exception as error:  # noqa: BLE001 - which is what is looked for
        return repr(error)
    return None


def load(folder: Path) -> predictor.Predictor:
    return predictor.load(folder, device="cpu")


def load_processor(folder: Path) -> Processor:
    """Loads preprocessing alone, which takes less time."""
    own = (folder / "processor.json").exists()
    return Processor.load(folder) if own else Processor.from_huggingface(folder, patch_size=16)


def problems(folder: Path, file: str, load: Callable[[Path], object]) -> dict[str, str]:
    """What is wrong with a folder when a setting of a JSON file is absurd."""
    content = json.loads((folder / file).read_text())
    found = {}
    for place in places(content):
        for value in VALUES:
            (folder / file).write_text(json.dumps(replaced(content, place, value)))
            if what := problem(lambda: load(folder)):
                found[f"{'.'.join(map(str, place))} = {value!r}"] = what
    (folder / file).write_text(json.dumps(content))
    load(folder)  # the control: as it was, it loads
    return found


@pytest.mark.slow
def test_settings_of_folders(own: Path, safe: Path) -> None:
    for folder, others in ((own, ("processor.json",)), (safe, ("preprocessor_config.json", "tokenizer_config.json"))):
        assert problems(folder, "config.json", load) == {}
        for file in others:
            assert problems(folder, file, load_processor) == {}


def test_every_field_of_the_model_stands_in_the_file(own: Path) -> None:
    model = json.loads((own / "config.json").read_text())["model"]
    parts = {"vision": VisionConfig, "text": TextConfig, "fusion": FusionConfig, "heads": HeadsConfig}
    assert parts.keys() == {field.name for field in fields(ModelConfig)}
    assert all(model[name].keys() == {field.name for field in fields(part)} for name, part in parts.items())


def test_index_of_shards(safe: Path) -> None:
    (safe / "model.safetensors").rename(safe / "a.safetensors")
    names = list(read_safetensors(safe / "a.safetensors"))[:3]
    index = safe / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}))
    assert problems(safe, index.name, lambda folder: read_sharded(folder / index.name)) == {}


def test_official_settings() -> None:
    made, found = official.make(), {}

    def read(settings: dict[str, Any]) -> object:
        return read_checkpoint("model.ckpt", settings, made.state_dict, official.OVERRIDES)

    read(made.run_config)  # the control
    for field in fields(Settings):
        for value in VALUES:
            settings = {**made.run_config, field.name: value}
            if what := problem(lambda settings=settings: read(settings)):
                found[f"{field.name} = {value!r}"] = what
    assert found == {}


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_of_runs_and_verbs(config: type) -> None:
    found = {}
    for field in fields(config):
        for value in VALUES:
            if what := problem(lambda field=field, value=value: from_plain(config, {field.name: value}, "settings")):
                found[f"{field.name} = {value!r}"] = what
        if str(field.type).removesuffix(" | None") in ("int", "float"):
            for value in (math.nan, math.inf, 10**30, True, "a"):
                with pytest.raises(ValueError, match=f"{field.name} is {value!r}"):
                    config(**{field.name: value})
    assert found == {}


@pytest.mark.parametrize("depth", [900, 100_000])
@pytest.mark.parametrize("file", ["config.json", "processor.json", "tokenizer.json"])
def test_settings_nested_without_end_or_too_large_for_the_memory(own: Path, file: str, depth: int) -> None:
    for content in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        (own / file).write_text(content)
        assert problem(lambda: load(own)) is None
        with pytest.raises(ValueError, match=file if depth > 900 else "."):
            load(own)
    with (own / file).open("w") as stream:
        stream.truncate(2**36)  # of which nothing is stored
    with pytest.raises(ValueError, match=rf"{file} has 68719476736 bytes; expected at most 268435456"), guarded():
        load(own)


@pytest.mark.parametrize(
    ("absurd", "words"),
    [
        (lambda it: it["model"]["vocab"].update(red=280), "ids up to 280, but text.vocab_size is 280; give the tok"),
        (lambda it: it["model"]["vocab"].update(red=2**32 - 1), "ids up to 4294967295, but text.vocab_size is 280"),
        (
            lambda it: it["added_tokens"].extend(it["added_tokens"][0] | {"content": f"<{n}>"} for n in range(9)),
            "ids up to 285, but text.vocab_size is 280",
        ),
        (lambda it: it["post_processor"].update(sep=["</s>", 300]), r"puts \[0, 300\] around a text"),
    ],
)
def test_token_ids_that_have_no_embedding(own: Path, absurd: Callable[[Any], None], words: str) -> None:
    content = json.loads((own / "tokenizer.json").read_text())
    absurd(content)
    (own / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words), guarded():
        load(own)


def test_header_of_weights_nested_without_end(own: Path) -> None:
    header = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    (own / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"), guarded():
        load(own)


class TestTensors:
    """What is no float, or no number, is refused by name from every source."""

    @pytest.fixture(params=NAMES)
    def read(self, request: pytest.FixtureRequest) -> Callable[[Callable[[Tensor], Tensor]], object]:
        """Reads a source in which one tensor is another."""
        name, made = NAMES[request.param], official.make()
        folder: Path = Path() if request.param == "official" else request.getfixturevalue(request.param)

        def call(change: Callable[[Tensor], Tensor]) -> object:
            if request.param == "official":
                tensors = {**made.state_dict, name: change(made.state_dict[name])}
                return read_checkpoint("model.ckpt", made.run_config, tensors, official.OVERRIDES)
            path = folder / "model.safetensors"
            tensors = {name: value.clone() for name, value in read_safetensors(path).items()}
            write_safetensors(path, {**tensors, name: change(tensors[name])})
            return load(folder)

        return call

    @pytest.mark.parametrize("kind", ["int64", "bool", "complex64", "float8_e4m3fn"])
    def test_no_floats(self, read: Callable[..., object], kind: str) -> None:
        with pytest.raises(
            ValueError, match=rf"wrongly typed tensors: .*word_embedding\S*weight {kind} \(expected floats"
        ):
            read(lambda tensor: tensor.to(getattr(torch, kind)))

    @pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_floats_are_read_if_they_are_numbers(self, read: Callable[..., object], kind: torch.dtype) -> None:
        read(lambda tensor: tensor.to(kind))
        for value in (math.nan, -math.inf):

            def spoil(tensor: Tensor, value: float = value) -> Tensor:
                changed = tensor.to(kind, copy=True)
                changed.flatten()[-1] = value
                return changed

            with pytest.raises(ValueError, match=r"NaN or infinite values in tensors: text\.word_embedding\.weight$"):
                read(spoil)


class TestResults:
    """A model of numbers so large that what comes out of it is none."""

    @pytest.fixture(scope="class")
    def broken(self, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("broken") / "model"
        checkpoint = checkpoints.read_checkpoint(tiny_checkpoint)
        huge = {name: torch.full_like(value, 3e38) for name, value in checkpoint.tensors.items() if "embedding" in name}
        checkpoints.write_checkpoint(replace(checkpoint, tensors=checkpoint.tensors | huge), folder)
        return folder

    @pytest.mark.parametrize(
        "command",
        [
            ["embed", "MODEL", "--texts", "a bar"],
            ["fill-mask", "MODEL", "--images", "PICTURE", "--texts", "a <mask>"],
            ["index", "FOLDER", "--out", "FOLDER/index.lance", "--model", "MODEL"],
        ],
    )
    def test_are_not_shown(
        self, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
    ) -> None:
        Image.new("RGB", (24, 24), "red").save(tmp_path / "a.png")
        places = {"MODEL": str(broken), "PICTURE": str(tmp_path / "a.png"), "FOLDER": str(tmp_path)}
        places["FOLDER/index.lance"] = str(tmp_path / "index.lance")
        with pytest.raises(SystemExit) as stop:
            cli.main([*(places.get(word, word) for word in command), "--device", "cpu"])
        shown = capsys.readouterr()
        assert (stop.value.code, shown.out) == (2, "")
        assert shown.err.splitlines()[-1].startswith("bridgetower: the model gives NaN; its weights or settings")
        assert not Table.exists(tmp_path / "index.lance")

    def test_are_not_served(self, broken: Path) -> None:
        command = [sys.executable, "-m", "bridgetower", "serve", "--model", str(broken), "--port", "0"]
        done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False)
        assert done.returncode > 0
        assert "the model gives NaN" in done.stderr
