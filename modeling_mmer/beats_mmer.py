"""BEATs: a transformer over the patches of a sound's mel spectrogram.

Enters: normalised log mel energies (batch, frames, mel bins), as `FbankFeatureExtractor` makes them, and the mask of
the frames that are sound (batch, frames). Leaves: (batch, tokens, width), one token a patch of 16 frames by 16 bins,
in the order of time and within it of frequency: 1024 frames of 128 bins make 64 x 8 = 512 tokens. The sizes are
settings; the defaults are those of `BEATs_iter3_plus_AS2M.pt` (Chen et al. 2022), their names those of its `cfg`, the
parameters' names those of its `model`, which loads as it is. A fine-tuned checkpoint also holds a classifier
(`predictor.*`), which has no place here. Invariant: nothing is drawn at random, and a sound that others or padding
lengthen in a batch gives, in its own tokens, what it gives alone.

Padding is told by whole patches: a patch that holds a frame of padding is not heard, just as frames that fill no
patch are left out where the sound comes alone. (The original's own mask takes every two frames for one token, so that
a sound's last patch loses some of its frequencies.)
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

DEFAULTS: dict[str, Any] = {
    "mel_bins": 128,
    "input_patch_size": 16,
    "embed_dim": 512,
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": True,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": True,
    "num_buckets": 320,
    "max_distance": 800,
    "gru_rel_pos": True,
}
# the only values that a published checkpoint has
FIXED = {"activation_fn": "gelu", "layer_norm_first": False}


def distance_buckets(tokens: int, buckets: int, max_distance: int) -> torch.Tensor:
    """int64 (tokens, tokens): the bucket of the distance from a query (row) to a key (column).

    Half of the buckets are for keys behind. Of each half, half stand for one distance each, the others for ranges that
    grow with the logarithm up to `max_distance`; the last takes all beyond. Reckoned in float32 on the CPU, as in
    training, so that no distance on an edge changes sides.
    """
    places = torch.arange(tokens, device="cpu")
    distance = places[None, :] - places[:, None]
    half = buckets // 2
    exact = half // 2
    span = distance.abs()
    growth = torch.log(span.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + growth.long()).clamp(max=half - 1)
    return (distance > 0).long() * half + torch.where(span < exact, span, far)


def _norm(weight_v: torch.Tensor) -> torch.Tensor:
    """(out, in, taps) -> (1, 1, taps), in float32 at least: squares of halves are lost."""
    wide = weight_v.to(torch.promote_types(weight_v.dtype, torch.float32))
    return wide.pow(2).sum((0, 1), keepdim=True).sqrt()


class PositionConv(nn.Module):
    """A grouped convolution over the tokens, as long before as after it; weight = weight_g · weight_v / ‖weight_v‖.

    The norm is one per tap, over all channels. The factors have the checkpoint's names; torch has others today.
    """

    def __init__(self, width: int, taps: int, groups: int):
        super().__init__()
        self.taps, self.groups = taps, groups
        self.weight_g = nn.Parameter(torch.ones(1, 1, taps))
        self.weight_v = nn.Parameter(torch.zeros(width, width // groups, taps))
        self.bias = nn.Parameter(torch.zeros(width))
        self.initialise()

    def initialise(self):
        init.normal_(self.weight_v, std=math.sqrt(4 / (self.taps * len(self.weight_v))))
        init.copy_(self.weight_g, _norm(self.weight_v.detach()))
        init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        weight = self.weight_g / _norm(self.weight_v) * self.weight_v
        mixed = nn.functional.conv1d(
            hidden.transpose(1, 2), weight.to(hidden.dtype), self.bias, padding=self.taps // 2, groups=self.groups
        )
        # an even number of taps has one output too many
        return mixed[..., : hidden.shape[1]].transpose(1, 2)


class GatedAttention(nn.Module):
    """Self-attention whose scores get a bias by distance, which each query scales by a gate of its own.

    Of the query's head q: a, b = σ of the sums of the first and last four outputs of `grep_linear`(q), and the gate is
    a · (b · grep_a − 1) + 2.
    """

    def __init__(self, width: int, heads: int, gated: bool):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // heads, 8) if gated else None
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1)) if gated else None

    def initialise(self):
        if self.grep_a is not None:
            init.ones_(self.grep_a)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor | None, heard: torch.Tensor | None) -> torch.Tensor:
        """hidden (batch, tokens, width), bias (heads, tokens, tokens), heard (batch, tokens) -> as hidden."""
        query, key, value = (
            each(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        if bias is not None:
            bias = bias[None]
            if self.grep_linear is not None:
                sums = self.grep_linear(query).unflatten(-1, (2, 4)).sum(-1)
                a, b = torch.sigmoid(sums).split(1, -1)  # (batch, heads, tokens, 1) each
                bias = (a * (b * self.grep_a - 1) + 2) * bias
            bias = bias.to(query.dtype)
        if heard is not None:
            seen = heard[:, None, None]  # (batch, heads, queries, keys)
            bias = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and feed-forward, a norm after each; `alpha` weighs what goes past them (DeepNorm; 1 without)."""

    def __init__(self, width: int, inner: int, heads: int, gated: bool, alpha: float):
        super().__init__()
        self.alpha = alpha
        self.self_attn = GatedAttention(width, heads, gated)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor | None, heard: torch.Tensor | None) -> torch.Tensor:
        hidden = self.self_attn_layer_norm(hidden * self.alpha + self.self_attn(hidden, bias, heard))
        inner = self.fc2(nn.functional.gelu(self.fc1(hidden)))
        return self.final_layer_norm(hidden * self.alpha + inner)


