"""Media as users give them become what an expert's own processor takes.

Enters: paths, URLs, PIL images, arrays, tensors, frames, one or many, flat or nested by sample. Leaves: a flat list
with the number per sample, and for each item an image (PIL or array), frames (T, H, W, 3) uint8, a waveform (samples,)
float32 at the rate that the expert wants, or points (N, 3|6). Invariant: an item that is already an array comes out
unchanged.
"""

import base64
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.audio_utils import load_audio
from transformers.image_utils import load_image
from transformers.video_utils import VideoMetadata, load_video

ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio", "point_cloud": "point_clouds"}
DEFAULT_FRAMES = 8
_REMOTE = ("http://", "https://", "data:")
_ITEM = {
    "image": "a path, URL, PIL image or array (H, W, C)",
    "video": "a path, URL, list of frames or array (T, H, W, C)",
    "audio": 'a path, URL, array (samples,) or {"array": …, "sampling_rate": …}',
    "point_cloud": "a path or an array (N, 3) or (N, 6)",
}
_DIMENSIONS = {"image": (2, 3), "video": (4,), "audio": (1,), "point_cloud": (2,)}


@dataclass
class Media:
    """The media of one modality in a batch: `items` in order, `counts` how many each sample has (None: given flat)."""

    items: list[Any]
    counts: list[int] | None = None


def is_item(modality: str, value: Any) -> bool:
    """Whether `value` is one medium, not a list of several."""
    if isinstance(value, (str, os.PathLike)):
        return True
    if hasattr(value, "ndim"):
        return value.ndim in _DIMENSIONS[modality]
    if isinstance(value, dict):
        return modality == "audio" and "array" in value
    if isinstance(value, (list, tuple)):
        first = value[0] if len(value) > 0 else None
        if modality == "audio":
            return isinstance(first, (int, float))
        if modality == "point_cloud":
            return isinstance(first, (list, tuple)) and len(first) > 0 and isinstance(first[0], (int, float))
        return modality == "video" and len(value) > 0 and all(_is_frame(frame) for frame in value)
    return modality == "image" and hasattr(value, "convert")


def _is_frame(value: Any) -> bool:
    return not isinstance(value, (str, os.PathLike)) and is_item("image", value)


def sort_media(modality: str, given: Any, samples: int | None) -> Media:
    """One medium, a list of media, or one list per sample -> `Media`. An array with one more dimension is a list.

    Raises ValueError for any other nesting, and where there is not one list per sample.
    """
    argument = ARGUMENTS[modality]
    if is_item(modality, given):
        return Media([given])
    if not isinstance(given, (list, tuple)) and getattr(given, "ndim", 0) - 1 in _DIMENSIONS[modality]:
        given = list(given)
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{argument}: found {_name(given)}, expected {_ITEM[modality]}, or a list of them")
    if given and all(is_item(modality, item) for item in given):
        return Media(list(given))
    items: list[Any] = []
    counts = []
    for place, inner in enumerate(given):
        inner = [] if inner is None else inner
        wrong = [] if not isinstance(inner, (list, tuple)) else [i for i in inner if not is_item(modality, i)]
        if not isinstance(inner, (list, tuple)) or wrong:
            found = _name(wrong[0]) if wrong else _name(inner)
            raise ValueError(
                f"{argument}[{place}]: found {found}; expected a flat list of media, or one list of media per sample, "
                f"where a medium is {_ITEM[modality]}"
            )
        items.extend(inner)
        counts.append(len(inner))
    if samples is not None and len(counts) != samples:
        raise ValueError(
            f"{argument}: found {len(counts)} lists of media for {samples} texts, expected one list per text"
        )
    return Media(items, counts)


def _name(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]


def _local(modality: str, source: Any) -> Path:
    path = Path(source)
    try:
        there = path.is_file()
    except (OSError, ValueError):  # longer than a name may be, as base64 is, or with a NUL in it
        there = False
    if not there:
        shown = str(path)
        raise ValueError(f"{modality} file not found: {shown[:200]}{'…' * (len(shown) > 200)}")
    return path


