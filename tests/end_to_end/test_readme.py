"""The commands of README.md and docs, as they are written, in an empty folder where the demo has run."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@contextmanager
def served(command: str, folder: Path) -> Iterator[None]:
    """Runs a command that serves until the commands after it have run."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        shlex.split(command), cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            said = []
            for line in server.stderr:
                said.append(line)
                if "serving" in line:
                    break
            else:
                pytest.fail("".join(said))
            yield
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """An empty folder after a short demo, with a few photos of the user's own."""
    folder = tmp_path_factory.mktemp("workplace")
    run(["bridgetower", "demo", "--minutes", "0.1"], folder)
    photos = folder / "my-photos"
    photos.mkdir()
    pictures = sorted((folder / "bridgetower-demo" / "pictures").glob("*.png"))
    assert len(pictures) >= 12
    with (photos / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number, picture in enumerate(pictures):
            shutil.copy(picture, photos)
            writer.writerow([picture.name, f"picture number {number} of mine"])
    return folder


def test_readme_has_commands():
    languages = [language for language, _ in blocks(ROOT / "README.md")]
    assert languages.count("bash") >= 5
    assert languages.count("python") >= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, workplace):
    with ExitStack() as servers:
        for language, text in blocks(page):
            if text.startswith("bridgetower serve"):
                servers.enter_context(served(text, workplace))
                continue
            interpreter = [sys.executable] if language == "python" else ["bash", "-euo", "pipefail"]
            run([*interpreter, "-c", text], workplace)


class TestDemo:
    def test_leaves_results_for_scripts(self, workplace):
        results = json.loads((workplace / "bridgetower-demo" / "results.json").read_text())
        assert {run["arm"] for run in results["runs"]} == {"bridgetower", "meter"}
        assert {name for run in results["runs"] for name in run["test"]} == {"emoji", "flags"}
        assert len({run["steps"] for run in results["runs"]}) == 1
        assert [answers["arm"] for answers in results["answers"]] == ["bridgetower", "meter"]
        assert set(results["answers"][0]["topics"]) == {"exists", "colour", "count", "relation", "overall"}

    def test_leaves_one_page_without_outside_links(self, workplace):
        page = (workplace / "bridgetower-demo" / "report.html").read_text()
        assert "<img" in page
        assert not re.search(r"""(src|href)=["']https?://""", page)

    def test_run_again_trains_no_further(self, workplace):
        demo = workplace / "bridgetower-demo"
        state, weights = demo / "runs" / "meter-0" / "last.pt", demo / "runs" / "meter-0" / "last" / "model.safetensors"
        seconds = json.loads((demo / "results.json").read_text())["seconds_total"]
        before = state.stat().st_mtime_ns, weights.read_bytes()
        run(["bridgetower", "demo", "--minutes", "0.1"], workplace)
        assert (state.stat().st_mtime_ns, weights.read_bytes()) == before
        assert json.loads((demo / "results.json").read_text())["seconds_total"] > seconds + 1


def test_make_passes_options_to_the_demo():
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "demo", "ARGS=--minutes 2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].endswith("bridgetower demo --minutes 2")
