"""A model with one expert gives that expert's own tokens and tensors, whatever its processor's quirks."""

import copy
import pickle

import pytest
import torch

from merging_mmer.vocabulary import build_processor, merge_vocabulary

from .tiny_processors import (
    BASE_TEMPLATE,
    MAKERS,
    clip,
    image,
    make_tokenizer,
    merged,
    noise,
    picture,
    text,
    to_merged_ids,
    user,
    video,
)


def assert_same_as_expert(kind, conversations, bos=False):
    """A model with one expert gives that expert's own tokens and tensors."""
    processor, vocabulary, own = merged({"eyes": kind}, bos=bos)
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    theirs = own["eyes"].apply_chat_template(
        conversations, processor_kwargs={"padding": True, "return_tensors": "pt"}, **options
    )
    ours = processor.apply_chat_template(conversations, **options)
    expected = [to_merged_ids(row, "eyes", vocabulary) for row in theirs["input_ids"].tolist()]
    assert ours["input_ids"].tolist() == expected
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    if "mm_token_type_ids" in theirs:
        assert torch.equal(ours["mm_token_type_ids"], theirs["mm_token_type_ids"])
    words = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    media = {name for name in theirs if name not in words}
    assert {name for name in ours if name.startswith("eyes.")} == {f"eyes.{name}" for name in media}
    for name in media:
        assert torch.equal(torch.as_tensor(ours[f"eyes.{name}"]), torch.as_tensor(theirs[name])), name
    return ours


IMAGES = [
    [user(picture(0), text("what is in the image?"))],
    [user(picture(1), picture(2), text("and a cat?")), user(text("two"), role="assistant"), user(text("a dog?"))],
    [user(picture(3), text("hello")), user(text("world"), role="assistant"), user(picture(4), text("cups"))],
]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", ["llava", "onevision", "video_llava", "gemma3", "qwen2_vl", "internvl"])
def test_images_as_the_expert_makes_them(kind, bos):
    for conversation in IMAGES:
        assert_same_as_expert(kind, conversation, bos)
    assert_same_as_expert(kind, IMAGES, bos)


@pytest.mark.parametrize("kind", ["onevision", "video_llava", "qwen2_vl"])
def test_videos_as_the_expert_makes_them(kind):
    conversations = [
        [user(clip(0), text("what?"))],
        [user(clip(1), clip(2), text("and a longer question?"))],
        [user(picture(1), clip(3), text("both"))],
    ]
    for conversation in conversations:
        assert_same_as_expert(kind, conversation)
    assert_same_as_expert(kind, conversations)


@pytest.mark.parametrize("bos", [False, True])
def test_sounds_as_the_expert_makes_them(bos):
    conversations = [
        [user(noise(0), text("what?"))],
        [user(noise(1, 5000), noise(2, 12000), text("and?")), user(text("hello"), role="assistant"), user(noise(3))],
    ]
    for conversation in conversations:
        assert_same_as_expert("qwen_audio", conversation, bos)
    assert_same_as_expert("qwen_audio", conversations, bos)


