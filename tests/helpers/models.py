"""Small models with weights off their defaults, inputs for them, and comparisons of their outputs."""

from typing import TypeVar

import numpy as np
import torch
from torch import nn

from bridgetower.data.batches.batch import IGNORED, CaptionBatch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import (
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)

# No two widths, depths or head counts are equal, so that a mix-up shows.
SMALL_CONFIG = ModelConfig(
    vision=VisionConfig(
        image_size=24, patch_size=8, hidden_size=24, num_layers=4, num_heads=3, intermediate_size=40
    ),
    text=TextConfig(
        vocab_size=50,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=36,
        max_positions=16,
        dropout=0.2,
    ),
    fusion=FusionConfig(
        hidden_size=16, num_layers=2, num_heads=2, intermediate_size=28, dropout=0.2
    ),
    heads=HeadsConfig(itc="tower", itc_size=12),
)

_Module = TypeVar("_Module", bound=nn.Module)


def changed_config(**overrides):
    """Returns the small config with fields replaced. `vision__image_size` stands for `vision.image_size`."""
    return SMALL_CONFIG.override(
        {name.replace("__", "."): value for name, value in overrides.items()}
    )


def build_model(config=SMALL_CONFIG, seed=0):
    return off_defaults(BridgeTower(config), seed).eval()


@torch.no_grad()
def off_defaults(module, seed=0):
    """Draws every parameter, LayerNorms, biases and learned scalars included, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(child.weight) for child in module.modules() if isinstance(child, nn.LayerNorm)}
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.numel() == 1 and not name.endswith("bias"):
            parameter.mul_(1 + 0.25 * noise.tanh())
        elif parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        elif id(parameter) in norms:
            parameter.copy_(1 + 0.25 * noise)
        else:
            parameter.copy_(0.15 * noise)
    return module


def normal_float64(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_float64(module):
    return off_defaults(module).double().eval()


def length_mask(*lengths):
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def random_images(count, config=SMALL_CONFIG, *, size=None, seed=0):
    side = size or config.vision.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def random_texts(lengths, config=SMALL_CONFIG, *, width=None, seed=0):
    """Returns random ids of some lengths, padded to `width` tokens (None: the longest), and their mask."""
    generator = torch.Generator().manual_seed(seed)
    first = config.text.pad_token_id + 2
    last = config.text.vocab_size
    rows = [torch.randint(first, last, (length,), generator=generator) for length in lengths]
    ids = torch.full((len(lengths), width or max(lengths)), config.text.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, words in enumerate(rows):
        ids[row, : len(words)] = words
        mask[row, : len(words)] = 1
    return ids, mask


def random_caption_batch(index, lengths, config=SMALL_CONFIG, *, seed=0):
    """Returns texts of some lengths with the images of `index`. The second token of each text is hidden."""
    input_ids, mask = random_texts(lengths, config)
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, 1] = input_ids[:, 1]
    return CaptionBatch(
        pixel_values=random_images(max(index) + 1, config)[list(index)],
        input_ids=input_ids,
        attention_mask=mask,
        masked_input_ids=torch.where(labels == IGNORED, input_ids, config.text.vocab_size - 1),
        mlm_labels=labels,
        image_index=torch.tensor(index),
        ids=tuple(map(str, index)),
        seed=seed,
    )


def random_encodings(model, lengths=(5, 3, 4)):
    config = model.config
    return model.encode_image(random_images(len(lengths), config)), model.encode_text(
        *random_texts(lengths, config)
    )


def output_weights(outputs, seed=1):
    """Returns fixed random weights for every output, to make one number of all of them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(outputs[name].shape, generator=generator) for name in sorted(outputs)}


def max_difference(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max())


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, np.asarray(expected), atol=1e-5)


def same_tensors(tensors, other):
    """Whether both hold the same names, number formats and values, bit for bit."""
    if tensors.keys() != other.keys():
        return False
    return all(
        value.dtype == other[name].dtype and torch.equal(value, other[name])
        for name, value in tensors.items()
    )
