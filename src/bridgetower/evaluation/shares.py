"""Shares of examples that are answered right, with the picture and without; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Shares of the examples of a topic that are answered right, in [0, 1].

    Attributes:
        number: Of examples.
        model: By the model.
        other_picture: By the model, when it is shown the picture, or the pictures, of another example.
        text_only: By the answer that the same words have most often in training.
        majority: By the commonest answer of training to anything.
    """

    number: int
    model: float
    other_picture: float
    text_only: float
    majority: float
