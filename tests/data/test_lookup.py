"""Values by key on the disk."""

from bridgetower.data.lookup import Lookup


def test_values_come_back_and_what_was_not_taken_is_known() -> None:
    with Lookup() as lookup:
        lookup["b"] = {"x": ["ü", 1, None]}
        lookup["a"] = 0
        assert lookup.get("b") == lookup.get("b") == {"x": ["ü", 1, None]}
        assert list(lookup.untaken()) == ["b", "a"]
        assert lookup.take("b") == lookup.take("b") == {"x": ["ü", 1, None]}
        assert list(lookup.untaken()) == ["a"]
        assert lookup.get("c") is lookup.take("c") is None
        lookup["a"] = 2
        assert lookup.take("a") == 2
        assert list(lookup.untaken()) == []
        lookup["caf\udce9"] = 3
        assert lookup.get("caf\udce9") == 3
        assert list(lookup.untaken()) == [r"caf\udce9"]
        assert lookup.take("caf\udce9") == 3
