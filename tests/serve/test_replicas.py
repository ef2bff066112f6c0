"""Shares of cores; the processes themselves are in test_cli_serve.py."""

import pytest

from bridgetower.serve.replicas import share


@pytest.mark.parametrize(
    ("cores", "count", "sizes"), [(4, 2, [2, 2]), (5, 2, [2, 3]), (7, 3, [2, 2, 3]), (3, 3, [1] * 3)]
)
def test_every_core_is_in_one_share(cores: int, count: int, sizes: list[int]) -> None:
    shares = [share(range(10, 10 + cores), number, count) for number in range(count)]
    assert list(map(len, shares)) == sizes
    assert [core for part in shares for core in part] == list(range(10, 10 + cores))


def test_too_few_cores() -> None:
    with pytest.raises(ValueError, match="replicas is 3, and there are 2 cores; expected 2 or fewer"):
        share([0, 1], 0, 3)
