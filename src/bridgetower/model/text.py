"""The text tower: token ids to the hidden states of the layers that are read."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bridgetower.model.config import TextConfig
from bridgetower.model.layers import PostNormLayer, activation_checkpointing


class TextTower(nn.Module):
    """RoBERTa or BERT without its pooler, which no BridgeTower objective reads."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        width = config.hidden_size
        self.word_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_positions, width)
        self.token_type_embedding = nn.Embedding(config.type_vocab_size, width)
        self.embedding_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            PostNormLayer(width, config.num_heads, config.intermediate_size, config.layer_norm_eps, config.dropout)
            for _ in range(config.num_layers)
        )

    def forward(
        self, input_ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"] | None, read_layers: tuple[int, ...]
    ) -> list[Float[Tensor, "b l t"]]:
        """Returns the outputs of `read_layers`, counted from 1 and increasing; `mask` is False on padding.

        Raises:
            ValueError: The text is longer than the position table.
        """
        hidden, outputs = self.embed(input_ids), []
        for number, layer in enumerate(self.layers[: read_layers[-1]], start=1):
            hidden = activation_checkpointing(layer, when=self.checkpoint_activations)(hidden, mask)
            if number in read_layers:
                outputs.append(hidden)
        return outputs

    def cls(
        self, input_ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"] | None, read_layer: int
    ) -> Float[Tensor, "b t"]:
        """Returns the CLS of one layer, which is computed at this position only; `mask` is False on padding.

        Raises:
            ValueError: The text is longer than the position table.
        """
        hidden = self.embed(input_ids)
        for layer in self.layers[: read_layer - 1]:
            hidden = activation_checkpointing(layer, when=self.checkpoint_activations)(hidden, mask)
        last = activation_checkpointing(self.layers[read_layer - 1], when=self.checkpoint_activations)
        return last(hidden, mask, num_queries=1)[:, 0]

    def embed(self, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l t"]:
        """Returns normalised sums of word, position and segment-0 embeddings."""
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(
                f"text of {input_ids.shape[1]} tokens; the position table holds {self.config.max_length}: shorten it"
            )
        hidden = self.word_embedding(input_ids) + self.token_type_embedding.weight[0]
        hidden = self.embedding_norm(hidden + self.position_embedding(self.position_ids(input_ids)))
        return self.dropout(hidden)

    def position_ids(self, input_ids: Int[Tensor, "b l"]) -> Int[Tensor, "*b l"]:
        """RoBERTa: cumsum(ids ≠ pad)·(ids ≠ pad) + pad, from the ids and not from the mask; BERT: the column."""
        if self.config.positions == "bert":
            return torch.arange(input_ids.shape[1], device=input_ids.device)
        is_token = (input_ids != self.config.pad_token_id).long()
        return is_token.cumsum(dim=1) * is_token + self.config.pad_token_id
