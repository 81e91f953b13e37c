"""Reading media: a file, an array and a PIL image of one thing give the same tensors; what cannot be read is named."""

import base64
import math
import sys

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from processing_mmer.media_mmer import (
    is_item,
    read_audio,
    read_image,
    read_video,
    resample_by_spectrum,
    sort_media,
    uniform_frames,
)

from .tiny_processors import image, merged, sound, video


def write_video(path, frames, rate=8):
    """Lossless, so that the frames that are read are the frames that were written."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def everything():
    return merged({"image": "llava", "audio": "qwen_audio", "video": "video_llava"})[0]


def test_an_image_is_the_same_as_file_array_and_pil(everything, tmp_path):
    pixels = image(0)
    Image.fromarray(pixels).save(tmp_path / "cup.png")
    given = [pixels, Image.fromarray(pixels), tmp_path / "cup.png", str(tmp_path / "cup.png"), torch.tensor(pixels)]
    made = [everything(text="<image>", images=one) for one in given]
    assert all(torch.equal(one["image.pixel_values"], made[0]["image.pixel_values"]) for one in made)
    blocks = [
        {"type": "image", "image": pixels},
        {"type": "image", "path": str(tmp_path / "cup.png")},
        {"type": "image", "url": str(tmp_path / "cup.png")},
        {"type": "image_url", "image_url": {"url": str(tmp_path / "cup.png")}},
        {"type": "image", "array": pixels},
    ]
    for block in blocks:
        out = everything.apply_chat_template([{"role": "user", "content": [block]}], tokenize=True, return_dict=True)
        assert torch.equal(out["image.pixel_values"], made[0]["image.pixel_values"])


def test_an_image_file_is_turned_as_its_exif_says(tmp_path):
    picture = Image.fromarray(image(0, 20, 30))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (20, 30)


def test_a_sound_is_the_same_as_file_array_and_list(everything, tmp_path):
    wave = sound(0)
    soundfile.write(tmp_path / "dog.wav", wave, 16000, subtype="FLOAT")
    given = [wave, tmp_path / "dog.wav", str(tmp_path / "dog.wav"), torch.tensor(wave), wave.tolist()]
    given += [{"array": wave, "sampling_rate": 16000}]
    made = [everything(text="<|AUDIO|>", audio=one) for one in given]
    for one in made:
        assert torch.equal(one["audio.input_features"], made[0]["audio.input_features"])
    block = {"type": "audio", "path": str(tmp_path / "dog.wav")}
    out = everything.apply_chat_template([{"role": "user", "content": [block]}], tokenize=True, return_dict=True)
    assert torch.equal(out["audio.input_features"], made[0]["audio.input_features"])


def test_sound_files_become_one_channel_at_the_experts_rate(tmp_path):
    left = np.full(800, 0.5, dtype=np.float32)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, -left / 2], axis=1), 16000, subtype="FLOAT")
    assert np.allclose(read_audio(tmp_path / "stereo.wav", 16000), 0.125)
    # one second of 440 Hz stays 440 Hz
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100).astype(np.float32)
    soundfile.write(tmp_path / "tone.wav", tone, 44100, subtype="FLOAT")
    read = read_audio(tmp_path / "tone.wav", 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert read.shape == (16000,) and read.dtype == np.float32
    assert np.abs(read[200:-200] - expected[200:-200]).max() < 1e-3
    assert np.array_equal(read, read_audio({"array": tone, "sampling_rate": 44100}, 16000))
    assert np.array_equal(read, read_audio(tone, 16000, 44100))


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (44100, 16000), (16000, 11025), (22050, 16000)])
def test_resampling_without_soxr_agrees(rate, wanted, monkeypatch):
    tone = np.sin(2 * np.pi * 300 * np.arange(rate // 2) / rate).astype(np.float32)
    with_soxr = read_audio(tone, wanted, rate)
    monkeypatch.setitem(sys.modules, "soxr", None)
    without = read_audio(tone, wanted, rate)
    assert abs(len(with_soxr) - len(without)) <= 1 and without.dtype == np.float32
    length = min(len(with_soxr), len(without))
    assert np.abs(with_soxr[:length] - without[:length])[400:-400].max() < 5e-3


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([8000, 11025, 16000, 44100]), st.sampled_from([8000, 16000, 24000]))
def test_resampled_length_is_the_duration(samples, rate, wanted):
    assert len(resample_by_spectrum(np.ones(samples), rate, wanted)) == math.ceil(samples * wanted / rate)


def test_whole_number_samples_are_scaled():
    assert read_audio(np.array([-32768, 0, 16384], dtype=np.int16), 16000).tolist() == [-1.0, 0.0, 0.5]
    assert read_audio(np.array([-(2**31), 2**30], dtype=np.int32), 16000).tolist() == [-1.0, 0.5]
    assert read_audio(np.array([128, 0, 192], dtype=np.uint8), 16000).tolist() == [0.0, -1.0, 0.5]
    with pytest.raises(ValueError, match="samples of type int64.*dtype='int16'"):
        read_audio([0, 12000, -12000], 16000)


def test_a_video_is_the_same_as_file_array_and_frames(everything, tmp_path):
    frames = video(0, 8)
    path = write_video(tmp_path / "walk.mkv", frames)
    read, metadata = read_video(path)
    assert np.array_equal(read, frames)
    assert (metadata.total_num_frames, metadata.fps, metadata.frames_indices) == (8, 8.0, list(range(8)))
    given = [frames, path, str(path), [Image.fromarray(frame) for frame in frames], list(frames)]
    made = [everything(text="<video>", videos=one) for one in given]
    for one in made:
        assert torch.equal(one["video.pixel_values_videos"], made[0]["video.pixel_values_videos"])
    block = {"type": "video", "path": str(path)}
    out = everything.apply_chat_template([{"role": "user", "content": [block]}], tokenize=True, return_dict=True)
    assert torch.equal(out["video.pixel_values_videos"], made[0]["video.pixel_values_videos"])


def test_frames_are_taken_at_equal_steps(everything, tmp_path):
    frames = video(0, 12)
    path = write_video(tmp_path / "walk.mkv", frames, rate=4)
    assert np.array_equal(read_video(path, 3)[0], frames[[0, 4, 8]])
    assert np.array_equal(read_video(path, fps=1)[0], frames[[0, 4, 8]])
    assert np.array_equal(read_video(path)[0], frames[[0, 1, 3, 4, 6, 7, 9, 10]])
    assert np.array_equal(read_video(path, 24)[0], np.repeat(frames, 2, axis=0))
    assert np.array_equal(read_video(frames, 3)[0], frames[[0, 4, 8]])
    from_file = everything(text="<video>", videos=path, num_frames=3)
    from_array = everything(text="<video>", videos=frames[[0, 4, 8]])
    assert torch.equal(from_file["video.pixel_values_videos"], from_array["video.pixel_values_videos"])


def test_frames_may_be_files(everything, tmp_path):
    frames = video(0, 3)
    paths = []
    for place, frame in enumerate(frames):
        paths.append(str(tmp_path / f"{place}.png"))
        Image.fromarray(frame).save(paths[-1])
    block = {"type": "video", "video": paths}
    out = everything.apply_chat_template([{"role": "user", "content": [block]}], tokenize=True, return_dict=True)
    expected = everything(text="<video>", videos=frames)
    assert torch.equal(out["video.pixel_values_videos"], expected["video.pixel_values_videos"])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 50))
def test_uniform_frames_are_even_and_inside(total, count):
    places = uniform_frames(total, count)
    steps = np.diff(places)
    assert len(places) == count and places[0] == 0 and places[-1] < total
    assert count == 1 or steps.max() - steps.min() <= 1


def test_uniform_frames_by_hand():
    assert uniform_frames(10, 4).tolist() == [0, 2, 5, 7]
    assert uniform_frames(2, 4).tolist() == [0, 0, 1, 1]
    # with the last one: as np.linspace(0, total - 1, count, dtype=int)
    assert uniform_frames(10, 4, include_last=True).tolist() == [0, 3, 6, 9]
    assert uniform_frames(20, 8, include_last=True).tolist() == [0, 2, 5, 8, 10, 13, 16, 19]
    assert uniform_frames(2, 4, include_last=True).tolist() == [0, 0, 0, 1]
    assert uniform_frames(7, 1, include_last=True).tolist() == [0]


@pytest.mark.parametrize(
    ("read", "name", "content", "message"),
    [
        (read_image, "cup.png", b"not an image", "cannot read the image .*cup.png"),
        (lambda path: read_audio(path, 16000), "dog.wav", b"not a sound", "cannot read the audio .*dog.wav"),
        (read_video, "walk.mp4", b"not a video", "cannot read the video .*walk.mp4"),
    ],
)
def test_unreadable_files_are_named(read, name, content, message, tmp_path):
    with pytest.raises(ValueError, match="file not found"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_media_in_base64_are_those_of_the_files(tmp_path):
    """As requests to a server hold them."""
    clip = write_video(tmp_path / "walk.mkv", video(0, 12), rate=4)
    soundfile.write(tmp_path / "dog.wav", np.linspace(-0.5, 0.5, 800), 16000)
    Image.fromarray(video(0, 1)[0]).save(tmp_path / "cup.png")
    kinds = {"walk.mkv": "video/x-matroska", "dog.wav": "audio/wav", "cup.png": "image/png"}
    inside = {
        name: f"data:{kind};base64,{base64.b64encode((tmp_path / name).read_bytes()).decode()}"
        for name, kind in kinds.items()
    }
    (frames, metadata), (wanted, known) = (read_video(one, 3) for one in (inside["walk.mkv"], clip))
    assert np.array_equal(frames, wanted) and metadata.frames_indices == known.frames_indices == [0, 4, 8]
    assert np.array_equal(read_audio(inside["dog.wav"], 16000), read_audio(tmp_path / "dog.wav", 16000))
    assert np.array_equal(read_image(inside["cup.png"]), read_image(tmp_path / "cup.png"))


@pytest.mark.parametrize("read", [read_image, read_video, lambda source: read_audio(source, 16000)])
@pytest.mark.parametrize("content", ["data:x/y;base64,???", "data:x/y;base64,bm90IGEgbWVkaXVt", "A" * 70000])
def test_broken_base64_is_refused_in_few_words(read, content):
    with pytest.raises(ValueError, match="cannot read the|file not found: A") as caught:
        read(content)
    assert len(str(caught.value)) < 600


def test_missing_packages_are_named(monkeypatch, tmp_path):
    for name in ("dog.wav", "walk.mp4"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install soundfile"):
        read_audio(tmp_path / "dog.wav", 16000)
    with pytest.raises(ImportError, match="pip install av"):
        read_video(tmp_path / "walk.mp4")


def test_wrong_media_are_refused():
    with pytest.raises(ValueError, match=r"found shape \(0,\)"):
        read_audio(np.zeros(0), 16000)
    with pytest.raises(ValueError, match="unequal shapes"):
        read_video([image(0), image(0, 8, 8)])
    with pytest.raises(ValueError, match="ask for num_frames"):
        read_video(video(0), fps=2)
    with pytest.raises(ValueError, match="both must be 1 or more"):
        uniform_frames(0, 3)
    with pytest.raises(ValueError, match=r"audio: found ndarray of shape \(2, 2, 5\)"):
        sort_media("audio", np.zeros((2, 2, 5)), None)
    with pytest.raises(ValueError, match=r"videos\[1\]"):
        sort_media("video", [[video(0)], 3], 2)
    assert not is_item("image", 3) and not is_item("image", [image(0)])
