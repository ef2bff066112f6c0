"""Hidden states and attention weights of chosen layers, for analyses and probes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from threading import get_ident
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridgetower.arguments import Expected, checked
from bridgetower.model.bridgetower import IMAGE, TEXT, BridgeTower
from bridgetower.model.config import EncoderName
from bridgetower.model.fusion import FusionAttention, Mask
from bridgetower.model.towers import Tower, Transformer

AttentionKind = Literal["vision", "text"] | FusionAttention
Layers = Annotated[
    Mapping[EncoderName, Collection[int]],
    Expected(
        "numbers of layers by part, such as {'vision': [0, 12], 'text': [12], 'fusion': [1, 6]}"
    ),
]


class HiddenStates(NamedTuple):
    """Hidden states by the number of their layer, attention weights and the pooled output.

    Attributes:
        vision, text: Of tower layers [B, L, width], of the image tower before its final LayerNorm; 0 is the embeddings.
        fused_image, fused_text: Both streams after a fusion layer [B, L, D].
        attentions: By kind, then by layer: softmax(q·kᵀ / √e) [B, heads, queries, keys]; empty without `attentions`.
        pooled: As `Fused.pooled`.
    """

    vision: dict[int, Float[Tensor, "b p v"]]
    text: dict[int, Float[Tensor, "b l t"]]
    fused_image: dict[int, Float[Tensor, "b p d"]]
    fused_text: dict[int, Float[Tensor, "b l d"]]
    attentions: dict[AttentionKind, dict[int, Float[Tensor, "b h q m"]]]
    pooled: Float[Tensor, "b e"]


@checked
def hidden_states(
    model: BridgeTower,
    pixel_values: Float[Tensor, "b 3 h w"],
    input_ids: Int[Tensor, "b l"],
    attention_mask: Mask = None,
    *,
    layers: Layers | None = None,
    attentions: bool = False,
) -> HiddenStates:
    """Runs a model on pairs and returns the outputs of chosen layers of its towers and its fusion encoder."""
    mask = None if attention_mask is None else attention_mask.bool()
    config = model.config
    numbers = _layer_numbers(model, layers)
    towers: dict[Literal["vision", "text"], Tower] = {"vision": model.vision, "text": model.text}
    weights: dict[AttentionKind, dict[int, Tensor]] = {}
    fused_image: dict[int, Tensor] = {}
    fused_text: dict[int, Tensor] = {}
    caller = get_ident()

    with ExitStack() as hooks:

        def record(
            outputs: dict[int, Tensor], number: int, module: nn.Module, read: Callable[..., Tensor]
        ) -> None:
            def hook(*call: Any) -> None:  # module, inputs, output
                if get_ident() == caller:  # other threads may use the model meanwhile
                    outputs[number] = read(*call)

            hooks.enter_context(module.register_forward_hook(hook))

        # Attention weights, of which the embeddings, number 0, have none.
        if attentions:
            for kind, tower in towers.items():
                for number in filter(None, numbers[kind]):
                    if not isinstance(tower, Transformer):
                        raise ValueError(
                            f"the attention of {type(tower).__name__} cannot be kept; leave {kind} out of layers"
                        )
                    attention = tower.attention(number)
                    record(weights.setdefault(kind, {}), number, attention, _attention_weights)
            for number in numbers["fusion"]:
                for fusion_kind, attention in model.fusion.attentions(number).items():
                    outputs = weights.setdefault(fusion_kind, {})
                    record(outputs, number, attention, _attention_weights)

        # Outputs of the fusion encoder.
        for number in numbers["fusion"]:
            record(fused_image, number, model.fusion.image_layers[number - 1], _output)
            record(fused_text, number, model.fusion.text_layers[number - 1], _output)

        # The towers and the fusion encoder run.
        vision, bridged = _tower_states(
            model.vision, pixel_values, None, numbers["vision"], config.vision_layers
        )
        image_encoded = model.project("image", bridged, None, IMAGE)
        text, bridged = _tower_states(
            model.text, input_ids, mask, numbers["text"], config.text_layers
        )
        text_encoded = model.project("text", bridged, mask, TEXT)
        # The kernels for CPUs would fuse some pairs after others, and each hook would keep the last of them.
        fused = BridgeTower.fuse(model, image_encoded, text_encoded, "all")
    return HiddenStates(vision, text, fused_image, fused_text, weights, fused.pooled)


def _layer_numbers(model: BridgeTower, layers: Layers | None) -> dict[EncoderName, tuple[int, ...]]:
    """Returns the numbers of the chosen layers, by default of all."""
    config = model.config
    # The embeddings, number 0, are known of this package's towers only.
    first_vision = 0 if isinstance(model.vision, Transformer) else 1
    first_text = 0 if isinstance(model.text, Transformer) else 1
    existing: dict[EncoderName, range] = {
        "vision": range(first_vision, config.vision.num_layers + 1),
        "text": range(first_text, config.text.num_layers + 1),
        "fusion": range(1, config.fusion.num_layers + 1),
    }
    numbers = {
        encoder: tuple(span if layers is None else layers.get(encoder, ()))
        for encoder, span in existing.items()
    }
    unknown = [
        f"{encoder} {number}"
        for encoder, span in existing.items()
        for number in numbers[encoder]
        if number not in span
    ]
    if unknown:
        ranges = [f"{encoder} {span[0]} to {span[-1]}" for encoder, span in existing.items()]
        raise ValueError(f"layers has {', '.join(unknown)}; this model has {', '.join(ranges)}")
    return numbers


def _output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output


def _attention_weights(
    attention: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor
) -> Tensor:
    """Computes the weights of a `DotProductAttention`, which never forms them."""
    query, key, _, mask = inputs
    queries = attention.split_heads(query)
    keys = attention.split_heads(key)
    scores = queries @ keys.mT / queries.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return scores.float().softmax(dim=-1)


def _tower_states(
    tower: Tower,
    inputs: Tensor,
    mask: Tensor | None,
    numbers: Collection[int],
    bridged: tuple[int, ...],
) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Returns the states of the layers `numbers`, and of the bridged ones as projections read them, of one run."""
    read = tuple(sorted({*numbers, *bridged}))
    if isinstance(tower, Transformer):
        outputs = tower.states(inputs, mask, read)
        norm = tower.post_norm
    else:
        outputs = tower.run(inputs, mask, read)
        norm = nn.Identity()
    states = dict(zip(read, outputs, strict=True))
    chosen_states = {number: states[number] for number in numbers}
    bridged_states = [norm(states[number]) for number in bridged]
    return chosen_states, bridged_states
