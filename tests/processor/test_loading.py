"""Reading in worker processes: the same items in the same order, and the errors of reading in this process."""

import pytest
import torch

from bridgetower.processor import load_items, loaded


def doubled(key: int) -> torch.Tensor:
    if key == 7:
        raise OSError("seven cannot be read")
    return torch.full((2,), 2 * key)


@pytest.mark.parametrize("num_workers", [0, 2])
class TestWorkers:
    def test_items_come_in_order_and_nothing_is_drawn(self, num_workers: int) -> None:
        before = torch.get_rng_state()
        found = [int(item[0]) for item in load_items(doubled, [3, 1, 2, 3, 5], num_workers=num_workers)]
        assert found == [6, 2, 4, 6, 10]
        assert torch.equal(torch.get_rng_state(), before)

    def test_batches(self, num_workers: int) -> None:
        found = list(loaded(doubled, [range(2), [4]], num_workers=num_workers))
        assert [batch.tolist() for batch in found] == [[[0, 0], [2, 2]], [[8, 8]]]
        assert list(loaded(doubled, [], num_workers=num_workers)) == []

    def test_an_error_is_that_of_the_item_and_comes_in_its_place(self, num_workers: int) -> None:
        items = load_items(doubled, [1, 7, 2], num_workers=num_workers)
        assert next(items).tolist() == [2, 2]
        with pytest.raises(OSError, match=r"^seven cannot be read$"):
            next(items)
