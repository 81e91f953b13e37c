"""The processor: what an expert's own processor gives, what batches give, and what is refused."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchFeature, ProcessorMixin

from processing_mmer import MMERProcessor
from processing_mmer.expert_processors_mmer import ExpertProcessor
from processing_mmer.media_mmer import is_item, sort_media
from processing_mmer.processor_classes_mmer import OWN_CLASSES, class_by_name
from processing_mmer.tokens_mmer import pad_rows

from .tiny_processors import clip, image, make_tokenizer, merged, noise, picture, sound, text, user, video

ALL = {"image": "llava", "audio": "qwen_audio", "video": "video_llava", "scan": "onevision"}


@pytest.fixture(scope="module")
def everything():
    return merged(ALL)[0]


def mixed_conversations():
    return [
        [user(text("hello world"))],
        [user(picture(0), text("what is in the image?"))],
        [user(noise(0), text("what?"))],
        [
            user(picture(1), noise(1), text("image and sound")),
            user(text("a dog"), role="assistant"),
            user(text("two?")),
        ],
        [user(clip(0), text("a video"))],
    ]


def test_a_batch_gives_what_each_sample_gives_alone(everything):
    conversations = mixed_conversations()
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    together = everything.apply_chat_template(conversations, **options)
    seen = {name: 0 for name in together if "." in name}
    for place, conversation in enumerate(conversations):
        alone = everything.apply_chat_template(conversation, **options)
        length = alone["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "route_ids"):
            assert torch.equal(together[name][place, -length:], alone[name][0]), name
        assert (together["attention_mask"][place, :-length] == 0).all()
        assert together["text_route"][place] == alone["text_route"][0]
        for name in (name for name in alone if "." in name):
            count = len(alone[name])
            assert torch.equal(together[name][seen[name] : seen[name] + count], alone[name]), name
            seen[name] += count
    assert all(count == len(together[name]) for name, count in seen.items())


def test_routes_and_modalities_by_value(everything):
    out = everything(
        text=["a", "<image>", "<image>b<|AUDIO|>", "<video>"],
        images=[image(0), image(1)],
        audio=[sound(0)],
        videos=[video(0)],
    )
    # base; expert 0; merged; expert 2, whose video it is
    assert out["text_route"].tolist() == [0, 2, 1, 4]
    assert out["mm_token_type_ids"].max(-1).values.tolist() == [0, 1, 3, 2]
    kinds, routes = out["mm_token_type_ids"][2], out["route_ids"][2]
    assert set(routes[kinds == 1].tolist()) == {2} and set(routes[kinds == 3].tolist()) == {3}
    assert set(routes[kinds == 0].tolist()) == {1}
    asked = everything(text=["a", "a<image>"], images=image(0), text_route=["merged", "audio"])
    assert asked["text_route"].tolist() == [1, 3]
    kinds = asked["mm_token_type_ids"]
    assert set(asked["route_ids"][kinds == 1].tolist()) == {2}
    assert set(asked["route_ids"][1][kinds[1] == 0].tolist()) == {3}


def test_text_route_of_the_processor_holds_where_a_call_is_silent():
    processor = merged({"image": "llava"}, text_route="merged")[0]
    assert processor(text="a")["text_route"].tolist() == [1]
    assert processor(text="a", text_route="base")["text_route"].tolist() == [0]
    assert processor(text="")["text_route"].tolist() == [1]


def test_media_go_to_the_expert_of_their_placeholder():
    processor = merged({"image": "llava", "medical": "llava"})[0]
    out = processor(text="<image:medical> <image> <image:medical>", images=[image(0), image(1), image(2)])
    alone = processor(text="<image><image><image>", images=[image(0), image(1), image(2)])
    assert torch.equal(out["medical.pixel_values"], alone["image.pixel_values"][[0, 2]])
    assert torch.equal(out["image.pixel_values"], alone["image.pixel_values"][[1]])
    handed = processor(text="<image>", images=image(0), experts={"image": "medical"})
    assert set(handed["route_ids"].flatten().tolist()) == {3}
    assert torch.equal(handed["medical.pixel_values"], alone["image.pixel_values"][:1])


def test_media_without_text_are_the_default_experts_tensors(everything):
    out = everything(images=[image(0)], audio=sound(0))
    assert set(out) == {"image.pixel_values", "audio.input_features", "audio.feature_attention_mask"}
    assert set(everything(images=image(0), experts={"image": "scan"})) == {
        f"scan.{name}" for name in ("pixel_values", "image_sizes", "batch_num_images")
    }


def test_save_and_load_gives_an_equal_processor(everything, tmp_path):
    everything.save_pretrained(tmp_path / "mmer-processor")
    loaded = MMERProcessor.from_pretrained(tmp_path / "mmer-processor")
    loaded.save_pretrained(tmp_path / "again")
    again = MMERProcessor.from_pretrained(tmp_path / "again")
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    expected = everything.apply_chat_template(mixed_conversations(), **options)
    for processor in (loaded, again):
        found = processor.apply_chat_template(mixed_conversations(), **options)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert processor.to_dict().items() <= everything.to_dict().items()
        assert {"experts", "default_experts", "text_route"} <= set(processor.to_dict())
        assert list(processor.experts) == list(everything.experts)
        assert processor.tokenizer.chat_template == everything.tokenizer.chat_template
        assert processor.tokenizer.padding_side == "left"
    folders = [path for path in (tmp_path / "again").rglob("*") if path.is_dir()]
    assert all(folder.parent == tmp_path / "again" for folder in folders), "push_to_hub carries one level of folders"


REMOTE = """
import sys
for room in ("configuration_mmer", "processing_mmer", "modeling_mmer", "merging_mmer"):
    sys.modules[room] = None
