"""Toy sets, built through the interface that a user's own set has: a `Collection` is described, then written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridgetower.data.sets.prepared_set import DatasetInfo
from bridgetower.extras import install_command
from bridgetower_demo.toysets import emoji, flag_questions, flags, scenes
from bridgetower_demo.toysets.collection import Collection, write_collection


@dataclass(frozen=True, kw_only=True)
class ToySet:
    """A set that takes no original files.

    Attributes:
        name: What it is called.
        summary: A line of help.
        config: Type of its settings, all of which have defaults.
        collect: Describes the set.
    """

    name: str
    summary: str
    config: type[Any]
    collect: Callable[[Any], Collection]


_INSTALLED = f"from installed packages: {install_command('demo')}."

TOYSETS: Mapping[str, ToySet] = {
    each.name: each
    for each in (
        ToySet(
            name="emoji",
            summary=f"Emoji with their names and keywords, {_INSTALLED}",
            config=emoji.EmojiConfig,
            collect=emoji.collect,
        ),
        ToySet(
            name="flags",
            summary=f"Flags with descriptions by people, {_INSTALLED}",
            config=flags.FlagsConfig,
            collect=flags.collect,
        ),
        ToySet(
            name="flag-questions",
            summary="Questions about flags, made by rules from the descriptions.",
            config=flags.FlagsConfig,
            collect=flag_questions.collect,
        ),
        ToySet(
            name="scenes",
            summary="Generated images of shapes, with captions, questions or statements.",
            config=scenes.ScenesConfig,
            collect=scenes.collect,
        ),
    )
}
"""Every toy set, by name."""


def prepare_toyset(
    name: str, out: Path, config: Any = None, *, progress: bool = True
) -> DatasetInfo:
    """Writes a toy set to the folder `out`; a complete one with the same settings is left as it is.

    Args:
        name: Which of `TOYSETS`.
        out: Dataset folder.
        config: Its settings; None: the defaults.
        progress: Whether to show progress, if standard error is a terminal.

    Raises:
        FileNotFoundError: If a package of the `demo` extra is missing.
        ValueError: If the name is unknown, or `out` holds something else.
    """
    if name not in TOYSETS:
        raise ValueError(f"no toy set called {name!r}; sets are {', '.join(TOYSETS)}")
    toyset = TOYSETS[name]
    return write_collection(
        Path(out), toyset.collect(toyset.config() if config is None else config), progress=progress
    )
