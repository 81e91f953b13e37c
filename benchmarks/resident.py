"""How small the routed model can be in memory, route by route, and what a step then takes.

    python benchmarks/resident.py --folder DIR           # the lab's five experts, kept by masks and kept exactly
    python benchmarks/resident.py --folder DIR --rounds 9

For each folder and each way to hold it: the bytes of the language model (encoders left out), beside the base's. What
τ* itself would come to in other forms: the entries of which no mask has a bit, the entropy of its bits, zlib's size
and speed. Then the processor's seconds of a decoding step (whose route `generate` keeps) and of a prefill, in bf16,
in turn with the base's own class: median, and the least and largest ratio of a round.
"""

import argparse
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from inference_memory import stored_bytes
from inference_subjects import lab_folders
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from configuration_mmer.export_mmer import write_hub_code
from evaluation_mmer.demo import EXPERTS, recipe
from evaluation_mmer.lab import build_expert
from mmer import MMERForConditionalGeneration, merge

Model = Any
PREFILL = 128
EXPERT = EXPERTS[0]


def ways(expert: str) -> dict[str, Callable[[Model], Any]]:
    return {
        "packed": lambda model: None,
        f"packed, {expert} kept": lambda model: model.keep_routes([expert]),
        f"only {expert}": lambda model: model.only_routes([expert]),
        f"only {expert}, kept": lambda model: (model.only_routes([expert]), model.keep_routes([expert])),
        f"only {expert} and merged": lambda model: model.only_routes([expert, "merged"]),
        "all experts, not merged": lambda model: model.only_routes(model.config.expert_names),
    }


def folders(folder: Path) -> tuple[Path, dict[str, Path]]:
    """(base, merged by kind); what is not there yet is merged."""
    base, masks = lab_folders(folder)
    exact = folder / "lab-exact"
    if not exact.is_dir():
        own = recipe(base, {name: build_expert(name) for name in EXPERTS})
        merge({**own, "decoupling": {"kind": "exact"}}, exact, progress=False)
    write_hub_code(exact)
    return base, {"mask": masks, "exact": exact}


def seconds(model: Model, **route: str) -> float:
    """Of the processor: a prefill."""
    ids = torch.randint(4, 4000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        started = time.process_time()
        model(input_ids=ids, logits_to_keep=1, **route)
        return time.process_time() - started


def language_bytes(model: Model) -> int:
    sizes = sum(model.memory_footprint_by_route().values())
    return sizes - stored_bytes(model.model.experts)


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Model:
    return MMERForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def sizes(base: Model, folder: Path) -> list[list[str]]:
    rows = []
    for name, change in ways(EXPERT).items():
        model = load(folder)
        change(model)
        size = language_bytes(model)
        rows.append([model.config.decoupling["kind"], name, f"{size / 1e6:.0f}", f"{size / stored_bytes(base):.2f}"])
    return rows


def times(base: Model, folder: Path, rounds: int) -> list[list[str]]:
    """In turn; the first round is not counted."""
    models = {"base": base}
    for name in ("packed", f"only {EXPERT}", f"only {EXPERT}, kept"):
        models[name] = load(folder, torch.float32)
        ways(EXPERT)[name](models[name])
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            if name != "base":
                model.keep_routes([EXPERT] if "kept" in name else [])
            found[name].append(seconds(model, **({} if name == "base" else {"text_route": EXPERT})))
    rows = []
    for name, values in found.items():
        ratios = sorted(ours / plain for ours, plain in zip(values[1:], found["base"][1:]))
        spread = f"{statistics.median(ratios):.2f}; {ratios[0]:.2f} – {ratios[-1]:.2f}"
        rows.append([name, f"{1e3 * statistics.median(values[1:]):.0f} ({spread})"])
    return rows


def entropy(values: torch.Tensor) -> float:
    share = torch.bincount(values.flatten().long()).double() / values.numel()
    share = share[share > 0]
    return float(-(share * share.log2()).sum())


def other_forms(folder: Path) -> list[list[str]]:
    """Of τ*: bits an entry, by form."""
    model = MMERForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    llm = model.model.language_model
    deltas, unmasked, differences = [], 0, []
    for module in llm.modules():
        if getattr(module, "delta", None) is None:
            continue
        delta, weight = module.delta.detach(), module.weight.detach()
        deltas.append(delta.flatten())
        differences.append(((weight + delta).view(torch.int16).int() - weight.view(torch.int16).int()).flatten())
        if module.masks is not None:
            joint = module.masks[0].clone()
            for mask in module.masks[1:]:
                joint |= mask
            ones = sum(int(((joint >> bit) & 1).sum()) for bit in range(8))
            unmasked += delta.numel() - ones
    delta, difference = torch.cat(deltas), torch.cat(differences)
    bits = delta.view(torch.int16).int() & 0xFFFF
    rows = [["bf16, as it is", "16.0", ""]]
    rows.append(["int16 difference of bit patterns, as it is", "16.0", ""])
    if unmasked:
        share = 1 - unmasked / delta.numel()
        rows.append([f"only where some mask has a bit ({share:.1%} of the entries)", f"{16 * share + 1:.1f}", ""])
    rows.append(["entropy of the 65,536 bf16 patterns", f"{entropy(bits):.1f}", ""])
    rows.append(["entropy of the high bytes + 8", f"{entropy(bits >> 8) + 8:.1f}", ""])
    rows.append(["entropy of the int16 differences", f"{entropy(difference - difference.min()):.1f}", ""])
    sample = delta[: 1 << 23].view(torch.int16)
    planes = [(sample & 0xFF).to(torch.uint8), ((sample >> 8) & 0xFF).to(torch.uint8)]
    for what, raw in {
        "zlib, level 1": [sample.numpy().tobytes()],
        "zlib, level 1, low and high bytes apart": [plane.numpy().tobytes() for plane in planes],
    }.items():
        packed = [zlib.compress(part, 1) for part in raw]
        started = time.process_time()
        for part in packed:
            zlib.decompress(part)
        took = time.process_time() - started
        size = sum(map(len, packed)) * 8 / sample.numel()
        rows.append([what, f"{size:.1f}", f"{2 * sample.numel() / took / 1e6:.0f} MB/s"])
    return rows


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    made = Table(*columns, title=title)
    for row in rows:
        made.add_row(*row)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--folder", type=Path, required=True, help="where the merged folders are, or are put")
    arguments = parser.parse_args()
    disable_progress_bar()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    base_folder, merged = folders(arguments.folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).eval()
    console = Console(width=150)
    rows = [row for folder in merged.values() for row in sizes(base, folder)]
    console.print(table("language model, bf16", ["kind", "what is held", "MB", "× base"], rows))
    for kind, folder in merged.items():
        if kind == "mask":  # of a folder with exact experts it is the same
            console.print(table("τ*", ["form", "bits an entry", "decoding"], other_forms(folder)))
    columns = ["what is held", f"ms a prefill of {PREFILL} tokens (× base)"]
    base = base.float()
    for kind, folder in merged.items():
        console.print(table(f"{kind}, route {EXPERT}, fp32", columns, times(base, folder, arguments.rounds)))


if __name__ == "__main__":
    main()
