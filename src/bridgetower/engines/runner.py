"""What computes exported parts: arrays in, arrays out."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from bridgetower.engines.parts import PartName


class Runner(Protocol):
    """Runs the parts of one exported folder; a part is loaded when it is first run."""

    def run(self, part: PartName, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the outputs of a part for its inputs, both in the order of `Part`."""
