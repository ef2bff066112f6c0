"""Configs of the towers, the fusion encoder, the heads and the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args

from bridgetower.plain import NO_OPTION, check_choice, check_numbers, from_plain

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "relu"]
Positions = Literal["roberta", "bert"]
Settings = Annotated[Mapping[str, Any] | None, NO_OPTION]
"""Arguments of another library for building a tower, ready for JSON. They come with the weights and are no option."""

BridgeKind = Literal[
    "add",
    "scaled_add",
    "interpolate",
    "concatenate",
    "gated",
    "norm",
    "static_manager",
    "adaptive_manager",
]
MANAGERS = ("static_manager", "adaptive_manager")
MIXING_BRIDGES = tuple(kind for kind in get_args(BridgeKind) if kind not in MANAGERS)
ItcKind = Literal["tower", "fused"]
Pooling = Literal["token", "mean"]
EncoderName = Literal["vision", "text", "fusion"]
_Entry = TypeVar("_Entry")

# Names of the classes of heads in the official order (`write_snli.py`; NLVR2's files hold these very strings).
FIXED_LABELS = {"snli_ve": ("contradiction", "neutral", "entailment"), "nlvr2": ("False", "True")}

EPS = (1e-20, 1.0)
WIDTH = 65_536
CLASSES = 10_000_000
_SIZES: dict[str, tuple[float, float]] = {
    "hidden_size": (1, WIDTH),
    "num_layers": (1, 1_000),
    "num_heads": (1, WIDTH),
    "intermediate_size": (1, 4 * WIDTH),
    "layer_norm_eps": EPS,
}


def check_image_size(image_size: int, patch_size: int) -> None:
    if image_size % patch_size or image_size <= 0:
        lower = max(image_size // patch_size, 1) * patch_size
        raise ValueError(
            f"image size {image_size} is not a multiple of the patch size {patch_size}; "
            f"set image_size to {lower} or {lower + patch_size}"
        )


def check_encoder(encoder: EncoderName, config: Any, **bounds: tuple[float, float]) -> None:
    """Checks the fields that encoders share. The vision tower has no dropout."""
    check_numbers(config, f"{encoder}.", **bounds, **_SIZES)
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"{encoder}.hidden_size {config.hidden_size} is not a multiple of "
            f"{encoder}.num_heads {config.num_heads}"
        )
    check_choice(f"{encoder}.activation", config.activation, Activation)
    if encoder != "vision":
        check_dropouts(encoder, config, "dropout", "attention_dropout")


def check_dropouts(section: str, config: Any, *names: str) -> None:
    for name in names:
        dropout = getattr(config, name)
        if dropout is not None and not 0 <= dropout < 1:
            raise ValueError(f"{section}.{name} is {dropout}; expected a probability in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower: a ViT in CLIP's form (the defaults) or timm's, which DeiT shares.

    Attributes:
        image_size: Side of the square input in pixels; a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        hidden_size: Width of the tower.
        num_layers: Transformer blocks.
        num_heads: Attention heads; they divide `hidden_size`.
        intermediate_size: Width of the feed-forward layers.
        layer_norm_eps: Epsilon of all LayerNorms of the tower; CLIP 1e-5, timm 1e-6.
        activation: `quick_gelu` is x·σ(1.702x), as in CLIP; `gelu` is the exact one, `gelu_tanh` approximates it.
        pre_norm: LayerNorm after the embeddings (CLIP's `ln_pre`).
        patch_bias: Bias in the patch convolution (timm has one, CLIP has none).
        distillation_token: A second learned token after the class token, as in a distilled DeiT.
        architecture: `vit`; `timm`, which `settings` describe; or a custom tower, with the sizes that it has.
        prefix_tokens: Tokens before the patches in a timm or custom tower; default: those of a ViT.
        settings: For `timm`: its `architecture` and the `arguments` that it is created with.
    """

    image_size: int = 288
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"
    pre_norm: bool = True
    patch_bias: bool = False
    distillation_token: bool = False
    architecture: str = "vit"
    prefix_tokens: int | None = None
    settings: Settings = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_encoder("vision", self, image_size=(1, 8_192), patch_size=(1, 8_192))
        check_image_size(self.image_size, self.patch_size)

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        if self.prefix_tokens is not None:
            return self.prefix_tokens
        return 2 if self.distillation_token else 1


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower: RoBERTa (the defaults) or BERT.

    Attributes:
        vocab_size: Token ids, special ones included.
        hidden_size: Width of the tower.
        num_layers: Transformer layers.
        num_heads: Attention heads; they divide `hidden_size`.
        intermediate_size: Width of the feed-forward layers.
        max_positions: Rows of the position table; RoBERTa leaves the first `pad_token_id` + 1 of them unused.
        type_vocab_size: Rows of the token type table, of which only the first is used.
        pad_token_id: Id that fills short texts.
        positions: `roberta` counts tokens but padding, from `pad_token_id` + 1; `bert` counts columns from 0.
        layer_norm_eps: Epsilon of all LayerNorms of the tower; RoBERTa 1e-5, BERT 1e-12.
        activation: Activation in the feed-forward layers; RoBERTa and BERT have `gelu`.
        dropout: Probability, in training only, for embeddings, attention and feed-forward alike.
        attention_dropout: That of attention weights, if it differs.
        architecture: `bert`; `transformers`, which `settings` describe; or a custom tower, with the sizes that it has.
        settings: For `transformers`: its config, with the `model_type`.
    """

    vocab_size: int = 50265
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 514
    type_vocab_size: int = 1
    pad_token_id: int = 1
    positions: Positions = "roberta"
    layer_norm_eps: float = 1e-5
    activation: Activation = "gelu"
    dropout: float = 0.1
    attention_dropout: float | None = None
    architecture: str = "bert"
    settings: Settings = field(default=None, hash=False)

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("vocab_size", "type_vocab_size", "max_positions"), (1, CLASSES))
        check_encoder("text", self, pad_token_id=(0, CLASSES), **counts)
        if self.pad_token_id >= self.vocab_size or self.max_length < 1:
            raise ValueError(
                f"text.pad_token_id {self.pad_token_id} with vocab_size {self.vocab_size} and max_positions "
                f"{self.max_positions}; expected one of the ids, and room for a token"
            )
        check_choice("text.positions", self.positions, Positions)

    @property
    def max_length(self) -> int:
        if self.positions == "bert":
            return self.max_positions
        return self.max_positions - self.pad_token_id - 1

    def check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"text of {length} tokens; the position table holds {self.max_length}: shorten it"
            )


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """The cross-modal encoder and what feeds it.

    Attributes:
        hidden_size: Width of both streams.
        num_layers: Layers of each stream.
        num_heads: Attention heads; they divide `hidden_size`.
        intermediate_size: Width of the feed-forward layers.
        bridge: How a tower layer x enters the previous fusion output z: `add` is LayerNorm(x + z), the paper's choice;
            `scaled_add` is LayerNorm(αx + z); `interpolate` is LayerNorm((1 - β)x + βz), α and β learned; `concatenate`
            is LayerNorm(W[x; z]); `gated` is LayerNorm(g ⊙ x + (1 - g) ⊙ z), g = σ(W[x; z]); `norm` is LayerNorm(z), so
            that only the last tower layers reach the encoder; `static_manager` and `adaptive_manager` weigh all bridged
            layers for every fusion layer, as in ManagerTower; None builds no bridges at all, as in METER. Another name
            is that of a custom bridge.
        input_norm: LayerNorm on the first layer's input; METER has none, a manager one for each tower layer instead.
        vision_layers: Image tower layers, counted from 1, that are read: one per fusion layer with bridges, any number
            for managers and custom bridges, and one without bridges (None or `norm`). None takes the top layers.
        text_layers: Text tower layers likewise.
        separate_projections: One projection per bridged layer and modality instead of one shared by all.
        layer_embeddings: A learned vector per tower layer, which is added after its projection, as in ManagerTower.
        layer_norm_eps: Epsilon inside the fusion layers; 1e-12 in the official code, 1e-5 in transformers.
        bridge_layer_norm_eps: Epsilon of the input LayerNorm and the bridges.
        num_token_types: Rows of the modality embedding: text, image, and a second image for NLVR2.
        activation: Activation in the feed-forward layers.
        dropout: Probability, in training only, for attention and feed-forward alike.
        attention_dropout: That of attention weights, if it differs.
    """

    hidden_size: int = 768
    num_layers: int = 6
    num_heads: int = 12
    intermediate_size: int = 3072
    bridge: BridgeKind | str | None = "add"
    input_norm: bool = True
    vision_layers: tuple[int, ...] | None = None
    text_layers: tuple[int, ...] | None = None
    separate_projections: bool = False
    layer_embeddings: bool = False
    layer_norm_eps: float = 1e-12
    bridge_layer_norm_eps: float = 1e-5
    num_token_types: int = 2
    activation: Activation = "gelu"
    dropout: float = 0.1
    attention_dropout: float | None = None

    def __post_init__(self) -> None:
        check_encoder("fusion", self, bridge_layer_norm_eps=EPS, num_token_types=(2, 1_000))
        # Managers and custom bridges read any number of tower layers.
        needs_exact_number = self.bridge in (None, *MIXING_BRIDGES)
        for name in ("vision_layers", "text_layers"):
            layers = getattr(self, name)
            if layers is None:
                continue
            is_valid = isinstance(layers, tuple) and all(type(layer) is int for layer in layers)
            if is_valid and (needs_exact_number or not layers):
                is_valid = len(layers) == self.num_bridged_layers
            if not is_valid:
                raise ValueError(
                    f"fusion.{name} is {layers}; expected {self.num_bridged_layers} tower layers "
                    f"(bridge {self.bridge!r}, {self.num_layers} fusion layers)"
                )

    @property
    def num_bridged_layers(self) -> int:
        """Tower layers per modality that reach the fusion encoder, unless others are named."""
        return 1 if self.bridge in (None, "norm") else self.num_layers

    @property
    def pooled_size(self) -> int:
        return 2 * self.hidden_size

    @property
    def first_bridge(self) -> int:
        """The first fusion layer, counted from 1, that a bridge feeds."""
        return 1 if self.bridge in MANAGERS else 2

    def num_tower_layers(self, tower: Literal["vision", "text"]) -> int:
        layers = getattr(self, f"{tower}_layers")
        return self.num_bridged_layers if layers is None else len(layers)


# Fields of `HeadsConfig` with numbers of classes, whose names a checkpoint has.
CLASS_COUNTS = ("vqa", "classification")
# Fields of `HeadsConfig` that say what the heads on towers read.
FEATURE_FIELDS = ("image_pooling", "text_pooling", "itc_dropout")


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Which heads the model carries.

    Attributes:
        mlm: Head for masked words.
        itm: Head that predicts whether image and text match.
        itc: `tower` projects each tower's last CLS (the official model); `fused` projects the image's last *bridged*
            CLS after projection and adds a head on the pooled output (transformers' contrastive model).
        itc_size: Width of the contrastive embeddings.
        itc_dropout: Dropout on what the `tower` kind projects, against overfitting of small sets.
        image_pooling: What heads on the image tower, such as `itc`, read of its last bridged layer: `token` is the
            tower's global vector, such as its CLS; `mean` is the mean of the patches.
        text_pooling: Likewise of a text; `mean`, as for towers of sentence-transformers, is of all tokens but padding.
        mlm_layer_norm_eps: Epsilon of the LayerNorm in the MLM head; 1e-12 in the official code, 1e-5 in transformers.
        mlm_activation: Activation in the MLM head.
        rank: Head that gives a pair one score, for choosing among several texts of an image (official `rank_output`).
        vqa: Number of answers of the question answering head; 0: no head.
        snli_ve: Head for the three classes of visual entailment.
        nlvr2: Head that classifies a statement about two images; needs three token types.
        classification: Classes of a custom data set, from image and text; 1: a number instead; 0: no head.
        multi_label: Whether several of them may hold at once, each with a probability of its own.
        hidden_scale: Width inside the classifiers above, as a multiple of the pooled width; 0: one Linear alone.
        nlvr2_dropout: Probability, in training only, before the NLVR2 head.
        custom: Names of custom heads.
    """

    mlm: bool = True
    itm: bool = True
    itc: ItcKind | None = None
    itc_size: int = 256
    itc_dropout: float = 0.0
    image_pooling: Pooling = "token"
    text_pooling: Pooling = "token"
    mlm_layer_norm_eps: float = 1e-12
    mlm_activation: Activation = "gelu"
    rank: bool = False
    vqa: int = 0
    snli_ve: bool = False
    nlvr2: bool = False
    classification: int = 0
    multi_label: bool = False
    hidden_scale: float = 2.0
    nlvr2_dropout: float = 0.1
    custom: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("heads.itc", self.itc, ItcKind, or_none=True)
        classes = dict.fromkeys(CLASS_COUNTS, (0, CLASSES))
        widths: dict[str, tuple[float, float]] = {"itc_size": (1, WIDTH), "hidden_scale": (0, 1e3)}
        check_numbers(self, "heads.", mlm_layer_norm_eps=EPS, **classes, **widths)
        for name, choices in (
            ("mlm_activation", Activation),
            ("image_pooling", Pooling),
            ("text_pooling", Pooling),
        ):
            check_choice(f"heads.{name}", getattr(self, name), choices)
        pools_mean = "mean" in (self.image_pooling, self.text_pooling)
        if self.itc == "fused" and (pools_mean or self.itc_dropout):
            raise ValueError(
                "heads.itc is fused with means as pooling, or itc_dropout; expected the kind tower"
            )
        check_dropouts("heads", self, "itc_dropout", "nlvr2_dropout")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model: two towers, the fusion encoder, heads.

    Attributes:
        vision: The image tower.
        text: The text tower.
        fusion: The cross-modal encoder.
        heads: What is predicted.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)

    def __post_init__(self) -> None:
        if self.heads.nlvr2 and self.fusion.num_token_types < 3:
            raise ValueError(
                f"heads.nlvr2 with fusion.num_token_types {self.fusion.num_token_types}; its second image needs 3"
            )
        if self.heads.itc == "fused" and self.fusion.layer_embeddings:
            raise ValueError(
                "heads.itc is fused with fusion.layer_embeddings; expected the itc kind tower"
            )
        for name, layers, depth in (
            ("vision", self.vision_layers, self.vision.num_layers),
            ("text", self.text_layers, self.text.num_layers),
        ):
            existing = set(layers).intersection(range(1, depth + 1))
            if layers != tuple(sorted(existing)):
                raise ValueError(
                    f"fusion.{name}_layers is {layers}; expected increasing layers between 1 and {depth}, "
                    f"the depth of the {name} tower"
                )

    @property
    def vision_layers(self) -> tuple[int, ...]:
        return self.fusion.vision_layers or self._top_layers(self.vision.num_layers)

    @property
    def text_layers(self) -> tuple[int, ...]:
        return self.fusion.text_layers or self._top_layers(self.text.num_layers)

    def _top_layers(self, depth: int) -> tuple[int, ...]:
        lowest = depth - self.fusion.num_bridged_layers + 1
        return tuple(range(lowest, depth + 1))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        return from_plain(cls, values, "model config")

    def override(self, overrides: Mapping[str, Any]) -> ModelConfig:
        """Returns a copy with dotted fields replaced, such as `{"text.num_heads": 4, "vision.image_size": 384}`."""
        sections = self.to_dict()
        for path, value in overrides.items():
            section, _, name = path.partition(".")
            if name not in sections.get(section, {}):
                paths = [f"{section}.{name}" for section in sections for name in sections[section]]
                raise ValueError(f"unknown config field {path!r}; known: {', '.join(paths)}")
            sections[section][name] = tuple(value) if isinstance(value, list) else value
        return ModelConfig(
            vision=VisionConfig(**sections["vision"]),
            text=TextConfig(**sections["text"]),
            fusion=FusionConfig(**sections["fusion"]),
            heads=HeadsConfig(**sections["heads"]),
        )


def look_up(field: str, name: str, table: Mapping[str, _Entry]) -> _Entry:
    if name not in table:
        raise ValueError(
            f"{field} is {name!r}; expected one of {', '.join(table)}, or a custom one, by extensions=NAME"
        )
    return table[name]