def test_plain_text_as_the_expert_makes_it():
    for nested in (True, False):
        processor, vocabulary, own = merged({"eyes": "onevision"})
        images = [[image(0), image(1)], [image(2)]] if nested else [image(0), image(1), image(2)]
        texts = ["USER: <image> and <image>\nwhat?", "a <image>"]
        theirs = own["eyes"](text=texts, images=images, return_tensors="pt", padding=True)
        ours = processor(text=texts, images=images)
        assert ours["input_ids"].tolist() == [
            to_merged_ids(r, "eyes", vocabulary) for r in theirs["input_ids"].tolist()
        ]
        assert torch.equal(ours["eyes.pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["eyes.batch_num_images"], theirs["batch_num_images"])


def test_a_later_expert_of_a_modality_gives_its_own_tokens():
    processor, vocabulary, own = merged({"image": "llava", "scan": "onevision"})
    conversation = [user(picture(0, expert="scan"), picture(1, expert="scan"), text("what?"))]
    ours = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
    plain = [user(picture(0), picture(1), text("what?"))]
    theirs = own["scan"].apply_chat_template(
        plain, tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "pt"}
    )
    assert ours["input_ids"][0].tolist() == to_merged_ids(theirs["input_ids"][0].tolist(), "scan", vocabulary)
    assert torch.equal(ours["scan.pixel_values"], theirs["pixel_values"])
    assert ours["text_route"].tolist() == [3]


def test_a_call_of_its_own_that_splits_images():
    """Idefics3 stacks by sample and pads with black images; ours is stacked by medium: the same pieces, in order."""
    processor, vocabulary, own = merged({"eyes": "idefics3"})
    options = {"tokenize": True, "return_dict": True}
    theirs = own["eyes"].apply_chat_template(
        IMAGES, processor_kwargs={"padding": True, "return_tensors": "pt"}, **options
    )
    ours = processor.apply_chat_template(IMAGES, **options)
    assert ours["input_ids"].tolist() == [to_merged_ids(r, "eyes", vocabulary) for r in theirs["input_ids"].tolist()]
    pieces = [made.flatten(0, 1) for made in (ours["eyes.pixel_values"], theirs["pixel_values"])]
    mine, other = ([piece for piece in made if piece.any()] for made in pieces)
    assert len(mine) == len(other) and all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_what_a_prompt_says_may_differ_from_where_features_stand():
    processor = merged({"eyes": "gemma3"})[0]
    own = processor.experts["eyes"]
    assert (own.written("image"), own.placeholders["image"]["token"]) == ("<start_of_image>", "<image_soft_token>")
    out = processor(text="a <start_of_image> b", images=image(0))
    assert (out["mm_token_type_ids"] == 1).sum() == 3 and (out["route_ids"] == 2).all()


TWICE = {
    "llava": {"<image>": "<image:more>"},
    "onevision": {"<image>": "<image:more>", "<video>": "<video:more>"},
    "video_llava": {"<image>": "<image:more>", "<video>": "<video:more>"},
    "gemma3": {"<start_of_image>": "<image:more>", "<image_soft_token>": "<image_soft_token:more>"},
    "qwen2_vl": {"<|image_pad|>": "<image:more>", "<|video_pad|>": "<video:more>"},
    "internvl": {"<IMG_CONTEXT>": "<image:more>", "<video>": "<video:more>"},
    "qwen_audio": {"<|AUDIO|>": "<audio:more>"},
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", TWICE)
def test_two_experts_of_one_kind_each_get_their_own_tokens(kind, bos):
    """Both experts' conversations, alone and in one batch, give what each one's own processor gives."""
    processor, vocabulary, own = merged({"first": kind, "more": kind}, bos=bos)
    assert vocabulary.renamed == {"first": {}, "more": TWICE[kind]}
    medium = noise if kind == "qwen_audio" else picture
    conversation = [user(medium(0), text("what?")), user(text("two"), role="assistant"), user(medium(1), text("a?"))]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    theirs = own["more"].apply_chat_template(conversation, processor_kwargs={"return_tensors": "pt"}, **options)
    chosen = {name: asked_of(conversation, name) for name in ("first", "more")}
    batch = processor.apply_chat_template(list(chosen.values()), **options)
    assert batch["text_route"].tolist() == [2, 3]
    for place, (name, one) in enumerate(chosen.items()):
        ours = processor.apply_chat_template(one, **options)
        expected = to_merged_ids(theirs["input_ids"][0].tolist(), name, vocabulary)
        assert ours["input_ids"][0].tolist() == batch["input_ids"][place].tolist() == expected
        for key in (key for key in theirs if f"{name}.{key}" in ours):
            assert torch.equal(ours[f"{name}.{key}"], torch.as_tensor(theirs[key])), key
        assert any(key.startswith(f"{name}.") for key in ours)


def asked_of(conversation, name):
    return [
        {**message, "content": [b if b["type"] == "text" else {**b, "expert": name} for b in message["content"]]}
        for message in conversation
    ]


@pytest.mark.parametrize("kind", TWICE)
def test_two_experts_of_one_kind_in_one_prompt(kind):
    processor, vocabulary, _ = merged({"first": kind, "more": kind})
    modality, medium = ("audio", noise) if kind == "qwen_audio" else ("image", picture)
    both = [user({**medium(0), "expert": "more"}, {**medium(0), "expert": "first"}, text("what?"))]
    out = processor.apply_chat_template(both, tokenize=True, return_dict=True)
    placed = [
        (out["input_ids"][0] == vocabulary.placeholders[name][modality][1]).nonzero().flatten()
        for name in ("more", "first")
    ]
    assert len(placed[0]) == len(placed[1]) > 0 and placed[0].max() < placed[1].min()
    assert out["route_ids"][0][placed[0]].unique().tolist() == [3] and out["text_route"].tolist() == [1]


def test_an_experts_own_marks_stay_its_own():
    """The base adds no bos and the expert does: each keeps its own way, mixtures take the base's."""
    base = make_tokenizer(template=BASE_TEMPLATE)
    processor, config = MAKERS["llava"](bos=True)
    other, other_config = MAKERS["qwen_audio"]()
    own = {"eyes": processor, "ears": other}
    vocabulary = merge_vocabulary(base, own, {"eyes": config, "ears": other_config})
    assert vocabulary.warnings == [] and set(vocabulary.readings["eyes"]) == {"post_processor"}
    assert vocabulary.readings["ears"] == {}
    ours = build_processor(vocabulary, own, BASE_TEMPLATE)
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    conversation = [user(picture(0), text("what is in the image?"))]
    theirs = processor.apply_chat_template(conversation, **options)
    for one in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        alone = one.apply_chat_template(conversation, **options)["input_ids"][0].tolist()
        assert alone == to_merged_ids(theirs["input_ids"][0], "eyes", vocabulary)
        plain = one(text=["hello", "hello", "a <image>"], images=image(0), text_route=["base", "eyes", "auto"])
        bos = base.convert_tokens_to_ids("<|begin|>")
        assert (plain["input_ids"] == bos).sum(-1).tolist() == [0, 1, 1]
        assert base("hello")["input_ids"] == plain["input_ids"][0][plain["attention_mask"][0].bool()].tolist()
        mixture = one.apply_chat_template([user(picture(0), noise(0), text("what?"))], **options)
        assert bos not in mixture["input_ids"]


def test_an_experts_frame_goes_with_its_media_into_mixtures():
    processor = merged({"eyes": "qwen2_vl", "ears": "qwen_audio", "more": "qwen2_vl"})[0]
    mixture = [user(picture(0), noise(0), picture(1, expert="more"), text("what?"))]
    assert processor.apply_chat_template(mixture) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\n<|audio_bos|><|AUDIO|><|audio_eos|>\n"
        "<|vision_start|><image:more><|vision_end|>\nwhat?<|im_end|>\n"
    )


def test_features_at_another_kinds_token_are_refused():
    processor = merged({"eyes": "internvl"})[0]
    with pytest.raises(ValueError, match="puts video features at other tokens than '<video>'"):
        processor(text="<video>", videos=video(0))


def test_processors_can_be_copied_and_sent_to_workers():
    processor = merged({"eyes": "gemma3", "ears": "qwen_audio"})[0]
    conversation = [user(picture(0), noise(0), text("what?"))]
    expected = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        found = other.apply_chat_template(conversation, tokenize=True, return_dict=True)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
