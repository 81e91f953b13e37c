"""Point-BERT: a transformer over groups of neighbouring points.

Enters: point clouds (batch, points, 3) x y z, or (batch, points, 6) with red green blue in [0, 1]; in the unit ball,
as it was trained. Leaves: (batch, 1 + groups, width), a class token and one token a group. The sizes are settings;
the defaults are those of PointLLM v1.2 (Xu et al. 2024; `PointTransformer_8192point_2layer`), the parameters' names
those of its `model.point_backbone`. Invariants: nothing is drawn at random, the order of the points does not matter
where all distances differ, and a cloud in a batch gives what it gives alone.
"""

from typing import Any

import torch
from torch import nn

DEFAULTS: dict[str, Any] = {
    "point_dims": 6,
    "groups": 512,
    "group_size": 32,
    "group_width": 256,
    "width": 384,
    "depth": 12,
    "heads": 6,
}


def farthest_points(places: torch.Tensor, count: int) -> torch.Tensor:
    """Indices (batch, count) of `count` of the points (batch, points, 3), each the farthest from those before it.

    The first is the one farthest from the centroid. PointLLM draws the first at random, so that one cloud gives
    other features in each run; any start gives centres of the kind that it was trained on.
    """
    if places.shape[1] < count:
        raise ValueError(f"point clouds of {places.shape[1]} points, but {count} groups need as many centres")
    batch = torch.arange(len(places), device=places.device)
    chosen = torch.empty(len(places), count, dtype=torch.int64, device=places.device)
    chosen[:, 0] = ((places - places.mean(1, keepdim=True)) ** 2).sum(-1).argmax(1)
    distance = torch.full(places.shape[:2], torch.inf, dtype=places.dtype, device=places.device)
    for step in range(1, count):
        last = places[batch, chosen[:, step - 1], None]
        distance = torch.minimum(distance, ((places - last) ** 2).sum(-1))
        chosen[:, step] = distance.argmax(1)
    return chosen


def group_points(points: torch.Tensor, groups: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(neighbourhoods (batch, groups, group_size, 3|6), centres (batch, groups, 3)).

    A group holds the points nearest to its centre, their places relative to it; colours stay as they are.
    """
    if points.shape[1] < group_size:
        raise ValueError(f"point clouds of {points.shape[1]} points, but a group takes {group_size}")
    places = points[..., :3]
    centres = places.gather(1, farthest_points(places, groups)[..., None].expand(-1, -1, 3))
    nearest = torch.cdist(centres, places, compute_mode="donot_use_mm_for_euclid_dist")
    indices = nearest.topk(group_size, dim=-1, largest=False).indices  # (batch, groups, group_size)
    batch = torch.arange(len(points), device=points.device)[:, None, None]
    inside = points[batch, indices]
    return torch.cat([inside[..., :3] - centres[:, :, None], inside[..., 3:]], -1), centres


class GroupEncoder(nn.Module):
    """The small PointNet of a group: (batch, groups, group_size, dims) -> (batch, groups, group_width)."""

    def __init__(self, dims: int, group_width: int):
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Conv1d(dims, 128, 1), nn.BatchNorm1d(128), nn.ReLU(), nn.Conv1d(128, 256, 1)
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(), nn.Conv1d(512, group_width, 1)
        )

    def forward(self, neighbourhoods: torch.Tensor) -> torch.Tensor:
        batch, groups, size, dims = neighbourhoods.shape
        each = self.first_conv(neighbourhoods.reshape(batch * groups, size, dims).transpose(1, 2))
        whole = each.amax(-1, keepdim=True).expand(-1, -1, size)
        return self.second_conv(torch.cat([whole, each], 1)).amax(-1).reshape(batch, groups, -1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = hidden.shape
        query, key, value = self.qkv(hidden).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(hidden)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class Blocks(nn.Module):
    """The positions are added anew before every block."""

    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden + positions)
        return hidden


class PointBert(nn.Module):
    """`width` of a token, `tokens` an item makes. Raises ValueError for settings that it does not know."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        own = {name: value for name, value in settings.items() if name != "kind"}
        if strangers := sorted(set(own) - set(DEFAULTS)):
            raise ValueError(f"point_bert: unknown settings {strangers}, expected some of {sorted(DEFAULTS)}")
        own = {**DEFAULTS, **own}
        self.point_dims, self.groups, self.group_size = own["point_dims"], own["groups"], own["group_size"]
        self.width, self.tokens = own["width"], own["groups"] + 1
        self.encoder = GroupEncoder(self.point_dims, own["group_width"])
        self.reduce_dim = nn.Linear(own["group_width"], self.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.cls_pos = nn.Parameter(torch.randn(1, 1, self.width))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, self.width))
        self.blocks = Blocks(self.width, own["heads"], own["depth"])
        self.norm = nn.LayerNorm(self.width)

    def forward(self, point_clouds: torch.Tensor) -> torch.Tensor:
        """(batch, points, point_dims) -> (batch, 1 + groups, width). Groups are formed in the points' own dtype."""
        if point_clouds.ndim != 3 or point_clouds.shape[-1] != self.point_dims:
            raise ValueError(
                f"point_clouds: found shape {tuple(point_clouds.shape)}, expected (batch, points, {self.point_dims})"
            )
        neighbourhoods, centres = group_points(point_clouds.float(), self.groups, self.group_size)
        dtype, batch = self.norm.weight.dtype, len(point_clouds)
        tokens = self.reduce_dim(self.encoder(neighbourhoods.to(dtype)))
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], 1)
        positions = torch.cat([self.cls_pos.expand(batch, -1, -1), self.pos_embed(centres.to(dtype))], 1)
        return self.norm(self.blocks(tokens, positions))
