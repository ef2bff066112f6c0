"""Using the downstream heads: answer questions, judge statements about one picture or about two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack, overload

from jaxtyping import Float
from torch import Tensor

from bridgetower.model.heads import ClassifierName
from bridgetower.processor import ImageLike

PairHead = Literal["vqa", "snli_ve", "nlvr2"]
"""Heads that read a picture, or two, together with a text."""


@dataclass(frozen=True)
class Choice:
    """An answer or a judgement that the model can choose.

    Attributes:
        label: Its name.
        probability: Of `answer`, of each answer on its own, so that they do not sum to one; elsewhere over all choices.
    """

    label: str
    probability: float


class Options(TypedDict, total=False):
    """What every use of a head can be told besides.

    Attributes:
        batch_size: Texts at once; 32 unless given.
        truncate: Cut texts that are too long instead of refusing them.
        progress: Show a bar.
    """

    batch_size: int
    truncate: bool
    progress: bool


class Answering(ABC):
    """What a loaded model can say about pictures and texts, by names of classes; `Predictor` is one."""

    @abstractmethod
    def class_names(self, head: ClassifierName) -> tuple[str, ...]:
        """Returns the names of the classes of a head, in its order."""

    @abstractmethod
    def class_probabilities(
        self,
        head: PairHead,
        images: ImageLike | Sequence[ImageLike],
        texts: str | Sequence[str],
        images_2: ImageLike | Sequence[ImageLike] | None = None,
        **options: Unpack[Options],
    ) -> Float[Tensor, "n k"]:
        """Returns the probability of every class of a head for each text with its image."""

    @overload
    def answer(  # type: ignore[overload-overlap]  # a string is a sequence of strings, but one text here
        self, images: ImageLike, questions: str, *, top: int = 5, **options: Unpack[Options]
    ) -> list[Choice]: ...

    @overload
    def answer(
        self, images: Sequence[ImageLike], questions: Sequence[str], *, top: int = 5, **options: Unpack[Options]
    ) -> list[list[Choice]]: ...

    def answer(
        self,
        images: ImageLike | Sequence[ImageLike],
        questions: str | Sequence[str],
        *,
        top: int = 5,
        **options: Unpack[Options],
    ) -> list[Choice] | list[list[Choice]]:
        """Returns the `top` likeliest answers to each question about its image.

        Args:
            images, questions: Image n goes with question n.
            top: Answers per question.
            **options: See `Options`.

        Returns:
            The answers, likeliest first; for a sequence of questions, a list of that per question.

        Raises:
            ValueError: A model without VQA head or without the names of its answers, `top` below 1, different numbers
                of images and questions, or unreadable ones.
        """
        if top < 1:
            raise ValueError(f"top is {top}; expected at least 1")
        names = self.class_names("vqa")
        chosen = choices(self.class_probabilities("vqa", images, questions, **options), names, top)
        return chosen[0] if isinstance(questions, str) else chosen

    @overload
    def entail(  # type: ignore[overload-overlap]
        self, images: ImageLike, statements: str, **options: Unpack[Options]
    ) -> list[Choice]: ...

    @overload
    def entail(
        self, images: Sequence[ImageLike], statements: Sequence[str], **options: Unpack[Options]
    ) -> list[list[Choice]]: ...

    def entail(
        self, images: ImageLike | Sequence[ImageLike], statements: str | Sequence[str], **options: Unpack[Options]
    ) -> list[Choice] | list[list[Choice]]:
        """Returns whether each image contradicts its statement, leaves it open (neutral), or entails it.

        Args:
            images, statements: Image n goes with statement n.
            **options: See `Options`.

        Returns:
            The three judgements, likeliest first; for a sequence of statements, a list of that per statement.

        Raises:
            ValueError: A model without SNLI-VE head, different numbers of images and statements, or unreadable ones.
        """
        names = self.class_names("snli_ve")
        chosen = choices(self.class_probabilities("snli_ve", images, statements, **options), names)
        return chosen[0] if isinstance(statements, str) else chosen

    @overload
    def reason(  # type: ignore[overload-overlap]
        self, images: ImageLike, images_2: ImageLike, statements: str, **options: Unpack[Options]
    ) -> list[Choice]: ...

    @overload
    def reason(
        self,
        images: Sequence[ImageLike],
        images_2: Sequence[ImageLike],
        statements: Sequence[str],
        **options: Unpack[Options],
    ) -> list[list[Choice]]: ...

    def reason(
        self,
        images: ImageLike | Sequence[ImageLike],
        images_2: ImageLike | Sequence[ImageLike],
        statements: str | Sequence[str],
        **options: Unpack[Options],
    ) -> list[Choice] | list[list[Choice]]:
        """Returns whether each statement about two images is true.

        Args:
            images, images_2, statements: The left image n and the right image n go with statement n.
            **options: See `Options`.

        Returns:
            `False` and `True`, likeliest first; for a sequence of statements, a list of that per statement.

        Raises:
            ValueError: A model without NLVR2 head, different numbers of images and statements, or unreadable ones.
        """
        names = self.class_names("nlvr2")
        chosen = choices(self.class_probabilities("nlvr2", images, statements, images_2, **options), names)
        return chosen[0] if isinstance(statements, str) else chosen


def choices(probabilities: Float[Tensor, "n k"], names: Sequence[str], top: int | None = None) -> list[list[Choice]]:
    """Returns the `top` likeliest classes of every row, None for all of them."""
    best = probabilities.topk(min(top or len(names), len(names)))
    return [
        [Choice(names[number], probability) for number, probability in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
