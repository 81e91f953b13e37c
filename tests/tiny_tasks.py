"""A tiny merged folder with tasks beside it: pictures, sounds and text, in files as a user has them."""

import json
from pathlib import Path

import numpy as np
import soundfile
import yaml
from PIL import Image

from mmer import merge

from . import tiny_world

# full rank: each expert comes back whole, up to rounding
WHOLE = {"kind": "mask", "scale": "row", "rank": 32}
COLOURS = ["red", "green", "blue", "dog cat"]


def write_media(folder: Path, count: int = 4):
    """a0.png …, s0.wav …"""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"a{number}.png")
        wave = (random.standard_normal(16000) * 0.1).astype(np.float32)
        soundfile.write(folder / f"s{number}.wav", wave, 16000)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tasks(path: Path, *tasks: dict) -> Path:
    path.write_text(yaml.safe_dump({"tasks": list(tasks)}, sort_keys=False))
    return path


def write_all(folder: Path) -> Path:
    """Four tasks of four items: written and chosen answers about pictures, chosen ones about sounds, text alone."""
    write_media(folder / "media")
    questions = ["what is this ?", "what is shown and spoken ?", "describe the picture .", "what word is this ?"]
    pictures = [
        {"image": f"media/a{n}.png", "question": question, "answers": ["red"], "choices": COLOURS, "label": COLOURS[n]}
        for n, question in enumerate(questions)
    ]
    write_rows(folder / "pictures.jsonl", pictures)
    sounds = [{"sound": f"media/s{n}.wav", "question": q, "label": n % 2} for n, q in enumerate(questions)]
    write_rows(folder / "sounds.jsonl", sounds)
    write_rows(folder / "words.jsonl", [{"question": q, "answers": "green"} for q in questions])
    return write_tasks(
        folder / "tasks.yaml",
        {"name": "pictures", "data": "pictures.jsonl", "max_new_tokens": 4},
        {"name": "colours", "data": "pictures.jsonl", "scorer": "choice", "answers": "label"},
        {
            "name": "sounds", "data": "sounds.jsonl", "media": {"audio": "sound"}, "answers": "label",
            "choices": ["word", "shape"], "scorer": "choice", "template": "{{ question }} and what is the sound ?",
        },
        {"name": "words", "data": "words.jsonl", "max_new_tokens": 4},
    )  # fmt: skip


def merged_world(folder: Path) -> Path:
    """Base, experts and the merged folder `out`, tasks in `tasks`. Returns `folder`."""
    recipe = tiny_world.make(folder)
    merge({**recipe, "decoupling": WHOLE}, folder / "out", progress=False)
    (folder / "tasks").mkdir()
    write_all(folder / "tasks")
    return folder
