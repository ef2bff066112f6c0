"""Layers compiled one by one: equal layers share their code, and what is between them stays plain Python."""

from __future__ import annotations

import torch._dynamo

from bridgetower.model.bridgetower import BridgeTower

# Graphs of one layer's code: of both streams, in the first and the last layer, for one batch size and for all.
_GRAPHS = 64

_TEXT_MULTIPLE = 8  # tokens; kernels for GPUs want lengths of attention masks and of products to be multiples of it


def compile_layers(model: BridgeTower, backend: str = "inductor") -> None:
    """Compiles the layers of the fusion encoder and of those towers that list theirs; names of parameters stay.

    Each is one graph for all batch sizes and text lengths after the first. Texts are padded to multiples of eight
    tokens and always have a mask, so that no length and no batch without padding needs graphs of its own.
    """
    allow_graphs()
    model.text_multiple = _TEXT_MULTIPLE
    for layer in model.layers():
        layer.compile(fullgraph=True, backend=backend)


def allow_graphs() -> None:
    """Lets PyTorch keep as many graphs of one function as there are kinds of calls; beyond, it computes without one."""
    torch._dynamo.config.cache_size_limit = max(_GRAPHS, torch._dynamo.config.cache_size_limit)
