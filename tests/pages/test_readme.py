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
from dataclasses import dataclass
from importlib.metadata import metadata
from importlib.util import find_spec
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from bridgetower import cli
from helpers.servers import s3_store
from helpers.sources import SUBTITLES, write_clip

ROOT = Path(__file__).parents[2]
# others use what these leave
FIRST = [
    ROOT / "README.md",
    ROOT / "docs" / "data.md",
    ROOT / "docs" / "training.md",
]
PAGES = [*FIRST, *sorted(set((ROOT / "docs").glob("*.md")) - set(FIRST))]
PUBLISHED = "BridgeTower/bridgetower-large-itm-mlm-itc"
LEFT = "bridgetower-demo/runs/bridgetower-0/last"
DEMO = ROOT / "tests" / "demo" / "small_demo.py"
# that `make lowest` leaves out
NEEDED = {"integrations.md": ("llama_index", "sentence_transformers")}
# As written, but on few images, with shallow models, and few images at once where the page leaves that to the recipe.
SMALL = f"""
python() {{
    case "$*" in
        "-m bridgetower_demo "*) shift 2; command python {DEMO} "$@" ;;
        *) command python "$@" ;;
    esac
}}
smaller() {{
    local options=()
    case "$*" in
        *--init*|*--vision*) ;;
        *"train pretrain-nano"*|*"train scenes-vqa"*)
            options=(--model.vision.num-layers 1 --model.text.num-layers 1 --model.fusion.num-layers 1)
            [[ "$*" == *--batch-size* ]] || options+=(--batch-size 16) ;;
    esac
    command "$@" "${{options[@]}}"
}}
bridgetower() {{ smaller bridgetower "$@"; }}
torchrun() {{ smaller torchrun "$@"; }}
"""
SERVE = "bridgetower serve"
END = "--- end of a block"
EACH = f"""
import sys
for block in sys.argv[1:]:
    exec(block, {{"__name__": "__main__"}})
    print({END!r})
"""
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STORE = re.compile(r's3://|filesystem\("s3"\)')
DECIMAL = re.compile(r"-?\d+\.\d+")
TOLERANCE = 0.15  # of what the full demo prints: processors round in their own way, and training carries that on


