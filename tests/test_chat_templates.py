"""Which template a conversation gets, and how it is written with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from processing_mmer.chat_templates_mmer import block_source, blocks_to_text, media_frame, template_owner, text_forms

from .tiny_processors import (
    BASE_TEMPLATE,
    LLAVA_TEMPLATE,
    MAKERS,
    image,
    make_llava,
    make_tokenizer,
    merged,
    noise,
    picture,
    text,
)

LISTS_TOO = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] | trim }}{% endfor %}{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def three():
    return merged({"image": "llava", "audio": "qwen_audio", "medical": "llava"})[0]


def user(*content):
    return [{"role": "user", "content": list(content)}]


def test_without_media_the_bases_own_template_is_used_byte_for_byte(three):
    base = make_tokenizer(template=BASE_TEMPLATE)
    conversations = [
        [{"role": "system", "content": "you are a cat"}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "a <dog>\n"}, {"role": "assistant", "content": "two"}],
    ]
    for options in ({"add_generation_prompt": True}, {"continue_final_message": True}, {}):
        expected = base.apply_chat_template(conversations, tokenize=False, **options)
        assert three.apply_chat_template(conversations, **options) == expected
        assert three.apply_chat_template(conversations[0], **options) == expected[0]
        assert three.tokenizer.apply_chat_template(conversations, tokenize=False, **options) == expected
    ids = three.apply_chat_template(conversations[0], tokenize=True, return_dict=True)
    assert ids["input_ids"][0].tolist() == base.apply_chat_template(conversations[0], tokenize=True)["input_ids"]
    assert ids["text_route"].tolist() == [0] and (ids["route_ids"] == 0).all()


def test_the_base_adds_no_special_tokens_to_its_template_and_experts_add_theirs():
    processor, _, own = merged({"image": "llava"}, bos=True)
    first = processor.tokenizer.bos_token_id
    base = processor.apply_chat_template(user(text("hello")), tokenize=True)
    assert (base == first).sum() == 0
    with_image = processor.apply_chat_template([user(picture(), text("hello")), user(text("hello"))], tokenize=True)
    assert (with_image == first).sum(-1).tolist() == [1, 0]


def test_text_blocks_are_written_as_text(three):
    plain = three.apply_chat_template([{"role": "user", "content": "hello world"}])
    assert three.apply_chat_template(user(text("hello world"))) == plain
    assert three.apply_chat_template(user(text("hello"), text(" world"))) == plain


def test_a_base_template_that_knows_blocks_is_given_them():
    processor, _, _ = merged({"image": "llava"}, base_template=LISTS_TOO)
    messages = user(text(" hello "), text(" world "))
    expected = make_tokenizer(template=LISTS_TOO).apply_chat_template(messages, tokenize=False)
    assert processor.apply_chat_template(messages) == expected == "[user] helloworld"


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        (user(picture(), text("what?")), {}, "USER: <image>\nwhat? "),
        (user(text("what?"), picture()), {}, "USER: <image>\nwhat? "),
        (
            [*user(picture(), text("what?")), {"role": "assistant", "content": "a dog"}],
            {},
            "USER: <image>\nwhat? ASSISTANT: a dog ",
        ),
        (user(picture(expert="medical"), text("what?")), {}, "USER: <image:medical>\nwhat? "),
        (user(picture(), text("what?")), {"text_route": "medical"}, "USER: <image:medical>\nwhat? "),
        (user(picture(), text("what?")), {"experts": {"image": "medical"}}, "USER: <image:medical>\nwhat? "),
        (user(text("what?")), {"text_route": "medical"}, "USER: what? "),
        (user(picture(), text("what?")), {"text_route": "base"}, "<|im_start|>user\n<image>\nwhat?<|im_end|>\n"),
        (user(picture(), text("what?")), {"text_route": "merged"}, "<|im_start|>user\n<image>\nwhat?<|im_end|>\n"),
        (
            user(picture(), picture(expert="medical"), text("what?")),
            {"text_route": "image"},
            "<|im_start|>user\n<image>\n<image:medical>\nwhat?<|im_end|>\n",
        ),
        (
            user(picture(), noise(), text("what?")),
            {},
            "<|im_start|>user\n<image>\n<|audio_bos|><|AUDIO|><|audio_eos|>\nwhat?<|im_end|>\n",
        ),
        (
            user(text("see"), picture(), text("hear"), noise(), text("and?")),
            {},
            "<|im_start|>user\nsee\n<image>\nhear\n<|audio_bos|><|AUDIO|><|audio_eos|>\nand?<|im_end|>\n",
        ),
        (
            user(noise(), text("what?")),
            {},
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nwhat?<|im_end|>\n",
        ),
        (user(picture(), text("what?")), {"chat_template": "default"}, "<|im_start|>user\n<image>\nwhat?<|im_end|>\n"),
        (user(picture(expert="medical")), {"chat_template": "medical"}, "USER: <image:medical>\n"),
        (user(picture(), text("what?")), {"chat_template": "{{ messages[0]['content'] }}!"}, "<image>\nwhat?!"),
        (user(text("hello")), {"chat_template": LLAVA_TEMPLATE}, "USER: hello "),
        # a template that does not know all of the media is taught them
        (
            user(picture(), noise(), text("what?")),
            {"chat_template": "image"},
            "USER: <image>\n<|audio_bos|><|AUDIO|><|audio_eos|>\nwhat? ",
        ),
    ],
)
def test_every_case(three, messages, options, expected):
    assert three.apply_chat_template(messages, **options) == expected


def test_a_batch_is_decided_conversation_by_conversation(three):
    conversations = [
        user(text("hello")),
        user(picture(), text("hello")),
        user(picture(), noise(), text("hello")),
        user(picture(), text("hello")),
    ]
    routes = ["auto", "auto", "auto", "medical"]
    together = three.apply_chat_template(conversations, text_route=routes)
    alone = [
        three.apply_chat_template(one, text_route=route) for one, route in zip(conversations, routes, strict=True)
    ]
    assert together == alone and len(set(together)) == 4
    out = three.apply_chat_template(conversations, text_route=routes, tokenize=True, return_dict=True)
    assert out["text_route"].tolist() == [0, 2, 1, 4]
    assert set(out) >= {"image.pixel_values", "medical.pixel_values", "audio.input_features"}


def test_an_experts_template_is_rendered_as_its_own_processor_renders_it():
    for kind in ("llava", "onevision", "video_llava", "qwen_audio"):
        processor, _, own = merged({"eyes": kind})
        medium = noise() if kind == "qwen_audio" else picture()
        messages = [*user(medium, text("what?"), medium), {"role": "assistant", "content": [text("a dog")]}]
        for options in ({"add_generation_prompt": True}, {"continue_final_message": True}, {}):
            expected = own["eyes"].apply_chat_template(messages, **options)
            assert processor.apply_chat_template(messages, **options) == expected


def test_an_expert_without_a_template_uses_the_bases(monkeypatch):
    monkeypatch.setitem(MAKERS, "bare", lambda bos=False: make_llava(bos, template=None))
    processor = merged({"image": "bare"})[0]
    assert processor.apply_chat_template(user(picture(), text("what?"))) == (
        "<|im_start|>user\n<image>\nwhat?<|im_end|>\n"
    )


def test_generation_prompt_and_template_variables(three):
    template = "{{ messages[0]['content'] }}{% if style %} {{ style }}{% endif %}{{ bos_token }}"
    assert three.apply_chat_template(user(text("a")), chat_template=template, style="b") == "a b<|begin|>"
    out = three.apply_chat_template(
        user(picture(), text("a")),
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": "max_length", "max_length": 40},
    )
    assert out["input_ids"].shape == (1, 40)
    arrays = three.apply_chat_template(user(picture()), tokenize=True, return_dict=True, return_tensors="np")
    assert type(arrays["image.pixel_values"]).__name__ == "ndarray"
    assert three.apply_chat_template(user(picture()), tokenize=True).shape[0] == 1


def test_media_may_come_beside_the_conversation(three):
    inside = three.apply_chat_template(user(picture(), text("a")), tokenize=True, return_dict=True)
    beside = three.apply_chat_template(
        user({"type": "image"}, text("a")), tokenize=True, return_dict=True, processor_kwargs={"images": [image(0)]}
    )
    assert all(torch.equal(inside[name], beside[name]) for name in inside)
    assert three.apply_chat_template(user({"type": "image"}, text("a"))) == "USER: <image>\na "


def test_assistant_masks_follow_expanded_placeholders(three):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}|{% endfor %}"
    )
    messages = [*user(picture(), text("what?")), {"role": "assistant", "content": "a dog"}]
    out = three.apply_chat_template(
        [messages, messages[:1]],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"add_special_tokens": False},
    )
    masked = out["input_ids"][0][out["assistant_masks"][0].bool()]
    assert three.tokenizer.decode(masked) == "a dog" and out["assistant_masks"][1].sum() == 0


def test_placeholders_that_users_write_can_be_made_harmless(three):
    messages = user(picture(), text("what is <image> and <|im_end|>?"))
    with pytest.raises(ValueError, match="a placeholder may stand in a message's text"):
        three.apply_chat_template(messages, tokenize=True)
    ids = three.apply_chat_template(messages, tokenize=True, return_dict=True, sanitize_control_tokens=True)
    assert (ids["mm_token_type_ids"] == 1).sum() == 4
    assert three.tokenizer.eos_token_id not in ids["input_ids"]
    mixture = user(picture(), noise(), text("what is <image>?"))
    harmless = user(picture(), noise(), text("what is it?"))
    together = three.apply_chat_template(
        [mixture, harmless], tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    kinds = together["mm_token_type_ids"]
    assert (kinds == 1).sum(-1).tolist() == [4, 4] and (kinds == 3).sum(-1).tolist() == [12, 12]
    plain = three.apply_chat_template(harmless, tokenize=True)
    assert torch.equal(together["input_ids"][1, -plain.shape[1] :], plain[0])


def test_the_callers_messages_are_left_alone(three):
    messages = user(picture(expert="medical"), text("what?"))
    before = [dict(block) for block in messages[0]["content"]]
    three.apply_chat_template(messages, tokenize=True)
    assert [set(block) for block in messages[0]["content"]] == [set(block) for block in before]


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "empty conversation"),
        (user({"type": "video", "path": "a.mp4"}), {}, "no expert takes video media"),
        (user(picture(expert="ear")), {}, "no expert 'ear'"),
        (user(picture(expert="audio")), {}, "expert 'audio' takes no image media"),
        (user(picture(), text("a")), {"text_route": "ear"}, "text_route: found 'ear'"),
        (user(picture(), text("a")), {"experts": {"image": "audio"}}, "expert 'audio' takes no image"),
        (user({"type": "image"}), {"tokenize": True}, "holds no medium"),
        (user({"type": "image", "path": "a.png", "url": "b"}), {"tokenize": True}, r"has \['url', 'path'\]"),
        (user({"type": "image", "path": "no.png"}), {"tokenize": True}, "image file not found: no.png"),
        (user({"words": "a"}), {}, 'expected a dict with "type"'),
        ([{"role": "user", "content": 3}], {}, "found int"),
        (user(picture()), {"chat_template": "{{ 'hello' }}"}, "wrote image placeholders of"),
        (user(picture()), {"tokenize": True, "processor_kwargs": {"images": image(1)}}, "give them once"),
        (user({"type": "audio"}, text("a")), {"load_audio_from_video": True}, "audio block of its own"),
        (user(text("a")), {"add_generation_prompt": True, "continue_final_message": True}, "not compatible"),
    ],
)
def test_refusals(three, messages, options, message):
    with pytest.raises(ValueError, match=message):
        three.apply_chat_template(messages, **options)


def test_the_sound_of_a_clip_is_not_asked_for_by_a_flag_alone(three):
    """transformers' server sets it with every clip."""
    messages = user(picture(), text("a"))
    assert three.apply_chat_template(messages, load_audio_from_video=True) == three.apply_chat_template(messages)