import numpy as np, torch
from transformers import AutoProcessor
folder, cup, dog, out = sys.argv[1:]
blocks = [{"type": "image", "image": np.load(cup)}, {"type": "audio", "path": dog}]
for source in (folder, folder + "-again"):
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    conversation = [{"role": "user", "content": blocks}]
    made = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
    processor.save_pretrained(folder + "-again")
torch.save(dict(made), out)
"""


def test_it_loads_as_remote_code_without_the_rooms(everything, tmp_path):
    folder = tmp_path / "mmer-remote"
    everything.save_pretrained(folder)
    np.save(tmp_path / "cup.npy", image(0))
    soundfile.write(tmp_path / "dog.wav", sound(0), 16000, subtype="FLOAT")
    conversation = [user(picture(0), {"type": "audio", "path": str(tmp_path / "dog.wav")})]
    expected = everything.apply_chat_template(conversation, tokenize=True, return_dict=True)
    given = [folder, tmp_path / "cup.npy", tmp_path / "dog.wav", tmp_path / "out.pt"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, *map(str, given)], cwd=tmp_path, capture_output=True, text=True, env=clean
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_text_route_can_be_set_at_load(everything, tmp_path):
    everything.save_pretrained(tmp_path)
    assert MMERProcessor.from_pretrained(tmp_path, text_route="image").text_route == "image"


def test_settings_of_the_experts_processors_get_through(everything):
    plain = everything(text="<image>", images=image(0))
    for options in ({"do_normalize": False}, {"images_kwargs": {"do_normalize": False}}):
        raw = everything(text="<image>", images=image(0), **options)
        assert 0 <= raw["image.pixel_values"].min() and raw["image.pixel_values"].max() <= 1
        assert not torch.equal(raw["image.pixel_values"], plain["image.pixel_values"])
    sampled = everything(text="<video>", videos=video(0, 6), num_frames=2)
    assert torch.equal(
        sampled["video.pixel_values_videos"],
        everything(text="<video>", videos=video(0, 6)[[0, 3]])["video.pixel_values_videos"],
    )


def test_padding_truncation_and_tensor_types(everything):
    texts = ["hello", "hello world, you are"]
    out = everything(text=texts)
    assert out["attention_mask"][0].tolist() == sorted(out["attention_mask"][0].tolist())
    right = everything(text=texts, padding_side="right")
    assert right["attention_mask"][0].tolist() == sorted(out["attention_mask"][0].tolist(), reverse=True)
    wide = everything(text=texts, padding="max_length", max_length=30)
    assert wide["input_ids"].shape == (2, 30)
    assert everything(text=texts, pad_to_multiple_of=8)["input_ids"].shape[1] % 8 == 0
    assert everything(text=texts, truncation=True, max_length=2)["input_ids"].shape == (2, 2)
    lists = everything(text=texts, padding=False, return_tensors=None)
    assert [len(row) for row in lists["input_ids"]] == [len(row) for row in lists["route_ids"]]
    arrays = everything(text=["<image>"], images=image(0), return_tensors="np")
    assert isinstance(arrays["input_ids"], np.ndarray) and isinstance(arrays["image.pixel_values"], np.ndarray)
    with pytest.raises(ValueError, match="padding=True"):
        everything(text=texts, padding=False)
    with pytest.raises(ValueError, match="return_tensors"):
        everything(text=texts, return_tensors="tf")
    with pytest.raises(ValueError, match="4 of 4|of 4 <image> tokens are left"):
        everything(text="<image> hello", images=image(0), truncation=True, max_length=3)


def test_to_casts_what_floats_and_nothing_else(everything):
    out = everything(text="<image>", images=image(0)).to("cpu", torch.bfloat16)
    assert isinstance(out, BatchFeature)
    assert out["image.pixel_values"].dtype == torch.bfloat16
    for name in ("input_ids", "attention_mask", "route_ids", "text_route", "mm_token_type_ids"):
        assert out[name].dtype == torch.int64, name


def test_what_pipelines_ask_for(everything):
    view = everything.feature_extractor
    own = everything.experts["audio"].processor.feature_extractor
    assert (view.padding_side, own.padding_side) == (everything.tokenizer.padding_side, "right")
    heard = [
        np.asarray(one(sound(0), sampling_rate=16000, return_tensors="np")["input_features"]) for one in (view, own)
    ]
    assert np.array_equal(*heard)
    assert view.fetch_audio(sound(0)).shape == (8000,)
    assert everything.image_processor is everything.experts["image"].processor.image_processor
    assert everything.video_processor is everything.experts["video"].processor.video_processor
    assert (everything.image_token, everything.audio_token) == ("<image>", "<|AUDIO|>")
    assert {"image.pixel_values", "audio.input_features", "route_ids", "text_route"} <= set(
        everything.model_input_names
    )
    blind = merged({"audio": "qwen_audio"})[0]
    assert not hasattr(blind, "image_processor") and hasattr(blind, "feature_extractor")
    ids = everything(text=["hello", "world"])["input_ids"]
    assert everything.post_process_multimodal_output(ids) == ["hello", "world"]
    counts = everything._get_num_multimodal_tokens(image_sizes=[(40, 52), (30, 30)])
    assert counts["num_image_tokens"] == [4, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "<image>", "audio": sound(0)}, r"audio: no expert takes audio.*image \(image\)"),
        ({"text": "<image>"}, "1 image placeholders .* but 0 media"),
        ({"text": "hello", "images": image(0)}, "0 image placeholders .* but 1 media"),
        ({"text": ["<image>", "a"], "images": [[image(0)], [image(1)]]}, "sample 1: 0 image placeholders"),
        ({"text": ["<image>", "<image>"], "images": [[image(0)]]}, "1 lists of media for 2 texts"),
        ({"text": "<image>", "images": [[[image(0)]]]}, r"images\[0\]: found list"),
        ({"text": "<image>", "images": 7}, "images: found int 7"),
        ({"text": "<image>", "images": "nowhere.png"}, "image file not found: nowhere.png"),
        ({"text": "a", "text_route": "ear"}, "text_route: found 'ear'"),
        ({"text": ["a", "b"], "text_route": ["base"]}, "1 routes for 2 samples"),
        ({"text": "<image>", "images": image(0), "experts": {"image": "ear"}}, "no expert 'ear'"),
        ({"text": "a", "experts": {"video": "image"}}, "expert 'image' takes no video media"),
        ({"text": [1]}, "expected a string or a list of strings"),
        ({"text": []}, "empty list"),
        ({}, "nothing to process"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        merged({"image": "llava"})[0](**given)


def test_refusals_at_the_door():
    processor = merged({"image": "llava"})[0]
    experts = list(processor.experts.values())
    with pytest.raises(ValueError, match="twice"):
        MMERProcessor(processor.tokenizer, experts * 2)
    with pytest.raises(ValueError, match="merged tokenizer"):
        MMERProcessor()
    with pytest.raises(ValueError, match="default_experts: no expert 'ear'"):
        MMERProcessor(processor.tokenizer, experts, {"image": "ear"})
    with pytest.raises(ValueError, match="text_route"):
        MMERProcessor(processor.tokenizer, experts, text_route="ear")
    with pytest.raises(ValueError, match="no class 'NoSuchProcessor'"):
        class_by_name("NoSuchProcessor")
    broken = experts[0].to_dict()
    del broken["parts"]
    with pytest.raises(ValueError, match="without \\['parts'\\]"):
        ExpertProcessor.from_dict(broken, processor.tokenizer, None)


class PointProcessor(ProcessorMixin):
    """A processor that transformers lacks, with a `__call__` of its own: two marks and three features a cloud."""

    def __init__(self, tokenizer=None, chat_template=None, point_cloud_token="<point>"):
        self.point_cloud_token = point_cloud_token
        self.point_cloud_token_id = tokenizer.convert_tokens_to_ids(point_cloud_token)
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text=None, point_clouds=None, return_tensors=None, text_kwargs=None, **kwargs):
        data = {"point_clouds": torch.stack([torch.as_tensor(cloud) for cloud in point_clouds])}
        if text is not None:
            run = f"<begin>{self.point_cloud_token * 3}<end>"
            written = [one.replace(self.point_cloud_token, run) for one in text]
            data.update(self.tokenizer(written, return_tensors=return_tensors, **text_kwargs))
        return BatchFeature(data)


def test_point_clouds_through_a_processor_of_our_own(monkeypatch, tmp_path):
    monkeypatch.setitem(OWN_CLASSES, "PointProcessor", PointProcessor)
    tokenizer = make_tokenizer("<begin>", "<end>", "<point>")
    entry = {"token": "<point>", "id": tokenizer.convert_tokens_to_ids("<point>")}
    own = ExpertProcessor("touch", PointProcessor(tokenizer), {"point_cloud": entry}, {"point_cloud_token": "<point>"})
    processor = MMERProcessor(tokenizer, [own])
    clouds = [np.random.default_rng(seed).random((5, 3)).astype(np.float32) for seed in (0, 1)]
    np.save(tmp_path / "chair.npy", clouds[1])
    out = processor(text=["a <point>", "<point> b"], point_clouds=[clouds[0], tmp_path / "chair.npy"])
    assert torch.equal(out["touch.point_clouds"], torch.as_tensor(np.stack(clouds)))
    assert out["mm_token_type_ids"].sum(-1).tolist() == [12, 12] and out["text_route"].tolist() == [2, 2]
    processor.save_pretrained(tmp_path / "with-points")
    loaded = MMERProcessor.from_pretrained(tmp_path / "with-points")
    assert torch.equal(loaded(text="<point>", point_clouds=clouds[0])["input_ids"][0], out["input_ids"][0][-5:])
    message = [user({"type": "point_cloud", "path": str(tmp_path / "chair.npy")}, text("what?"))]
    with pytest.raises(ValueError, match="no chat template"):
        loaded.apply_chat_template(message)
    asked = loaded.apply_chat_template(
        message, chat_template="{{ messages[0]['content'] }}", tokenize=True, return_dict=True
    )
    assert torch.equal(asked["touch.point_clouds"][0], torch.as_tensor(clouds[1]))


# the small parts


def test_padding_by_hand():
    columns = {"input_ids": [[5], [6, 7]], "route_ids": [[2], [3, 3]]}
    fills = {"input_ids": [0, 0], "route_ids": [2, 3]}
    assert pad_rows(columns, fills, {}, "left") == {"input_ids": [[0, 5], [6, 7]], "route_ids": [[2, 2], [3, 3]]}
    assert pad_rows(columns, fills, {"pad_to_multiple_of": 3}, "right")["input_ids"] == [[5, 0, 0], [6, 7, 0]]
    with pytest.raises(ValueError, match="needs max_length"):
        pad_rows(columns, fills, {"padding": "max_length"}, "left")
    with pytest.raises(ValueError, match="padding: found 'wide'"):
        pad_rows(columns, fills, {"padding": "wide"}, "left")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=5), st.sampled_from(["image", "audio", "video", "point_cloud"])
)
def test_nested_media_keep_their_order_and_counts(counts, modality):
    shapes = {"image": (4, 4, 3), "audio": (9,), "video": (2, 4, 4, 3), "point_cloud": (5, 3)}
    items = [np.full(shapes[modality], place, dtype=np.float32) for place in range(sum(counts))]
    assert all(is_item(modality, item) for item in items)
    places = iter(items)
    media = sort_media(modality, [[next(places) for _ in range(count)] for count in counts], len(counts))
    assert media.counts == counts and all(a is b for a, b in zip(media.items, items, strict=True))
    if items:
        flat = sort_media(modality, items, len(counts))
        assert flat.counts is None and len(flat.items) == len(items)
        assert len(sort_media(modality, np.stack(items), None).items) == len(items)
