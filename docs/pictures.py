"""Makes the pictures of README.md: python docs/pictures.py, in a folder where `make demo` has run.

They show a search in the web UI and a search's sheet, with the model and the held-out images of the demo. Needs
Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent
NAMES = ("web-ui.png", "search.png")
QUERY = "three horizontal bands of black, red and green"
FLAGS = "path LIKE 'flags/%'"
COLOURS = 128  # of each picture, so that it is small


def main() -> None:
    """Writes the pictures and the record."""
    with tempfile.TemporaryDirectory() as folder:
        taken, drawn = Path(folder) / "web-ui.png", Path(folder) / "search.png"
        take_page(taken)
        search = ["search", "demo", QUERY, "--where", FLAGS, "--top", "5", "--sheet", str(drawn)]
        subprocess.run([sys.executable, "-m", "bridgetower", *search], check=True)
        for path in (taken, drawn):
            Image.open(path).convert("RGB").quantize(COLOURS).save(DOCS / path.name, optimize=True)


def take_page(path: Path) -> None:
    """Serves the demo's index and takes a screenshot of a search in the web UI."""
    from playwright.sync_api import sync_playwright

    serve = [sys.executable, "-m", "bridgetower", "serve", "--index", "demo", "--port", "0"]
    with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        try:
            assert server.stderr is not None
            lines: list[str] = []
            for line in server.stderr:
                lines.append(line)
                if "serving" in line:
                    break
            else:
                raise RuntimeError(f"run `make demo` here first; serve did not start:\n{''.join(lines)}")
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
