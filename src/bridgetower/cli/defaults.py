"""What verbs work with when no model or no index is given: what the demo has left."""

from __future__ import annotations

import logging
from pathlib import Path

from bridgetower.demo.folder import FOLDER, answering_model, held_out_index, trained_model

logger = logging.getLogger(__name__)


def model_or_demo(model: str | None, command: str) -> str:
    """Returns the model, or the one that the demo trained, and says so.

    Args:
        model: As given.
        command: That would name a model, for the error.

    Raises:
        FileNotFoundError: None is given, and the demo has left none.
    """
    if model is not None:
        return model
    trained = trained_model(FOLDER)
    if not _is_whole(trained):
        raise FileNotFoundError(
            f"no model is given, and {FOLDER} has none: run `bridgetower demo`, which trains one, or name one with "
            f"`{command}`"
        )
    logger.info("no model is given: using %s, which the demo trained", trained)
    return str(trained)


def answering_or_demo(model: str | None, command: str) -> str:
    """Returns the model, or the one that the demo taught to answer questions, and says so.

    Args:
        model: As given.
        command: That would name a model, for the error.

    Raises:
        FileNotFoundError: None is given, and the demo has left none.
    """
    found = model or demo_answering()
    if found is None:
        raise FileNotFoundError(
            f"no model is given, and {FOLDER} has none that answers questions: run `bridgetower demo`, which trains "
            f"one, or name one with `{command}`"
        )
    return found


def demo_answering() -> str | None:
    """Returns the model that the demo taught to answer questions, and says so; None if there is none."""
    trained = answering_model(FOLDER)
    if not _is_whole(trained):
        return None
    logger.info("no model to answer questions is given: using %s, which the demo trained", trained)
    return str(trained)


def index_or_demo(index: str | None) -> str:
    """Returns the index, or the one that the demo made, and says so.

    Raises:
        FileNotFoundError: None is given, and the demo has left none.
    """
    if index is not None:
        return index
    made = held_out_index(FOLDER)
    if not made.exists():
        raise FileNotFoundError(
            f"no index is given, and {FOLDER} has none: run `bridgetower demo`, which makes one, or make your own with "
            "`bridgetower index PHOTOS --out photos.lance --model MODEL`"
        )
    logger.info("no index is given: using %s, which the demo made", made)
    return str(made)


def _is_whole(model: Path) -> bool:
    """Whether a folder of a model is there; its config is written last."""
    return (model / "config.json").exists()
