"""The example of parts of one's own, as it is written, and its parts in commands."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from bridgetower.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_parts.py"
OWN = ["--task-spec", f"{EXAMPLE}:CLAIMS", "--extensions", f"{EXAMPLE}:EXTENSIONS"]


@pytest.fixture(scope="module")
def work(forked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "work"
    command = [forked / "python", EXAMPLE, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    use, metrics = done.stdout.splitlines()
    assert re.match(r"3\.png is a bright square: (yes|no), probability 0\.\d\d$", use)
    assert metrics.startswith("{'accuracy': ")
    assert (folder / "run" / "best" / "model.safetensors").exists()
    return folder


def test_commands(work, capsys):
    data = str(work / "set")
    run = str(work / "run-of-commands")
    main(["train", "claims-nano", *OWN, "--data.folders", data, "--device", "cpu", "--out", run])
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    main(
        [
            "evaluate",
            run,
            "claims",
            *OWN,
            "--data",
            data,
            "--split",
            "validation",
            "--device",
            "cpu",
        ]
    )
    report = json.loads(capsys.readouterr().out)
    assert report["accuracy"] == accuracy
    assert json.loads((work / "run-of-commands" / "best" / "labels.json").read_text()) == {
        "claim": ["no", "yes"]
    }
    main(["inspect", data, "--schema", f"{EXAMPLE}:SCHEMA", "--html", str(work / "page.html")])
    assert json.loads(capsys.readouterr().out)["splits"]["validation"]["classes"].keys() == {
        "no",
        "yes",
    }
    image = str(work / "originals" / "3.png")
    main(
        [
            "embed",
            run,
            "--extensions",
            str(EXAMPLE),
            "--images",
            image,
            "--texts",
            "dark",
            "--of",
            "pairs",
        ]
    )
    assert len(json.loads(capsys.readouterr().out)["embedding"]) == 256

    predicting = ["predict", run, "claim", "--extensions", f"{EXAMPLE}:EXTENSIONS"]
    main([*predicting, "--images", image, "--texts", "a dark square", "--top", "1"])
    row = json.loads(capsys.readouterr().out)
    assert (row["image"], row["text"]) == (image, "a dark square")
    assert [choice["label"] for choice in row["classes"]] in (["yes"], ["no"])

    extensions = ["--extensions", f"{EXAMPLE}:EXTENSIONS"]
    main(["convert", run, str(work / "converted"), "--to", "bridgetower", *extensions])
    assert json.loads(capsys.readouterr().out)["not_used"] == []
    main(
        [
            "embed",
            str(work / "converted"),
            *extensions,
            "--images",
            image,
            "--texts",
            "dark",
            "--of",
            "pairs",
        ]
    )
    assert len(json.loads(capsys.readouterr().out)["embedding"]) == 256
