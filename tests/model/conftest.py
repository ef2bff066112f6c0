"""Number format for tests that claim exactness."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def double_precision() -> Iterator[None]:
    """Makes every tensor of a module's tests a double, so that only a real difference is a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
