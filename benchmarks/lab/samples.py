"""Writes `evaluation_mmer/lab/samples`: a few held-out pictures, words, clips and clouds, to be asked about.

    python benchmarks/lab/samples.py

The first test picture of each clothing item (28x28 PNG) and digit (8x8 PNG), a few words by test voices (16 kHz
16-bit mono wav), the first test clip of each movement (56x56, 8 frames, mp4), the first test cloud of each class (2048
points, float16 .npy). index.json says of each file its expert, modality, question, right answer, source and licence.
They are chosen blindly, not by what an expert answers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

from evaluation_mmer.lab import clips, digits, fashion, furniture, speech
from evaluation_mmer.lab.datasets import ANSWERS, QUESTIONS
from evaluation_mmer.lab.experts import STORED
from evaluation_mmer.lab.layouts import LAYOUTS

SPOKEN = ("seven", "dog", "yellow", "horse", "left", "three")
CLOTHES = {"source": "Fashion-MNIST test split (Zalando Research)", "licence": "MIT"}
SPEECH = {"source": "synthesised with {voice.program}, voice {voice.name}", "licence": "Apache-2.0"}
WRITTEN = {"source": "Optical Recognition of Handwritten Digits (UCI), test split", "licence": "CC-BY-4.0"}
MESHES = {"source": "points of {place} in Sweet Home 3D's library", "licence": "{licence}"}
LICENCES = {
    "BlendSwap-CC-0.sh3f": "CC0-1.0",
    "BlendSwap-CC-BY.sh3f": "CC-BY-3.0",
    "KatorLegaz.sh3f": "CC-BY-3.0 (Andrew Kator and Jennifer Legaz)",
    "Reallusion.sh3f": "CC-BY-3.0 (Reallusion)",
    "Scopia.sh3f": "CC-BY-3.0 (Scopia Visual Interfaces Systems)",
}
FRAMES_A_SECOND = 8


def firsts(pairs: Sequence[tuple[Any, str]], wanted: Sequence[str]) -> list[tuple[int, Any, str]]:
    """(number, media, answer) of the first item with each of the answers."""
    found: dict[str, tuple[int, Any, str]] = {}
    for at, (media, answer) in enumerate(pairs):
        found.setdefault(answer, (at, media, answer))
        if len(found) == len(wanted):
            break
    return [found[answer] for answer in wanted]


def pictures(
    folder: Path, expert: str, test: Sequence[tuple[Any, str]], prefix: str, facts: dict[str, str]
) -> list[dict[str, str]]:
    entries = []
    for number, picture, name in firsts(test, ANSWERS[expert]):
        file = f"{prefix}{name.replace(' ', '-')}.png"
        Image.fromarray(picture).save(folder / file, optimize=True)
        entries.append(entry(file, expert, name, {**facts, "source": f"{facts['source']}, picture {number}"}))
    return entries


def words(folder: Path) -> list[dict[str, str]]:
    test = speech.clips("test")
    entries = []
    for turn, word in enumerate(SPOKEN):
        at = (turn * 5) % len(speech.VOICES["test"])  # steps through the voices
        wave, said = test[at * len(speech.WORDS) + speech.WORDS.index(word)]
        voice, file = speech.VOICES["test"][at], f"{said}.wav"
        soundfile.write(folder / file, wave, speech.RATE, subtype="PCM_16")
        entries.append(entry(file, "audio", said, {key: text.format(voice=voice) for key, text in SPEECH.items()}))
    return entries


def movements(folder: Path) -> list[dict[str, str]]:
    entries = []
    for number, frames, name in firsts(clips.clips("test"), clips.MOVEMENTS):
        file = f"moves-{name}.mp4"
        write_clip(folder / file, frames)
        facts = {"source": f"moved picture {number} of the {CLOTHES['source']}", "licence": CLOTHES["licence"]}
        entries.append(entry(file, "video", name, facts))
    return entries


def write_clip(path: Path, frames: np.ndarray) -> None:
    """frames (N, height, width, 3) uint8 -> H.264 without loss but for the colour space's rounding."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FRAMES_A_SECOND, options={"crf": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def clouds(folder: Path) -> list[dict[str, str]]:
    entries = []
    test = furniture.clouds("test")
    for number, points, name in firsts(test, furniture.CLASSES):
        file = f"{name}.npy"
        np.save(folder / file, points.astype(np.float16))
        place = test.places[number // test.views]
        facts = {key: text.format(place=place, licence=LICENCES[place.split("/")[0]]) for key, text in MESHES.items()}
        entries.append(entry(file, "point_cloud", name, facts))
    return entries


def entry(file: str, expert: str, answer: str, facts: dict[str, str]) -> dict[str, str]:
    modality = LAYOUTS[expert].media_type
    return {
        "file": file,
        "expert": expert,
        "modality": modality,
        "question": QUESTIONS[expert],
        "answer": answer,
        **facts,
    }


def main() -> None:
    folder = STORED / "samples"
    folder.mkdir(exist_ok=True)
    entries = [
        *pictures(folder, "image", fashion.pictures("test"), "", CLOTHES),
        *words(folder),
        *pictures(folder, "digits", digits.pictures("test"), "digit-", WRITTEN),
        *movements(folder),
        *clouds(folder),
    ]
    (folder / "index.json").write_text(json.dumps(entries, indent=2) + "\n")
    print(f"{len(entries)} samples in {folder}, {sum(file.stat().st_size for file in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