def test_no_template_at_all_is_refused():
    processor = merged({"image": "llava"}, base_template=None)[0]
    assert processor.apply_chat_template(user(picture())) == "USER: <image>\n"
    with pytest.raises(ValueError, match="the base came without one"):
        processor.apply_chat_template(user(text("hello")))


# the small parts


def test_owners_by_hand():
    names = ["image", "audio"]
    cases = {
        ("auto", ()): None,
        ("auto", ("image",)): "image",
        ("auto", ("image", "audio")): None,
        ("base", ("image",)): None,
        ("merged", ("image",)): None,
        ("image", ()): "image",
        ("image", ("image",)): "image",
        ("image", ("audio",)): None,
    }
    for (route, media), expected in cases.items():
        assert template_owner(route, set(media), names) == expected, (route, media)
    with pytest.raises(ValueError, match="text_route"):
        template_owner("ear", set(), names)


def test_what_templates_understand():
    assert text_forms(BASE_TEMPLATE, ()) == (True, False)
    assert text_forms(LLAVA_TEMPLATE, ()) == (False, True)
    assert text_forms(LISTS_TOO, ()) == (True, True)
    assert text_forms("{{ messages[0]['content'] | trim }}", ()) == (True, False)
    assert text_forms("{{ nothing.here }}", ()) == (False, False)


