"""Towers that timm and transformers build. Only this module imports these packages."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from bridgetower.extras import require
from bridgetower.model.config import EncoderName, Positions, TextConfig, VisionConfig
from bridgetower.model.layers import PatchStates, Pixels, TokenIds, TokenMask, TokenStates, on_meta
from bridgetower.model.towers import TextTower, VisionTower

# Prefix of a tower's parameters, before the library's names.
_PREFIX = "model."
_UNUSED_SETTINGS = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "problem_type",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "chunk_size_feed_forward",
)
_UNLIMITED = 8_192  # tokens, for a text tower without a position table


class TimmTower(VisionTower):
    """An image tower of timm, whose final norm applies to every layer that is read.

    `VisionConfig.settings` has `architecture`, a name of timm, and `arguments` of its `create_model`.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        settings = _tower_settings("vision", config, "architecture")
        self.model, built = _timm(settings, config.image_size)
        names = ("patch_size", "hidden_size", "num_layers", "prefix_tokens")
        _check_sizes("vision", config, built, *names)

    def forward(self, pixel_values: Pixels, layers: tuple[int, ...]) -> list[PatchStates]:
        outputs = self.model.forward_intermediates(
            pixel_values,
            indices=[layer - 1 for layer in layers],
            return_prefix_tokens=self.model.num_prefix_tokens > 0,
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if not self.model.num_prefix_tokens:
            return outputs
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]

    def pooled(self, hidden: PatchStates) -> Float[Tensor, "b v"]:
        return self.model.forward_head(hidden, pre_logits=True)

    def stacked_layers(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        library_tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
        converted = self.converted(library_tensors)
        fitted = {f"{_PREFIX}{name}": tensor for name, tensor in converted.items()}
        wrong = []
        for name, tensor in self.state_dict().items():
            if fitted[name].shape != tensor.shape:
                wrong.append(name)
        if wrong:
            raise ValueError(
                f"timm cannot resize {', '.join(wrong)}; use the image size that the tower was trained at"
            )
        return fitted

    def converted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns weights under timm's current names and at this tower's image size, from any form that timm reads."""
        module = sys.modules[type(self.model).__module__]
        convert = getattr(module, "checkpoint_filter_fn", None)
        if convert is None:
            return dict(tensors)
        return dict(convert(dict(tensors), self.model))

    def set_activation_checkpointing(self, enabled: bool) -> None:
        self.model.set_grad_checkpointing(enabled)


class TransformersTower(TextTower):
    """A text encoder of transformers without its pooler, whose layer n is `hidden_states[n]` of its output.

    `TextConfig.settings` is the config of transformers, with its `model_type`.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        settings = _tower_settings("text", config, "model_type")
        self.model, built = _transformers(settings, config.dropout)
        names = ("vocab_size", "hidden_size", "num_layers", "max_positions")
        _check_sizes("text", config, built, *names)

    def forward(
        self, input_ids: TokenIds, mask: TokenMask, layers: tuple[int, ...]
    ) -> list[TokenStates]:
        self.config.check_length(input_ids.shape[1])
        attention_mask = None if mask is None else mask.long()
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
        )
        hidden = [output.hidden_states[layer] for layer in layers]
        if mask is None:
            return hidden
        # Values on padding depend on the kernel, and are NaN where a local window is all padding.
        return [layer.masked_fill(~mask[..., None], 0) for layer in hidden]

    def stacked_layers(self) -> list[nn.Module]:
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.config.num_layers:
                return list(module)
        raise ValueError(
            f"{type(self.model).__name__} has no list of {self.config.num_layers} layers to train some of"
        )

    def set_activation_checkpointing(self, enabled: bool) -> None:
        if enabled:
            self.model.activation_checkpointing_enable()
        else:
            self.model.activation_checkpointing_disable()


def timm_config(
    architecture: str, arguments: Mapping[str, Any], image_size: int | None = None
) -> VisionConfig:
    settings = {"architecture": architecture, "arguments": dict(arguments)}
    with on_meta():
        _, config = _timm(settings, image_size)
    return config


