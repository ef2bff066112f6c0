"""Builds the documentation as a site: python docs/build.py FOLDER, which `make docs` calls.

The pages are README.md, those of docs/, and the help of every command. The site of a version is in a folder of its own,
beside those of other versions, and has nothing of other hosts.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from contextlib import redirect_stdout, suppress
from pathlib import Path

from packaging.version import Version

import bridgetower
from bridgetower import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NAMES = {"README.md": "index.md"} | {
    f"{name}.md": f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")
}
COLUMNS = 90
LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)#]+)")


def main(out: Path) -> None:
    """Builds the site of this version into its folder in `out`, and a list of all versions there.

    Raises:
        subprocess.CalledProcessError: The site has warnings, such as a link that leads nowhere.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gather(folder / "pages")
        settings = (DOCS / "zensical.toml").read_text(encoding="utf-8")
        settings = settings.replace("VERSION", bridgetower.__version__).replace(
            "SOURCE", str(ROOT / "src")
        )
        (folder / "zensical.toml").write_text(settings, encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, check=True
        )
        shutil.rmtree(out / bridgetower.__version__, ignore_errors=True)
        shutil.copytree(folder / "site", out / bridgetower.__version__)
    list_versions(out)


def gather(folder: Path) -> None:
    """Writes all pages into a folder, with the files of the project that they link to."""
    folder.mkdir()
    for page in [*(ROOT / name for name in NAMES), *sorted(DOCS.glob("*.md"))]:
        text, files = with_moved_links(page)
        (folder / moved(page)).write_text(text, encoding="utf-8")
        for file in files:
            (folder / moved(file)).parent.mkdir(exist_ok=True)
            shutil.copy(file, folder / moved(file))
    for name in ("icon.svg", "site.css"):
        shutil.copy(DOCS / name, folder / name)
    (folder / "commands.md").write_text(commands(), encoding="utf-8")


def moved(path: Path) -> Path:
    """Where a file of the project is among the pages."""
    place = path.relative_to(ROOT)
    return Path(
        NAMES.get(str(place), place.relative_to("docs") if place.parts[0] == "docs" else place)
    )


def with_moved_links(page: Path) -> tuple[str, list[Path]]:
    """The text of a page with its links as they are in the site, and the files that are linked and are no pages."""
    files: list[Path] = []

    def replaced(link: re.Match[str]) -> str:
        target = (page.parent / link[1]).resolve()
        if target.suffix != ".md":
            files.append(target)
        return moved(target).as_posix()

    return LINK.sub(replaced, page.read_text(encoding="utf-8")), files


def commands() -> str:
    """The page with the help of every command."""
    os.environ["COLUMNS"] = str(COLUMNS)
    parts = [
        "# Commands",
        "What `bridgetower COMMAND --help` prints. Recipes have options of their own:",
    ]
    parts += [
        "`bridgetower train RECIPE --help`, and sets of data `bridgetower prepare SET --help`."
    ]
    for group, names in cli.GROUPS.items():
        parts += ["", f"## {group.capitalize()}"]
        for name in names:
            printed = io.StringIO()
            with redirect_stdout(printed), suppress(SystemExit):
                cli.main([name, "--help"])
            lines = [
                line if line.startswith(" ") else textwrap.fill(line, COLUMNS)
                for line in printed.getvalue().splitlines()
            ]
            parts += ["", f"### {name}", "", "```text", *lines, "```"]
    return "\n".join(parts) + "\n"


def list_versions(out: Path) -> None:
    """Writes the list of the versions in a folder, and a page that leads to the newest."""
    names = sorted(
        (path.parent.name for path in out.glob("*/index.html")), key=Version, reverse=True
    )
    versions = [{"version": name, "title": name, "aliases": []} for name in names]
    (out / "versions.json").write_text(json.dumps(versions), encoding="utf-8")
    leading = f'<!doctype html><meta http-equiv="refresh" content="0; url={names[0]}/index.html"><title>Docs</title>'
    (out / "index.html").write_text(leading, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
