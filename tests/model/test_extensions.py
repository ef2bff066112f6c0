"""A tower, a bridge and a head from outside the package: in the model, in checkpoints, with the kernels of a CPU."""

from dataclasses import replace

import pytest
import torch

from bridgetower import BridgeTower, Extensions
from bridgetower.checkpoints import Checkpoint, convert, read_checkpoint, write_checkpoint
from bridgetower.model.cpu import OneDnnLinear, optimize_for_cpu
from helpers.custom_modules import CUSTOM_EXTENSIONS
from helpers.models import (
    SMALL_CONFIG,
    changed_config,
    max_difference,
    off_defaults,
    random_images,
    random_texts,
)

CONFIG = replace(
    changed_config(
        vision__architecture="patches",
        vision__prefix_tokens=0,
        text__architecture="words",
        fusion__bridge="manager",
        fusion__vision_layers=(1, 2, 4),
        fusion__text_layers=(1, 2, 3),
    ),
    heads=replace(SMALL_CONFIG.heads, custom=("mood",)),
)


def build_extended(seed=0):
    return off_defaults(BridgeTower(CONFIG, CUSTOM_EXTENSIONS), seed).eval()


def test_everything_reaches_the_outputs():
    model = build_extended()
    image = model.encode_image(random_images(3))
    text = model.encode_text(*random_texts([5, 3, 4]))
    assert [layer.shape for layer in image.layers] == 3 * [(3, CONFIG.vision.num_tokens, 16)]
    fused = model.fuse(image, text)
    losses = [model.head("mood")(fused.pooled), model.image_embeds(image), model.text_embeds(text)]
    torch.cat([loss.flatten() for loss in losses]).square().sum().backward()
    ours = ("vision.", "text.", "mood_head.", "fusion.text_bridges.", "fusion.image_bridges.")
    reached = {
        name: value.grad for name, value in model.named_parameters() if name.startswith(ours)
    }
    assert len(reached) > 10
    assert [
        name for name, gradient in reached.items() if gradient is None or not gradient.any()
    ] == []


def test_the_global_vector_is_that_of_the_tower():
    model = build_extended()
    pixels = random_images(3)
    expected = model.vision(pixels, (4,))[0].mean(dim=1)
    for outputs in ("layers", "cls"):
        assert max_difference(model.encode_image(pixels, outputs=outputs).cls, expected) < 1e-6


def test_kernels_of_a_cpu_leave_them_as_they_are():
    model = build_extended()
    batch = (random_images(3), *random_texts([5, 3, 4]))
    expected = model(*batch).pooled
    optimize_for_cpu(model)
    swapped = [name for name, module in model.named_modules() if isinstance(module, OneDnnLinear)]
    assert not [name for name in swapped if name.startswith("vision.") or name.endswith(".weigh")]
    assert "image_projections.0" in swapped
    assert max_difference(model(*batch).pooled, expected) < 1e-5


def test_a_checkpoint_names_them(tmp_path):
    model = build_extended()
    batch = (random_images(3), *random_texts([5, 3, 4]))
    checkpoint = Checkpoint(
        source="mine", config=CONFIG, tensors=model.state_dict(), extensions=CUSTOM_EXTENSIONS
    )
    write_checkpoint(checkpoint, tmp_path / "model")
    read = read_checkpoint(tmp_path / "model", extensions=CUSTOM_EXTENSIONS)
    assert read.config == CONFIG
    assert torch.equal(read.model()(*batch).pooled, model(*batch).pooled)
    with pytest.raises(
        ValueError,
        match=r"vision\.architecture is 'patches'; expected one of vit, timm, or a custom",
    ):
        read_checkpoint(tmp_path / "model")
    fields = (
        r"vision\.architecture is 'patches'.*text\.architecture is 'words'.*heads\.custom.*mood"
    )
    with pytest.raises(ValueError, match=fields):
        convert(read, tmp_path / "hf", "hf")


def test_unknown_names():
    for values, message in (
        (
            {"text.architecture": "letters"},
            "architecture is 'letters'; expected one of bert, transformers, words,",
        ),
        (
            {"heads.custom": ("mood", "colour")},
            "heads.custom is 'colour'; expected one of mlm, .*, mood, or",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            BridgeTower(CONFIG.override(values), CUSTOM_EXTENSIONS)


def test_names_of_the_package_are_refused():
    for kind, name in (
        ("vision_towers", "vit"),
        ("text_towers", "bert"),
        ("bridges", "add"),
        ("heads", "vqa"),
    ):
        classes = getattr(CUSTOM_EXTENSIONS, kind)
        with pytest.raises(
            ValueError,
            match=rf"extensions\.{kind} has '{name}', a name of the package; expected none",
        ):
            Extensions(**{kind: {**classes, name: next(iter(classes.values()))}})


def test_initial_weights_of_a_tower_are_its_own():
    model = BridgeTower(CONFIG, CUSTOM_EXTENSIONS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.reset_parameters(torch.Generator().manual_seed(0))
    after = model.state_dict()
    assert all(
        torch.equal(before[name], after[name])
        for name in before
        if name.startswith(("vision.", "text."))
    )
    assert not torch.equal(before["mood_head.weight"], after["mood_head.weight"])