class Encoder(nn.Module):
    """All layers take the distance bias of the first: `layers.0.self_attn.relative_attention_bias`.

    A checkpoint repeats it for each layer. The repetitions are dropped on loading, and one that differs is an error.
    """

    def __init__(self, own: dict[str, Any]):
        super().__init__()
        width, heads = own["encoder_embed_dim"], own["encoder_attention_heads"]
        self.num_buckets, self.max_distance = own["num_buckets"], own["max_distance"]
        self.relative = own["relative_position_embedding"]
        self.pos_conv = nn.Sequential(PositionConv(width, own["conv_pos"], own["conv_pos_groups"]), nn.GELU())
        alpha = (2 * own["encoder_layers"]) ** 0.25 if own["deep_norm"] else 1.0
        self.layers = nn.ModuleList(
            Layer(width, own["encoder_ffn_embed_dim"], heads, own["gru_rel_pos"], alpha)
            for _ in range(own["encoder_layers"])
        )
        if self.relative:
            first: Any = self.layers[0]
            first.self_attn.relative_attention_bias = nn.Embedding(self.num_buckets, heads)
        self.layer_norm = nn.LayerNorm(width)
        self.register_load_state_dict_pre_hook(_drop_repeated_bias)

    def forward(self, hidden: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        """hidden (batch, tokens, width), heard (batch, tokens) bool -> (batch, tokens, width)."""
        if heard is not None:
            hidden = hidden.masked_fill(~heard[..., None], 0)
        hidden = self.layer_norm(hidden + self.pos_conv(hidden))
        bias = self._distance_bias(hidden) if self.relative else None
        for layer in self.layers:
            hidden = layer(hidden, bias, heard)
        return hidden

    def _distance_bias(self, hidden: torch.Tensor) -> torch.Tensor:
        """(heads, tokens, tokens)."""
        first: Any = self.layers[0]
        buckets = distance_buckets(hidden.shape[1], self.num_buckets, self.max_distance)
        return first.self_attn.relative_attention_bias(buckets.to(hidden.device)).permute(2, 0, 1)


def _drop_repeated_bias(encoder: Any, state: dict[str, Any], prefix: str, *arguments: Any):
    errors = arguments[-1]
    names = [f"{prefix}layers.{i}.self_attn.relative_attention_bias.weight" for i in range(len(encoder.layers))]
    for name in names[1:]:
        repeated = state.pop(name, None)
        if repeated is not None and (names[0] not in state or not torch.equal(repeated, state[names[0]])):
            errors.append(f"{name} is not equal to {names[0]}: all layers of BEATs share one distance bias")


class Beats(nn.Module):
    """`width` of a token. Raises ValueError for settings that it does not know, or sizes that do not divide."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        own = {name: value for name, value in settings.items() if name != "kind"}
        if strangers := sorted(set(own) - set(DEFAULTS)):
            raise ValueError(f"beats: unknown settings {strangers}, expected some of {sorted(DEFAULTS)}")
        own = {**DEFAULTS, **own}
        _check_sizes(own)
        self.patch, self.mel_bins, self.width = own["input_patch_size"], own["mel_bins"], own["encoder_embed_dim"]
        embed = own["embed_dim"]
        self.patch_embedding = nn.Conv2d(1, embed, self.patch, stride=self.patch, bias=own["conv_bias"])
        self.layer_norm = nn.LayerNorm(embed)
        self.post_extract_proj = nn.Linear(embed, self.width) if embed != self.width else None
        self.encoder = Encoder(own)

    def forward(
        self, input_features: torch.Tensor, feature_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """input_features (batch, frames, mel_bins), feature_attention_mask (batch, frames), 1 where there is sound
        -> (batch, frames // 16 · mel_bins // 16, width). Tokens that are not heard hold nothing of use.
        """
        shape = tuple(input_features.shape)
        if len(shape) != 3 or shape[-1] != self.mel_bins or shape[1] < self.patch:
            raise ValueError(
                f"input_features: found shape {shape}, expected (batch, frames, {self.mel_bins}) with at least "
                f"{self.patch} frames; a shorter sound needs silence around it"
            )
        if feature_attention_mask is not None and tuple(feature_attention_mask.shape) != shape[:2]:
            raise ValueError(
                f"feature_attention_mask: found shape {tuple(feature_attention_mask.shape)}, expected {shape[:2]}, "
                "one number a frame"
            )
        patches = self.patch_embedding(input_features.unsqueeze(1).to(self.patch_embedding.weight.dtype))
        tokens = self.layer_norm(patches.flatten(2).transpose(1, 2))  # (batch, time x frequency, embed)
        if self.post_extract_proj is not None:
            tokens = self.post_extract_proj(tokens)
        heard = None if feature_attention_mask is None else self.token_mask(feature_attention_mask)
        return self.encoder(tokens, heard)

    def token_mask(self, feature_attention_mask: torch.Tensor) -> torch.Tensor:
        """The frames' mask (batch, frames) -> the tokens' (batch, tokens), bool: patches that are sound throughout.

        Raises ValueError where a sound has no such patch.
        """
        frames = feature_attention_mask.shape[1] // self.patch * self.patch
        whole = feature_attention_mask[:, :frames].bool().unflatten(1, (-1, self.patch)).all(-1)
        silent = (~whole.any(1)).nonzero().flatten().tolist()
        if silent:
            raise ValueError(
                f"feature_attention_mask: sounds {silent} have no patch of {self.patch} frames, expected at least "
                "one each; put silence around them before they become features"
            )
        return whole.repeat_interleave(self.mel_bins // self.patch, 1)


def _check_sizes(own: dict[str, Any]):
    for name, value in FIXED.items():
        if own[name] != value:
            raise ValueError(f"beats: {name} is {own[name]!r}, only {value!r} is known, that of all checkpoints")
    width = own["encoder_embed_dim"]
    for name, whole in (("encoder_attention_heads", width), ("conv_pos_groups", width)):
        if whole % own[name]:
            raise ValueError(f"beats: {name} {own[name]} does not divide encoder_embed_dim {whole}")
    if own["mel_bins"] % own["input_patch_size"]:
        raise ValueError(
            f"beats: input_patch_size {own['input_patch_size']} does not divide mel_bins {own['mel_bins']}"
        )
    if own["num_buckets"] < 4 or own["max_distance"] <= own["num_buckets"] // 4:
        raise ValueError(
            f"beats: found num_buckets {own['num_buckets']} and max_distance {own['max_distance']}, expected at least "
            "4 buckets, and a distance beyond those that have a bucket each"
        )


__all__ = ["DEFAULTS", "Beats"]
