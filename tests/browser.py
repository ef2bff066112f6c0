"""A browser."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SITE = "--host-resolver-rules=MAP photos.example.org 127.0.0.1"


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as driver:
        if installed is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip(
                "NO CHROMIUM, THE PAGE IS NOT TESTED: apt-get install chromium, or playwright install chromium"
            )
        browser = driver.chromium.launch(executable_path=installed, args=[SITE])
        yield browser
        browser.close()


@pytest.fixture
def browsed(chromium, tmp_path):
    @contextmanager
    def opened(address, path="/", *, expected=None, **settings):
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings})
        page = context.new_page()
        page.set_default_timeout(60_000)
        asked = []
        wrong = []
        page.on("request", lambda request: asked.append(request.url))
        page.on(
            "console",
            lambda message: (
                wrong.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address + path)
        try:
            yield page
        except BaseException:
            page.screenshot(path=tmp_path / "failure.png", full_page=True)
            raise
        finally:
            context.close()
        assert len(asked) > 4
        assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert not [text for text in wrong if expected is None or expected not in text]

    return opened
