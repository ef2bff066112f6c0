"""Builds the documentation as a site: python docs/build.py FOLDER, which `make docs` calls.

The pages are README.md, those of docs/, one for each public object, and one for each command. The site of a version is
in a folder of its own, beside those of other versions, and has nothing of other hosts.
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
import tomllib
from contextlib import redirect_stdout, suppress
from pathlib import Path

import griffe
from packaging.version import Version

import bridgetower
from bridgetower import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SOURCE = ROOT / "src"
NAMES = {"README.md": "index.md"} | {
    f"{name}.md": f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")
}
COLUMNS = 90
OBJECT = re.compile(r"^::: (\S+)$", re.MULTILINE)  # a directive of mkdocstrings
OBJECTS = re.compile(r"(?:^::: \S+\n+)+", re.MULTILINE)
LISTED = re.compile(r"^\* \[(\S+)\]\((\S+)\): ", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)#]+)")


def main(out: Path) -> None:
    """Builds the site of this version into its folder in `out`, and a list of all versions there.

    Raises:
        subprocess.CalledProcessError: The site has warnings, such as a link that leads nowhere.
    """
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gather(folder / "pages")
        (folder / "theme" / "partials").mkdir(parents=True)
        shutil.copy(DOCS / "source.html", folder / "theme" / "partials")
        settings = (DOCS / "zensical.toml").read_text(encoding="utf-8")
        for index in ("reference.md", "commands.md"):
            settings = settings.replace(f'"{index}"', navigation(folder / "pages" / index))
        settings = settings.replace("REPOSITORY", urls["Repository"])
        settings = settings.replace("SOURCE", str(SOURCE))
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
    write_objects(folder)
    write_commands(folder)


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


def write_objects(folder: Path) -> None:
    """Writes a page for each public object, and lists them in the index in place of the directives."""
    package = griffe.load("bridgetower", search_paths=[SOURCE])

    def listed(directives: re.Match[str]) -> str:
        lines = []
        for path in OBJECT.findall(directives[0]):
            docstring = package[path.removeprefix("bridgetower.")].docstring
            sentence = " ".join(docstring.value.partition("\n\n")[0].split())
            page = f"api-{path.rpartition('.')[2]}.md"
            (folder / page).write_text(f"::: {path}\n", encoding="utf-8")
            lines.append(f"* [{path}]({page}): {sentence}\n")
        return "".join([*lines, "\n"])

    index = folder / "reference.md"
    text = OBJECTS.sub(listed, index.read_text(encoding="utf-8"))
    index.write_text(text, encoding="utf-8")


def write_commands(folder: Path) -> None:
    """Writes a page with the help of each command, and an index of them."""
    os.environ["COLUMNS"] = str(COLUMNS)
    summaries = dict(re.findall("^  ([a-z-]+) +(.+)$", printed("--help"), re.MULTILINE))
    index = ["# Commands", "", "Each page has what `bridgetower COMMAND --help` prints."]
    index += ["`bridgetower train RECIPE --help` and `bridgetower prepare SET --help` print more."]
    for group, names in cli.GROUPS.items():
        index += ["", f"## {group.capitalize()}", ""]
        for name in names:
            index.append(f"* [{name}](command-{name}.md): {summaries[name]}")
            lines = [
                line if line.startswith(" ") else textwrap.fill(line, COLUMNS)
                for line in printed(name, "--help").splitlines()
            ]
            text = "\n".join([f"# {name}", "", "```text", *lines, "```", ""])
            (folder / f"command-{name}.md").write_text(text, encoding="utf-8")
    (folder / "commands.md").write_text("\n".join([*index, ""]), encoding="utf-8")


def printed(*arguments: str) -> str:
    """The help that a command prints."""
    output = io.StringIO()
    with redirect_stdout(output), suppress(SystemExit):
        cli.main(list(arguments))
    return output.getvalue()


def navigation(index: Path) -> str:
    """An index with the pages that it lists, as an entry of the navigation."""
    pages = LISTED.findall(index.read_text(encoding="utf-8"))
    entries = [f'{{ "{name.rpartition(".")[2]}" = "{page}" }}' for name, page in pages]
    return f'[{{ "Overview" = "{index.name}" }}, {", ".join(entries)}]'


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
