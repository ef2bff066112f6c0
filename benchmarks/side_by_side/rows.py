"""What a benchmark says: one row per comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bridgetower.model.cpu import processor_name
from side_by_side.timing import Timing


@dataclass(frozen=True, kw_only=True)
class Row:
    """One of our ways, beside one of a peer's where there is one.

    Attributes:
        name: What is compared.
        ours: Which of our ways.
        peer: Which way of the peer.
        ours_s, peer_s: Median seconds.
        target: What `ratio` is to reach; None if the row is for information.
        max_diff: Largest difference of the outputs.
        unit: Of ours and the peer's value, where it is not seconds.
        gflops: Matrix products of our way, in 1e9 operations per second.
        products_gflops: The same products alone, one after the other: the machine's rate.
        share: Of that rate.
        disturbed: Whether other processes were busy whenever one of the two was timed.
        peak_gib: Highest resident memory of the process that measured, in GiB.
        details: Seconds of every way, by name, and what else was measured.
    """

    name: str
    ours: str = ""
    peer: str = ""
    ours_s: float
    peer_s: float | None = None
    target: float | None = None
    max_diff: float | None = None
    unit: str = "s"
    gflops: float | None = None
    products_gflops: float | None = None
    share: float | None = None
    disturbed: bool = False
    peak_gib: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times the peer needs what we need."""
        return self.peer_s and (self.peer_s / self.ours_s if self.ours_s else math.inf)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached."""
        return None if self.target is None or self.ratio is None else self.ratio >= self.target

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as JSON holds it."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "reached": self.reached,
            "processor": processor_name(),
        }


def timed(name: str, timings: Mapping[str, Timing], ours: str, peer: str, **more: Any) -> Row:
    """Returns the row of two ways that were timed in turn."""
    one, other = timings[ours], timings[peer]
    disturbed = one.disturbed or other.disturbed
    return Row(
        name=name,
        ours=ours,
        peer=peer,
        ours_s=one.seconds,
        peer_s=other.seconds,
        disturbed=disturbed,
        **more,
    )
