"""Questions and statements as examples, each with its picture; they are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bridgetower.data.pictures import Pictures


class Entries:
    """What is said about pictures, one example each: the rows of `questions` or `statements`.

    Only the places of the entries are kept in memory: the 440 thousand questions of VQAv2 with ten answers each would
    take half a gigabyte in every process that decodes.
    """

    def __init__(self, pictures: Pictures, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """Finds the entries.

        Args:
            pictures: Of kind `vqa`, `snli-ve` or `nlvr2`.
            keep: Tells which entries are examples; None: all of them.

        Raises:
            ValueError: None are.
        """
        self.pictures, self._keep = pictures, keep
        places = [
            place
            for image, said in enumerate(pictures.said())
            for place in [(image, number) for number, entry in enumerate(said) if self._kept(entry)]
            * pictures.repeats(image)
        ]
        if not places:
            folders = ", ".join(str(folder) for folder, _ in pictures.sources)
            unfit = "" if keep is None else " is fit for this"
            raise ValueError(
                f"no example in split {', '.join(pictures.splits)} of {folders}{unfit}; choose another split"
            )
        self._places = torch.tensor(places)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields every entry once, in the order of the examples of a set without repeats."""
        return (entry for said in self.pictures.said() for entry in said if self._kept(entry))

    def chosen(self, examples: Sequence[int]) -> tuple[list[int], list[dict[str, Any]]]:
        """Returns the pictures of some examples and what is said about them."""
        places = self._places[list(examples)].tolist()
        return [image for image, _ in places], [self.pictures.said_of(image)[number] for image, number in places]

    def _kept(self, entry: dict[str, Any]) -> bool:
        return self._keep is None or self._keep(entry)
