"""Rows of encodings: layers are copied where they are read, with the numbers and gradients of copies made before."""

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from bridgetower.model.bridges import BRIDGES
from bridgetower.model.fusion import Encoded, TakenLayers

ROWS = torch.tensor([0, 1, 2, 2, 0, 1, 0, 1, 2])
OTHERS = torch.tensor([0, 1, 2, 0, 1, 2, 1, 2, 0])


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operators made and that are still there, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def copied(encoded: Encoded, rows: Tensor) -> Encoded:
    """Every layer copied before any is read."""
    return replace(encoded.map(lambda tensor: tensor[rows]), first_layer_cache=None)


@pytest.mark.parametrize("kind", BRIDGES)
@pytest.mark.parametrize("cached", [False, True])
def test_numbers_and_gradients_are_those_of_copies(kind: str, cached: bool) -> None:
    found = {}
    for name, take in (("copied", copied), ("taken", Encoded.__getitem__)):
        model = tiny.build(tiny.changed(fusion__bridge=kind))
        image, text = tiny.encodings(model)
        if cached and name == "taken":
            image, text = model.cache_image(image), model.cache_text(text)
        fused = model.fuse(take(image, ROWS), take(text, OTHERS), outputs="all")
        outputs = {"text": fused.text, "image": fused.image, "pooled": fused.pooled}
        weights = tiny.cotangents(outputs)
        sum((outputs[each] * weights[each]).sum() for each in outputs).backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        found[name] = outputs, gradients
    (one, one_gradients), (other, other_gradients) = found.values()
    assert all(tiny.off(one[name], other[name]) <= (1e-5 if cached else 0) for name in one)
    assert one_gradients.keys() == other_gradients.keys()
    assert all(tiny.off(one_gradients[name], other_gradients[name]) < 1e-4 for name in one_gradients)


def test_rows_of_rows() -> None:
    image, text = tiny.encodings(tiny.build())
    again = text[ROWS][torch.tensor([8, 3, 3])][slice(1, None)]
    assert isinstance(again.layers, TakenLayers)
    assert not isinstance(again.layers.layers, TakenLayers)
    expected = copied(copied(text, ROWS), torch.tensor([3, 3]))
    assert all(torch.equal(one, other) for one, other in zip(again.layers, expected.layers, strict=True))
    assert torch.equal(again.mask, expected.mask)
    assert len(again.layers[1:]) == len(text.layers) - 1
    assert torch.equal(again.layers[-1:][0], expected.layers[-1])
    joined = Encoded.cat([image[ROWS], image])
    assert torch.equal(joined.layers[0], torch.cat([image.layers[0][ROWS], image.layers[0]]))


@pytest.mark.parametrize("train", [False, True])
def test_less_memory(train: bool) -> None:
    """Six fusion layers read six tower layers of each modality, one after the other."""
    config = tiny.changed(
        **{"vision__num_layers": 6, "text__num_layers": 6, "fusion__num_layers": 6, "fusion__hidden_size": 64},
        **{"vision__image_size": 64, "fusion__dropout": 0.0},
    )
    model = tiny.build(config).train(train)
    with torch.set_grad_enabled(train):
        image, text = tiny.encodings(model)
        rows = ROWS.repeat(2)
        takes: dict[str, Callable[[Encoded, Tensor], Encoded]] = {"copied": copied, "taken": Encoded.__getitem__}
        most = {}
        for name, take in takes.items():
            with LiveBytes() as live:
                model.fuse(take(image, rows), take(text, rows)).pooled.sum()
            most[name] = live.most
        layer = image.layers[0][rows].nbytes
    assert most["copied"] > 6 * layer
    assert most["copied"] - most["taken"] > 4 * layer  # of the six layers of images, all but the one that is read
