"""A Q-Former as a connector: learnt queries that read an encoder's features (BLIP-2, Li et al. 2023).

Enters: features (items, tokens, in) and, where some are padding, the mask of those that are not (items, tokens).
Leaves: (items, queries, out), as many tokens an item however long it is. In order: a learnt position is added to each
feature; the queries are normalised; in each layer they attend to each other, then to the features, then pass a
feed-forward, each with what went past it added and a norm after; a linear layer brings them to the language model's
width. The parameters' names are those of ModelCompose's audio expert below `modal_projectors.audio.`
(`qformer_32N_2L`; Video-LLaMA's class), whatever the modality. Invariant: features that are masked change nothing.

What ModelCompose and Video-LLaMA set to None in BERT's class is its text path: word and position embeddings, the head
(`cls`), and each layer's `intermediate` and `output`. The feed-forward of the queries, `intermediate_query` and
`output_query`, is another pair of modules; it stays and is used.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

DEFAULTS: dict[str, Any] = {
    "queries": 32,
    "layers": 2,
    "hidden_size": 768,
    "attention_heads": 12,
    "intermediate_size": 3072,
    "positions": 1024,
}
NORM_EPS = 1e-12  # BERT's


class Projections(nn.Module):
    """Queries from `width`, keys and values from `source_width`; heads mixed, not yet projected."""

    def __init__(self, width: int, source_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(source_width, width), nn.Linear(source_width, width)

    def forward(self, hidden: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        query, key, value = (
            each(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each, given in ((self.query, hidden), (self.key, source), (self.value, source))
        )
        wanted = None if mask is None else mask[:, None, None].bool()
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=wanted)
        return mixed.transpose(1, 2).flatten(2)


class Output(nn.Module):
    """A linear layer, what went past it added, and a norm."""

    def __init__(self, inner: int, width: int):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, inner: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(inner) + past)


class Attention(nn.Module):
    def __init__(self, width: int, source_width: int, heads: int):
        super().__init__()
        self.self = Projections(width, source_width, heads)
        self.output = Output(width, width)

    def forward(self, hidden: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """hidden (items, queries, width), source (items, tokens, source_width), mask (items, tokens) -> as hidden."""
        return self.output(self.self(hidden, source, mask), hidden)


class Intermediate(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.dense = nn.Linear(width, inner)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(self.dense(hidden))


class Layer(nn.Module):
    def __init__(self, width: int, source_width: int, heads: int, inner: int):
        super().__init__()
        self.attention = Attention(width, width, heads)
        self.crossattention = Attention(width, source_width, heads)
        self.intermediate_query, self.output_query = Intermediate(width, inner), Output(inner, width)

    def forward(self, hidden: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        hidden = self.attention(hidden, hidden)
        hidden = self.crossattention(hidden, source, mask)
        return self.output_query(self.intermediate_query(hidden), hidden)


class Embeddings(nn.Module):
    """What is left of BERT's embeddings where there is no text: the norm."""

    def __init__(self, width: int):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(width, eps=NORM_EPS)


class Layers(nn.Module):
    def __init__(self, layers: list[Layer]):
        super().__init__()
        self.layer = nn.ModuleList(layers)


class Bert(nn.Module):
    def __init__(self, width: int, layers: list[Layer]):
        super().__init__()
        self.embeddings, self.encoder = Embeddings(width), Layers(layers)

    def forward(self, queries: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        hidden = self.embeddings.LayerNorm(queries)
        for layer in self.encoder.layer:
            hidden = layer(hidden, source, mask)
        return hidden


class QFormer(nn.Module):
    """Settings: `widths` [in, out] and those of `DEFAULTS`. Raises ValueError for others, or heads that do not fit."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        own = {name: value for name, value in settings.items() if name not in ("kind", "widths")}
        widths = settings.get("widths", [])
        if strangers := sorted(set(own) - set(DEFAULTS)):
            raise ValueError(f"qformer: unknown settings {strangers}, expected some of {sorted(DEFAULTS)}")
        own = {**DEFAULTS, **own}
        width, heads = own["hidden_size"], own["attention_heads"]
        if len(widths) != 2 or width % heads:
            raise ValueError(
                f"qformer: found widths {widths}, hidden_size {width} and attention_heads {heads}; expected two "
                "widths, the encoder's and the language model's, and heads that divide the hidden size"
            )
        source_width, out = widths
        self.positions = own["positions"]
        self.audio_query_tokens = nn.Parameter(torch.zeros(1, own["queries"], width))
        layers = [Layer(width, source_width, heads, own["intermediate_size"]) for _ in range(own["layers"])]
        self.audio_Qformer = nn.ModuleDict({"bert": Bert(width, layers)})
        self.audio_llama_proj = nn.Linear(width, out)
        self.audio_position_embedding = nn.Embedding(self.positions, source_width)
        self.initialise()

    def initialise(self):
        init.normal_(self.audio_query_tokens, std=0.02)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """features (items, tokens, in), mask (items, tokens), true where to look -> (items, queries, out)."""
        items, tokens = features.shape[:2]
        if tokens > self.positions:
            raise ValueError(
                f"the encoder gives {tokens} features an item, but this connector has learnt {self.positions} "
                "positions: give it shorter media"
            )
        source = features + self.audio_position_embedding.weight[:tokens]
        queries = self.audio_query_tokens.expand(items, -1, -1)
        hidden = self.audio_Qformer["bert"](queries, source, mask)
        return self.audio_llama_proj(hidden)


__all__ = ["QFormer"]
