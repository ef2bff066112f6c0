"""The reference of the API at /docs in a real Chromium: all that openapi.json has, and requests that are sent."""

import base64
import json

import pytest

from helpers.servers import start_server, wait_until


@pytest.fixture(scope="module")
def keyed_server(predictor):
    with start_server(predictor, page=True, api_key="sesame", name="tiny") as server:
        yield server


@pytest.fixture
def api_page(browsed, keyed_server):
    with browsed(str(keyed_server.client.base_url), "/docs", expected="status of 40") as page:
        page.get_by_label("API key").fill("open")
        page.get_by_label("API key").press("Enter")
        page.get_by_text("the API key is missing or wrong").wait_for()
        page.get_by_label("API key").fill("sesame")
        page.get_by_label("API key").press("Enter")
        page.locator("#operations section").first.wait_for()
        yield page


def test_every_operation_and_field(api_page, keyed_server):
    headers = {"Authorization": "Bearer sesame"}
    description = keyed_server.client.get("/openapi.json", headers=headers).json()
    operations = [
        f"{method}{path}" for path, methods in description["paths"].items() for method in methods
    ]
    assert [
        section.get_attribute("id") for section in api_page.locator("#operations section").all()
    ] == operations
    match = api_page.locator('section[id="post/v1/match"]')
    fields = match.locator("details").first.locator("th").all_inner_texts()
    assert fields == list(description["components"]["schemas"]["MatchRequest"]["properties"])
    row = match.locator("details").first.locator("tr", has_text="all_pairs").inner_text()
    assert row.split("\t")[:2] == ["all_pairs", "boolean; default false"]
    match.get_by_text("Fields of the response").click()
    assert "data[].score" in match.locator("details").nth(1).locator("th").all_inner_texts()
    messages = api_page.locator('section[id="post/v1/embeddings"] th').all_inner_texts()
    assert "messages[].content[].image_url.url" in messages
    assert api_page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_examples_can_be_sent(api_page, predictor):
    for path in ("/v1/embeddings", "/v1/rerank", "/v1/match", "/v1/fill-mask", "/v1/explain"):
        section = api_page.locator(f'section[id="post{path}"]')
        section.get_by_role("button", name=f"Send POST {path}").click()
        section.get_by_text("Status 200").wait_for()
    match = api_page.locator('section[id="post/v1/match"]')
    body = {
        "images": json.loads(match.get_by_role("textbox").input_value())["images"],
        "texts": "a bar",
    }
    match.get_by_role("textbox").fill(json.dumps(body))
    match.get_by_role("button", name="Send").click()
    wait_until(lambda: len(json.loads(match.locator("pre").inner_text())["data"]) == 1)
    (item,) = json.loads(match.locator("pre").inner_text())["data"]
    red = base64.b64decode(body["images"].partition(",")[2])
    assert item["score"] == pytest.approx(float(predictor.match(red, "a bar")), abs=1e-6)
    match.get_by_role("textbox").fill("{")
    match.get_by_role("button", name="Send").click()
    match.get_by_text("Status 400").wait_for()


@pytest.mark.parametrize("answer", ["<html>401 Authorization Required</html>", None])
def test_what_answers_before_the_server_is_told(chromium, keyed_server, answer):
    page = chromium.new_page()
    page.route(
        "**/openapi.json",
        lambda route: route.fulfill(status=401, body=answer) if answer else route.abort(),
    )
    page.goto(f"{keyed_server.client.base_url}/docs")
    words = "answered with status 401" if answer else "The server cannot be reached"
    page.get_by_text(words).wait_for()
    page.close()


def test_behind_a_proxy_with_a_password(chromium, keyed_server):
    """The browser knows the password of the proxy, and sends it where scripts let it."""
    context = chromium.new_context()
    page = context.new_page()
    context.add_cookies(
        [{"name": "password", "value": "right", "url": str(keyed_server.client.base_url)}]
    )

    def proxy(route):
        if "password=right" not in route.request.all_headers().get("cookie", ""):
            route.fulfill(
                status=401, content_type="text/html", body="<html>401 Authorization Required</html>"
            )
        else:
            route.continue_(headers={**route.request.headers, "Authorization": "Bearer sesame"})

    page.route("**/openapi.json", proxy)
    page.goto(f"{keyed_server.client.base_url}/docs")
    page.locator("#operations section").first.wait_for()
    context.close()


def test_a_parameter_in_the_path(api_page):
    section = api_page.locator('section[id="get/v1/models/{name}"]')
    for name, status in (("tiny", 200), ("other", 404)):
        section.get_by_role("textbox").fill(name)
        section.get_by_role("button", name="Send").click()
        section.get_by_text(f"Status {status}").wait_for()
