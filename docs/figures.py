"""Makes figures of README.md and docs: python docs/figures.py.

They show the architecture, and what bridges add by the runs in research/bridges.json. Where `make demo` has run, they
also show a search in the web UI and a search's sheet, with the demo's model and held-out images. That needs Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from bridgetower.drawing import INK, SERIES

DOCS = Path(__file__).resolve().parent
RESEARCH = DOCS.parent / "research"
SEARCH = ("web-ui.png", "search.png")
BRIDGES = {"depth-6": "depth-6/curves.png", "depths": "depths.png", "variants": "variants.png"}
QUERY = "a smiling face"
COLOURS = 128  # of each picture, so that it is small
# the first and the third colour of plots, lighter
TOWER, FUSION, HEAD = (
    "#d9eaf5",
    "#d3efe5",
    "#f4f4f7",
)
BRIDGE = SERIES[0]


def main() -> None:
    """Writes the figures."""
    draw_architecture(DOCS / "bridgetower.png")
    with tempfile.TemporaryDirectory() as folder:
        for experiment, written in BRIDGES.items():
            seeds = ["21", "22", "23", "24"] + ["25", "26"] * (experiment == "depth-6")
            options = [
                experiment,
                "--work",
                folder,
                "--results",
                str(RESEARCH / "bridges.json"),
                "--seeds",
                *seeds,
            ]
            subprocess.run([sys.executable, str(RESEARCH / "bridges.py"), *options], check=True)
            shutil.copy(Path(folder) / written, DOCS / f"bridges-{experiment}.png")
        if not Path("bridgetower-demo").exists():
            return
        taken, drawn = Path(folder) / "web-ui.png", Path(folder) / "search.png"
        take_page(taken)
        search = ["search", "demo", QUERY, "--top", "5", "--sheet", str(drawn)]
        subprocess.run([sys.executable, "-m", "bridgetower", *search], check=True)
        for path in (taken, drawn):
            Image.open(path).convert("RGB").quantize(COLOURS).save(DOCS / path.name, optimize=True)


def draw_architecture(path: Path) -> None:
    """Draws three layers of each tower, their bridges, and the fusion layers that these lead to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    figure, axes = pyplot.subplots(figsize=(9, 4.6), dpi=130)

    def box(x: float, y: float, width: float, text: str, colour: str, height: float = 0.62) -> None:
        style = "round,pad=0.02,rounding_size=0.1"
        axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=INK, lw=1
            )
        )
        axes.text(
            x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5, color=INK
        )

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.4})

    for x, name, source in (
        (0.2, "image", "patches of an image"),
        (7.6, "text", "tokens of a text"),
    ):
        box(x, 0, 2.2, source, HEAD)
        box(x, 0.95, 2.2, f"{name} layers 1 to 6", TOWER)
        for layer in range(3):
            label = f"{name} layer {7 + layer}" if layer < 2 else f"{name} layer 12"
            box(x, 1.9 + 0.95 * layer, 2.2, label, TOWER)
        axes.text(x + 1.1, 3.66, "⋮", ha="center", va="center", fontsize=12, color=INK)
        for bottom in (0.62, 1.57, 2.52):
            arrow((x + 1.1, bottom), (x + 1.1, bottom + 0.33))
    for layer in range(3):
        y = 1.9 + 0.95 * layer
        box(3.7, y, 2.6, f"fusion layer {layer + 1 if layer < 2 else 6}", FUSION)
        arrow((2.42, y + 0.31), (3.68, y + 0.31), BRIDGE)
        arrow((7.58, y + 0.31), (6.32, y + 0.31), BRIDGE)
    axes.text(3.05, 2.3, "bridge", ha="center", va="bottom", fontsize=8.5, color=BRIDGE)
    axes.text(6.95, 2.3, "bridge", ha="center", va="bottom", fontsize=8.5, color=BRIDGE)
    axes.text(5, 3.66, "⋮", ha="center", va="center", fontsize=12, color=INK)
    arrow((5, 2.52), (5, 2.85))
    for x, width, name in (
        (2.65, 1.2, "matching"),
        (4.1, 1.8, "masked words"),
        (6.15, 1.2, "answers, …"),
    ):
        box(x, 4.9, width, name, HEAD)
        arrow((5, 4.42), (x + width / 2, 4.88))
    box(0.2, 4.9, 2.2, "vector of the image", HEAD)
    box(7.6, 4.9, 2.2, "vector of the text", HEAD)
    arrow((1.3, 4.42), (1.3, 4.88))
    arrow((8.7, 4.42), (8.7, 4.88))
    axes.set(xlim=(0, 10), ylim=(-0.15, 5.7))
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", facecolor="white")


def take_page(path: Path) -> None:
    """Serves the demo's index and takes a screenshot of a search in the web UI."""
    from playwright.sync_api import sync_playwright

    serve = [sys.executable, "-m", "bridgetower", "serve", "--index", "demo", "--port", "0"]
    with (
        subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as server,
        sync_playwright() as driver,
    ):
        try:
            assert server.stderr is not None
            lines: list[str] = []
            for line in server.stderr:
                lines.append(line)
                if "serving" in line:
                    break
            else:
                raise RuntimeError(
                    f"run `make demo` here first; serve did not start:\n{''.join(lines)}"
                )
            address = lines[-1].split(" at ")[-1].strip()
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
            page = browser.new_page(viewport={"width": 1100, "height": 760}, color_scheme="light")
            page.goto(f"{address}/#search")
            page.get_by_label("Describe the image").fill(QUERY)
            page.get_by_label("Describe the image").press("Enter")
            page.locator("#hits img").first.wait_for()
            page.wait_for_load_state("networkidle")
            page.screenshot(path=path)
            browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
