"""Small models with weights off their defaults, and inputs for them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bridgetower.data.batch import IGNORED, CaptionBatch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import FusionConfig, HeadsConfig, ModelConfig, TextConfig, VisionConfig
from bridgetower.model.fusion import Encoded

# No two widths, depths or head counts are equal, so that a mix-up shows.
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=24, patch_size=8, hidden_size=24, num_layers=4, num_heads=3, intermediate_size=40),
    text=TextConfig(
        vocab_size=50, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=36, max_positions=16, dropout=0.2
    ),
    fusion=FusionConfig(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=28, dropout=0.2),
    heads=HeadsConfig(itc="tower", itc_size=12),
)

_Module = TypeVar("_Module", bound=nn.Module)


def changed(**overrides: Any) -> ModelConfig:
    """Returns the small config with fields replaced; `vision__image_size` stands for `vision.image_size`."""
    return CONFIG.override({name.replace("__", "."): value for name, value in overrides.items()})


def build(config: ModelConfig = CONFIG, seed: int = 0) -> BridgeTower:
    """Returns a model in evaluation mode whose every parameter is random."""
    return off_defaults(BridgeTower(config), seed).eval()


@torch.no_grad()
def off_defaults(module: _Module, seed: int = 0) -> _Module:
    """Draws every parameter, LayerNorms, biases and learned scalars included, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(child.weight) for child in module.modules() if isinstance(child, nn.LayerNorm)}
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 0:
            parameter.mul_(1 + 0.25 * noise.tanh())
        elif parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        elif id(parameter) in norms:
            parameter.copy_(1 + 0.25 * noise)
        else:
            parameter.copy_(0.15 * noise)
    return module


def exact(*shape: int, seed: int = 0) -> Tensor:
    """Returns random numbers of double precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(module: _Module) -> _Module:
    """Returns a module in evaluation mode with random parameters of double precision."""
    return off_defaults(module).double().eval()


def mask_of(*lengths: int) -> Tensor:
    """Returns the mask of texts of some lengths."""
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def images(count: int, config: ModelConfig = CONFIG, *, size: int | None = None, seed: int = 0) -> Tensor:
    """Returns random pixel values."""
    side = size or config.vision.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def texts(
    lengths: Sequence[int], config: ModelConfig = CONFIG, *, width: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns random ids of some lengths, padded to `width` tokens (None: the longest), and their mask."""
    generator = torch.Generator().manual_seed(seed)
    first, last = config.text.pad_token_id + 2, config.text.vocab_size
    rows = [torch.randint(first, last, (length,), generator=generator) for length in lengths]
    ids = torch.full((len(lengths), width or max(lengths)), config.text.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, words in enumerate(rows):
        ids[row, : len(words)] = words
        mask[row, : len(words)] = 1
    return ids, mask


def caption_batch(
    index: Sequence[int], lengths: Sequence[int], config: ModelConfig = CONFIG, *, seed: int = 0
) -> CaptionBatch:
    """Returns texts of some lengths with the images of `index`; the second token of each text is hidden."""
    input_ids, mask = texts(lengths, config)
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, 1] = input_ids[:, 1]
    return CaptionBatch(
        pixel_values=images(max(index) + 1, config)[list(index)],
        input_ids=input_ids,
        attention_mask=mask,
        masked_input_ids=torch.where(labels == IGNORED, input_ids, config.text.vocab_size - 1),
        mlm_labels=labels,
        image_index=torch.tensor(index),
        ids=tuple(map(str, index)),
        seed=seed,
    )


def encodings(model: BridgeTower, lengths: Sequence[int] = (5, 3, 4)) -> tuple[Encoded, Encoded]:
    """Returns random images and as many texts of some lengths, encoded."""
    config = model.config
    return model.encode_image(images(len(lengths), config)), model.encode_text(*texts(lengths, config))


def cotangents(outputs: Mapping[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Returns fixed random weights for every output, to make one number of all of them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(outputs[name].shape, generator=generator) for name in sorted(outputs)}


def off(ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest difference of two tensors of one shape."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max())


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names, number formats and values, bit for bit."""
    if one.keys() != other.keys():
        return False
    return all(value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items())
