"""What settings refuse when they are made, and how the command line describes them."""

import re
from dataclasses import fields, is_dataclass

import pytest

from bridgetower.data.config import Cutting, DataConfig, MaskingConfig, PrepareConfig
from bridgetower.data.sets.custom import CUSTOM_SETS, PairsConfig
from bridgetower.data.sets.datasets import DATASETS
from bridgetower.data.sets.datasets.spec import ArrowConfig
from bridgetower.engines.engine import EngineChoice
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import (
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from bridgetower.objectives.config import Phase, PretrainingConfig, RankingConfig
from bridgetower.search.config import IndexConfig
from bridgetower.serve.config import ServeConfig

NAN = float("nan")
INF = float("inf")
REFUSED = {
    Cutting: [
        ({"every": 0}, "every"),
        ({"every": NAN}, "every"),
        ({"max_moments": 0}, "max_moments"),
    ],
    DataConfig: [
        ({"repeats": (0,), "folders": ("a",)}, "repeats"),
        *(
            ({name: value}, name)
            for name, value in {"captions": "two", "augmentation": "flip"}.items()
        ),
        *(
            ({name: value}, name)
            for name, value in {"word_dropout": 1.0, "max_length": 2, "num_workers": -1}.items()
        ),
        ({"random_crop": 0.0}, r"random_crop is 0.0; expected a share in \(0, 1\], or None"),
        ({"random_crop": 1.5}, "random_crop is 1.5"),
        (
            {"rand_augment": "colours", "rand_magnitude": 3},
            "rand_augment is 'colours'; expected one of none",
        ),
        ({"rand_magnitude": 3}, "rand_magnitude is 3 for rand_augment 'none'; expected 0"),
        (
            {"rand_augment": "colour"},
            "rand_magnitude is 0 for rand_augment 'colour'; expected 1 to 30",
        ),
        ({"rand_augment": "geometry", "rand_magnitude": 11}, "expected 1 to 10"),
        (
            {"random_crop": 0.5, "cache": True},
            "start from the image files; leave cache and augmentation out",
        ),
        ({"flip": True, "augmentation": "affine"}, "leave cache and augmentation out"),
    ],
    MaskingConfig: [
        ({"probability": 0.0}, "probability"),
        ({"probability": 1.5}, "probability"),
        ({"mask_share": -0.1}, "mask_share"),
        ({"random_share": -0.1}, "random_share"),
        ({"mask_share": 0.9, "random_share": 0.2}, "mask_share"),
    ],
    PairsConfig: [
        ({"test_fraction": -0.1}, "give >= 0, together below 1"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, "give >= 0, together below 1"),
        ({"max_errors": -1}, "max_errors is -1"),
        ({"num_workers": 0}, "num_workers is 0"),
    ],
    RetrievalConfig: [
        *(({name: -1}, f"{name} is -1") for name in ("candidates", "batch_size")),
        *(({name: 0}, f"{name} is 0") for name in ("max_captions", "fold_size")),
        ({"protocol": "fair"}, "protocol is 'fair'"),
    ],
    Phase: [
        ({"until": 0.0}, "a phase ends at 0.0; expected a share"),
        ({"until": 1.5}, "a phase ends at 1.5"),
        ({"mlm": -1.0}, r"loss weights mlm -1.0, .*expected >= 0"),
        ({"mlm": 0, "itm": 0, "itc": 0}, "one positive"),
        ({"negatives": "hrad"}, "negatives is 'hrad'; expected one of random, uniform, hard"),
        ({"negatives": "hard", "itm": 0}, "itm is 0, so that nothing draws them"),
        ({"objectives": {"itc": 1}}, "mlm, itm and itc have weights of their own"),
        *(({"objectives": {"sigmoid": weight}}, "expected >= 0") for weight in (-1.0, NAN, INF)),
    ],
    PretrainingConfig: [
        *(
            (
                {"phases": tuple(Phase(until=end) for end in ends)},
                "expected increasing shares of which the last is 1",
            )
            for ends in ((), (0.5,), (0.5, 0.5, 1.0), (0.7, 0.3, 1.0), (1.0, 0.5))
        ),
        ({"negatives_from": "all"}, "negatives_from is 'all'; expected one of rank, world"),
        (
            {"phases": (Phase(negatives="uniform"),), "negatives_from": "world"},
            "but no phase has hard negatives",
        ),
        (
            {"mlm_normalization": "mean"},
            "mlm_normalization is 'mean'; expected one of step, official",
        ),
    ],
    RankingConfig: [
        ({"false_texts": 0}, "false_texts is 0; expected at least 1"),
        ({"itm": -1.0}, "itm is -1.0; expected at least 0"),
    ],
    EngineChoice: [
        ({"precision": "fp16", "device": "cpu"}, "precision fp16 is for GPUs; on the CPU use bf16"),
        ({"engine": "openvino", "precision": "fp16"}, "engine openvino has no fp16; .*: torch"),
        (
            {"engine": "onnxruntime", "precision": "bf16"},
            "engine onnxruntime has no bf16; .*: openvino, torch",
        ),
        ({"precision": "int8"}, "engine torch has no int8; engines that have it: onnxruntime"),
        ({"engine": "openvino", "precision": "int8"}, "engine openvino has no int8"),
        (
            {"engine": "onnxruntime", "device": "cuda:0"},
            "engine onnxruntime runs on the CPU, not on cuda:0",
        ),
        ({"device": "gpu"}, "device is 'gpu'; expected a name such as cpu or cuda:0"),
        (
            {"engine": "openvino", "compile": True},
            "engine openvino is not compiled; use engine torch",
        ),
        *(
            ({"device": device}, "device is 'cuda:99', but PyTorch sees")
            for device in ("cuda:99", 99, "99")
        ),
        ({"device": "meta"}, "device is 'meta', on which PyTorch cannot compute here"),
        ({"device": "vulkan"}, "device is 'vulkan', on which PyTorch cannot compute here"),
    ],
}


@pytest.mark.parametrize(
    ("config", "values", "message"), [(key, *case) for key in REFUSED for case in REFUSED[key]]
)
def test_unfit_values(config, values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


CONFIGS = [
    *(VisionConfig, TextConfig, FusionConfig, HeadsConfig, ModelConfig),
    *(DataConfig, MaskingConfig, PrepareConfig, ArrowConfig),
    *(spec.config for spec in (*CUSTOM_SETS.values(), DATASETS["vg"], DATASETS["vgqa"])),
    *(RetrievalConfig, IndexConfig, ServeConfig),
]


def described(docstring):
    """Names with an entry of their own under "Attributes"."""
    _, _, attributes = (docstring or "").partition("Attributes:\n")
    return re.findall(r"^ {8}(\w+): \S", attributes, re.MULTILINE)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_own_field_has_an_entry_in_order(config):
    inherited = {
        item.name for base in config.__bases__ if is_dataclass(base) for item in fields(base)
    }
    names = [name for name in described(config.__doc__) if name not in inherited]
    assert names == [item.name for item in fields(config) if item.name not in inherited]


def test_control_fields_that_share_an_entry_are_missed():
    assert described("X.\n\n    Attributes:\n        a, b: Two.\n        c: One.\n") == ["c"]
