"""Routes, fields, bounds and defaults of the HTTP API are those in `tests/contracts/http.json`."""

from helpers.contracts import check_contract

NESTED = ("items", "anyOf", "oneOf", "properties", "additionalProperties")
FACTS = ("type", "$ref", "enum", "const", "default", "required", "pattern", "in", "name", "schema")


def facts_of(value, *, are_names=False):
    """Returns a part of the description without its prose. Keys of `properties` are names of fields."""
    match value:
        case dict():
            return {
                key: facts_of(entry, are_names=key == "properties")
                for key, entry in value.items()
                if are_names
                or key in (*NESTED, *FACTS)
                or "inimum" in key
                or "aximum" in key
                or key.startswith(("min", "max"))
            }
        case list():
            return [facts_of(entry) for entry in value]
    return value


def test_routes_and_fields(client):
    description = client.get("/openapi.json").json()
    operations = {
        f"{method} {path}": {
            "operation": operation["operationId"],
            "parameters": facts_of(operation.get("parameters", [])),
            "responses": sorted(operation["responses"]),
        }
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }
    schemas = facts_of(description["components"]["schemas"], are_names=True)
    check_contract("http", {"operations": operations, "schemas": schemas})
