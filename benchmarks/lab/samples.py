"""Writes `evaluation_mmer/lab/samples`: the first test picture of each class, and a few words by test voices.

    python benchmarks/lab/samples.py

Pictures are 28x28 grey PNG, words 16 kHz 16-bit mono wav; index.json says of each file its modality, the question, the
right answer, where it comes from and under which licence. They are chosen blindly, not by what an expert answers.
"""

import json
from pathlib import Path

import soundfile
from PIL import Image

from evaluation_mmer.lab.datasets import QUESTIONS
from evaluation_mmer.lab.experts import STORED
from evaluation_mmer.lab.fashion import CLASSES, pictures
from evaluation_mmer.lab.speech import RATE, VOICES, WORDS, clips

SPOKEN = ("seven", "dog", "yellow", "horse", "left", "three")
FASHION = {"source": "Fashion-MNIST test split (Zalando Research)", "licence": "MIT"}
SPEECH = {"source": "synthesised with {voice.program}, voice {voice.name}", "licence": "Apache-2.0"}


def image_samples(folder: Path) -> list[dict[str, str]]:
    test = pictures("test")
    entries = []
    for name in CLASSES:
        number = next(at for at, (_, label) in enumerate(test) if label == name)
        file = f"{name.replace(' ', '-')}.png"
        Image.fromarray(test[number][0]).save(folder / file, optimize=True)
        entries.append(entry(file, "image", name, {**FASHION, "source": f"{FASHION['source']}, picture {number}"}))
    return entries


def audio_samples(folder: Path) -> list[dict[str, str]]:
    test = clips("test")
    entries = []
    for turn, word in enumerate(SPOKEN):
        at = (turn * 5) % len(VOICES["test"])  # steps through the voices
        wave, said = test[at * len(WORDS) + WORDS.index(word)]
        voice, file = VOICES["test"][at], f"{said}.wav"
        soundfile.write(folder / file, wave, RATE, subtype="PCM_16")
        entries.append(entry(file, "audio", said, {key: text.format(voice=voice) for key, text in SPEECH.items()}))
    return entries


def entry(file: str, modality: str, answer: str, facts: dict[str, str]) -> dict[str, str]:
    return {"file": file, "modality": modality, "question": QUESTIONS[modality], "answer": answer, **facts}


def main() -> None:
    folder = STORED / "samples"
    folder.mkdir(exist_ok=True)
    entries = image_samples(folder) + audio_samples(folder)
    (folder / "index.json").write_text(json.dumps(entries, indent=2) + "\n")
    print(f"{len(entries)} samples in {folder}, {sum(file.stat().st_size for file in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