def read_image(source: Any) -> Any:
    """A path, URL or data: URI as a PIL RGB image, turned as its EXIF says; images and arrays stay as they are."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    if not (isinstance(source, str) and source.startswith(_REMOTE)):
        source = str(_local("image", source))
    try:
        return load_image(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the image {str(source)[:200]}: {str(error)[:200]}") from error


def read_audio(source: Any, rate: int, given_rate: int | None = None) -> np.ndarray:
    """One channel of sound, float32 (samples,), at `rate` Hz.

    Channels of a file are averaged; int16, int32 and uint8 samples, as files hold them, are scaled to [-1, 1), other
    whole numbers are refused, since they do not say their scale. `given_rate` is that of arrays; where it or a file's
    own differs from `rate` the sound is resampled.
    """
    if isinstance(source, dict):
        given_rate = source.get("sampling_rate", given_rate)
        source = source["array"]
    if isinstance(source, str) and source.startswith(_REMOTE):
        try:
            return load_audio(source, sampling_rate=rate, backend="soundfile")
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"cannot read the audio {source[:200]}: {str(error)[:200]}") from error
    origin = "audio array"
    if isinstance(source, (str, os.PathLike)):
        wave, given_rate = _read_sound_file(_local("audio", source))
        origin = str(source)
    else:
        wave = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    if wave.ndim != 1 or len(wave) == 0:
        raise ValueError(f"{origin}: found shape {wave.shape}, expected (samples,), one channel that is not empty")
    if wave.dtype == np.uint8:  # 8-bit wav has its middle at 128
        wave = (wave.astype(np.float32) - 128) / 128
    elif wave.dtype in (np.int16, np.int32):
        wave = wave / (np.iinfo(wave.dtype).max + 1)
    elif not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(
            f"{origin}: found samples of type {wave.dtype}, expected floats in [-1, 1], int16, int32 or uint8. Give "
            "the array the type that the file had, such as numpy.asarray(samples, dtype='int16')"
        )
    wave = wave.astype(np.float32, copy=False)
    if given_rate is None or given_rate == rate:
        return wave
    return _resample(wave, int(given_rate), rate)


def _read_sound_file(path: Path) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs soundfile: pip install soundfile, or pass the samples"
        ) from error
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot read the audio {path}: {error}; expected wav, flac, ogg or mp3") from error
    return wave.mean(axis=1), rate


def _resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Resampling from `rate` to `wanted` Hz: by soxr, as transformers does it, else by `resample_by_spectrum`."""
    try:
        import soxr
    except ImportError:
        return resample_by_spectrum(wave, rate, wanted)
    return soxr.resample(wave, rate, wanted, quality="soxr_hq").astype(np.float32)


