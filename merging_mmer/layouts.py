"""Which code wrote a checkpoint: transformers, PEFT, or one of those that have a layout of their own.

Enters: a folder. Leaves: its `Layout`, None for what transformers and PEFT write themselves. Told by config.json and
by the names of files and tensors, never by the folder's name. Invariant: what nobody here knows is refused, with what
was seen.
"""

from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import llava_layout, model_compose_layout, point_llm_layout, video_llava_layout
from .layout_parts import Layout, Order, Reading, Seen
from .pretrained import CONFIG, naming

LAYOUTS: tuple[Layout, ...] = (
    model_compose_layout.LAYOUT,
    point_llm_layout.LAYOUT,
    video_llava_layout.LAYOUT,
    llava_layout.LAYOUT,
)
_SHOWN = 8


def find_layout(folder: Path) -> Layout | None:
    """The layout of a folder, None for a transformers checkpoint or a PEFT adapter. Raises ValueError for others."""
    seen = Seen(folder)
    with naming(folder / CONFIG, own=True):
        for layout in LAYOUTS:
            if layout.matches(seen):
                return layout
        if seen.is_adapter or seen.model_type in CONFIG_MAPPING or "auto_map" in seen.config:
            return None
    names = sorted(seen.keys)
    tensors = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    known = "; ".join(f"{layout.name}: {layout.shown}" for layout in LAYOUTS)
    raise ValueError(
        f"{folder}: by its {CONFIG} this is no checkpoint that is known. Seen: files {seen.files[:12]}, model_type "
        f"{seen.model_type!r}, architectures {seen.config.get('architectures')}, tensors {tensors or 'none'}. Known: "
        f"transformers checkpoints, by a model_type that the installed transformers has; PEFT adapters; {known}"
    )


def read_layout(folder: Path, order: Order) -> Reading | None:
    """The folder as its layout reads it; None for what transformers and PEFT write themselves."""
    layout = find_layout(folder)
    if layout is not None:
        with naming(folder / CONFIG, own=True):
            return layout.read(Seen(folder), order)
    for field in ("encoder", "lora_key"):
        if getattr(order.recipe, field) is not None:
            raise ValueError(
                f"{order.where}.{field}: {folder} is a transformers checkpoint or a PEFT adapter, which needs none; "
                "leave it out"
            )
    return None


__all__ = ["LAYOUTS", "Layout", "Order", "Reading", "find_layout", "read_layout"]
