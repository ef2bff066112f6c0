"""What parts a model has, and examples of their inputs."""

import pytest
import torch

import tiny
from bridgetower.engines.parts import PartName, flat, make_part, part_names


def test_only_what_heads_read() -> None:
    every = {"image", "image_cls", "text", "text_cls", "fusion_pooled", "fusion_text"}
    assert set(part_names(tiny.build())) == every
    few = {"heads__itc": None, "heads__mlm": False}
    assert part_names(tiny.build(tiny.changed(**few))) == ("image", "text", "fusion_pooled")
    assert part_names(tiny.build(tiny.changed(**few, heads__image=3)))[3:] == ("image_cls",)


@pytest.mark.parametrize("name", part_names(tiny.build()))
@torch.no_grad()
def test_every_part_runs_on_its_examples(name: PartName) -> None:
    part = make_part(tiny.build(), name)
    sizes = []
    for inputs in part.examples():
        assert len(flat(inputs)) == len(part.input_names)
        outputs = part.module(*inputs)
        assert len(outputs) == len(part.output_names)
        assert all(output.isfinite().all() for output in outputs)
        sizes.append([tuple(tensor.shape) for tensor in flat(inputs)])
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize("pad", [0, 1, 30, 49])
@torch.no_grad()
def test_examples_of_texts_are_padded_where_the_pad_is_wherever_it_is(pad: int) -> None:
    model = tiny.build(tiny.changed(text__pad_token_id=pad, text__positions="bert"))
    ids, mask = make_part(model, "text").inputs
    assert torch.equal(ids == pad, mask == 0)
    assert ids.min() >= 0
    assert ids.max() < model.config.text.vocab_size
    assert torch.equal(mask.sum(dim=1), torch.tensor([8, 4]))


@torch.no_grad()
def test_a_part_recorded_by_torch_takes_other_sizes() -> None:
    model = tiny.build()
    recorded = make_part(model, "text").exported().module()
    for lengths in ([1], [14, 3, 2]):
        ids, mask = tiny.texts(lengths)
        *layers, cls = recorded(ids, mask)
        expected = model.encode_text(ids, mask)
        torch.testing.assert_close(tuple(layers), expected.layers, atol=2e-5, rtol=0)
        torch.testing.assert_close(cls, expected.cls, atol=2e-5, rtol=0)
