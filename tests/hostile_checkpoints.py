"""Sound checkpoints that hostile_inputs.py breaks, of kinds that the other tests have no writer for."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def move_projector_out(folder: Path):
    """Leave the projector in mm_projector.bin alone."""
    path = folder / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    for file in set(index["weight_map"].values()):
        tensors = torch.load(folder / file)
        torch.save({name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}, folder / file)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "mm_projector" not in name}
    path.write_text(json.dumps(index))


def write_lora(folder: Path, base: Any):
    """As PEFT saves it."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"):
        out, wide = base.model.get_submodule(name).weight.shape
        for side, shape in (("A", (4, wide)), ("B", (out, 4))):
            tensors[f"base_model.model.model.{name}.lora_{side}.weight"] = 0.1 * torch.randn(
                shape, generator=generator
            )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj"],
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_shards(folder: Path):
    """The base in three files of safetensors."""
    shutil.copytree(folder / "base", folder / "shards")
    (folder / "shards" / "model.safetensors").unlink()
    tensors = load_file(folder / "base" / "model.safetensors")
    names, where = sorted(tensors), {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({n: tensors[n] for n in names[number::3]}, folder / "shards" / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(names[number::3], file))
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    (folder / "shards" / "model.safetensors.index.json").write_text(text)
