"""The documentation as a site: every page and link is there, nothing comes from other hosts, it fits narrow windows."""

import json
import re
import subprocess
import sys
import tomllib
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest

import bridgetower
from bridgetower import cli

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"https?:|//")

for package in ("zensical", "mkdocstrings"):
    pytest.importorskip(package)


class SitePage(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.links = []
        self.loaded = []
        self.places = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.places |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical":
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    (folder / "0.0.9").mkdir()
    (folder / "0.0.9" / "index.html").write_text("<h1>Older</h1>")
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", folder], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def site(out):
    return out / bridgetower.__version__


@pytest.fixture(scope="module")
def pages(site):
    return {path: SitePage(path) for path in site.rglob("*.html")}


def test_every_page_of_docs_is_in_the_navigation():
    settings = tomllib.loads((ROOT / "docs" / "zensical.toml").read_text())["project"]
    pages_in_navigation = [
        name
        for group in settings["nav"]
        for pages in group.values()
        for page in pages
        for name in page.values()
    ]
    made = {"index.md", "changelog.md", "contributing.md", "commands.md", "security.md"}
    assert sorted(pages_in_navigation) == sorted(
        made | {path.name for path in (ROOT / "docs").glob("*.md")}
    )


def test_every_link_leads_somewhere(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            if OUTSIDE.match(link) or link.startswith("data:") or path.name == "404.html":
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (target in pages and anchor not in pages[target].places):
                broken.append(f"{path.name}: {link}")
    assert not broken
    assert sum(len(page.links) for page in pages.values()) > 500


def test_nothing_is_loaded_from_other_hosts(site, pages):
    assert not [
        (path.name, name)
        for path, page in pages.items()
        for name in page.loaded
        if OUTSIDE.match(name)
    ]
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    loaded = re.findall(r"url\(\s*[\"']?([^\"')]*)|@import\s+[\"']([^\"']*)", styles)
    assert not [name for pair in loaded for name in pair if OUTSIDE.match(name)]


def test_every_public_name_and_command_has_a_page_and_a_line_in_its_index(pages, site):
    objects, commands = pages[site / "reference.html"].links, pages[site / "commands.html"].links
    for name in bridgetower.__all__:
        assert f"bridgetower.{name}" in pages[site / f"api-{name}.html"].places
        assert f"api-{name}.html" in objects
    for name in cli.COMMANDS:
        assert f"usage: bridgetower {name}" in (site / f"command-{name}.html").read_text()
        assert f"command-{name}.html" in commands
    assert "::: bridgetower" not in (site / "reference.html").read_text()


def test_the_search_finds_the_pages_of_objects_and_commands(site):
    index = json.loads((site / "search.json").read_text())
    found = {item["location"].partition("#")[0] for item in index["items"]}
    assert {"api-load.html", "command-search.html", "fine-tune.html"} <= found


def test_the_header_links_the_repository(pages, site):
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert all(urls["Repository"] in page.links for page in pages.values() if page.links)
    assert f"git clone {urls['Repository']} " in (ROOT / "README.md").read_text()


def test_versions_are_listed_and_the_newest_opens(out):
    listed = json.loads((out / "versions.json").read_text())
    assert [entry["version"] for entry in listed] == [bridgetower.__version__, "0.0.9"]
    assert f"url={bridgetower.__version__}/index.html" in (out / "index.html").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_narrow_window(browsed, out, scheme):
    handler = partial(SimpleHTTPRequestHandler, directory=str(out))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        site = f"http://127.0.0.1:{server.server_address[1]}"
        version = bridgetower.__version__
        narrow = {"color_scheme": scheme, "viewport": {"width": 390, "height": 800}}
        with browsed(site, f"/{version}/index.html", expected="status of 404", **narrow) as page:
            for name in ("index", "api-load", "command-search", "reproduce"):
                page.goto(f"{site}/{version}/{name}.html")
                page.locator("h1").first.wait_for()
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                code = "[...document.querySelectorAll('pre > code')].every(one => one.scrollWidth <= one.clientWidth)"
                assert page.evaluate(code)
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert all(int(channel) < 64 for channel in re.findall("[0-9]+", colour)) == (
                scheme == "dark"
            )
        server.shutdown()
