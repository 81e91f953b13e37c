"""Log mel energies as Kaldi reckons them: what BEATs, and ModelCompose's audio expert around it, hear.

Enters: sounds, float (samples,) in [-1, 1) at 16 kHz. Leaves: input_features (sounds, frames, mel bins) float32 and
feature_attention_mask (sounds, frames) int64, 1 where a frame is sound. Of every 25 ms, each 10 ms: whole frames only;
samples scaled to 16 bits; mean taken out; pre-emphasis 0.97; Povey's window; power spectrum of the next power of two;
triangles on the mel scale between 20 Hz and half the rate; logarithm, no energy below float32's epsilon; then
(x − mean) / (2·std). Invariant: no frame of a sound is left out unless `truncation` says so.
"""

import functools
import warnings
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from .processor_classes_mmer import own_class

_FRAME_MS, _STEP_MS = 25, 10
_LOWEST_HERTZ, _PRE_EMPHASIS, _SCALE = 20.0, 0.97, 2.0**15
_FLOOR = float(np.finfo(np.float32).eps)


@functools.lru_cache(maxsize=8)
def _mel_filters(rate: int, bins: int, fft_length: int) -> np.ndarray:
    with warnings.catch_warnings():
        # the lowest of 128 filters lie between two frequencies of the spectrum: they are empty in Kaldi too
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        return mel_filter_bank(
            num_frequency_bins=fft_length // 2 + 1,
            num_mel_filters=bins,
            min_frequency=_LOWEST_HERTZ,
            max_frequency=rate / 2,
            sampling_rate=rate,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )


def log_mel_energies(wave: np.ndarray, rate: int = 16_000, bins: int = 128) -> np.ndarray:
    """float (samples,) in [-1, 1) -> float32 (frames, bins), not yet normalised.

    At 16 kHz there are 1 + (samples − 400) // 160 frames; one at least is expected.
    """
    length, step = rate * _FRAME_MS // 1000, rate * _STEP_MS // 1000
    fft_length = 1 << (length - 1).bit_length()
    return spectrogram(
        wave * _SCALE,
        window_function(length, "povey", periodic=False),
        frame_length=length,
        hop_length=step,
        fft_length=fft_length,
        power=2.0,
        center=False,
        preemphasis=_PRE_EMPHASIS,
        remove_dc_offset=True,
        mel_filters=_mel_filters(rate, bins, fft_length),
        mel_floor=_FLOOR,
        log_mel="log",
    ).T


@own_class
class FbankFeatureExtractor:
    r"""Sounds of any length to one tensor, and the mask of what in it is sound.

    Args:
        sampling_rate: of the sounds; another is refused, not resampled.
        num_mel_bins: mel bins of a frame.
        max_seconds: the longest sound, counted in frames, 100 a second (ModelCompose: 2 x 512 frames). A longer one is
            refused unless `truncation`.
        truncation: a longer sound loses what comes after `max_seconds`, as ModelCompose does without a word.
        min_frames: the shortest sound in frames: the 16 of one BEATs patch, which makes no token of less.
        mean, std: of the energies, as they were in training.
        hear_padding: False: padding goes up to the longest sound of a call, the mask is 0 there, and no sound is
            changed by those beside it. True: each sound is filled with zeros up to `max_seconds`, and the model
            hears them as if they were sound; so ModelCompose's audio experts were trained.
    """

    model_input_names = ["input_features", "feature_attention_mask"]

    def __init__(
        self,
        sampling_rate: int = 16_000,
        num_mel_bins: int = 128,
        max_seconds: float = 10.24,
        truncation: bool = False,
        min_frames: int = 16,
        mean: float = 15.41663,
        std: float = 6.55582,
        hear_padding: bool = False,
    ):
        if sampling_rate < 1000 or num_mel_bins < 1 or not 1 <= min_frames <= max_seconds * 100 or std <= 0:
            raise ValueError(
                f"found sampling_rate {sampling_rate}, num_mel_bins {num_mel_bins}, min_frames {min_frames}, "
                f"max_seconds {max_seconds}, std {std}; expected at least 1000 Hz, 1 bin, 1 frame, as many seconds as "
                "those frames last (100 a second), and a positive std"
            )
        self.sampling_rate, self.num_mel_bins, self.max_seconds = sampling_rate, num_mel_bins, max_seconds
        self.truncation, self.min_frames, self.mean, self.std = truncation, min_frames, mean, std
        self.hear_padding = hear_padding

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "FbankFeatureExtractor":
        return cls(**settings)

    @property
    def max_frames(self) -> int:
        return round(self.max_seconds * 1000 / _STEP_MS)

    def __call__(
        self,
        audio: Any,
        sampling_rate: int | None = None,
        truncation: bool | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """One sound or a list of them -> input_features, feature_attention_mask. `truncation` overrules the setting.

        Raises ValueError, naming the sound, where one is too long, too short, not of one channel or not of floats,
        and for another `sampling_rate`.
        """
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(
                f"sampling_rate: found {sampling_rate}, expected {self.sampling_rate}: resample the sounds first"
            )
        cut = self.truncation if truncation is None else truncation
        single = getattr(audio, "ndim", 0) == 1 or (isinstance(audio, list) and audio and isinstance(audio[0], float))
        sounds = [self._one(f"audio[{i}]", one, cut) for i, one in enumerate([audio] if single else audio)]
        if not sounds:
            raise ValueError("audio: found no sound, expected one or a list of them")
        longest = self.max_frames if self.hear_padding else max(map(len, sounds))
        features = np.zeros((len(sounds), longest, self.num_mel_bins), np.float32)
        mask = np.full((len(sounds), longest), int(self.hear_padding), np.int64)
        for i, sound in enumerate(sounds):
            features[i, : len(sound)] = sound
            mask[i, : len(sound)] = 1
        made = {"input_features": features, "feature_attention_mask": mask}
        if return_tensors != "np":
            return BatchFeature({name: torch.from_numpy(value) for name, value in made.items()})
        return BatchFeature(made)

    def _one(self, name: str, sound: Any, truncation: bool) -> np.ndarray:
        """float32 (frames, bins), normalised."""
        wave = np.asarray(sound.detach().cpu() if hasattr(sound, "detach") else sound)
        if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating) or not np.isfinite(wave).all():
            raise ValueError(
                f"{name}: found {wave.dtype} of shape {wave.shape}, expected finite floats in [-1, 1) of shape "
                "(samples,): average the channels, and divide whole numbers by the largest of their kind"
            )
        length, step = (self.sampling_rate * ms // 1000 for ms in (_FRAME_MS, _STEP_MS))
        frames = max(0, 1 + (len(wave) - length) // step)
        if frames < self.min_frames:
            raise ValueError(
                f"{name}: found {len(wave)} samples, {frames} frames; expected at least {self.min_frames} frames, "
                f"{length + (self.min_frames - 1) * step} samples: put silence around the sound"
            )
        if frames > self.max_frames:
            if not truncation:
                raise ValueError(
                    f"{name}: found {len(wave) / self.sampling_rate:.2f} s, expected at most {self.max_seconds} s; "
                    'cut the sound into pieces, or pass audio_kwargs={"truncation": True} to have only its start heard'
                )
            wave = wave[: length + (self.max_frames - 1) * step]
        energies = log_mel_energies(wave, self.sampling_rate, self.num_mel_bins)
        return (energies - np.float32(self.mean)) / np.float32(2 * self.std)
