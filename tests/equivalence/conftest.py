"""What the tests of recorded cases share: the case that a file is about, its model in a task, and its encodings."""

import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("golden")
sys.path.append(str(Path(__file__).parents[1] / "distributed"))  # for its runner of processes


@pytest.fixture(scope="module")
def recorded(request):
    from golden import case

    return case(request.module.CASE)


@pytest.fixture(scope="module")
def task(recorded):
    from recompute import pretraining_task

    return pretraining_task(recorded, recorded.load())


@pytest.fixture(scope="module")
def encoded(recorded, task):
    from recompute import encode

    return encode(task.model, recorded.inputs)
