"""Layers compiled one by one: equal layers share their code, and what is between them stays plain Python."""

from __future__ import annotations

from bridgetower.model.bridgetower import BridgeTower


def compile_layers(model: BridgeTower, backend: str = "inductor") -> None:
    """Compiles the layers of the fusion encoder and of those towers that list theirs; names of parameters stay.

    Each is one graph for all batch sizes and text lengths after the first.

    Args:
        model: Whose layers are compiled at their first run; a layer that is more than one graph is an error then.
        backend: Of `torch.compile`.
    """
    for layer in model.layers():
        layer.compile(fullgraph=True, backend=backend)