def blocks(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def agrees(expected: str, printed: str) -> bool:
    return re.fullmatch(".+".join(map(re.escape, expected.split("…"))), printed) is not None


def is_near(expected: str, printed: str) -> bool:
    """Whether a line has the words and names that are shown, `…` apart, and decimals near those."""
    words = [".*".join(map(re.escape, text.split("…"))) for text in DECIMAL.split(expected)]
    match = re.fullmatch(f"({DECIMAL.pattern})".join(words), printed)
    numbers = zip(DECIMAL.findall(expected), match.groups() if match else (), strict=False)
    return match is not None and all(
        abs(float(value) - float(other)) <= TOLERANCE for value, other in numbers
    )


def test_what_is_printed_agrees_with_what_is_shown():
    assert agrees("[2, …] and 3", "[2, 512] and 3")
    assert not agrees("[2, …] and 3", "[2, 512] and 4")
    assert not agrees("[3, …]", "[2, 512]")


@dataclass(frozen=True)
class PageShell:
    """A folder, and a shell in it."""

    folder: Path
    commands: Path

    @property
    def environment(self) -> dict[str, str]:
        """That of the shell."""
        folders = [str(ROOT / "demo"), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"PYTHONPATH": ":".join(folders)}
        return (
            os.environ
            | variables
            | {"PATH": f"{self.commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        )

    def run(self, *command: str) -> list[str]:
        """The lines that a command prints, which must succeed."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (
            f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
        # PyTorch 2.10 says these
        return [line for line in done.stdout.splitlines() if not line.startswith("[Gloo] ")]

    def outputs(self, language: str, texts: list[str]) -> list[list[str]]:
        """The lines of each block. Those of Python share a process, which imports large libraries once."""
        if language == "bash":
            return [self.run("bash", "-euo", "pipefail", "-c", SMALL + text) for text in texts]
        printed = self.run("python", "-c", EACH, *texts)
        ends = [index for index, line in enumerate(printed) if line == END]
        return [printed[start + 1 : end] for start, end in pairwise([-1, *ends])]

    @contextmanager
    def serves(self, command: str) -> Iterator[None]:
        """Runs a command that serves until the commands after it have run."""
        with subprocess.Popen(
            shlex.split(command),
            cwd=self.folder,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stderr is not None
            try:
                lines = []
                for line in server.stderr:
                    lines.append(line)
                    if "serving" in line:
                        break
                else:
                    pytest.fail("".join(lines))
                yield
            finally:
                server.terminate()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, forked):
    """An empty folder after a short demo without a download, with a few photos and videos of the user's own."""
    folder = tmp_path_factory.mktemp("workplace")
    demo = PageShell(folder, forked)
    demo.run("python", str(DEMO))
    photos = folder / "my-photos"
    photos.mkdir()
    pictures = sorted((folder / "bridgetower-demo" / "images").glob("*.png"))
    assert len(pictures) >= 12
    with (photos / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number, picture in enumerate(pictures):
            shutil.copy(picture, photos)
            writer.writerow([picture.name, f"photo number {number} of mine"])
    (folder / "docs").mkdir()
    for picture in (ROOT / "docs").glob("*.png"):
        shutil.copy(picture, folder / "docs")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "lectures").mkdir()
    write_clip(folder / "lectures" / "one.webm", codec="libvpx-vp9")
    write_clip(folder / "talk.mp4")
    (folder / "talk.srt").write_text(SUBTITLES, encoding="utf-8")
    return demo


def test_readme_has_commands():
    languages = [language for language, _ in blocks(ROOT / "README.md")]
    assert {"bash", "python"} <= set(languages)
    assert any(PUBLISHED in text for _, text in blocks(ROOT / "README.md"))


def test_what_the_readme_tells_of_transformers():
    transformers = pytest.importorskip("transformers")
    heads = ("ContrastiveLearning", "ImageAndTextRetrieval", "MaskedLM")
    classes = [name for name in dir(transformers) if name.startswith("BridgeTowerFor")]
    assert classes == [f"BridgeTowerFor{head}" for head in heads]
    for (
        name
    ) in classes:  # models that embed a text or an image alone, such as CLIP, have these methods
        assert not any(
            hasattr(getattr(transformers, name), f"get_{tower}_features")
            for tower in ("text", "image")
        )
    package = metadata("transformers")
    assert package["Requires-Python"].startswith(">=3.11")
    assert 'torch>=2.6; extra == "torch"' in package.get_all("Requires-Dist")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, workplace):
    """Lines that a page shows after `# =>` are printed, but for what `…` stands for. Those after `# ≈` come nightly."""
    for package in NEEDED.get(page.name, ()):
        pytest.importorskip(package)
    needs_store = any(STORE.search(text) for _, text in blocks(page))
    has_store = find_spec("moto") is not None
    with ExitStack() as servers:
        if needs_store and has_store:
            servers.enter_context(s3_store())
        for (language, serves), group in groupby(
            blocks(page), lambda block: (block[0], block[1].startswith(SERVE))
        ):
            texts = [
                text.replace(PUBLISHED, LEFT)
                for _, text in group
                if has_store or not STORE.search(text)
            ]
            if serves:
                for text in texts:
                    servers.enter_context(workplace.serves(text))
                continue
            for text, printed in zip(texts, workplace.outputs(language, texts), strict=True):
                if marks := re.findall(r"# (=>|≈) (.*)", text):
                    # the full demo prints the others
                    expected = [value if mark == "=>" else "…" for mark, value in marks]
                    assert len(printed) == len(expected), printed
                    assert [
                        line for line in zip(expected, printed, strict=True) if not agrees(*line)
                    ] == []
    if needs_store and not has_store:
        pytest.skip("moto is not installed; all but the commands with s3:// has run")


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_pages_show_what_the_full_demo_prints(tmp_path, forked):
    """Blocks with lines after `# ≈`. The demo runs unless BRIDGETOWER_DEMO names its folder."""
    demo = PageShell(Path(os.environ.get("BRIDGETOWER_DEMO", tmp_path)), forked)
    if demo.folder == tmp_path:
        demo.run(sys.executable, "-m", "bridgetower_demo")
    expected = []
    actual = []
    for page in PAGES:
        measured = [text for _, text in blocks(page) if "# ≈ " in text]
        with ExitStack() as servers:
            for text in [text for _, text in blocks(page) if measured and text.startswith(SERVE)]:
                servers.enter_context(demo.serves(text))
            for printed in demo.outputs("bash", measured):
                actual += printed
        expected += [line for text in measured for line in re.findall(r"# (?:=>|≈) (.*)", text)]
    assert len(expected) > 8
    assert [pair for pair in zip(expected, actual, strict=True) if not is_near(*pair)] == []
    assert [
        pair for pair in zip(expected, [*actual[1:], actual[0]], strict=True) if is_near(*pair)
    ] == []  # the control


def test_commands_that_are_not_run_are_parsed(monkeypatch):
    """Those that need the hub or the reader's own files: each has only options that there are."""
    parsed = cli.parsed
    seen = []
    monkeypatch.setattr(
        cli, "parsed", lambda *arguments: (parsed(*arguments), seen.append(arguments[0]))[1] or list
    )
    for page in PAGES:
        for block in re.findall(
            r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            for line in re.findall(
                r"^bridgetower (?!.*(?:[|$…]|--help|RECIPE)).*", block, re.MULTILINE
            ):
                cli.main(shlex.split(line, comments=True)[1:])
    assert len(seen) > 30
    with pytest.raises(SystemExit):
        cli.main(["index", "photos", "--oot", "photos.lance"])


class TestDemo:
    def test_leaves_results_for_scripts(self, workplace):
        results = json.loads((workplace.folder / "bridgetower-demo" / "results.json").read_text())
        assert [run["arm"] for run in results["runs"]] == ["bridgetower"]
        assert {name for run in results["runs"] for name in run["test"]} == {"emoji", "flags"}
        assert [answers["arm"] for answers in results["answers"]] == ["bridgetower"]
        assert set(results["answers"][0]["topics"]) == {
            "exists",
            "colour",
            "count",
            "relation",
            "overall",
        }

    def test_leaves_one_page_without_outside_links(self, workplace):
        page = (workplace.folder / "bridgetower-demo" / "report.html").read_text()
        assert "<img" in page
        assert not re.search(r"""(src|href)=["']https?://""", page)


@pytest.mark.timeout(300)
def test_the_notebook_runs(workplace):
    """In a folder where the demo has run, as one script: what a cell displays is not drawn."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    num_images = len(list((workplace.folder / "bridgetower-demo" / "images").glob("*.png")))
    printed = workplace.run("python", "-c", "\n".join(cells))
    assert printed[0].startswith(f"{num_images} images: ")
    assert printed[-1].startswith("emoji-3.png: ")
    result = json.loads((workplace.folder / "quickstart" / "result.json").read_text())
    assert result["verdict"] in printed
    assert result["num_images"] == num_images


def test_make_passes_options_to_the_demo():
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "demo", "ARGS=--compare"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].endswith("python -m bridgetower_demo --compare")