def timm_data_config(
    architecture: str, pretrained: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns timm's preprocessing of an architecture: `input_size`, `mean`, `std`, `interpolation`, `crop_mode`."""
    require("towers", "timm")
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    defaults = get_pretrained_cfg(architecture)
    values = defaults.to_dict() if defaults else {}
    values.update(pretrained or {})
    return dict(resolve_data_config({}, pretrained_cfg=values))


def timm_hub_id(name: str) -> str:
    require("towers", "timm")
    from timm.models import get_pretrained_cfg, is_model

    weights = get_pretrained_cfg(name) if is_model(name.partition(".")[0]) else None
    if weights is None or not weights.hf_hub_id:
        raise ValueError(
            f"timm has no weights called {name!r}; expected a name such as vit_small_patch14_dinov2.lvd142m"
        )
    hub_id = str(weights.hf_hub_id)
    if hub_id.endswith("/"):
        return f"{hub_id}{weights.architecture}.{weights.tag}"
    return hub_id


def transformers_config(settings: Mapping[str, Any]) -> TextConfig:
    with on_meta():
        _, config = _transformers(settings, 0.0)
    return config


def read_transformers(folder: Path) -> tuple[TextConfig, dict[str, Tensor]]:
    """Reads an encoder as transformers does, without a network or code in the folder."""
    require("towers", "transformers")
    from transformers import AutoModel

    try:
        loaded, report = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,  # the default asks on the terminal
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"transformers cannot read {folder} ({_first_line(error)})") from error
    # Settings, with values as JSON has them.
    values = loaded.config.to_dict()
    for name in _UNUSED_SETTINGS:
        values.pop(name, None)
    settings = json.loads(json.dumps(values))

    # Weights of the tower that the settings build.
    config = transformers_config(settings)
    with on_meta():
        expected = TransformersTower(config).state_dict()
    tensors = loaded.state_dict()
    names = [name.removeprefix(_PREFIX) for name in expected]
    if lacking := sorted(set(names) & set(report["missing_keys"])):
        raise ValueError(f"{folder} lacks tensors: {', '.join(lacking[:10])}")
    return config, {f"{_PREFIX}{name}": tensors[name] for name in names}


def transformers_tokenizer(folder: Path) -> Tokenizer | None:
    """Reads the tokenizer of a folder as transformers does, without a network or code in the folder."""
    has_model = any(folder.glob("*.model"))
    has_vocabulary = any((folder / name).is_file() for name in ("vocab.json", "vocab.txt"))
    if has_model:
        require("towers", "transformers", "sentencepiece")
    elif has_vocabulary:
        require("towers", "transformers")
    else:
        return None
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"transformers cannot read the tokenizer in {folder} ({_first_line(error)})"
        ) from error
    vocabulary = loaded.vocab_files_names.get("vocab_file", "tokenizer.json")
    if not (folder / vocabulary).is_file() or not hasattr(loaded, "backend_tokenizer"):
        raise ValueError(
            f"{folder} has no {vocabulary} for transformers' {type(loaded).__name__}; add a tokenizer.json"
        )
    tokenizer: Tokenizer = loaded.backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _tower_settings(
    encoder: EncoderName, config: VisionConfig | TextConfig, key: str
) -> Mapping[str, Any]:
    settings = config.settings or {}
    if not isinstance(settings.get(key), str):
        raise ValueError(
            f"{encoder}.settings has no {key}, which {config.architecture!r} is built from; read the tower's weights"
        )
    return settings


def _check_sizes(encoder: EncoderName, config: Any, built: Any, *names: str) -> None:
    """Checks that a config agrees with the config of what its settings build."""
    for name in names:
        if getattr(config, name) != getattr(built, name):
            raise ValueError(
                f"{encoder}.{name} is {getattr(config, name)}, but {encoder}.settings make a tower with "
                f"{getattr(built, name)}; leave it out"
            )


