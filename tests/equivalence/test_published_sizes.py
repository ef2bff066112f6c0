"""The published repositories: names and shapes at full size on the meta device."""

from typing import Any

import huggingface as hf
import pytest
import torch
from transformers import BridgeTowerConfig

import bridgetower
from bridgetower.checkpoints import huggingface

# Sizes in config.json of the repositories BridgeTower/NAME on the hub. Those of the large model were read in its stored
# commits 9bdaa4b and 0e15d64. The base models have transformers' defaults, which its documentation calls those of
# bridgetower-base, and of which commit f803af9 of bridgetower-base-itm-mlm shows the sizes of the text tower.
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
_SHARED = {
    "num_hidden_layers": 6,
    "layer_norm_eps": 1e-5,
    "link_tower_type": "add",
    "share_cross_modal_transformer_layers": True,
    "share_link_tower_layers": False,
    "tie_word_embeddings": False,
    "logit_scale_init_value": 2.6592,
}
BASE = _SHARED | {
    "hidden_size": 768,
    "text_config": _ROBERTA
    | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "vision_config": {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16, "image_size": 288},
}
LARGE = _SHARED | {
    "hidden_size": 1024,
    "contrastive_hidden_size": 512,
    "text_config": _ROBERTA
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 294},
}
REPOSITORIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bridgetower-base": (BASE, ("backbone",)),
    "bridgetower-base-itm-mlm": (BASE, ("mlm", "itm")),
    "bridgetower-large-itm-mlm-itc": (LARGE, ("mlm", "itm", "itc")),
}
KINDS = [(name, kind) for name, (_, kinds) in REPOSITORIES.items() for kind in kinds]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_names_and_shapes(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every tensor of transformers' model, those that no computation reads included."""
    values, _ = REPOSITORIES[name]
    with torch.device("meta"):
        theirs = hf.KINDS[kind](BridgeTowerConfig(**values))
    expected = theirs.state_dict()
    monkeypatch.setattr("bridgetower.checkpoints.checkpoint.finite", lambda source, tensors: tensors)  # no values there
    checkpoint = huggingface.read_checkpoint(name, values, expected)
    written, tensors = huggingface.export(checkpoint)
    found, shapes = ({one: tensor.shape for one, tensor in all_.items()} for all_ in (tensors, expected))
    assert found == shapes
    pooler = sum(tensor.numel() for tensor in checkpoint.extra_tensors.values())
    with torch.device("meta"):
        ours = bridgetower.BridgeTower(checkpoint.config)
    assert sum(parameter.numel() for parameter in ours.parameters()) + pooler == theirs.num_parameters()
    back = BridgeTowerConfig(**written)
    for part in ("", "text_config", "vision_config"):
        described, start = (getattr(one, part) if part else one for one in (back, theirs.config))
        for field in values[part] if part else _SHARED:
            assert getattr(described, field) == getattr(start, field), field
