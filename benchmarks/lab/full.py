"""The lab's fully fine-tuned experts: in goes a run of `train.py --full`, out comes an expert in the cache.

    python benchmarks/lab/full.py --run runs/clothes --name clothes [--items 400]

Their LLM's 210 linears (212 MB) are more than this repository can hold, so the recipe in README.md trains them into
the cache; `full_tower(name)` is then a whole checkpoint as a user would have it, in bf16, or says how to train it.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from evaluation_mmer.lab.cache import LabError, lab_root, publish
from evaluation_mmer.lab.datasets import load_items, score
from evaluation_mmer.lab.experts import answer, build_base, build_encoder
from evaluation_mmer.lab.layouts import LAYOUTS
from evaluation_mmer.lab.towers import write_tower

FULL = {"clothes": "image", "words": "audio"}  # name -> the lab's expert whose task, encoder and connector it takes
LINEARS_FILE = "linears.safetensors"
CURVES = Path(__file__).parent / "curves"


def full_root() -> Path:
    return lab_root() / "full"


def full_tower(name: str) -> Path:
    folder = full_root() / name
    if not (folder / "tower").is_dir():
        raise LabError(
            f"the fully fine-tuned expert {name!r} is not in {folder}: it is too large to be stored with the "
            "code. Train it as benchmarks/lab/README.md says, then run benchmarks/lab/full.py"
        )
    return folder / "tower"


def build(run: Path, name: str) -> Path:
    """The run's linears in the base, behind the run's connector: a folder in the cache."""

    def write(folder: Path) -> None:
        base, layout = build_base(), FULL[name]
        llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        tuned = load_file(run / LINEARS_FILE)
        lost = llm.load_state_dict(tuned, strict=False).unexpected_keys
        if lost:
            raise LabError(f"{run / LINEARS_FILE} holds tensors that the base has not, such as {lost[0]}")
        with tempfile.TemporaryDirectory() as own:
            llm.save_pretrained(own)
            AutoTokenizer.from_pretrained(base).save_pretrained(own)
            connector = load_file(run / "connector.safetensors")
            write_tower(layout, Path(own), build_encoder(layout), connector, folder / "tower")
        for file in ("expert.json", "curve.json"):
            shutil.copyfile(run / file, folder / file)

    shutil.rmtree(full_root() / name, ignore_errors=True)
    return publish(full_root() / name, write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", choices=sorted(FULL), required=True)
    parser.add_argument("--items", type=int, default=400, help="test items that it is then asked; 0: none")
    options = parser.parse_args()
    folder = build(options.run, options.name)
    shutil.copyfile(folder / "curve.json", CURVES / f"{options.name}.json")
    if not options.items:
        return
    task = FULL[options.name]
    model = LAYOUTS[task].model.from_pretrained(folder / "tower", dtype=torch.float32).eval()
    items = load_items(task, "test", options.items)
    began = time.perf_counter()
    replies = answer(model, AutoProcessor.from_pretrained(folder / "tower"), items)
    right = sum(score(reply, item.answer) for reply, item in zip(replies, items))
    found = {"expert": options.name, "items": len(items), "right": right, "accuracy": right / len(items)}
    print(json.dumps({**found, "seconds": round(time.perf_counter() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
