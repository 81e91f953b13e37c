"""Trains the point clouds' encoder: in go the furniture's train clouds, out comes a folder with encoder.* files.

    python benchmarks/lab/point_encoder.py --steps 1200 --out evaluation_mmer/lab/point_cloud

No package brings a pretrained encoder for points, so a small Point-BERT learns to name the classes from scratch, with
a linear head that is thrown away. The best checkpoint on the validation split is kept, in bf16: encoder.safetensors,
encoder.json (the settings), and the curve in curves/point_encoder.json. The test split is never looked at.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from evaluation_mmer.lab import furniture
from evaluation_mmer.lab.layouts import POINTS
from modeling_mmer.point_bert_mmer import PointBert
from processing_mmer.point_clouds_mmer import PointCloudProcessor

SETTINGS = {
    "kind": "point_bert", "point_dims": 3, "groups": 32, "group_size": 16, "group_width": 128,
    "width": 128, "heads": 4, "depth": 4,
}  # fmt: skip
CURVE = Path(__file__).parent / "curves" / "point_encoder.json"


def tensors(clouds: Sequence[tuple[Any, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(clouds, POINTS, 3) as the expert's processor makes them, and class numbers (clouds,)."""
    processor = PointCloudProcessor(points=POINTS, dims=3)
    made = torch.stack([processor(cloud).point_clouds[0] for cloud, _ in clouds])
    return made, torch.tensor([furniture.CLASSES.index(kind) for _, kind in clouds])


def varied(points: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each cloud (batch, points, 3) turned about y, stretched by up to a fifth, its points moved by 0.01."""
    batch = len(points)
    angle = torch.rand(batch, generator=generator) * 2 * torch.pi
    zero, one = torch.zeros(batch), torch.ones(batch)
    rows = [angle.cos(), zero, angle.sin(), zero, one, zero, -angle.sin(), zero, angle.cos()]
    turn = torch.stack(rows, -1).reshape(batch, 3, 3)
    stretch = 0.8 + 0.4 * torch.rand(batch, 1, 3, generator=generator)
    moved = points * stretch + 0.01 * torch.randn(points.shape, generator=generator)
    return moved @ turn.transpose(1, 2)


class Classifier(nn.Module):
    """The encoder, and a head on its class token and the largest of its groups."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PointBert(SETTINGS)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * self.encoder.width, len(furniture.CLASSES)))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(points)
        return self.head(torch.cat([hidden[:, 0], hidden[:, 1:].amax(1)], -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    points, kinds = tensors(furniture.clouds("train"))
    held, wanted = tensors(furniture.clouds("validation"))
    model = Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.lr, options.steps, pct_start=0.1)
    # each class as often as any other
    weight = 1.0 / torch.bincount(kinds, minlength=len(furniture.CLASSES))[kinds]
    curve, best, losses, began = [], -1.0, [], time.perf_counter()
    for step in range(1, options.steps + 1):
        model.train()
        rows = torch.multinomial(weight, options.batch, replacement=True, generator=generator)
        logits = model(varied(points[rows], generator))
        loss = nn.functional.cross_entropy(logits, kinds[rows], label_smoothing=0.1)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == options.steps:
            model.eval()
            with torch.no_grad():
                hits = model(held).argmax(-1) == wanted
            point = {"step": step, "loss": sum(losses) / len(losses), "validation": hits.float().mean().item()}
            curve.append({key: round(value, 4) for key, value in point.items()})
            print(json.dumps({**curve[-1], "seconds": round(time.perf_counter() - began)}), flush=True)
            losses = []
            if point["validation"] >= best:
                best = point["validation"]
                write_out(options.out, model.encoder)
    CURVE.parent.mkdir(exist_ok=True)
    CURVE.write_text(json.dumps(curve, indent=2) + "\n")


def write_out(folder: Path, encoder: PointBert) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        key: (value.to(torch.bfloat16) if value.is_floating_point() else value).contiguous()
        for key, value in sorted(encoder.state_dict().items())
    }
    save_file(state, folder / "encoder.safetensors", {"format": "pt"})
    (folder / "encoder.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")


if __name__ == "__main__":
    main()
