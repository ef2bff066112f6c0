"""How models are evaluated; importable without torch."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bridgetower.model.plain import AT_LEAST_0, AT_LEAST_1, check_choice, check_numbers

Protocol = Literal["standard", "paper"]


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How retrieval is evaluated.

    Attributes:
        candidates: k of the first stage, per query; published: 128 on Flickr30k, 256 on COCO. 0 ranks by ITC alone.
        protocol: `standard` ranks each direction on its own candidates, by matching and ITC as the checkpoint weighs
            them; `paper` on the maximum of both sides, by the logit of a match alone. Of VQAv2, `paper` leaves out the
            questions to which no annotator gave an answer of the vocabulary.
        max_captions: Captions of each image that are queries; None takes all.
        fold_size: Images of a fold, which are ranked with their captions only; recalls are means over the folds.
            COCO 1k: 1000. None ranks the whole set.
        batch_size: Items, pairs or examples at once.
    """

    candidates: int = 128
    protocol: Protocol = "standard"
    max_captions: int | None = None
    fold_size: int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        names = ("max_captions", "fold_size", "batch_size")
        check_numbers(self, "", candidates=AT_LEAST_0, **dict.fromkeys(names, AT_LEAST_1))
        check_choice("protocol", self.protocol, Protocol)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How an evaluation runs; nothing here changes its result.

    Attributes:
        work: Folder in which retrieval keeps what it has in a folder of its own until it is finished: called again
            after a kill, the same evaluation goes on from there. None: it starts again.
        until_written: Removes that folder when it is closed, for callers that write results, which a kill before that
            would lose. None: the folder is removed when the evaluation ends.
        num_workers: Processes that decode; 0 decodes in this one.
        progress: Show bars.
    """

    work: Path | None = None
    until_written: ExitStack | None = None
    num_workers: int = 0
    progress: bool = False


DEFAULTS = EvaluationOptions()
