"""Values by key on the disk."""

from bridgetower.data.lookup import Lookup


def test_values_come_back_and_are_gone_once_taken() -> None:
    with Lookup() as lookup:
        lookup["b"] = {"x": ["ü", 1, None]}
        lookup["a"] = 0
        assert list(lookup) == ["b", "a"]
        assert lookup.get("b") == lookup.pop("b") == {"x": ["ü", 1, None]}
        assert lookup.pop("b") is None
        lookup["a"] = 2
        assert lookup.get("a") == 2
        assert list(lookup) == ["a"]
