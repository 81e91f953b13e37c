"""Makes a training run the expert that ships: in goes a run's folder, out comes `evaluation_mmer/lab/<name>`.

    python benchmarks/lab/export.py --run runs/image [--items 400]

The stored files are then built as any user gets them (`load_expert`) and measured on the test split, greedy generation
in float32; the accuracy and its number of items go into expert.json, the training curve into CURVES of this folder.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from evaluation_mmer.lab.datasets import load_items, score
from evaluation_mmer.lab.experts import ADAPTER_FILES, STORED, answer, load_expert

CURVES = Path(__file__).parent / "curves"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="of the order in which test items are taken")
    options = parser.parse_args()
    facts = json.loads((options.run / "expert.json").read_text())
    name = facts["name"]
    (STORED / name).mkdir(exist_ok=True)
    for file in ("connector.safetensors", *ADAPTER_FILES):
        shutil.copyfile(options.run / file, STORED / name / file)
    CURVES.mkdir(exist_ok=True)
    shutil.copyfile(options.run / "curve.json", CURVES / f"{name}.json")

    model, processor = load_expert(name, torch.float32)
    items = load_items(name, "test", options.items, options.seed)
    began = time.perf_counter()
    replies = answer(model, processor, items)
    right = sum(score(reply, item.answer) for reply, item in zip(replies, items))
    seconds = round(time.perf_counter() - began, 1)
    facts["test"] = {"items": len(items), "seed": options.seed, "right": right, "accuracy": right / len(items)}
    (STORED / name / "expert.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps({"expert": name, **facts["test"], "seconds": seconds}), flush=True)
    for item, reply in zip(items, replies):
        if not score(reply, item.answer):
            print(f"  {item.answer} -> {reply}")


if __name__ == "__main__":
    main()
