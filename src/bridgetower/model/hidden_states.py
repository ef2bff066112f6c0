"""Hidden states and attention weights of chosen layers, as an analysis or a probe reads them."""

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
from bridgetower.model.config import Part
from bridgetower.model.fusion import Mask
from bridgetower.model.towers import Tower, Transformer, VisionTower

FusionAttention = Literal["image self", "text self", "image to text", "text to image"]
"""Attention in a fusion layer: within a stream, and from the positions of one stream to those of the other."""
AttentionKind = Literal["vision", "text"] | FusionAttention
Layers = Annotated[
    Mapping[Part, Collection[int]],
    Expected(
        "numbers of layers by part, such as {'vision': [0, 12], 'text': [12], 'fusion': [1, 6]}"
    ),
]


class HiddenStates(NamedTuple):
    """What layers give, each by its number, with the pooled output.

    Attributes:
        vision, text: Of tower layers [B, L, width], of the image tower before its final LayerNorm; 0 is the embeddings.
        fused_image, fused_text: Both streams after a fusion layer [B, L, D].
        attentions: By kind, then by layer: softmax(q·kᵀ / √e) [B, heads, queries, keys]; empty unless asked for.
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
    """Runs a model on pairs, and returns what chosen layers of its towers and its fusion encoder give."""
    mask = None if attention_mask is None else attention_mask.bool()
    config = model.config
    there: dict[Part, range] = {
        "vision": range(not isinstance(model.vision, Transformer), config.vision.num_layers + 1),
        "text": range(not isinstance(model.text, Transformer), config.text.num_layers + 1),
        "fusion": range(1, config.fusion.num_layers + 1),
    }
    chosen = {
        part: tuple(numbers if layers is None else layers.get(part, ()))
        for part, numbers in there.items()
    }
    unknown: list[str] = []
    for part, numbers in chosen.items():
        unknown += [f"{part} {number}" for number in numbers if number not in there[part]]
    if unknown:
        known = ", ".join(
            f"{part} {numbers[0]} to {numbers[-1]}" for part, numbers in there.items()
        )
        raise ValueError(f"layers has {', '.join(unknown)}; this model has {known}")
    found = HiddenStates({}, {}, {}, {}, {}, pooled=torch.empty(0, 0))
    caller = get_ident()  # other threads may use the model meanwhile
    with ExitStack() as hooks:

        def keep(
            kept: dict[int, Tensor], number: int, layer: nn.Module, what: Callable[..., Tensor]
        ) -> None:
            def hook(*call: Any) -> None:  # module, inputs, output
                if get_ident() == caller:
                    kept[number] = what(*call)

            hooks.enter_context(layer.register_forward_hook(hook))

        def keep_weights(kind: AttentionKind, number: int, layer: Any) -> None:
            if attentions:
                keep(found.attentions.setdefault(kind, {}), number, layer.attention, _weights)

        towers: dict[Literal["vision", "text"], Tower] = {
            "vision": model.vision,
            "text": model.text,
        }
        for part, tower in towers.items() if attentions else ():
            layered = [number for number in chosen[part] if number > 0]
            if layered and not isinstance(tower, Transformer):
                raise ValueError(
                    f"the attention of {type(tower).__name__} cannot be kept; leave {part} out of layers"
                )
            for number in layered:
                keep_weights(part, number, tower.stacked_layers()[number - 1].attention)
        for number in chosen["fusion"]:
            image_layer, text_layer = (
                model.fusion.image_layers[number - 1],
                model.fusion.text_layers[number - 1],
            )
            keep(found.fused_image, number, image_layer, lambda module, inputs, output: output)
            keep(found.fused_text, number, text_layer, lambda module, inputs, output: output)
            keep_weights("image self", number, image_layer.self_attention)
            keep_weights("text self", number, text_layer.self_attention)
            keep_weights("image to text", number, image_layer.cross_attention)
            keep_weights("text to image", number, text_layer.cross_attention)
        vision, bridged = _states(
            model.vision, pixel_values, None, chosen["vision"], config.vision_layers
        )
        image = model.project("image", bridged, None, IMAGE)
        text, bridged = _states(model.text, input_ids, mask, chosen["text"], config.text_layers)
        # all pairs at once
        fused = BridgeTower.fuse(model, image, model.project("text", bridged, mask, TEXT), "all")
    return found._replace(vision=vision, text=text, pooled=fused.pooled)


def _weights(
    attention: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor
) -> Tensor:
    """The weights of a `DotProductAttention`, which never forms them."""
    query, key, _, mask = inputs
    queries, keys = attention.split_heads(query), attention.split_heads(key)
    scores = queries @ keys.mT / queries.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return scores.float().softmax(dim=-1)


def _states(
    tower: Tower,
    inputs: Tensor,
    mask: Tensor | None,
    chosen: Collection[int],
    bridged: tuple[int, ...],
) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Returns the states of chosen layers, and those of the bridged ones as projections read them, of one run."""
    numbers = tuple(sorted({*chosen, *bridged}))
    if isinstance(tower, Transformer):
        run = tower.states(inputs, mask, numbers)
    else:
        run = (
            tower(inputs, numbers)
            if isinstance(tower, VisionTower)
            else tower(inputs, mask, numbers)
        )
    states = dict(zip(numbers, run, strict=True))
    finish = tower.post_norm if isinstance(tower, Transformer) else nn.Identity()
    return {number: states[number] for number in chosen}, [
        finish(states[number]) for number in bridged
    ]
