"""Video files and frames in one call: what a clip becomes does not depend on what stands beside it."""

import pytest
import torch

from .test_media import write_video
from .tiny_processors import merged, video

KINDS = {"qwen2_vl": "<|video_pad|>", "onevision": "<video>"}  # patches of all clips in one row; one row per clip
FRAMES = 4


def processor_of(kind, sampling=True):
    """A processor whose expert samples frames by itself, as newer ones do."""
    made = merged({"film": kind})[0]
    own = made.experts["film"].processor.video_processor
    own.do_sample_frames, own.num_frames, own.fps = sampling, FRAMES, None
    return made


def alone(processor, token, clip, **settings):
    return processor(text=token, videos=[clip], **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["fa", "af", "afa", "ffaaf"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_batch_is_each_clip_alone(kind, order, nested, tmp_path):
    processor, token = processor_of(kind), KINDS[kind]
    clips = [video(seed, 12) for seed in range(len(order))]
    given = [
        write_video(tmp_path / f"{i}.mkv", clip) if what == "f" else clip
        for i, (what, clip) in enumerate(zip(order, clips))
    ]
    together = processor(text=[token] * len(given), videos=[[one] for one in given] if nested else given)
    singles = [alone(processor, token, one) for one in given]
    for name in singles[0]:
        if name.startswith("film."):
            assert torch.equal(together[name], torch.cat([one[name] for one in singles])), name
    for row, one in enumerate(singles):
        mask = together["attention_mask"][row].bool()
        assert torch.equal(together["input_ids"][row][mask], one["input_ids"][0])
    # and the arrays were sampled: without it they would make more
    unsampled = alone(processor_of(kind, sampling=False), token, clips[0])
    assert unsampled["input_ids"].shape[1] > singles[0]["input_ids"].shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_several_in_one_text_and_a_number_of_frames(kind, tmp_path):
    processor, token = processor_of(kind), KINDS[kind]
    clips = [video(seed, 12) for seed in range(3)]
    given = [clips[0], write_video(tmp_path / "walk.mkv", clips[1]), clips[2]]
    together = processor(text=f"{token} and {token} then {token}", videos=given, num_frames=2)
    of_arrays = processor(text=f"{token} and {token} then {token}", videos=clips, num_frames=2)
    assert together.keys() == of_arrays.keys()
    for name in together:
        assert torch.equal(torch.as_tensor(together[name]), torch.as_tensor(of_arrays[name])), name


def test_what_cannot_be_joined_is_refused(tmp_path):
    processor, token = processor_of("onevision", sampling=False), KINDS["onevision"]
    file = write_video(tmp_path / "walk.mkv", video(0, 12))
    with pytest.raises(ValueError, match="pixel_values_videos has the shapes .*ask for one num_frames"):
        processor(text=[token] * 2, videos=[file, video(1, 12)])  # 4 frames of the file, 12 of the array
    with pytest.raises(ValueError, match="video_metadata: cannot be given for files and frames together"):
        processor(text=[token] * 2, videos=[file, video(1, FRAMES)], video_metadata=[None, None])
