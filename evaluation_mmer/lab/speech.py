"""Spoken words, synthesised here: in go a word and a voice, out comes one second or less of 16 kHz mono float32.

Two programs speak: espeak-ng (formants, many accents and variants) and flite (recorded diphones). No voice of the test
split, and none of the validation split, is heard in training: `VOICES` says who speaks where. A clip is trimmed,
scaled and given some silence by a generator seeded with its own description, so the same list of clips comes out each
time on the same versions of the two programs.
"""

import io
import os
import shutil
import subprocess
import zlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from .cache import LabError, Progress, lab_root, publish, say

RATE = 16_000
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("cat", "dog", "horse", "cow", "sheep", "duck", "tiger", "rabbit"),
    *("red", "blue", "green", "yellow", "black", "white", "orange", "purple"),
    *("yes", "no", "up", "down", "left", "right"),
)
PROGRAMS = ("espeak-ng", "flite")


@dataclass(frozen=True)
class Voice:
    """`name` is what the program calls it; `stretch` makes the word longer, `pitch` is relative to the voice's own."""

    program: str
    name: str
    stretch: float = 1.0
    pitch: float = 1.0


def voices(program: str, names: list[str], stretches: tuple[float, ...], pitches: tuple[float, ...]) -> list[Voice]:
    return [Voice(program, *fields) for fields in product(names, stretches, pitches)]


def variants(accents: tuple[str, ...], speakers: tuple[str, ...]) -> list[str]:
    return [f"{accent}{speaker}" for accent, speaker in product(accents, speakers)]


TRAIN_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-029")
TRAIN_SPEAKERS = ("+m1", "+f1", "+klatt2", "+Andy", "+linda")
VOICES = {
    "train": [
        *voices("espeak-ng", variants(TRAIN_ACCENTS, ("", "+m3", "+m7", "+f2", "+f4")), (0.9, 1.1), (0.8, 1.1)),
        *voices("espeak-ng", variants(TRAIN_ACCENTS[:2], TRAIN_SPEAKERS), (1.0,), (1.0,)),
        *voices("flite", ["kal", "kal16", "awb"], (0.85, 1.0, 1.15), (0.85, 1.0, 1.2)),
    ],
    "validation": [
        *voices("espeak-ng", variants(("en-gb-x-gbclan",), ("+m5", "+f5")), (1.0,), (1.0,)),
        *voices("flite", ["rms"], (0.9, 1.1), (1.0,)),
    ],
    "test": [
        *voices("espeak-ng", variants(("en-gb-x-rp", "en-gb-x-gbcwmd"), ("+m4", "+f3")), (0.9, 1.1), (1.0,)),
        *voices("flite", ["slt"], (0.9, 1.0, 1.1), (0.9, 1.0, 1.1)),
    ],
}


def command(voice: Voice, word: str, wav: Path) -> list[str]:
    if voice.program == "espeak-ng":
        speed, pitch = round(160 / voice.stretch), round(50 * voice.pitch)
        return ["espeak-ng", "-v", voice.name, "-s", str(speed), "-p", str(pitch), "-w", str(wav), word]
    stretch = f"duration_stretch={voice.stretch}"
    mean = {"slt": 170, "awb": 130, "rms": 95}.get(voice.name, 105)  # Hz, the voices' own
    pitch_target = f"int_f0_target_mean={mean * voice.pitch:.0f}"
    return ["flite", "-voice", voice.name, "--setf", stretch, "--setf", pitch_target, "-t", word, "-o", str(wav)]


def synthesise(voice: Voice, word: str, folder: Path) -> np.ndarray:
    """The bare word: mono float32 at 16 kHz, silence trimmed off both ends."""
    import soundfile
    import soxr

    if shutil.which(voice.program) is None:
        raise LabError(
            f"the spoken words need the programs {' and '.join(PROGRAMS)}, and {voice.program} is not on PATH; "
            "on Debian and Ubuntu: apt-get install espeak-ng flite"
        )
    wav = folder / f"{os.getpid()}.wav"
    done = subprocess.run(command(voice, word, wav), capture_output=True, text=True)
    if done.returncode != 0 or not wav.is_file():
        raise LabError(f"{voice.program} could not say {word!r} as {voice.name}: {done.stderr.strip()}")
    wave, rate = soundfile.read(io.BytesIO(wav.read_bytes()), dtype="float32")
    wav.unlink()
    wave = soxr.resample(wave, rate, RATE).astype(np.float32)
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    return wave[loud[0] : loud[-1] + 1]


def dress(wave: np.ndarray, seed: int, noise: bool) -> np.ndarray:
    """The word at a random loudness between two random silences, at most one second; with noise if asked for."""
    generator = np.random.default_rng(seed)
    wave = wave[:RATE] * (generator.uniform(0.2, 0.9) / np.abs(wave).max())
    before, after = generator.uniform(0, 1, 2) * min(RATE - len(wave), 0.5 * RATE) / 2
    wave = np.pad(wave, (int(before), int(after)))
    if noise:
        level = np.sqrt(np.mean(wave**2)) * 10 ** (-generator.uniform(15, 45) / 20)
        wave = wave + generator.normal(0, level, len(wave))
    return wave.astype(np.float32)


def clips(
    split: str, cache: str | os.PathLike[str] | None = None, progress: Progress = say
) -> list[tuple[np.ndarray, str]]:
    """Every word by every voice of the split, as (wave, word). Kept in the cache as 16-bit samples."""

    def write(folder: Path) -> None:
        progress(f"synthesising the {split} split of the spoken words ({len(WORDS) * len(VOICES[split])} clips)")
        waves = []
        for voice, word in product(VOICES[split], WORDS):
            seed = zlib.crc32(f"{split} {voice} {word}".encode())
            wave = dress(synthesise(voice, word, folder), seed, noise=split == "train")
            waves.append(np.round(wave * 32767).clip(-32768, 32767).astype(np.int16))
        lengths = np.array([len(wave) for wave in waves])
        np.savez(folder / "clips.npz", samples=np.concatenate(waves), lengths=lengths)

    described = zlib.crc32(f"{VOICES[split]} {WORDS}".encode())
    target = publish(lab_root(cache) / "datasets" / f"spoken-words-{split}-{described:08x}", write)
    with np.load(target / "clips.npz") as kept:
        samples = kept["samples"].astype(np.float32) / 32767
        waves = np.split(samples, np.cumsum(kept["lengths"])[:-1])
    words = [word for _, word in product(VOICES[split], WORDS)]
    return list(zip(waves, words))
