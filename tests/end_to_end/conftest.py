"""A browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SITE = "--host-resolver-rules=MAP photos.example.org 127.0.0.1"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser: one of the system, or Playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api")
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as driver:
        if installed is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("NO CHROMIUM, THE PAGE IS NOT TESTED: apt-get install chromium, or playwright install chromium")
        browser = driver.chromium.launch(executable_path=installed, args=[SITE])
        yield browser
        browser.close()
