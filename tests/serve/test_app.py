"""The description of the API, and requests made up from it."""

from collections import Counter

import pytest


def test_the_description_has_this_server_s_errors(client):
    content = client.get("/openapi.json").json()
    responses = content["paths"]["/v1/match"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "404", "408", "413", "429", "503"}
    assert responses["429"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
    assert "HTTPValidationError" not in content["components"]["schemas"]


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_made_up_requests(client, mode):
    """What the description allows, and what it does not: answers are as described, none is a failure of the server."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi import checks

    names = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
    names += ("negative_data_rejection", "unsupported_method")
    held = [schemathesis.checks.not_a_server_error, *(getattr(checks, name) for name in names)]
    routes = Counter()
    usual = settings(max_examples=5, deadline=None, database=None, derandomize=True)
    refusals = {"checks": {"negative_data_rejection": {"expected-statuses": [400, 413]}}}
    config = schemathesis.Config.from_dict(refusals)
    description = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json", config=config)
    operations = [result.ok() for result in description.get_all_operations()]
    if mode == "negative":
        operations = [operation for operation in operations if operation.method == "post"]
    for operation in operations:

        @settings(usual, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def answered(case):
            case.call_and_validate(checks=held)
            routes[case.operation.path] += 1

        answered()
    assert routes["/v1/embeddings"] == 5
    assert set(routes) == {operation.path for operation in operations}


def test_head_is_get_without_the_body(client):
    for path in (
        "/",
        "/page.js",
        "/health",
        "/ready",
        "/info",
        "/metrics",
        "/v1/models",
        "/v1/index",
        "/openapi.json",
    ):
        got = client.get(path)
        head = client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
        if path not in ("/metrics", "/ready"):
            assert head.headers["content-length"] == got.headers["content-length"]