def resample_by_spectrum(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """The wave with its spectrum cut, or filled with zeros, at half the lower rate: float32 (⌈samples·wanted/rate⌉,).

    Silence is put around it, since a spectrum takes the end of a sound for what comes before its start.
    """
    common = math.gcd(rate, wanted)
    step, new_step = rate // common, wanted // common
    margin = -(-rate // (10 * step))
    blocks = margin * 2 - (-len(wave) // step)
    silent = np.zeros(blocks * step)
    silent[margin * step : margin * step + len(wave)] = wave
    spectrum = np.fft.rfft(silent)
    samples = blocks * new_step
    kept = np.zeros(samples // 2 + 1, dtype=spectrum.dtype)
    shared = min(len(kept), len(spectrum))
    kept[:shared] = spectrum[:shared]
    resampled = np.fft.irfft(kept, samples) * (new_step / step)
    start = margin * new_step
    return resampled[start : start - (-len(wave) * wanted // rate)].astype(np.float32)


def uniform_frames(total: int, count: int, include_last: bool = False) -> np.ndarray:
    """Frame i of `count` is ⌊i·total/count⌋, as transformers samples; with too few frames some come more than once.

    With `include_last` it is ⌊i·(total−1)/(count−1)⌋, as Video-LLaVA samples: the first and the last are among them.
    """
    if total < 1 or count < 1:
        raise ValueError(f"cannot take {count} frames of {total}: both must be 1 or more")
    if include_last:
        return np.arange(count) * (total - 1) // max(count - 1, 1)
    return np.arange(count) * total // count


def read_video(
    source: Any, count: int | None = None, fps: float | None = None, include_last: bool = False
) -> tuple[Any, VideoMetadata | None]:
    """(frames, metadata): `count` frames at equal steps, or `fps` frames per second of film, uint8 (T, H, W, 3).

    A file gives 8 frames when neither is asked for. Frames and arrays come as they are unless `count` is asked for.
    `include_last`: see `uniform_frames`.
    """
    if isinstance(source, str) and source.startswith("data:"):  # which load_video does not know
        return _read_video_file(_in_data(source), source[:40], count, fps, include_last)
    if isinstance(source, str) and source.startswith(_REMOTE):
        fetch: Any = load_video
        return fetch(
            source, backend="pyav", sample_indices_fn=lambda metadata, **_: _wanted(metadata, count, fps, include_last)
        )
    if isinstance(source, (str, os.PathLike)):
        path = str(_local("video", source))
        return _read_video_file(path, path, count, fps, include_last)
    if isinstance(source, (list, tuple)):
        frames = [np.asarray(_colour(read_image(frame))) for frame in source]
        if len({frame.shape for frame in frames}) != 1:
            raise ValueError(
                f"video: frames of unequal shapes {sorted({frame.shape for frame in frames})}; resize them first"
            )
        source = np.stack(frames)
    if fps is not None:
        raise ValueError("fps: only a video file says how long it lasts; for frames ask for num_frames")
    return (source if count is None else source[uniform_frames(len(source), count, include_last)]), None


def _colour(frame: Any) -> Any:
    return frame.convert("RGB") if hasattr(frame, "convert") else frame


def _wanted(metadata: VideoMetadata, count: int | None, fps: float | None, include_last: bool) -> np.ndarray:
    total = int(metadata.total_num_frames)
    if count is None and fps is not None:
        if not metadata.fps:
            raise ValueError("fps: the video does not say its own frame rate; ask for num_frames")
        count = max(1, int(total / metadata.fps * fps))
    return uniform_frames(total, count or DEFAULT_FRAMES, include_last)


def _in_data(source: str) -> io.BytesIO:
    """The bytes in a data: URI."""
    try:
        return io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
    except ValueError as error:
        raise ValueError(f"cannot read the video {source[:40]}…: {error}; expected data:video/…;base64,…") from error


def _read_video_file(
    file: str | io.BytesIO, path: str, count: int | None, fps: float | None, include_last: bool
) -> tuple[np.ndarray, VideoMetadata]:
    """A path, or the bytes of a file; `path` names it in messages."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"reading {path} needs av: pip install av, or pass the frames") from error
    try:
        with av.open(file) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate) if stream.average_rate else None
            # a container's frame count may be missing or wrong, so the packets are counted: none is decoded
            total = sum(packet.size > 0 for packet in container.demux(stream))
            metadata = VideoMetadata(
                total_num_frames=total,
                fps=rate,
                duration=total / rate if rate else None,
                height=stream.height,
                width=stream.width,
                video_backend="pyav",
            )
        places = _wanted(metadata, count, fps, include_last)
        kept: dict[int, np.ndarray] = {}
        if isinstance(file, io.BytesIO):
            file.seek(0)
        with av.open(file) as container:
            wanted = set(places.tolist())
            for place, frame in enumerate(container.decode(video=0)):
                if place in wanted:
                    kept[place] = frame.to_ndarray(format="rgb24")
                if place >= places[-1]:
                    break
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"cannot read the video {path}: {error}") from error
    if len(kept) != len(wanted):
        raise ValueError(
            f"cannot read the video {path}: {total} frames announced, but frame {max(wanted - set(kept))} is missing"
        )
    metadata.frames_indices = places.tolist()
    return np.stack([kept[place] for place in places.tolist()]), metadata