def _timm(settings: Mapping[str, Any], image_size: int | None) -> tuple[Any, VisionConfig]:
    """Builds a model and returns it with its sizes."""
    require("towers", "timm")
    import timm
    from timm.models import is_model

    architecture = settings["architecture"]
    arguments = settings.get("arguments", {})
    if not is_model(architecture.partition(".")[0]):
        raise ValueError(
            f"timm has no architecture {architecture!r}; timm.list_models() names those that there are"
        )
    size = {} if image_size is None else {"img_size": image_size}
    keywords = {**arguments, **size, "num_classes": 0}
    try:
        model = _instantiate(lambda: timm.create_model(architecture, **keywords))
    except TypeError as error:
        raise ValueError(
            f"timm cannot build {architecture} with {arguments or size} ({error})"
        ) from error

    # Layers of one width and patch size, and a way to their outputs with the prefix tokens, which some models drop.
    has_blocks = all(
        hasattr(model, name) for name in ("blocks", "patch_embed", "num_prefix_tokens")
    )
    run = getattr(model, "forward_intermediates", None)
    parameters = inspect.signature(run).parameters if run else {}
    layers = getattr(model, "feature_info", None)
    sizes = set[tuple[int, int]]()
    if isinstance(layers, list):
        sizes = {(layer["num_chs"], layer["reduction"]) for layer in layers}
    if len(sizes) != 1 or not has_blocks or "return_prefix_tokens" not in parameters:
        raise ValueError(
            f"{architecture} is no vision transformer of timm whose layers are of one width and whose "
            "forward_intermediates returns prefix tokens; expected one such as vit_small_patch14_dinov2"
        )
    ((hidden_size, patch_size),) = sizes

    # The image size, if the model decides it.
    if image_size is None:
        input_size = getattr(model.patch_embed, "img_size", None)
        height, width = input_size or model.pretrained_cfg["input_size"][1:]
        if height != width:
            raise ValueError(
                f"timm's image size is {height} x {width}; expected a square: give image_size"
            )
        image_size = int(height)
    attention = getattr(model.blocks[0], "attn", None)
    config = VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_layers=len(model.blocks),
        num_heads=getattr(attention, "num_heads", 1),
        intermediate_size=4 * hidden_size,
        architecture="timm",
        prefix_tokens=model.num_prefix_tokens,
        settings=settings,
    )
    return model, config


def _transformers(settings: Mapping[str, Any], dropout: float) -> tuple[Any, TextConfig]:
    """Builds a model in float32 with one dropout probability everywhere, and returns it with its sizes."""
    require("towers", "transformers")
    from transformers import AutoConfig, AutoModel

    # The library's config.
    values = dict(settings)
    kind = values.pop("model_type")
    for name in ("dtype", "torch_dtype"):
        values.pop(name, None)
    try:
        library_config: Any = AutoConfig.for_model(kind, **values)
    except ValueError as error:
        raise ValueError(
            f"transformers does not know the model type {kind!r}; expected an encoder such as bert"
        ) from error
    for name, value in library_config.to_dict().items():
        if "dropout" in name and type(value) in (int, float):
            setattr(library_config, name, dropout)
    if getattr(library_config, "is_encoder_decoder", False):
        raise ValueError(
            f"{kind} is an encoder with a decoder; expected an encoder such as modernbert"
        )

    # The model, and whether its positions leave padding out, as RoBERTa's.
    model = _instantiate(lambda: AutoModel.from_config(library_config))
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    positions: Positions = "bert"
    for name, module in model.named_modules():
        is_positions = name.endswith("embeddings.position_embeddings")
        if is_positions and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            positions = "roberta"

    # Its sizes.
    width = library_config.hidden_size
    config = TextConfig(
        vocab_size=library_config.vocab_size,
        hidden_size=width,
        num_layers=library_config.num_hidden_layers,
        num_heads=getattr(library_config, "num_attention_heads", 1),
        intermediate_size=getattr(library_config, "intermediate_size", None) or 4 * width,
        max_positions=getattr(library_config, "max_position_embeddings", None) or _UNLIMITED,
        pad_token_id=library_config.pad_token_id or 0,
        positions=positions,
        architecture="transformers",
        settings=settings,
    )
    return model, config


def _instantiate(build: Callable[[], Any]) -> Any:
    """Builds a model, on `meta` with values in its buffers, as checkpoints do not hold all of them."""
    if torch.get_default_device().type != "meta":
        return build()
    with torch.device("cpu"):
        model = build()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            without_memory = nn.Parameter(
                parameter.detach().to("meta"), requires_grad=parameter.requires_grad
            )
            module.register_parameter(name, without_memory)
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
