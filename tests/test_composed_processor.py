"""ComposedProcessor: media are counted against the placeholders, in each text where they come per text."""

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from processing_mmer.composed_processor_mmer import ComposedProcessor
from processing_mmer.video_frames_mmer import LanguageBindVideoProcessor

from .tiny_processors import image, make_tokenizer, video


@pytest.fixture(scope="module")
def processor():
    size = {"height": 8, "width": 8}
    return ComposedProcessor(
        make_tokenizer("<image>", "<video>"),
        parts={
            "image": CLIPImageProcessor(size=size, crop_size=size),
            "video": LanguageBindVideoProcessor(num_frames=2, size=8),
        },
        features={"image": {"count": 3}, "video": {"count": 2}},
        image_token="<image>",
        video_token="<video>",
    )


A, B, C = (image(seed) for seed in range(3))


def test_media_of_another_text_are_refused(processor):
    texts = ["<image> and <image>", "<image>"]
    with pytest.raises(ValueError, match="text 0: 2 <image> in it, but 1 in images"):
        processor(text=texts, images=[[A], [B, C]])
    with pytest.raises(ValueError, match="text 0: 2 <image> in it, but 3 in images"):
        processor(text=texts, images=[[A, B, C], []])
    with pytest.raises(ValueError, match="found 1 lists of media for 2 texts"):
        processor(text=texts, images=[[A, B, C]])
    with pytest.raises(ValueError, match="3 <image> in the text, but 2 in images"):
        processor(text=texts, images=[A, B])
    with pytest.raises(ValueError, match="3 <image> in the text, but 0 in images"):
        processor(text=texts)


def test_flat_and_per_text_are_the_same(processor):
    texts = ["<image> and <image>", "no picture", "<image>"]
    flat = processor(text=texts, images=[A, B, C], padding=True, return_tensors="pt")
    apart = processor(text=texts, images=[[A, B], None, [C]], padding=True, return_tensors="pt")
    assert all(torch.equal(flat[name], apart[name]) for name in flat)
    place = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (flat["input_ids"] == place).sum(-1).tolist() == [6, 0, 3]
    assert len(flat["pixel_values"]) == 3


@pytest.mark.parametrize("given", [Image.fromarray(A), A, [A], [[A]], A[None]], ids=lambda g: type(g).__name__)
def test_one_medium_however_it_comes(processor, given):
    expected = processor.image_processor([A], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(text="<image>", images=given, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor(images=given, return_tensors="pt")["pixel_values"], expected)


def test_frames_are_one_clip(processor):
    clip = video(0, 5)
    expected = processor(text="<video>", videos=clip, return_tensors="pt")
    for given in (list(clip), [clip], [list(clip)], [[clip]]):
        made = processor(text="<video>", videos=given, return_tensors="pt")
        assert torch.equal(made["pixel_values_videos"], expected["pixel_values_videos"])


def test_none_at_all(processor):
    for none in (None, [], ()):
        made = processor(text="a dog", images=none, return_tensors="pt")
        assert "pixel_values" not in made and made["input_ids"].shape[0] == 1