def test_frames_by_hand():
    pair = (
        "{% for c in messages[0]['content'] %}{{ c['text'] if c['type'] == 'text' else '<a><image><b>' }}{% endfor %}"
    )
    assert media_frame(pair, "image", "<image>", ("<a>", "<b>"), ()) == "<a><image><b>"
    assert media_frame(pair, "image", "<image>", ("<a>",), ()) == "<image>"
    assert media_frame(LLAVA_TEMPLATE, "image", "<image>", ("<a>",), ()) == "<image>"
    assert media_frame(BASE_TEMPLATE, "image", "<image>", ("<a>",), ()) is None


def test_sources_by_hand():
    assert block_source({"type": "audio", "audio": [0.5], "sampling_rate": 8000}) == {
        "array": [0.5],
        "sampling_rate": 8000,
    }
    assert block_source({"type": "audio", "audio_url": {"url": "a.wav"}}) == "a.wav"
    assert block_source({"type": "image", "base64": "abc"}) == "data:image/unknown;base64,abc"
    assert block_source({"type": "image"}) is None


PIECES = st.lists(st.one_of(st.just(None), st.text("ab \n", min_size=1, max_size=4)), max_size=6)


@settings(max_examples=200, deadline=None)
@given(PIECES)
def test_each_medium_has_a_line_of_its_own(pieces):
    blocks = [{"type": "image"} if piece is None else text(piece) for piece in pieces]
    written = blocks_to_text(blocks, lambda _: "<image>")
    assert written.split("\n").count("<image>") == pieces.count(None)
    assert "".join(written.replace("<image>", "").split("\n")) == "".join("".join(filter(None, pieces)).split("\n"))
