"""Tasks, towers, bridges and heads of a user's own, by the options that name them; importable without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridgetower.extras import load_object
from bridgetower.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from bridgetower.model.extensions import Extensions


def own_task(place: str | None) -> TaskSpec | None:
    """Returns the task that `--task-spec` names, None without one; errors as of `load_object`."""
    return None if place is None else load_object("task_spec", place, TaskSpec)


def own_extensions(place: str | None) -> Extensions:
    """Returns the towers, bridges and heads that `--extensions` names; errors as of `load_object`."""
    from bridgetower.model.extensions import NO_EXTENSIONS, Extensions

    return NO_EXTENSIONS if place is None else load_object("extensions", place, Extensions)
